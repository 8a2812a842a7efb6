"""Rates, token rates and concurrency of all workers and hosts together, in Redis.

What the requests of one turn of the event loop ask goes out as one call of one script (`shared_rates.lua`), one call
at a time: the busier the worker, the more requests share a call. Redis's clock is the only one. A place taken of a
concurrency limit is a lease that its worker renews, so that a worker that dies gives its places back.

When Redis is away each worker holds the limits by itself: it has counted along, so its own requests are remembered.
"""

import asyncio
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

from gateway.admission.rates import (
    NO_LIMIT,
    Grant,
    Headers,
    LimitBook,
    LocalGrant,
    LocalRates,
    RateLimit,
    charge,
    rate_headers,
)
from gateway.redis_link import RedisAway, RedisLink
from gateway.telemetry.logs import get_logger

log = get_logger(__name__)

PREFIX = "{leadline}:rate:"
"""One hash tag: all meters live in one slot, because one script takes of several."""
LEASE_S = 60.0
"""A place of a dead worker is free again after this."""
RENEW_S = LEASE_S / 3
MAX_BATCH = 512
MAX_OWED = 10_000
"""What could not be given back while Redis was away and is given back later; past that, leases end by themselves."""
DEGRADED = "redis"

_TAKE, _GIVE, _RENEW = 1, 2, 3
_RATE: Final = 0
_PLACE: Final = 1
_SCRIPT = (Path(__file__).parent / "shared_rates.lua").read_text()
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[list[float]]).decode

_Meter = tuple[str, Literal[0, 1], float, float]
"""(meter, rate or place, two numbers as the script has them)."""


class _Operation:
    __slots__ = ("answer", "asked_at", "code", "meters", "request_id")

    def __init__(
        self, code: int, request_id: str, meters: list[_Meter], answer: "asyncio.Future[list[float] | None] | None"
    ) -> None:
        self.code = code
        self.request_id = request_id
        self.meters = meters
        self.answer = answer
        """None where nobody waits; its result is None where Redis did not answer."""
        self.asked_at = time.monotonic()


class _Unlimited:
    """The grant of a caller without limits, while Redis is away."""

    degraded = DEGRADED

    def release(self, actual_tokens: int) -> None:
        pass

    def headers(self) -> Headers:
        return []


_UNLIMITED: Grant = _Unlimited()


class SharedRates:
    """Owned by one event loop; between `start` and `close` it renews the leases of what is under way."""

    def __init__(self, link: RedisLink, *, renew_s: float = RENEW_S, lease_s: float = LEASE_S) -> None:
        self.book = LimitBook()
        self._link = link
        self._lease_us = int(lease_s * 1e6)
        self._renew_s = renew_s
        self._script = link.client.register_script(_SCRIPT)
        self._local = LocalRates()
        self._queue: deque[_Operation] = deque()
        self._owed: deque[_Operation] = deque(maxlen=MAX_OWED)
        self._held: dict[str, list[_Meter]] = {}
        """Places under way, by request."""
        self._sending: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self.calls = 0
        """Calls of the script so far."""

    def start(self) -> None:
        self._renewing = asyncio.create_task(self._renew(), name="rate-leases")

    async def admit(self, limits: tuple[RateLimit, ...], request_id: str, tokens: int) -> Grant:
        """Raises RateLimited. Waits for Redis 50 ms at most."""
        if not limits:
            return NO_LIMIT if self._link.up else _UNLIMITED
        if not self._link.up:
            return SharedGrant(self, limits, tokens, request_id, self._local.take(limits, tokens), None)
        answer: asyncio.Future[list[float] | None] = asyncio.get_running_loop().create_future()
        meters = [_taken(limit, tokens) for limit in limits]
        self._ask(_Operation(_TAKE, request_id, meters, answer))
        try:
            found = await answer
        except asyncio.CancelledError:
            self._give(request_id, limits, tokens, 0)  # Redis may have admitted it by now, or will
            raise
        if found is None:
            return SharedGrant(self, limits, tokens, request_id, self._local.take(limits, tokens), None)
        refused = int(found[0])
        if refused:
            raise limits[refused - 1].refusal(found[1] / 1e6)
        places = [meter for meter in meters if meter[1] == _PLACE]
        if places:
            self._held[request_id] = places
        return SharedGrant(self, limits, tokens, request_id, self._local.book_in(limits, tokens), found[2:])

    def statistics(self) -> dict[str, int]:
        return {
            "held": len(self._held),
            "owed": len(self._owed),
            "queued": len(self._queue),
            **self._local.statistics(),
        }

    async def close(self) -> None:
        """Give back what is still to be given back, if Redis takes it."""
        if self._renewing is not None:
            self._renewing.cancel()
            with suppress(asyncio.CancelledError):
                await self._renewing
        while self._sending is not None:
            await self._sending

    def give_back(
        self, request_id: str, limits: tuple[RateLimit, ...], tokens: int, actual_tokens: int, *, counted: bool
    ) -> None:
        """`counted`: Redis has the request; else only its places are freed, in case it took them unheard."""
        self._held.pop(request_id, None)
        if counted:
            self._give(request_id, limits, tokens, actual_tokens)
        else:
            places: list[_Meter] = [(limit.meter, _PLACE, 0, 0) for limit in limits if limit.kind == "concurrency"]
            if places:
                self._ask(_Operation(_GIVE, request_id, places, None))

    def _give(self, request_id: str, limits: tuple[RateLimit, ...], tokens: int, actual_tokens: int) -> None:
        meters: list[_Meter] = []
        for limit in limits:
            if limit.kind == "concurrency":
                meters.append((limit.meter, _PLACE, 0, 0))
            elif limit.kind == "tokens":
                more = actual_tokens - charge(limit, tokens)
                if more:
                    meters.append((limit.meter, _RATE, more * limit.interval_s * 1e6, 0))
        if meters:
            self._ask(_Operation(_GIVE, request_id, meters, None))

    def _ask(self, operation: _Operation) -> None:
        if operation.code == _GIVE and not self._link.up:
            self._owed.append(operation)
            return
        self._queue.append(operation)
        if self._sending is None:
            # The task runs in the loop's next turn: by then all requests of this one have asked.
            self._sending = asyncio.create_task(self._send(), name="rates")

    async def _send(self) -> None:
        try:
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
                while self._owed and len(batch) < 2 * MAX_BATCH:
                    batch.insert(0, self._owed.pop())
                answers: list[list[float]] | None = None
                try:
                    answers = await self._call(batch)
                except RedisAway:
                    self._keep_owed(batch)
                finally:
                    for at, operation in enumerate(batch):
                        if operation.answer is not None and not operation.answer.done():
                            operation.answer.set_result(answers[at] if answers is not None else None)
        finally:
            self._sending = None

    async def _call(self, batch: list[_Operation]) -> list[list[float]]:
        places: dict[str, int] = {}
        operations = [
            (
                operation.code,
                operation.request_id,
                [(places.setdefault(name, len(places) + 1), *rest) for name, *rest in operation.meters],
            )
            for operation in batch
        ]
        keys = [PREFIX + name for name in places]
        arguments = (self._lease_us, _encode(operations))
        now = time.monotonic()
        waited_s = max((now - operation.asked_at for operation in batch if operation.answer is not None), default=0.0)
        self.calls += 1
        packed: bytes = await self._link.call(lambda _: self._script(keys, arguments), waited_s=waited_s)
        return _decode(packed)

    def _keep_owed(self, batch: list[_Operation]) -> None:
        """Places that may still be taken are freed later. Charges are not corrected twice, so they are not kept."""
        for operation in batch:
            places = [meter for meter in operation.meters if meter[1] == _PLACE]
            if operation.code == _GIVE and places:
                self._owed.append(_Operation(_GIVE, operation.request_id, places, None))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            if self._link.up:
                for request_id, places in self._held.items():
                    self._ask(_Operation(_RENEW, request_id, places, None))


def _taken(limit: RateLimit, tokens: int) -> _Meter:
    if limit.kind == "concurrency":
        return limit.meter, _PLACE, limit.count, 0
    weight = 1 if limit.kind == "requests" else charge(limit, tokens)
    return limit.meter, _RATE, limit.per_s * 1e6, weight * limit.interval_s * 1e6


class SharedGrant:
    """A Grant of `SharedRates`."""

    __slots__ = ("_due_in_us", "_limits", "_local", "_rates", "_request_id", "_tokens", "degraded")

    def __init__(
        self,
        rates: SharedRates,
        limits: tuple[RateLimit, ...],
        tokens: int,
        request_id: str,
        local: LocalGrant,
        due_in_us: list[float] | None,
    ) -> None:
        self._rates = rates
        self._limits = limits
        self._tokens = tokens
        self._request_id = request_id
        self._local = local
        self._due_in_us = due_in_us
        """As Redis had it at admission, limit by limit; None: Redis was away, and this worker decided."""
        self.degraded = None if due_in_us is not None else DEGRADED

    def release(self, actual_tokens: int) -> None:
        self._local.release(actual_tokens)
        counted = self._due_in_us is not None
        self._rates.give_back(self._request_id, self._limits, self._tokens, actual_tokens, counted=counted)

    def headers(self) -> Headers:
        if self._due_in_us is None:
            return self._local.headers()
        return rate_headers(
            (limit, max(0, int((limit.per_s - due_us / 1e6) / limit.interval_s + 1e-6)), due_us / 1e6)
            for limit, due_us in zip(self._limits, self._due_in_us, strict=True)
            if limit.per_s
        )
