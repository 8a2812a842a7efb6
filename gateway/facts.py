"""What a decision was made from, as its ledger row keeps it: enough to make it again, under the same policy or another.

What the row has in columns (model, tenant, team, session, run, endpoint, time) is not said twice. Nobody's words are in
it. Absent is absent: a field that equals its default is left out.
"""

from typing import Any

import msgspec
from blake3 import blake3

from probes.types import Estimate
from routers.types import Arm, Effort, Hints, Load, Query, Signals, State

Told = float | tuple[float, float, float]
"""An estimate: its value, or (value, low, high)."""


class _Hints(msgspec.Struct, frozen=True, omit_defaults=True):
    cost: int | None = None
    p: float | None = None
    effort: Effort | None = None
    models: tuple[str, ...] | None = None


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of a query: its size and needs. Of the signals: their values. Of the state: what stood in the way."""

    n: int
    """Prompt tokens, estimated."""
    most: int | None = None
    cap: int | None = None
    tags: tuple[str, ...] = ()
    tools: bool = False
    format: bool = False
    logprobs: bool = False
    choices: int = 1
    inputs: int = 1
    key: str = ""
    reasoning: str | None = None
    hints: _Hints | None = None
    probe: str = "not_asked"
    p: dict[str, Told] = {}
    exact: dict[str, int] = {}
    out: dict[str, Told] = {}
    domain: dict[str, float] = {}
    thinks: Told | None = None
    hard: Told | None = None
    cached: dict[str, int] = {}
    clusters: tuple[tuple[int, float], ...] = ()
    down: tuple[str, ...] = ()
    left: int | None = None
    degrade: tuple[str, str] | None = None
    load: dict[str, Load] = {}
    last: str | None = None
    last_p: dict[str, float] = {}
    arms: tuple[tuple[int, str, float, float], ...] = ()
    """(cluster, model, pulls, reward)"""
    bound: str | None = None


def hash_secret(pepper: bytes) -> bytes:
    """What keys `prompt_hash`: 32 bytes, for this use alone."""
    return blake3(pepper, derive_key_context="leadline prompt hash").digest()


def prompt_hash(secret: bytes, tenant: str, messages: bytes | msgspec.Raw) -> str:
    """16 bytes in hexadecimal: equal for equal conversations of one tenant, and telling nobody without the secret."""
    return blake3(tenant.encode() + b"\x00" + bytes(messages), key=secret).hexdigest(16)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Facts).decode


def written(query: Query, signals: Signals, state: State) -> str:
    """As JSON, for the row."""
    hints = query.hints
    return _encode(
        Facts(
            n=query.input_tokens_estimate,
            most=query.input_tokens_max,
            cap=query.max_output_tokens,
            tags=tuple(query.tags),
            tools=query.needs_tools,
            format=query.needs_format,
            logprobs=query.needs_logprobs,
            choices=query.choices,
            inputs=query.inputs,
            key=query.key,
            reasoning=query.reasoning,
            hints=None if hints is None else _hints(hints),
            probe=signals.probe,
            p={name: _told(estimate) for name, estimate in signals.p_success.items()},
            exact=dict(signals.input_tokens),
            out={name: _told(estimate) for name, estimate in signals.out_tokens.items()},
            domain=dict(signals.domain),
            thinks=None if signals.needs_reasoning is None else _told(signals.needs_reasoning),
            hard=None if signals.difficulty is None else _told(signals.difficulty),
            cached=dict(signals.cached_tokens),
            clusters=signals.clusters,
            down=tuple(state.unavailable),
            left=state.budget_remaining_nanousd,
            degrade=None if state.degrade is None else (state.degrade, state.degrade_reason),
            load=dict(state.load),
            last=state.session_model,
            last_p=dict(state.session_p),
            bound=state.bound_to,
            arms=tuple([(at, model, arm.pulls, arm.reward) for (at, model), arm in state.arms.items()]),
        )
    ).decode()


def read(row: Any, source: str) -> tuple[Query, Signals, State] | None:
    """What a row's decision was made from; None where the row does not say. `source`: who measured."""
    if not row["facts"]:
        return None
    try:
        facts = _decode(row["facts"])
    except msgspec.DecodeError:
        return None
    hints = facts.hints
    query = Query(
        model=row["model_requested"],
        tenant=row["tenant"],
        input_tokens_estimate=facts.n,
        max_output_tokens=facts.cap,
        tags=frozenset(facts.tags),
        needs_tools=facts.tools,
        needs_format=facts.format,
        needs_logprobs=facts.logprobs,
        choices=facts.choices,
        endpoint=row["endpoint"],
        inputs=facts.inputs,
        input_tokens_max=facts.most,
        session=row["session"],
        run=row["scope"],
        hints=None if hints is None else Hints(hints.cost, hints.p, hints.effort, _set(hints.models)),
        reasoning=facts.reasoning,
        key=facts.key,
        team=row["team"],
        id=row["id"],
        at_ms=row["created_at_ms"],
    )
    signals = Signals(
        p_success={name: _estimate(told, f"{source}/{name}") for name, told in facts.p.items()},
        input_tokens=facts.exact,
        probe=facts.probe,  # type: ignore[arg-type]  # as it was written
        out_tokens={name: _estimate(told, source) for name, told in facts.out.items()},
        domain=facts.domain,
        needs_reasoning=None if facts.thinks is None else _estimate(facts.thinks, source),
        cached_tokens=facts.cached,
        clusters=facts.clusters,
        difficulty=None if facts.hard is None else _estimate(facts.hard, source),
    )
    state = State(
        unavailable=dict.fromkeys(facts.down, "not available then"),
        budget_remaining_nanousd=facts.left,
        degrade=None if facts.degrade is None else facts.degrade[0],  # type: ignore[arg-type]  # as it was written
        degrade_reason="" if facts.degrade is None else facts.degrade[1],
        now_ms=row["created_at_ms"],
        load=facts.load,
        session_model=facts.last,
        session_p=facts.last_p,
        bound_to=facts.bound,
        arms={(at, model): Arm(pulls, reward) for at, model, pulls, reward in facts.arms},
    )
    return query, signals, state


def clusters_of(text: str | None) -> tuple[tuple[int, float], ...]:
    """The clusters of the query that a row's facts tell of; none where they tell of none."""
    try:
        return _decode(text).clusters if text else ()
    except msgspec.DecodeError:
        return ()


def _hints(hints: Hints) -> _Hints:
    models = None if hints.models is None else tuple(sorted(hints.models))
    return _Hints(hints.max_cost_nanousd, hints.min_p_success, hints.effort, models)


def _set(names: tuple[str, ...] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


def _told(estimate: Estimate) -> Told:
    if estimate.low is None or estimate.high is None:
        return estimate.value
    return estimate.value, estimate.low, estimate.high


def _estimate(told: Told, source: str) -> Estimate:
    return Estimate(told, source) if isinstance(told, float | int) else Estimate(told[0], source, told[1], told[2])
