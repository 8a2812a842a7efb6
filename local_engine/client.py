"""The gateway's end of the engine link. No torch here: gateway workers import this."""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Final, Literal

import msgspec

from local_engine.errors import EngineFailure, EngineGone, EngineSilent
from local_engine.plan_types import Plan
from local_engine.prefix_types import KVEvent, PrefixStats
from local_engine.types import (
    Cancel,
    Command,
    Delta,
    Effort,
    Embed,
    EmbedResult,
    EngineStats,
    Event,
    Failed,
    Finished,
    Follow,
    Generate,
    Hello,
    Prefix,
    PrefixEvents,
    PrefixResult,
    Probe,
    ProbeResult,
    SamplingParams,
    Score,
    ScoreResult,
    Stats,
    StatsResult,
    TapSpec,
    ThoughtSoFar,
)
from local_engine.wire import FrameError, decode_event, encode_frame, read_frame

COUNTS_WITHIN_S: Final = 5.0
"""The engine counts in passing, whatever it computes: one that takes longer hangs."""
MAX_UNREAD: Final = 10_000
"""Events that wait for whoever asked; one more, and all are dropped for a failure that says so."""


class EngineClient:
    """One connection to an engine, shared by any number of tasks of one event loop.

    A lost connection ends everything in flight with EngineGone at once; `connect` may then be called again. A slow
    reader of a stream holds up nobody: its deltas are merged while they wait, so a stream never holds more than one
    merged delta for each choice, bounded by the model's context, and the closing events.
    """

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._hello: Hello | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._inboxes: dict[int, _Inbox] = {}
        self._ids = itertools.count(1)

    @property
    def connected(self) -> bool:
        return self._writer is not None and not self._writer.is_closing()

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._inboxes)

    @property
    def hello(self) -> Hello:
        """What the engine said of itself. Raises EngineGone before the first `connect`."""
        if self._hello is None:
            raise EngineGone("not connected to an engine yet")
        return self._hello

    async def connect(self) -> Hello:
        """Connect and wait for the engine's greeting. Raises EngineGone when nobody answers."""
        await self.close()
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket_path)
        except OSError as error:
            raise EngineGone(f"no engine at {self._socket_path}: {error.strerror or error}") from error
        try:
            body = await read_frame(reader)
            hello = decode_event(body) if body is not None else None
            if not isinstance(hello, Hello):
                raise EngineGone(f"what listens at {self._socket_path} does not greet like an engine")
        except (FrameError, msgspec.DecodeError) as error:
            writer.close()
            raise EngineGone(f"what listens at {self._socket_path} is no engine: {error}") from error
        except BaseException:
            writer.close()
            raise
        self._hello, self._writer = hello, writer
        self._reading = asyncio.create_task(self._read(reader), name="engine-client")
        return hello

    async def closed(self) -> None:
        """Returns when the link is gone, whoever ended it."""
        if self._reading is not None:
            await asyncio.wait((self._reading,))

    async def close(self) -> None:
        """Hang up; the engine cancels what this connection asked for. Harmless when not connected."""
        self._hang_up("this client closed the connection")
        reading, self._reading = self._reading, None
        writer, self._writer = self._writer, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if writer is not None:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def give_up(self, why: str) -> None:
        """End everything in flight with EngineSilent; the link stays. An engine that wakes up computes none of it."""
        for id, inbox in self._inboxes.items():
            self._cancel(id)
            inbox.close(EngineSilent(why))

    async def generate(
        self,
        model: str,
        messages_json: bytes,
        sampling: SamplingParams,
        tools_json: bytes | None = None,
        prefix: str = "",
        *,
        n: int = 1,
        priority: int = 0,
        deadline_s: float | None = None,
        salt: str = "",
        taps: TapSpec | None = None,
        tool_choice: Literal["none", "auto", "required"] = "auto",
        tool: str = "",
        plan: Plan | None = None,
        thought: ThoughtSoFar | None = None,
        context: int | None = None,
    ) -> AsyncGenerator[Delta | Finished, None]:
        """Stream `n` answers, each of which ends with Finished. Leaving early (`aclose`, a cancelled task) cancels all.

        Raises EngineFailure when the engine refuses or fails, EngineGone when the link is or gets lost. Use
        `contextlib.aclosing` so that leaving the loop early closes the stream at once.
        """
        with self._asking() as (id, inbox):
            running = n
            try:
                self._send(
                    Generate(
                        id,
                        model,
                        messages_json,
                        sampling,
                        tools_json,
                        prefix,
                        n,
                        priority,
                        deadline_s,
                        salt,
                        taps,
                        tool_choice,
                        tool,
                        plan,
                        thought,
                        context,
                    )
                )
                while running:
                    event = await inbox.get()
                    running -= isinstance(event, Finished)
                    if isinstance(event, Delta | Finished):
                        yield event
            except (EngineFailure, EngineGone):
                running = 0
                raise
            finally:
                if running:
                    self._cancel(id)

    async def score(
        self,
        model: str,
        messages_json: bytes,
        candidates: Sequence[str],
        tools_json: bytes | None = None,
        prefix: str = "",
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        salt: str = "",
    ) -> ScoreResult:
        """How probable each candidate is as what comes next. Raises as `generate` does."""
        texts = list(candidates)
        event = await self._ask(
            lambda id: Score(id, model, messages_json, texts, tools_json, prefix, priority, deadline_s, salt)
        )
        assert isinstance(event, ScoreResult)
        return event

    async def probe(
        self,
        messages_json: bytes,
        model: str = "",
        tools_json: bytes | None = None,
        *,
        effort: Effort = "low",
        salt: str = "",
        ttl_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> ProbeResult:
        """How likely this is answered well, as the encoder has it, and how long its prompt is for each model.

        With `model` as that model's own reading has it; what was read is kept for `ttl_s`, and a `generate` of the same
        messages, tools, effort and salt computes none of it again. Raises as `generate` does.
        """
        event = await self._ask(lambda id: Probe(id, messages_json, model, tools_json, effort, salt, ttl_s, deadline_s))
        assert isinstance(event, ProbeResult)
        return event

    async def embed(self, texts: Sequence[str]) -> EmbedResult:
        """One vector per text. Raises as `generate` does."""
        event = await self._ask(lambda id: Embed(id, list(texts)))
        assert isinstance(event, EmbedResult)
        return event

    async def stats(self) -> EngineStats:
        """What the engine is doing. Raises as `generate` does."""
        return (await self._counts()).stats

    async def prefix_stats(self) -> dict[str, PrefixStats]:
        """What each model's prefix store has done. Raises as `generate` does."""
        return (await self._counts()).prefixes

    async def _counts(self) -> StatsResult:
        try:
            async with asyncio.timeout(COUNTS_WITHIN_S):
                event = await self._ask(Stats)
        except TimeoutError:
            raise EngineSilent(f"it said nothing for {COUNTS_WITHIN_S:g} s") from None
        assert isinstance(event, StatsResult)
        return event

    async def prefix(
        self,
        model: str,
        action: Literal["lookup", "pin", "unpin", "evict"],
        messages_json: bytes | None = None,
        tools_json: bytes | None = None,
        *,
        effort: Effort = "low",
        salt: str = "",
        deadline_s: float | None = None,
    ) -> PrefixResult:
        """See `local_engine.types.Prefix`. Raises as `generate` does."""
        event = await self._ask(
            lambda id: Prefix(id, model, action, messages_json, tools_json, effort, salt, deadline_s)
        )
        assert isinstance(event, PrefixResult)
        return event

    async def prefix_events(self, model: str) -> AsyncGenerator[list[KVEvent], None]:
        """What the model's prefix store has, block by block, and from then on what comes and goes, until it is left.

        Raises as `generate` does, and EngineFailure where its reader has fallen MAX_UNREAD messages behind: what it
        knows is not true any more.
        """
        with self._asking() as (id, inbox):
            self._send(Follow(id, model))
            try:
                while True:
                    event = await inbox.get()
                    if isinstance(event, Finished):  # cancelled, and not by us
                        raise EngineGone("the engine stopped")
                    assert isinstance(event, PrefixEvents)
                    yield event.events
            finally:
                self._cancel(id)

    async def _ask(self, command: Callable[[int], Command]) -> Event:
        with self._asking() as (id, inbox):
            self._send(command(id))
            try:
                event = await inbox.get()
            except asyncio.CancelledError:
                self._cancel(id)
                raise
            if isinstance(event, Finished):  # cancelled, and not by us
                raise EngineGone("the engine stopped before it answered")
            return event

    @contextlib.contextmanager
    def _asking(self) -> Iterator[tuple[int, "_Inbox"]]:
        id = next(self._ids)
        inbox = self._inboxes[id] = _Inbox(id)
        try:
            yield id, inbox
        finally:
            del self._inboxes[id]

    def _send(self, command: Command) -> None:
        if self._writer is None or self._writer.is_closing():
            raise EngineGone("not connected to the engine")
        try:
            self._writer.write(encode_frame(command))
        except FrameError as error:
            raise EngineFailure("invalid_request", str(error)) from error

    def _cancel(self, id: int) -> None:
        with contextlib.suppress(EngineGone):  # then nothing is left to cancel
            self._send(Cancel(id))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        reason = "the engine closed the connection"
        try:
            while (body := await read_frame(reader)) is not None:
                event = decode_event(body)
                if not isinstance(event, Hello) and (inbox := self._inboxes.get(event.id)):
                    inbox.put(event)
        except (FrameError, msgspec.DecodeError) as error:
            reason = f"the engine sent what is no event: {error}"
        finally:
            self._hang_up(reason)

    def _hang_up(self, reason: str) -> None:
        if self._writer is not None:
            self._writer.close()
        for inbox in self._inboxes.values():
            inbox.close(EngineGone(reason))


class _Inbox:
    """The events of one command that its caller has not taken yet."""

    def __init__(self, id: int) -> None:
        self._id = id
        self._events: deque[Event] = deque()
        self._closed: EngineGone | None = None
        self._changed = asyncio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, Delta):
            for at, waiting in enumerate(self._events):
                if isinstance(waiting, Delta) and waiting.choice == event.choice:
                    self._events[at] = _merged(waiting, event)
                    return
        if len(self._events) >= MAX_UNREAD:  # its reader may never read again
            self._events.clear()
            event = Failed(self._id, "internal", f"{MAX_UNREAD} messages were not read; begin anew")
        self._events.append(event)
        self._changed.set()

    def close(self, error: EngineGone) -> None:
        self._closed = self._closed or error
        self._changed.set()

    async def get(self) -> Event:
        """The next event. Raises EngineFailure for Failed, and EngineGone when no more can come."""
        while not self._events:
            if self._closed is not None:
                raise self._closed
            self._changed.clear()
            await self._changed.wait()
        event = self._events.popleft()
        if isinstance(event, Failed):
            raise EngineFailure(event.code, event.message, event.param)
        return event


def _merged(first: Delta, then: Delta) -> Delta:
    return Delta(
        first.id,
        first.content + then.content,
        first.reasoning + then.reasoning,
        first.tokens + then.tokens,
        [*first.logprobs, *then.logprobs],
        first.choice,
        [*first.tapped, *then.tapped],
        [*first.tool_calls, *then.tool_calls],
        first.reasoning_tokens + then.reasoning_tokens,
        first.input_tokens,
        first.cached_tokens,
    )
