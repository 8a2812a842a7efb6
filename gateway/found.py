"""What probes said of one query, tier after tier, put together into its signals. Light: no torch, no numpy."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from probes.types import Bands, Estimate, interval
from routers.types import Signals

NOBODY: Final[Mapping[str, str]] = {}
NOTHING: Final[Mapping[str, Bands]] = {}


class Said(Protocol):
    """One probe's word: an engine's `ProbeResult`, or a `Reading`."""

    @property
    def p_success(self) -> Mapping[str, float]: ...

    @property
    def undecided(self) -> Collection[str]: ...

    @property
    def out_tokens(self) -> Mapping[str, tuple[float, float, float]]: ...

    @property
    def domain(self) -> Mapping[str, float]: ...

    @property
    def needs_reasoning(self) -> float | None: ...


@dataclass(slots=True)
class Found:
    """What the tiers have said so far of the heads that matter to this query."""

    heads: Mapping[str, str]
    """Model of the policy to head."""
    p_success: dict[str, Estimate] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)
    """Models."""
    out_tokens: dict[str, Estimate] = field(default_factory=dict)
    domain: Mapping[str, float] = field(default_factory=dict)
    needs_reasoning: Estimate | None = None
    input_tokens: dict[str, int] = field(default_factory=dict)
    answered: bool = False

    @property
    def open(self) -> bool:
        """Whether a dearer tier has something to add."""
        return len(self.p_success) < len(self.heads) or bool(self.undecided)

    def add(
        self,
        said: Said,
        version: str,
        cost_us: int,
        *,
        beside: bool = False,
        by: Mapping[str, str] = NOBODY,
        bands: Mapping[str, Bands] = NOTHING,
    ) -> None:
        """`beside`: where the tier before was undecided, its word counts as much as this one's. `by`: of heads that
        one of several probes spoke of, which; `version` names them all. `bands`: what is known of each head's word."""
        self.answered = True
        for model, head in self.heads.items():
            p = said.p_success.get(head)
            if p is not None and (model not in self.p_success or model in self.undecided):
                source, cost = f"{by.get(head, version)}/{head}", cost_us
                low, high = interval(bands.get(head, ()), p) or (None, None)
                if beside and (before := self.p_success.get(model)) is not None:
                    p = (p + before.value) / 2
                    low, high = _mean(low, before.low), _mean(high, before.high)
                    source, cost = f"{before.source.rpartition('/')[0]}+{source}", cost + before.cost_us
                self.p_success[model] = Estimate(p, source, low, high, cost)
                self.undecided.discard(model)
                if head in said.undecided:
                    self.undecided.add(model)
            if (tokens := said.out_tokens.get(head)) is not None:
                value, low, high = tokens
                self.out_tokens[model] = Estimate(value, f"{version}/{head}.tokens", low, high, cost_us)
        if said.domain:
            self.domain = said.domain
        if said.needs_reasoning is not None:
            self.needs_reasoning = Estimate(said.needs_reasoning, f"{version}/needs_reasoning", cost_us=cost_us)

    def signals(self) -> Signals:
        if not self.answered:
            return Signals(probe="unavailable")
        return Signals(
            p_success=self.p_success,
            input_tokens=self.input_tokens,
            probe="ok",
            out_tokens=self.out_tokens,
            domain=self.domain,
            needs_reasoning=self.needs_reasoning,
        )


def _mean(one: float | None, other: float | None) -> float | None:
    """Of the ends of two intervals around two words that are averaged: as wide as both err alike."""
    return None if one is None or other is None else (one + other) / 2
