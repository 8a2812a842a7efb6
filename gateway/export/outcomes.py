"""One row per request of which something was said: the prompt, where it was kept, and per model what is known."""

from typing import Any

import msgspec
from sqlalchemy import Engine, and_, or_, select
from sqlmodel import col

from gateway.ledger.outcomes import ACCEPTED, JUDGE
from gateway.ledger.tables import AttemptRow, OutcomeRow, RequestRow, SampleRow
from gateway.replay.history import Span
from probes.text import render

Row = dict[str, Any]
FIRST = ("request_id", "created_at_ms", "tenant", "prompt", "prompt_hash", "sources")
PER_MODEL = ("correct", "score", "p", "cost_usd", "out_tokens")


def outcome_table(engine: Engine, span: Span, *, source: str | None = None, kept: bool = False) -> list[Row]:
    """Rows, oldest first, all with the same columns: FIRST, then `correct_MODEL`, … of each model. Blocking.

    `correct` is 1 where the mean score of the sources is at least a half; people's word goes before a judge's. `p` is
    what the decision had expected; cost and tokens are those of the call that was answered. What is not known is None.
    `source`: only what this source said. `kept`: only requests whose prompt is there.
    """
    rows: dict[str, Row] = {}
    said: dict[tuple[str, str], list[tuple[str, float]]] = {}
    with engine.connect() as connection:
        for found in connection.execute(_said(span, source)).mappings():
            row = rows.setdefault(found["request_id"], _begun(found))
            row["sources"].add(found["source"])
            said.setdefault((found["request_id"], found["model"]), []).append((found["source"], found["score"]))
            if found["p_success"] is not None:
                row[f"p_{found['model']}"] = found["p_success"]
        for found in connection.execute(_calls(span)).mappings():
            asked = rows.get(found["parent"] or found["request"])
            if asked is not None:
                cost = found["cost_nanousd"]
                asked[f"cost_usd_{found['model']}"] = None if cost is None else cost / 1e9
                asked[f"out_tokens_{found['model']}"] = found["output_tokens"] + found["reasoning_tokens"]
    for (request_id, model), words in said.items():
        people = [score for who, score in words if who != JUDGE]
        scores = people or [score for _, score in words]
        score = sum(scores) / len(scores)
        rows[request_id] |= {f"score_{model}": score, f"correct_{model}": int(score >= ACCEPTED)}
    models = sorted({model for _, model in said})
    columns = [*FIRST, *(f"{part}_{model}" for model in models for part in PER_MODEL)]
    return [
        {name: row.get(name) for name in columns} | {"sources": ",".join(sorted(row["sources"]))}
        for row in rows.values()
        if not kept or row["prompt"] is not None
    ]


def _begun(found: Any) -> Row:
    prompt = found["prompt"]
    return {
        "request_id": found["request_id"],
        "created_at_ms": found["asked_at_ms"],
        "tenant": found["tenant"],
        "prompt": None if prompt is None else render(msgspec.json.decode(prompt)),
        "prompt_hash": found["prompt_hash"],
        "sources": set(),
    }


def _within(span: Span) -> list[Any]:
    row = RequestRow
    found = [col(row.created_at_ms) >= span.since_ms, col(row.created_at_ms) < span.until_ms]
    return found if span.tenant is None else [*found, col(row.tenant) == span.tenant]


def _said(span: Span, source: str | None) -> Any:
    row, outcome, sample = RequestRow, OutcomeRow, SampleRow
    query: Any = (
        select(
            OutcomeRow.__table__,  # type: ignore[attr-defined]
            col(row.created_at_ms).label("asked_at_ms"),
            col(row.prompt_hash),
            col(sample.prompt),
        )
        .join(row, col(row.id) == col(outcome.request_id))
        .outerjoin(sample, col(sample.request_id) == col(row.id))
        .where(*_within(span))
        .order_by(col(row.created_at_ms), col(row.id), col(outcome.source), col(outcome.model))
    )
    return query if source is None else query.where(col(outcome.source) == source)


def _calls(span: Span) -> Any:
    """Answered calls of rated requests and of the shadows that they cast, judges left out."""
    row, attempt = RequestRow, AttemptRow
    rated = select(col(OutcomeRow.request_id))
    return (
        select(
            col(row.id).label("request"),
            col(row.parent),
            col(attempt.model),
            col(attempt.cost_nanousd),
            col(attempt.output_tokens),
            col(attempt.reasoning_tokens),
        )
        .join(attempt, col(attempt.request_id) == col(row.id))
        .where(
            *_within(span),
            and_(col(attempt.outcome) == "ok", col(attempt.kind) != "judge"),
            or_(col(row.id).in_(rated), col(row.parent).in_(rated)),
        )
        .order_by(col(attempt.seq))
    )
