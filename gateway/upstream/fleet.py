"""Several servers with the same models behind one provider: each call goes where its prefix and the load say.

The score of a replica is the share of the prompt that it would have to read, plus its load over the mean load: among
equals the prefix decides, and a replica gives up a full match once it is about a mean load busier than another. A score
that ignores load sends everything to whoever was first. Where the KV is full, a call pushes another out, which is then
read again: that counts as one prompt more to be read.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from gateway.telemetry.logs import get_logger
from gateway.upstream.affinity import PrefixIndex, block_keys
from gateway.upstream.connection import Timeouts
from gateway.upstream.engines import CAPABILITIES, Load, load_of_body
from gateway.upstream.http import HttpClient, RequestHead
from gateway.upstream.http_errors import HttpError
from gateway.upstream.openai import OpenAIUpstream
from gateway.upstream.types import (
    Answer,
    AnswerStream,
    ChatCall,
    Event,
    Hear,
    Progress,
    StreamState,
    Target,
    UpstreamError,
)
from routers.policy import Server

log = get_logger(__name__)

LOAD_AGE_S = 1.0
"""How old a load may be before it is asked for anew, beside the calls."""
FULL_KV = 0.9
"""Share of the KV from which on there is hardly room for one more prompt while those that run go on growing."""
DOWN_S = (1.0, 30.0)
"""How long a replica that does not serve is passed over: from the first to the second, doubling."""
_LOAD_TIMEOUTS = Timeouts(1.0, 2.0, 2.0, 2.0)
_MAX_LOAD_BYTES = 1 << 20
_NO_LOAD = Load()
_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class Replica:
    """One server. `told` is what it last said of its load, beyond what this worker has sent it."""

    name: str
    upstream: OpenAIUpstream
    load_head: RequestHead | None
    in_flight: int = 0
    told: Load = _NO_LOAD
    told_at: float = float("-inf")
    failures: int = 0
    down_until: float = 0.0
    asking: "asyncio.Task[None] | None" = field(default=None, repr=False)

    @property
    def load(self) -> float:
        return self.in_flight + self.told.requests


class Fleet:
    """An upstream made of replicas. One that does not serve now is passed over within the same attempt."""

    def __init__(
        self,
        client: HttpClient,
        provider: str,
        server: Server,
        base_urls: Sequence[str],
        api_key: str | None,
        salt: bytes,
        priority_scheduling: bool = False,
    ) -> None:
        self._client = client
        self._server = server
        self._prefixes = PrefixIndex()
        self._turn = itertools.count()
        path = CAPABILITIES[server].load_path
        headers = [("Authorization", f"Bearer {api_key}")] if api_key is not None else []
        self.replicas = []
        for number, base_url in enumerate(base_urls):
            root = base_url.rstrip("/").removesuffix("/v1")
            name = provider if len(base_urls) == 1 else f"{provider}[{number}]"
            replica = Replica(
                name,
                OpenAIUpstream(
                    client, name, base_url, api_key, server=server, salt=salt, priority_scheduling=priority_scheduling
                ),
                RequestHead("GET", root + path, headers) if path is not None and len(base_urls) > 1 else None,
            )
            replica.upstream.on_load = _teller(replica)
            self.replicas.append(replica)

    def unavailable(self, target: Target) -> str | None:
        return None

    async def complete(self, target: Target, call: ChatCall, progress: Progress | None = None) -> Answer:
        async def ask(replica: Replica) -> Answer:
            try:
                return await replica.upstream.complete(target, call, progress)
            finally:
                replica.in_flight -= 1

        return await self._first(call, ask)

    async def stream(self, target: Target, call: ChatCall, progress: Progress | None = None) -> AnswerStream:
        async def ask(replica: Replica) -> AnswerStream:
            try:
                return _Counted(await replica.upstream.stream(target, call, progress), replica)
            except BaseException:
                replica.in_flight -= 1
                raise

        return await self._first(call, ask)

    async def _first(self, call: ChatCall, ask: Callable[[Replica], Awaitable[_T]]) -> _T:
        """The answer of the best replica that serves. `ask` counts it out of flight."""
        keys = _keys_of(call) if len(self.replicas) > 1 else []
        ranked = self._ranked(keys)
        for left, at in zip(reversed(range(len(ranked))), ranked, strict=True):
            replica = self.replicas[at]
            replica.in_flight += 1
            self._prefixes.saw(keys, at)
            try:
                answer = await ask(replica)
            except UpstreamError as error:
                if not _serves_nobody(error):
                    raise
                self._lost(at, error)
                if not left:
                    raise
            else:
                replica.failures = 0
                return answer
        raise AssertionError("a fleet has a replica")

    async def close(self) -> None:
        """End what is asked beside calls."""
        asking = [replica.asking for replica in self.replicas if replica.asking is not None]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _ranked(self, keys: Sequence[int]) -> list[int]:
        """Replicas by score, best first; those that did not serve of late come last."""
        now = time.monotonic()
        matched = self._prefixes.matched(keys, len(self.replicas))
        for replica in self.replicas:
            self._refresh(replica, now)
        mean = sum(replica.load for replica in self.replicas) / len(self.replicas)
        turn = next(self._turn)

        def score(at: int) -> tuple[bool, float, int]:
            replica = self.replicas[at]
            busy = (1 - matched[at]) + replica.load / (mean + 1) + (replica.told.kv >= FULL_KV)
            return (replica.down_until > now, busy, (at - turn) % len(self.replicas))

        return sorted(range(len(self.replicas)), key=score)

    def _lost(self, at: int, error: UpstreamError) -> None:
        replica = self.replicas[at]
        pause_s = min(DOWN_S[0] * 2**replica.failures, DOWN_S[1])
        replica.failures += 1
        replica.down_until = time.monotonic() + pause_s
        replica.told = _NO_LOAD
        self._prefixes.forget(at)
        log.warning("replica.passed_over", replica=replica.name, error=error.kept, passed_over_s=pause_s)

    def _refresh(self, replica: Replica, now: float) -> None:
        """Forget a load that is old; ask for it where the server has a path for it."""
        if now - replica.told_at < LOAD_AGE_S:
            return
        if replica.load_head is None:
            replica.told = _NO_LOAD
        elif replica.asking is None or replica.asking.done():
            replica.asking = asyncio.create_task(self._ask_load(replica, replica.load_head), name="replica-load")

    async def _ask_load(self, replica: Replica, head: RequestHead) -> None:
        sent = replica.in_flight
        load = None
        with contextlib.suppress(HttpError):
            response = await self._client.request(head, b"", _LOAD_TIMEOUTS)
            try:
                body = await response.read(_MAX_LOAD_BYTES)
                load = load_of_body(self._server, body) if response.status == 200 else None
            finally:
                response.release()
        replica.told = replace(load, requests=max(0.0, load.requests - sent)) if load is not None else _NO_LOAD
        replica.told_at = time.monotonic()


def _serves_nobody(error: UpstreamError) -> bool:
    """Nobody listens, or there is no engine behind who does: nothing was computed, and retries would meet the same."""
    return error.cause == "connect" or error.status == 503


class _Counted:
    """A stream that is in flight at its replica until it is closed."""

    def __init__(self, stream: AnswerStream, replica: Replica) -> None:
        self.state: StreamState = stream.state
        self._stream = stream
        self._replica: Replica | None = replica

    def listen(self, hear: Hear) -> None:
        self._stream.listen(hear)

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self._stream.__aiter__()

    async def close(self) -> None:
        replica, self._replica = self._replica, None
        if replica is not None:
            replica.in_flight -= 1
        await self._stream.close()


def _teller(replica: Replica) -> Callable[[Load], None]:
    """Takes the load that came with an answer."""

    def tell(load: Load) -> None:
        replica.told, replica.told_at = load, time.monotonic()

    return tell


def _keys_of(call: ChatCall) -> list[int]:
    """Of what the engine's prompt is made of, in its order: tools stand before the messages."""
    fields = call.fields
    prompt = fields.get("messages") or fields.get("prompt") or fields.get("input")
    parts = [memoryview(part) for part in (fields.get("tools"), prompt) if part is not None]
    return block_keys(f"{call.tenant}\n{call.model}", parts)
