"""What was spent, summed by who or what spent it: exact integers from the ledger's rows. Blocking, like `report`."""

from typing import Any, Literal

from sqlalchemy import Engine, case, func, select
from sqlmodel import col

from gateway.ledger.tables import RequestRow

By = Literal["key", "team", "tenant", "model", "run"]
_COLUMNS = {
    "key": RequestRow.key_id,
    "team": RequestRow.team,
    "tenant": RequestRow.tenant,
    "model": RequestRow.model_served,
    "run": RequestRow.scope,
}


def spend_by(
    engine: Engine, by: By, *, since_ms: int, until_ms: int, limit: int, tenant: str | None = None
) -> list[dict[str, Any]]:
    """Sums per group from `since_ms` up to, and without, `until_ms`; dearest first. A run is named with its key.

    `cost_nanousd` sums what is known; `unpriced` counts the requests whose cost is not.
    """
    row = RequestRow
    groups = [col(row.key_id), col(row.scope)] if by == "run" else [col(_COLUMNS[by])]
    cost = func.coalesce(func.sum(col(row.cost_nanousd)), 0)
    query = (
        select(
            *groups,
            func.count().label("requests"),
            cost.label("cost_nanousd"),
            func.coalesce(func.sum(case((col(row.cost_nanousd).is_(None), 1), else_=0)), 0).label("unpriced"),
            func.coalesce(
                func.sum(col(row.input_tokens) + col(row.cached_input_tokens) + col(row.cache_write_tokens)), 0
            ).label("input_tokens"),
            func.coalesce(func.sum(col(row.output_tokens) + col(row.reasoning_tokens)), 0).label("output_tokens"),
        )
        .where(col(row.created_at_ms) >= since_ms, col(row.created_at_ms) < until_ms)
        .group_by(*groups)
        .order_by(cost.desc(), *groups)
        .limit(limit)
    )
    if tenant is not None:
        query = query.where(col(row.tenant) == tenant)
    if by == "run":
        query = query.where(col(row.scope).is_not(None))
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    return [
        {
            **({"key_id": found[0], "run": found[1]} if by == "run" else {by: found[0]}),
            **dict(zip(_SUMS, map(_whole, found[len(groups) :]), strict=True)),
        }
        for found in rows
    ]


_SUMS = ("requests", "cost_nanousd", "unpriced", "input_tokens", "output_tokens")


def _whole(value: Any) -> int:
    return int(value)  # PostgreSQL sums big integers to decimals
