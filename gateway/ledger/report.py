"""Read the ledger: sums and rows for the dashboard, the API and budgets. All from the same tables, all blocking."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, case, func, literal, or_, select, union_all
from sqlmodel import col

from gateway.ledger import outcomes
from gateway.ledger.elsewhere import moves
from gateway.ledger.tables import AttemptRow, RequestRow


def spent_since(engine: Engine, scope: str, start_ms: int) -> int:
    """`spent_by`, on a connection of its own."""
    with engine.connect() as connection:
        return spent_by(connection, scope, start_ms)


def spent_by(connection: Connection, scope: str, start_ms: int) -> int:
    """Nano-dollars that `scope` (`key:ID`, `team:NAME`, `tenant:NAME` or `scope:KEY:RUN`) has spent since `start_ms`.

    A run's spend is that of the run and of all the runs below it.
    """
    kind, _, name = scope.partition(":")
    query = select(func.coalesce(func.sum(col(RequestRow.cost_nanousd)), 0)).where(
        col(RequestRow.created_at_ms) >= start_ms
    )
    if kind == "key":
        query = query.where(col(RequestRow.key_id) == name)
    elif kind == "team":
        query = query.where(col(RequestRow.team) == name)
    elif kind == "tenant":
        query = query.where(col(RequestRow.tenant) == name)
    else:
        key_id, _, run = name.partition(":")
        query = query.where(col(RequestRow.key_id) == key_id, _in_run(run))
    return int(connection.execute(query).scalar_one() or 0)


def _in_run(run: str) -> ColumnElement[bool]:
    """The run itself, and what is below it: the names from `run/` up to, and without, `run0`, as `0` follows `/`."""
    path = col(RequestRow.scope)
    return or_(path == run, and_(path >= f"{run}/", path < f"{run}0"))


def summary(
    engine: Engine, *, since_ms: int, tenant: str | None = None, scope: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Totals of all requests since `since_ms`, of one tenant or of all, or of one (key id, run with its sub-runs).

    `savings_nanousd` is repriced: over the rows with a baseline and a cost, what the same tokens would have cost at
    the price of the dearest candidate, less what they did cost.
    """
    row = RequestRow
    query = select(
        func.count().label("requests"),
        func.coalesce(func.sum(col(row.cost_nanousd)), 0).label("cost_nanousd"),
        func.coalesce(func.sum(col(row.baseline_nanousd)), 0).label("baseline_nanousd"),
        func.coalesce(func.sum(col(row.baseline_nanousd) - col(row.cost_nanousd)), 0).label("savings_nanousd"),
        func.coalesce(func.sum(case((col(row.cost_nanousd).is_(None), 1), else_=0)), 0).label("unpriced"),
        func.coalesce(func.sum(case((col(row.cost_estimated), 1), else_=0)), 0).label("estimated"),
        func.coalesce(func.sum(case((col(row.cache) == "hit", 1), else_=0)), 0).label("cache_hits"),
        func.coalesce(func.sum(case((col(row.outcome) != "ok", 1), else_=0)), 0).label("not_ok"),
        func.coalesce(
            func.sum(col(row.input_tokens) + col(row.cached_input_tokens) + col(row.cache_write_tokens)), 0
        ).label("input_tokens"),
        func.coalesce(func.sum(col(row.output_tokens) + col(row.reasoning_tokens)), 0).label("output_tokens"),
    ).where(col(row.created_at_ms) >= since_ms)
    if tenant is not None:
        query = query.where(col(row.tenant) == tenant)
    query = query.where(*_of_scope(scope))
    with engine.connect() as connection:
        return {name: int(value) for name, value in connection.execute(query).mappings().one().items()}


def worth(
    engine: Engine, *, since_ms: int, tenant: str | None = None, scope: tuple[str, str] | None = None
) -> dict[str, int | None]:
    """`outcomes.quality` of the requests that `summary` sums."""
    conditions = [col(RequestRow.created_at_ms) >= since_ms, *_of_scope(scope)]
    if tenant is not None:
        conditions.append(col(RequestRow.tenant) == tenant)
    return outcomes.quality(engine, *conditions)


def by_model(
    engine: Engine, *, since_ms: int, tenant: str | None = None, scope: tuple[str, str] | None = None
) -> list[dict[str, Any]]:
    """Requests and cache hits per model that served (None: none did), and what was spent on each; most requests first.

    A model that was tried and did not serve has its money, and no request. The rows sum to `summary`.
    """
    row = RequestRow
    conditions = [col(row.created_at_ms) >= since_ms]
    if tenant is not None:
        conditions.append(col(row.tenant) == tenant)
    conditions += _of_scope(scope)
    served: Select[*tuple[Any, ...]] = (
        select(
            col(row.model_served).label("model"),
            func.coalesce(func.sum(col(row.cost_nanousd)), 0).label("cost"),
            func.count().label("requests"),
            func.sum(case((col(row.cache) == "hit", 1), else_=0)).label("cache_hits"),
        )
        .where(*conditions)
        .group_by(col(row.model_served))
    )
    tried = [select(*list(m.subquery().c)[:2], literal(0), literal(0)) for m in moves(conditions)]
    parts = union_all(served, *tried).subquery().c
    requests = func.sum(parts.requests)
    query = (
        select(parts.model, requests, func.sum(parts.cost), func.sum(parts.cache_hits))
        .group_by(parts.model)
        .order_by(requests.desc(), parts.model)
    )
    with engine.connect() as connection:
        return [
            {"model": model, "requests": int(count), "cost_nanousd": int(cost), "cache_hits": int(hits)}
            for model, count, cost, hits in connection.execute(query)
        ]


def request(
    engine: Engine, request_id: str, *, tenant: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """One request's row with its attempts; None when there is none (or it is another tenant's)."""
    with engine.connect() as connection:
        query = select(RequestRow.__table__).where(col(RequestRow.id) == request_id)  # type: ignore[attr-defined]
        if tenant is not None:
            query = query.where(col(RequestRow.tenant) == tenant)
        found = connection.execute(query).mappings().first()
        if found is None:
            return None
        attempts = connection.execute(
            select(AttemptRow.__table__)  # type: ignore[attr-defined]
            .where(col(AttemptRow.request_id) == request_id)
            .order_by(col(AttemptRow.seq))
        ).mappings()
        return dict(found), [dict(attempt) for attempt in attempts]


def _of_scope(scope: tuple[str, str] | None) -> list[ColumnElement[bool]]:
    if scope is None:
        return []
    key_id, name = scope
    return [col(RequestRow.key_id) == key_id, _in_run(name)]
