"""The ledger's decisions, and what another policy makes of them: which rows it can be judged on, and by what."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import Engine, and_, case, func, select
from sqlmodel import col

from gateway import facts
from gateway.ledger.outcomes import JUDGE, decision_of
from gateway.ledger.settle import Usage, cost_nanousd
from gateway.ledger.tables import OutcomeRow, RequestRow
from gateway.replay.estimate import Array, Evaluation, Logged, doubly_robust
from routers.decide import decide
from routers.errors import NoCandidate
from routers.policy import Policy
from routers.types import Decision, Query, Signals, State

REFUSED = "(refused)"
SEEDS = 256
"""Most draws that look for all actions of a policy that explores."""
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Span:
    """Which requests are replayed."""

    since_ms: int
    until_ms: int
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One request then, and what the new policy would do with it."""

    decision: Decision
    cost: float
    """Nano-dollars; NaN: unpriced."""
    latency_ms: float
    score: float
    """From 0 to 1; NaN: nobody said."""
    usage: Usage
    tokens: int
    target: Mapping[str, float]
    """Plan → the probability with which the new policy runs it."""
    expected: Mapping[str, tuple[float | None, float | None]]
    """Plan → (P(success), nano-dollars) as the new decision has them."""

    @property
    def action(self) -> str:
        return self.decision.plan.name

    @property
    def same(self) -> bool:
        """The new policy does for sure what was done for sure."""
        return self.decision.propensity == 1.0 and self.target == {self.action: 1.0}

    @property
    def supported(self) -> bool:
        """All that the new policy may do here could have happened here, with a propensity that is known."""
        if self.decision.propensity < 1.0:
            return {self.action, *self.target} <= set(self.decision.among)
        return self.same


@dataclass(frozen=True, slots=True)
class Repriced:
    """Rows on which the logs say nothing of what the new policy does there: arithmetic, not an estimate."""

    n: int
    cost_before: float | None
    """Mean nano-dollars of the rows with both prices; None: there are none."""
    cost_after: float | None
    """Of the same rows and tokens, at the new plan's price."""
    unpriced: int
    predicted: int
    """Rows of which P(success) is known before and after; it is 0 for what is refused."""
    predicted_before: float | None
    """Mean P(success) that the probe gave; None: it gave none."""
    predicted_after: float | None


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of a history."""

    rows: int
    same: int
    supported: int
    """Rows that the estimate stands on: those that stay the same, and those where the logged policy explored."""
    refused: int
    skipped: Mapping[str, int]
    """Why → rows of the ledger that could not be replayed."""
    estimates: Mapping[str, Evaluation | None] = field(default_factory=dict)
    """`cost` in nano-dollars, `quality` from 0 to 1, `latency` in ms, of `supported`; None: too few outcomes."""
    repriced: Repriced | None = None


def replay(engine: Engine, policy: Policy, span: Span) -> Replay:
    """Run `policy` over the decisions of a span. Blocking; nothing is called and nothing written."""
    skipped: dict[str, int] = {}
    turns = list(_turns(engine, policy, span, skipped))
    supported = [turn for turn in turns if turn.supported]
    others = [turn for turn in turns if not turn.supported]
    return Replay(
        rows=len(turns),
        same=sum(turn.same for turn in turns),
        supported=len(supported),
        refused=sum(REFUSED in turn.target for turn in turns),
        skipped=skipped,
        estimates=estimates(supported),
        repriced=repriced(others, policy) if others else None,
    )


def estimates(turns: list[Turn]) -> dict[str, Evaluation | None]:
    """Doubly robust, of rows that support it."""
    if not turns:
        return dict.fromkeys(("cost", "quality", "latency"))
    names = sorted({name for turn in turns for name in (turn.action, *turn.decision.among)})
    place = {name: index for index, name in enumerate(names)}
    target = np.zeros((len(turns), len(names)))
    features = np.zeros((len(turns), len(names), 4))
    features[:, :, 0] = 1.0
    for row, turn in enumerate(turns):
        for name, chance in turn.target.items():
            target[row, place[name]] = chance
        features[row, :, 1] = 0.5
        features[row, :, 3] = np.log1p(turn.tokens)
        told = {candidate.model: candidate for candidate in turn.decision.candidates}
        for name in (turn.action, *turn.decision.among):
            # A route's effort is no part of its candidates' names: `local+high` may have run for `local`.
            candidate = told.get(name) or told.get(name.partition("+")[0])
            if candidate is not None:
                features[row, place[name], 1] = 0.5 if candidate.p_success is None else candidate.p_success
                features[row, place[name], 2] = candidate.expected_cost_nanousd or 0

    def of(outcome: list[float]) -> Evaluation | None:
        action = np.array([place[turn.action] for turn in turns])
        propensity = np.array([turn.decision.propensity for turn in turns])
        return doubly_robust(Logged(action, propensity, np.array(outcome, dtype=float), features), target)

    return {
        "cost": of([turn.cost for turn in turns]),
        "quality": of([turn.score for turn in turns]),
        "latency": of([turn.latency_ms for turn in turns]),
    }


def repriced(turns: list[Turn], policy: Policy) -> Repriced:
    """The same tokens at the new plans' prices, and what the probe expected."""
    after = np.array([_repriced(turn, policy) for turn in turns])
    before = np.array([turn.cost for turn in turns])
    p_before = [next((c.p_success for c in turn.decision.candidates if c.model == turn.action), None) for turn in turns]
    p_after = [
        sum(chance * (turn.expected[name][0] or 0.0) for name, chance in turn.target.items())
        if all(turn.expected[name][0] is not None for name in turn.target)
        else None
        for turn in turns
    ]
    both = [(b, a) for b, a in zip(p_before, p_after, strict=True) if b is not None and a is not None]
    priced = ~(np.isnan(after) | np.isnan(before))
    return Repriced(
        n=len(turns),
        cost_before=_mean(before[priced]),
        cost_after=_mean(after[priced]),
        unpriced=int((~priced).sum()),
        predicted=len(both),
        predicted_before=_mean(np.array([b for b, _ in both])),
        predicted_after=_mean(np.array([a for _, a in both])),
    )


def _repriced(turn: Turn, policy: Policy) -> float:
    total = 0.0
    for name, chance in turn.target.items():
        model = policy.models.get(name.partition("+")[0]) if ">" not in name else None
        cost: float | None = turn.expected[name][1]  # of a plan that is more than a model: as the decision expects
        if model is not None:
            cost = cost_nanousd(model.price, turn.usage)
        if cost is None:
            return float("nan")
        total += chance * cost
    return total


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None


def _turns(engine: Engine, policy: Policy, span: Span, skipped: dict[str, int]) -> Iterator[Turn]:
    for row in _rows(engine, span):
        if row["cache"] == "hit":
            reason = "answered from the cache"
        elif (decision := decision_of(row["decision"])) is None:
            reason = "no decision, or one of another version"
        elif (asked := facts.read(row, decision.probe_version or "probe")) is None:
            reason = "the caller named a model, or the row is older than replays"
        else:
            target, expected = _target(asked, policy, decision.seed)
            yield Turn(
                decision=decision,
                cost=float("nan") if row["cost_nanousd"] is None else float(row["cost_nanousd"]),
                latency_ms=row["duration_us"] / 1000,
                score=float("nan") if row["score"] is None else float(row["score"]),
                usage=Usage(
                    row["input_tokens"],
                    row["cached_input_tokens"],
                    row["cache_write_tokens"],
                    row["output_tokens"],
                    row["reasoning_tokens"],
                ),
                tokens=asked[0].input_tokens_estimate,
                target=target,
                expected=expected,
            )
            continue
        skipped[reason] = skipped.get(reason, 0) + 1


def _rows(engine: Engine, span: Span) -> Iterator[Any]:
    """Requests of callers, oldest first, each with the mean score of its sources on what was served."""
    row, outcome = RequestRow, OutcomeRow
    people = func.avg(case((col(outcome.source) != JUDGE, col(outcome.score))))
    score = (
        select(func.coalesce(people, func.avg(col(outcome.score))))
        .where(and_(col(outcome.request_id) == col(row.id), col(outcome.model) == col(row.model_served)))
        .scalar_subquery()
    )
    query = select(RequestRow.__table__, score.label("score")).where(  # type: ignore[attr-defined]
        col(row.parent).is_(None), col(row.created_at_ms) >= span.since_ms, col(row.created_at_ms) < span.until_ms
    )
    if span.tenant is not None:
        query = query.where(col(row.tenant) == span.tenant)
    query = query.order_by(col(row.created_at_ms), col(row.id))
    with engine.connect().execution_options(yield_per=_BATCH) as connection:
        yield from connection.execute(query).mappings()


def _target(
    asked: tuple[Query, Signals, State], policy: Policy, seed: int
) -> tuple[dict[str, float], dict[str, tuple[float | None, float | None]]]:
    """(plan → probability, plan → what the decision expects of it). Exact: the policy says its own propensities."""
    query, signals, state = asked
    chances: dict[str, float] = {}
    expected: dict[str, tuple[float | None, float | None]] = {}
    for at in range(seed, seed + SEEDS):
        try:
            decision = decide(query, signals, policy, state, at)
        except NoCandidate:
            return {REFUSED: 1.0}, {REFUSED: (0.0, 0.0)}
        name = decision.plan.name
        chances[name] = decision.propensity
        expected |= {c.model: (c.p_success, c.expected_cost_nanousd) for c in decision.candidates}
        expected.setdefault(name, (None, None))
        if decision.propensity == 1.0 or len(chances) == len(decision.among):
            break
    whole = sum(chances.values())
    return {name: chance / whole for name, chance in chances.items()}, expected
