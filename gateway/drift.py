"""Whether the probe still means what it says, from what is said of answers: an alarm per probe, model and side.

Each worker reads the outcomes table as it grows and feeds the same pairs in the same order to `probes.drift`, so all
of them, and a later start, come to the same state without keeping any. A pair is the first word on an answer: what
somebody takes back does not bet twice. What callers choose to rate is no random sample; a judge's shadows are one.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, select, tuple_
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col

from gateway.ledger.outcomes import JUDGE
from gateway.ledger.tables import OutcomeRow
from gateway.telemetry.logs import get_logger
from probes.drift import DriftAlarm

log = get_logger(__name__)

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


class DriftWatch:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._alarms: dict[tuple[str, str, str], DriftAlarm] = {}
        self._seen: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        """(request, model, kind of source) whose pair was taken, the last MAX_SEEN of them."""
        self._after = (0, "", "", "")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._after = (time.time_ns() // 1_000_000 - REACH_MS, "", "", "")
        self._task = asyncio.create_task(self._watch(), name="drift-watch")

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

    def read(self, until_ms: int) -> int:
        """Take in one batch of what was said before `until_ms`; returns how many rows there were. Blocking."""
        rows = list(self._batch(until_ms))
        for row in rows:
            self._after = (row.created_at_ms, row.request_id, row.source, row.model)
            by = JUDGE if row.source == JUDGE else "people"
            if (row.request_id, row.model, by) in self._seen:
                continue
            self._seen[row.request_id, row.model, by] = None
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
            key = (row.probe_version, row.model, by)
            if self._alarms.setdefault(key, DriftAlarm()).see(row.p_success, row.score):
                log.warning("probe.drift", probe=key[0], model=key[1], by=by, cause=self._alarms[key].cause)
        return len(rows)

    def _batch(self, until_ms: int) -> Iterator[Any]:
        row = OutcomeRow
        order = (col(row.created_at_ms), col(row.request_id), col(row.source), col(row.model))
        query = (
            select(*order, col(row.score), col(row.p_success), col(row.probe_version))
            .where(
                tuple_(*order) > self._after,
                col(row.created_at_ms) < until_ms,
                col(row.p_success).is_not(None),
                col(row.probe_version).is_not(None),
            )
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
                log.warning("drift.unreadable", error=str(error)[:200])
            await asyncio.sleep(POLL_S)
