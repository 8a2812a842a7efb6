"""The ledger as the dashboard leafs through it: a slice of the requests, summed into cells or listed newest first."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, case, func, literal, select, tuple_, union_all
from sqlmodel import col

from gateway.ledger.elsewhere import moves
from gateway.ledger.tables import RequestRow

Row = dict[str, Any]
Cursor = tuple[int, str]
"""Where a listing goes on: (created_at_ms, id) of the last row seen."""

_LISTED = [column for column in RequestRow.__table__.columns if column.name not in ("decision", "facts", "plan")]  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Slice:
    """Which requests are meant; None means any."""

    since_ms: int = 0
    tenant: str | None = None
    model: str | None = None
    outcome: str | None = None
    cache: str | None = None
    stream: bool | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        row = RequestRow
        wanted = [
            (row.tenant, self.tenant), (row.model_served, self.model), (row.outcome, self.outcome),
            (row.cache, self.cache), (row.stream, self.stream),
        ]  # fmt: skip
        return [col(row.created_at_ms) >= self.since_ms] + [
            col(column) == value for column, value in wanted if value is not None
        ]


@dataclass(frozen=True, slots=True)
class Cell:
    """Sums of the requests of one span of time that one model served (None: none came to serve), and what was spent on
    the model in that span, whoever served then."""

    start_ms: int
    model: str | None
    requests: int
    cost_nanousd: int
    savings_nanousd: int
    """Repriced: see `report.summary`."""
    unpriced: int
    estimated: int
    cache_hits: int
    cache_misses: int
    cancelled: int
    failed: int
    """Ended neither well nor by their caller."""
    input_tokens: int
    output_tokens: int


def cells(engine: Engine, of: Slice, *, span_ms: int) -> list[Cell]:
    """The slice cut by time and model. One query, so that all that is summed from it agrees with itself.

    A request is counted where it was served; the money and tokens of its other attempts stand at their own models.
    """
    row = RequestRow
    start = (col(row.created_at_ms) // span_ms).label("start")

    def count(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.sum(case((condition, 1), else_=0))

    def total(*columns: Any) -> ColumnElement[int]:
        return func.coalesce(sum((func.sum(column) for column in columns[1:]), func.sum(columns[0])), 0)

    served: Select[*tuple[Any, ...]] = (
        select(
            start,
            col(row.model_served).label("model"),
            total(col(row.cost_nanousd)).label("cost_nanousd"),
            total(col(row.input_tokens), col(row.cached_input_tokens), col(row.cache_write_tokens)).label(
                "input_tokens"
            ),
            total(col(row.output_tokens), col(row.reasoning_tokens)).label("output_tokens"),
            func.count().label("requests"),
            total(col(row.baseline_nanousd) - col(row.cost_nanousd)).label("savings_nanousd"),
            count(col(row.cost_nanousd).is_(None)).label("unpriced"),
            count(col(row.cost_estimated).is_(True)).label("estimated"),
            count(col(row.cache) == "hit").label("cache_hits"),
            count(col(row.cache) == "miss").label("cache_misses"),
            count(col(row.outcome) == "cancelled").label("cancelled"),
            count(col(row.outcome).not_in(("ok", "cancelled"))).label("failed"),
        )
        .where(*of.conditions())
        .group_by(start, col(row.model_served))
    )
    sums = [field.name for field in fields(Cell)[2:]]
    nothing = [literal(0)] * (len(sums) - 3)
    tried = [select(*moved.subquery().c, *nothing) for moved in moves(of.conditions(), start)]
    parts = union_all(served, *tried).subquery().c
    query = (
        select(parts.start, parts.model, *(func.sum(parts[name]) for name in sums))
        .group_by(parts.start, parts.model)
        .order_by(parts.start, parts.model)
    )
    with engine.connect() as connection:
        return [
            Cell(int(at) * span_ms, model, *(int(value) for value in found))
            for at, model, *found in connection.execute(query)
        ]


def oldest_ms(engine: Engine, of: Slice) -> int | None:
    """When the slice's first request came; None when it is empty."""
    with engine.connect() as connection:
        found = connection.execute(select(func.min(col(RequestRow.created_at_ms))).where(*of.conditions())).scalar()
        return None if found is None else int(found)


def page(engine: Engine, of: Slice, *, limit: int, before: Cursor | None = None) -> list[Row]:
    """Rows of the slice, newest first, decisions left out."""
    row = RequestRow
    query = select(*_LISTED).where(*of.conditions())
    if before is not None:
        query = query.where(tuple_(col(row.created_at_ms), col(row.id)) < before)
    query = query.order_by(col(row.created_at_ms).desc(), col(row.id).desc()).limit(limit)
    with engine.connect() as connection:
        return [dict(found) for found in connection.execute(query).mappings()]


def pages(engine: Engine, of: Slice, *, size: int) -> Iterator[list[Row]]:
    """The whole slice, page by page: what is not yet read is not yet in memory."""
    before: Cursor | None = None
    while rows := page(engine, of, limit=size, before=before):
        yield rows
        before = cursor(rows[-1])


def cursor(row: Row) -> Cursor:
    return row["created_at_ms"], row["id"]


def choices(engine: Engine, of: Slice) -> dict[str, list[str]]:
    """What the filters can be set to, within the slice: models served, outcomes, tenants."""
    row = RequestRow
    query = select(col(row.model_served), col(row.outcome), col(row.tenant)).where(*of.conditions()).distinct()
    with engine.connect() as connection:
        found = connection.execute(query).all()
    names = ("model", "outcome", "tenant")
    return {name: sorted({value for values in found if (value := values[at])}) for at, name in enumerate(names)}
