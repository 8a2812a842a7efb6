"""Staying with a conversation's model, and what leaving it costs.

The bill of a turn already tells the models apart: what a provider still holds of the prompt is billed as cached input,
and what it does not hold is billed whole (`Signals.cached_tokens`). Two things are added here.

    the switch   A conversation that leaves may come back when its prefix has been dropped, and pay for it again. Its
                 price is the chance of that, times what the prefix is worth at the model it leaves.
    the release  A hard turn moves a conversation to a stronger model at once; easy turns after it bring it back
                 slowly. A fall of p_success is believed whole, a rise only in part (fast attack, slow release).
"""

from collections.abc import Mapping
from dataclasses import replace

from msgspec import structs

from probes.types import Estimate
from routers.aims import Affinity
from routers.policy import Model
from routers.types import Signals

_PER_TOKENS = 1_000_000


def switch_nanousd(affinity: Affinity, leaves: Model, cached_tokens: int) -> int:
    """What leaving this model costs, beside the turn's own bill; 0 where nothing is held or its price is not known."""
    if leaves.price is None or cached_tokens <= 0:
        return 0
    price = leaves.price.at(cached_tokens)
    worth = cached_tokens * max(price.input - price.cached_input, 0) / _PER_TOKENS
    return round(affinity.comes_back * worth)


def held(signals: Signals, before: Mapping[str, float], release: float) -> Signals:
    """The signals with each p_success as the conversation so far allows it: `before` has those of its last turn."""
    return structs.replace(
        signals,
        p_success={
            name: _held(estimate, before[name], release) if name in before else estimate
            for name, estimate in signals.p_success.items()
        },
    )


def _held(now: Estimate, before: float, release: float) -> Estimate:
    if now.value <= before:
        return now
    value = before + release * (now.value - before)
    return replace(now, value=value, low=None if now.low is None else min(now.low, value))
