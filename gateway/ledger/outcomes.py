"""What was said of answers: written once per request, source and model, read beside the requests. All blocking."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, and_, case, func, literal, select
from sqlmodel import col

from gateway.ledger.tables import OutcomeRow, RequestRow, insert_into
from routers.explain import from_dict
from routers.types import Decision

CALLER, JUDGE = "caller", "judge"
MAX_SOURCES = 8
"""That speak of one request."""
ACCEPTED = 0.5
"""From this score on, an answer counts as accepted."""

Row = dict[str, Any]


class TooManySources(ValueError):
    """The request has been judged by as many sources as are kept."""


class NothingServed(ValueError):
    """No model answered that request."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One source's word on one model's answer."""

    model: str
    score: float
    """From 0, rejected, to 1, accepted."""


def caller_says(
    engine: Engine,
    request_id: str,
    score: float,
    *,
    tenant: str | None,
    source: str,
    comment: str | None,
    now_ms: int,
) -> Row | None:
    """Keep what a caller says of the answer it got; said again by the same source, the last word counts.

    None: there is no such request, or it is another tenant's. Raises TooManySources and NothingServed.
    """
    with engine.begin() as connection:
        query = select(RequestRow.__table__).where(col(RequestRow.id) == request_id)  # type: ignore[attr-defined]
        if tenant is not None:
            query = query.where(col(RequestRow.tenant) == tenant)
        found = connection.execute(query.with_for_update()).mappings().first()  # sources of one request come in turns
        if found is None:
            return None
        if found["model_served"] is None:
            raise NothingServed(request_id)
        verdicts = [Verdict(found["model_served"], score)]
        rows = _rows(found, decision_of(found["decision"]), source, verdicts, comment, now_ms)
        _write(connection, engine, rows)
        if connection.execute(_sources(request_id)).scalar_one() > MAX_SOURCES:
            raise TooManySources(request_id)
        first = select(col(OutcomeRow.created_at_ms)).where(
            col(OutcomeRow.request_id) == request_id, col(OutcomeRow.source) == source
        )
        rows[0]["created_at_ms"] = connection.execute(first).scalar_one()  # of its first word
    return rows[0]


def judge_says(connection: Connection, request: Row, verdicts: Sequence[Verdict], comment: str, now_ms: int) -> None:
    """Keep a judge's verdicts on the answers to a request, in the caller's transaction."""
    decision = decision_of(request["decision"])
    _write(connection, connection.engine, _rows(request, decision, JUDGE, verdicts, comment, now_ms))


def _sources(request_id: str) -> Any:
    return select(func.count(func.distinct(col(OutcomeRow.source)))).where(col(OutcomeRow.request_id) == request_id)


def _rows(
    request: Any, decision: Decision | None, source: str, verdicts: Sequence[Verdict], comment: str | None, now_ms: int
) -> list[Row]:
    return [
        {
            "request_id": request["id"],
            "source": source,
            "model": verdict.model,
            "tenant": request["tenant"],
            "key_id": request["key_id"],
            "created_at_ms": now_ms,
            "score": verdict.score,
            "comment": comment,
            "p_success": None if decision is None else expected(decision, verdict.model),
            "probe_version": None if decision is None else decision.probe_version,
        }
        for verdict in verdicts
    ]


def _write(connection: Connection, engine: Engine, rows: list[Row]) -> None:
    insert = insert_into(OutcomeRow.__table__, engine.dialect.name)  # type: ignore[attr-defined]
    key = ("request_id", "source", "model")
    new = {name: insert.excluded[name] for name in ("score", "comment")}
    connection.execute(insert.on_conflict_do_update(index_elements=key, set_=new), rows)


def decision_of(text: str | None) -> Decision | None:
    """A decision as the ledger holds it; None where there is none, or another version wrote it."""
    if not text:
        return None
    try:
        return from_dict(msgspec.json.decode(text, type=dict[str, Any]))
    except ValueError:
        return None


def expected(decision: Decision, model: str) -> float | None:
    """P(success) of the answer that `model` gave, as the decision had it: of the plan, if that is what ran."""
    p_success = {candidate.model: candidate.p_success for candidate in decision.candidates}
    if decision.plan.model == model and decision.plan.name in p_success:
        return p_success[decision.plan.name]
    return p_success.get(model)


def of_request(engine: Engine, request_id: str) -> list[Row]:
    """What was said of one request, oldest first."""
    query = (
        select(OutcomeRow.__table__)  # type: ignore[attr-defined]
        .where(col(OutcomeRow.request_id) == request_id)
        .order_by(col(OutcomeRow.created_at_ms), col(OutcomeRow.source), col(OutcomeRow.model))
    )
    with engine.connect() as connection:
        return [dict(found) for found in connection.execute(query).mappings()]


def quality(engine: Engine, *conditions: Any) -> dict[str, int | None]:
    """Of the requests under `conditions`: how many were rated, how many accepted, and what all of the rated cost for
    each that was accepted (`cost_of_pass_nanousd`; None: nothing was accepted).

    A request's score is the mean of its sources on the model that served; a judge counts where nobody else spoke. A
    request's cost is that of all its attempts and of the shadows it cast.
    """
    outcome, row = OutcomeRow, RequestRow
    people = func.avg(case((col(outcome.source) != JUDGE, col(outcome.score))))
    score = func.coalesce(people, func.avg(col(outcome.score)))
    rated = (
        select(col(row.id).label("id"), col(row.cost_nanousd).label("cost"), score.label("score"))
        .join(outcome, and_(col(outcome.request_id) == col(row.id), col(outcome.model) == col(row.model_served)))
        .where(col(row.parent).is_(None), *conditions)
        .group_by(col(row.id), col(row.cost_nanousd))
        .subquery()
    )
    shadows = select(func.sum(col(row.cost_nanousd))).where(col(row.parent).in_(select(rated.c.id)))
    query = select(
        func.count(),
        func.coalesce(func.sum(case((rated.c.score >= literal(ACCEPTED), 1), else_=0)), 0),
        func.coalesce(func.sum(rated.c.cost), 0) + func.coalesce(shadows.scalar_subquery(), 0),
    ).select_from(rated)
    with engine.connect() as connection:
        count, accepted, cost = map(int, connection.execute(query).one())
    return {
        "rated": count,
        "accepted": accepted,
        "rated_cost_nanousd": cost,
        "cost_of_pass_nanousd": None if not accepted else -(-cost // accepted),
    }
