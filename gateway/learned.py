"""What a worker learns from what is said of answers: whether probes still hold, and what bandits have earned.

Each worker reads the outcomes table as it grows and takes in the same pairs in the same order, so all of them, and a
later start, come to the same state without keeping any. A pair is the first word on an answer: what somebody takes
back does not bet twice. What callers choose to rate is no random sample; a judge's shadows are. Alarms are by probe,
model and side (people, judge); arms are per tenant, so that nobody's feedback moves another tenant's requests.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, select, tuple_
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col

from gateway import facts
from gateway.ledger.outcomes import JUDGE, decision_of
from gateway.ledger.tables import OutcomeRow, RequestRow
from gateway.telemetry.logs import get_logger
from probes.drift import DriftAlarm
from routers.bandit import EVERYWHERE, updated
from routers.types import Arm

log = get_logger(__name__)
Clusters = tuple[tuple[int, float], ...]

POLL_S = 10.0
BATCH_ROWS = 500
REACH_MS = 30 * 86_400_000
"""How far back a start looks."""
MAX_SEEN = 50_000
LATE_MS = 5_000
"""Outcomes are taken in when they are so old: what other workers wrote meanwhile is in its place by then."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the pairs of one probe, model and kind of source say by now."""

    probe: str
    model: str
    by: str
    """`people` or `judge`."""
    pairs: int
    evidence: float
    alarm: str
    """What is wrong, in words; empty: nothing is."""


class Learned:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._alarms: dict[tuple[str, str, str], DriftAlarm] = {}
        self._arms: dict[str, dict[int, dict[tuple[int, str], Arm]]] = {}
        """By tenant and cluster."""
        self._seen: OrderedDict[tuple[str, ...], None] = OrderedDict()
        """(request, model, by whom or what for) whose pair was taken, the last MAX_SEEN of them."""
        self._after = (0, "", "", "")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._after = (time.time_ns() // 1_000_000 - REACH_MS, "", "", "")
        self._task = asyncio.create_task(self._watch(), name="outcome-watch")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def calibrations(self) -> list[Calibration]:
        """Of all that has been watched, alarms first."""
        found = [
            Calibration(*key, pairs=alarm.n, evidence=alarm.evidence, alarm=alarm.cause)
            for key, alarm in sorted(self._alarms.items())
        ]
        return sorted(found, key=lambda one: not one.alarm)

    def arms(self, tenant: str, clusters: Clusters) -> Mapping[tuple[int, str], Arm]:
        """What each arm has earned in these clusters of queries, by this tenant's outcomes."""
        of_tenant = self._arms.get(tenant)
        if of_tenant is None:
            return {}
        if not clusters:
            return of_tenant.get(EVERYWHERE[0][0], {})
        found: dict[tuple[int, str], Arm] = {}
        for cluster, _ in clusters:
            found |= of_tenant.get(cluster, {})
        return found

    def read(self, until_ms: int) -> int:
        """Take in one batch of what was said before `until_ms`; returns how many rows there were. Blocking."""
        rows = list(self._batch(until_ms))
        for row in rows:
            self._after = (row.created_at_ms, row.request_id, row.source, row.model)
            if self._first(row.request_id, row.model, "arm"):
                self._reward(row.tenant, facts.clusters_of(row.facts), _arm(row), row.score)
            by = JUDGE if row.source == JUDGE else "people"
            if row.p_success is None or row.probe_version is None or not self._first(row.request_id, row.model, by):
                continue
            key = (row.probe_version, row.model, by)
            if self._alarms.setdefault(key, DriftAlarm()).see(row.p_success, row.score):
                log.warning("probe.drift", probe=key[0], model=key[1], by=by, cause=self._alarms[key].cause)
        return len(rows)

    def _first(self, *key: str) -> bool:
        if key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return True

    def _reward(self, tenant: str, clusters: Clusters, arm: str, score: float) -> None:
        """A new table for each cluster: decisions may be reading the old one."""
        of_tenant = self._arms.setdefault(tenant, {})
        for at in clusters or EVERYWHERE:
            of_tenant[at[0]] = updated(of_tenant.get(at[0], {}), (at,), arm, score)

    def _batch(self, until_ms: int) -> Iterator[Any]:
        row = OutcomeRow
        order = (col(row.created_at_ms), col(row.request_id), col(row.source), col(row.model))
        query = (
            select(
                *order,
                col(row.tenant),
                col(row.score),
                col(row.p_success),
                col(row.probe_version),
                col(RequestRow.facts),
                col(RequestRow.decision),
                col(RequestRow.model_served),
            )
            .join(RequestRow, col(RequestRow.id) == col(row.request_id))
            .where(tuple_(*order) > self._after, col(row.created_at_ms) < until_ms)
            .order_by(*order)
            .limit(BATCH_ROWS)
        )
        with self._engine.connect() as connection:
            yield from connection.execute(query)

    async def _watch(self) -> None:
        while True:
            try:
                while await asyncio.to_thread(self.read, time.time_ns() // 1_000_000 - LATE_MS) == BATCH_ROWS:
                    pass
            except SQLAlchemyError as error:
                log.warning("outcomes.unreadable", error=str(error)[:200])
            await asyncio.sleep(POLL_S)


def _arm(row: Any) -> str:
    """What earned a word on an answer: the plan that ran, where the answer is what was served and not a fallback's; a
    fallback, or a shadow, earns for its model alone."""
    decided = decision_of(row.decision) if row.model == row.model_served else None
    if decided is None:
        return str(row.model)
    plan = decided.plan
    answering = [stage.model for stage in plan.stages] if plan.kind == "cascade" else [plan.model]
    return plan.name if row.model in answering else str(row.model)
