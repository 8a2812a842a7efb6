"""What was spent, summed by who or what spent it: exact integers from the ledger's rows. Blocking, like `report`."""

from typing import Any, Literal

from sqlalchemy import Engine, case, func, literal, select, union_all
from sqlmodel import col

from gateway.ledger.elsewhere import moves
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

    By model, a request counts where it was served, and each attempt's money and tokens where it was made.

    `cost_nanousd` sums what is known; `unpriced` counts the requests whose cost is not.
    """
    row = RequestRow
    groups = [col(row.key_id), col(row.scope)] if by == "run" else [col(_COLUMNS[by])]
    conditions = [col(row.created_at_ms) >= since_ms, col(row.created_at_ms) < until_ms]
    if tenant is not None:
        conditions.append(col(row.tenant) == tenant)
    if by == "run":
        conditions.append(col(row.scope).is_not(None))
    read = col(row.input_tokens) + col(row.cached_input_tokens) + col(row.cache_write_tokens)
    sums = (
        select(
            *groups,
            func.coalesce(func.sum(col(row.cost_nanousd)), 0).label("cost_nanousd"),
            func.sum(read).label("input_tokens"),
            func.sum(col(row.output_tokens) + col(row.reasoning_tokens)).label("output_tokens"),
            func.count().label("requests"),
            func.sum(case((col(row.cost_nanousd).is_(None), 1), else_=0)).label("unpriced"),
        )
        .where(*conditions)
        .group_by(*groups)
    )
    tried = [select(*m.subquery().c, literal(0), literal(0)) for m in moves(conditions)] if by == "model" else []
    parts = union_all(sums, *tried).subquery().c
    names = list(parts)[: len(groups)]
    cost = func.sum(parts.cost_nanousd)
    query = (
        select(*names, *(func.sum(parts[name]) for name in _SUMS))
        .group_by(*names)
        .order_by(cost.desc(), *names)
        .limit(limit)
    )
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
