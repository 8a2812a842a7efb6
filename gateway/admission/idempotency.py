"""Idempotency keys, with Stripe's semantics: the first result of a key is what every repetition gets, for 24 hours.

A claim is a row in SQL, inserted before the request is admitted: of any number of workers and repetitions, one runs.
Only requests that send the header pay for it, and none of it runs on the event loop's thread.
"""

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, Engine, Executable, Table, and_, bindparam, delete, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col

from gateway.errors import IdempotencyMismatch, OutcomeUnknown, RequestUnderWay, Unavailable
from gateway.ledger.tables import IdempotencyRow, RequestRow, insert_into
from gateway.telemetry.logs import get_logger

log = get_logger(__name__)

KEEP_S = 24 * 3600.0
LEASE_S = 15.0
"""Renewed while the owner lives; after it, the ledger says what became of the request."""
PURGE_S = 600.0
MAX_BODY_BYTES = 2 << 20
"""A larger answer is not kept: a repetition is refused and names the receipt."""
UNDER_WAY_RETRY_S = 1.0

_T = TypeVar("_T")
_table: Table = IdempotencyRow.__table__  # type: ignore[attr-defined]
_row = _table.c


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run a request; end it with `finish` or `release`."""

    key_id: str
    idempotency_key: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Replay:
    """What the first request with this key was answered."""

    request_id: str
    status: int
    content_type: str
    body: bytes


class IdempotencyStore:
    """Owned by one event loop. `start` keeps the leases of its claims and purges what has expired."""

    def __init__(self, engine: Engine, pepper: bytes, *, lease_s: float = LEASE_S) -> None:
        self._engine = engine
        self._pepper = pepper
        self._lease_ms = int(lease_s * 1000)
        self._owner = uuid.uuid4().hex
        self._live: set[Claim] = set()
        self._insert = insert_into(_table, engine.dialect.name).on_conflict_do_nothing().returning(_row.request_id)
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._keeping = asyncio.create_task(self._keep(), name="idempotency-leases")

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def claim(
        self, key_id: str, idempotency_key: str, *, path: str, body: bytes, request_id: str
    ) -> Claim | Replay:
        """A claim for the first request with this key, its result for every later one.

        Raises RequestUnderWay while the first is under way, IdempotencyMismatch for another request under the same key,
        OutcomeUnknown when the first one's result is lost, Unavailable without the database.
        """
        digest = hmac.new(self._pepper, b"idempotency\n%d:" % len(path) + path.encode(), hashlib.sha256)
        digest.update(body)
        claim = Claim(key_id, idempotency_key, request_id)
        replay = await self._in_sql(lambda connection: self._claim(connection, claim, digest.hexdigest()))
        if replay is not None:
            return replay
        self._live.add(claim)
        return claim

    async def finish(self, claim: Claim, status: int, content_type: str, body: bytes | None) -> None:
        """Keep the result. `body` None: too large to keep. A database that is away is logged: the answer goes out."""
        values = {"status": status, "content_type": content_type, "body": body}
        await self._end(claim, update(_table).where(_is(claim)).values(**values))

    async def release(self, claim: Claim) -> None:
        """The request never ran, or left nothing to repeat: the next one with its key runs."""
        await self._end(claim, delete(_table).where(_is(claim)))

    async def _end(self, claim: Claim, statement: Executable) -> None:
        self._live.discard(claim)
        try:
            await self._run(statement)
        except Unavailable:
            log.error("idempotency.not_kept", request_id=claim.request_id)

    async def _run(self, statement: Executable, parameters: list[dict[str, str]] | None = None) -> None:
        def run(connection: Connection) -> None:
            connection.execute(statement, parameters)

        await self._in_sql(run)

    async def _in_sql(self, run: Callable[[Connection], _T]) -> _T:
        def transact() -> _T:
            with self._engine.begin() as connection:
                return run(connection)

        try:
            return await asyncio.to_thread(transact)
        except SQLAlchemyError as error:
            log.error("idempotency.sql_failed", error=str(error)[:200])
            raise Unavailable(
                "idempotency-key: the database that keeps it does not answer; retry shortly.", retry_after_s=1
            ) from error

    def _claim(self, connection: Connection, claim: Claim, body_hash: str) -> Replay | None:
        now_ms = time.time_ns() // 1_000_000
        values = {
            "key_id": claim.key_id,
            "idempotency_key": claim.idempotency_key,
            "body_hash": body_hash,
            "request_id": claim.request_id,
            "owner": self._owner,
            "lease_until_ms": now_ms + self._lease_ms,
            "expires_at_ms": now_ms + int(KEEP_S * 1000),
        }
        for _ in range(3):
            if connection.execute(self._insert, values).first() is not None:
                return None
            found = connection.execute(
                select(_table).where(_row.key_id == claim.key_id, _row.idempotency_key == claim.idempotency_key)
            ).one_or_none()
            if found is None:
                continue  # released since
            earlier = Claim(claim.key_id, claim.idempotency_key, found.request_id)
            if found.expires_at_ms > now_ms:
                if found.body_hash != body_hash:
                    raise IdempotencyMismatch(
                        "idempotency-key: was first sent with another request; use a new key for each request, and "
                        "the same bytes to repeat one."
                    )
                if found.status is not None:
                    return _replay(found.request_id, found.status, found.content_type, found.body)
                if found.lease_until_ms > now_ms:
                    raise _under_way(found.request_id)
                _check_interrupted(connection, found.request_id)
            connection.execute(delete(_table).where(_is(earlier)))
        raise _under_way(claim.request_id)  # others come and go faster than we look

    async def _keep(self) -> None:
        purge_at = 0.0
        while True:
            await asyncio.sleep(self._lease_ms / 3000)
            try:
                await self._renew()
                if time.monotonic() >= purge_at:
                    await self._run(delete(_table).where(_row.expires_at_ms < time.time_ns() // 1_000_000))
                    purge_at = time.monotonic() + PURGE_S
            except Unavailable:
                continue  # logged; tried again with the next lease

    async def _renew(self) -> None:
        claims = [{"k": claim.key_id, "i": claim.idempotency_key, "r": claim.request_id} for claim in self._live]
        if claims:
            mine = and_(
                _row.key_id == bindparam("k"), _row.idempotency_key == bindparam("i"), _row.request_id == bindparam("r")
            )
            until_ms = time.time_ns() // 1_000_000 + self._lease_ms
            await self._run(update(_table).where(mine).values(lease_until_ms=until_ms), claims)


def _is(claim: Claim) -> ColumnElement[bool]:
    """The row of this claim and of no later one."""
    return and_(
        _row.key_id == claim.key_id,
        _row.idempotency_key == claim.idempotency_key,
        _row.request_id == claim.request_id,
    )


def _replay(request_id: str, status: int, content_type: str, body: bytes | None) -> Replay:
    if body is None:
        raise OutcomeUnknown(
            f"idempotency-key: its answer was larger than {MAX_BODY_BYTES >> 20} MiB and was not kept; "
            f"/leadline/v1/requests/{request_id} has its receipt. Use a new key to run it again."
        )
    return Replay(request_id, status, content_type, bytes(body))


def _under_way(request_id: str) -> RequestUnderWay:
    conflict = RequestUnderWay(f"idempotency-key: its first request ({request_id}) is still under way; retry shortly.")
    conflict.retry_after_s = UNDER_WAY_RETRY_S
    return conflict


def _check_interrupted(connection: Connection, request_id: str) -> None:
    """Its worker is dead. What the ledger has closed as interrupted may run again; else raises OutcomeUnknown."""
    outcome = connection.execute(select(col(RequestRow.outcome)).where(col(RequestRow.id) == request_id)).scalar()
    if outcome != "interrupted":
        raise OutcomeUnknown(
            f"idempotency-key: the worker that ran its first request is gone and its answer with it; "
            f"/leadline/v1/requests/{request_id} has, or will have, its receipt. Use a new key to run it again."
        )
