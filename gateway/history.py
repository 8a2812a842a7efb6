"""The ledger's history as decisions can be made of it again: each row as a query, with its signals and the state then.

A row keeps what its decision was made from (`gateway.facts`), but for requests that named a model: of those tags,
tools, formats and limits of length are not known, and what is made of them is an approximation.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, create_engine, select
from sqlalchemy.exc import DBAPIError
from sqlmodel import col

from gateway import facts
from gateway.ledger.report import request
from gateway.ledger.tables import ApiKey, RequestRow
from gateway.settings import Settings
from probes.types import Estimate
from routers.diff import outcome
from routers.explain import from_dict
from routers.policy import Policy
from routers.types import Decision, Query, Signals, State

AS_THEN = "by what the probe said and what was up and affordable then"
APPROXIMATE = "the row does not keep what was decided from: tags, tools, formats, hints and caps count as absent"
MAX_ROWS = 5_000


@dataclass(frozen=True, slots=True)
class Past:
    """One request of the ledger."""

    row: Mapping[str, Any]
    decision: Decision | None
    """None: answered from the cache, or refused before anything was decided."""
    query: Query
    signals: Signals
    state: State
    exact: bool
    """Whether the row keeps what it was decided from."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """How two policies decide the newest requests of the ledger."""

    requests: int
    changed: Counter[tuple[str, str]]
    """(plan under the one, plan under the other) → requests, where they differ."""


def past_request(settings: Settings, request_id: str) -> Past | None:
    """None: the ledger has no such request. Raises LookupError where there is no ledger that can be read."""
    engine = _ledger(settings)
    try:
        found = request(engine, request_id)
        return _past(found[0], _key_names(engine)) if found is not None else None
    except DBAPIError as error:
        raise LookupError(f"the ledger cannot be read ({str(error.orig).splitlines()[0]})") from error
    finally:
        engine.dispose()


def over_history(settings: Settings, before: Policy, after: Policy, since_ms: int) -> Replayed:
    """The newest `MAX_ROWS` requests since then, decided by both. Raises LookupError as `past_request`."""
    engine = _ledger(settings)
    try:
        with engine.connect() as connection:
            rows = connection.execute(
                select(RequestRow.__table__)  # type: ignore[attr-defined]
                .where(col(RequestRow.created_at_ms) >= since_ms, col(RequestRow.decision).is_not(None))
                .order_by(col(RequestRow.created_at_ms).desc())
                .limit(MAX_ROWS)
            ).mappings()
            names = _key_names(engine)
            pasts = [_past(dict(row), names) for row in rows]
    except DBAPIError as error:
        raise LookupError(f"the ledger cannot be read ({str(error.orig).splitlines()[0]})") from error
    finally:
        engine.dispose()
    changed: Counter[tuple[str, str]] = Counter()
    for past in pasts:
        old, new = (outcome(policy, past.query, past.signals, past.state) for policy in (before, after))
        if old != new:
            changed[old, new] += 1
    return Replayed(len(pasts), changed)


def _ledger(settings: Settings) -> Engine:
    """To read from: no schema is made or changed."""
    if settings.database_url.startswith("sqlite:///") and not (settings.home / "ledger.db").exists():
        raise LookupError(f"there is no ledger in {settings.home}; set LEADLINE_HOME or DATABASE_URL")
    return create_engine(settings.database_url)


def _key_names(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        rows = connection.execute(select(col(ApiKey.id), col(ApiKey.name))).all()
    return {key_id: name for key_id, name in rows}  # noqa: C416  # rows are no pairs to the type checker


def _past(row: Mapping[str, Any], key_names: Mapping[str, str]) -> Past:
    decision = from_dict(json.loads(row["decision"])) if row["decision"] else None
    version = (decision.probe_version if decision is not None else None) or "ledger"
    kept = facts.read(row, version)
    if kept is not None:
        return Past(row, decision, *kept, exact=True)
    tokens = row["input_tokens"] + row["cached_input_tokens"] + row["cache_write_tokens"]
    query = Query(
        model=row["model_requested"],
        tenant=row["tenant"],
        input_tokens_estimate=max(tokens // max(row["attempts"], 1), 1),
        max_output_tokens=None,
        endpoint=row["endpoint"],
        session=row["session"],
        run=row["scope"],
        key=key_names.get(row["key_id"], ""),
        team=row["team"],
        id=row["id"],
        at_ms=row["created_at_ms"],
    )
    known = [] if decision is None else [one for one in decision.candidates if one.p_success is not None]
    p = {c.model: Estimate(c.p_success or 0.0, f"{version}/{c.model}", c.p_low, c.p_high) for c in known}
    signals = Signals(p_success=p, probe="ok" if p else "not_asked")
    return Past(row, decision, query, signals, State(now_ms=query.at_ms), exact=False)
