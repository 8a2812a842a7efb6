"""A stream on its way to its caller: what is told, what is kept of it, and the bill when it ends."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import msgspec

from gateway.errors import LeadlineError
from gateway.ledger.records import AttemptRecord
from gateway.ledger.settle import Usage
from gateway.resume import Transcript, resumable
from gateway.ticket import Ticket
from gateway.upstream.gather import Kept, as_stream
from gateway.upstream.sse import DONE, write_event
from gateway.upstream.told_usage import told_as
from gateway.upstream.types import Answer, AnswerStream, ChatCall, Event, UpstreamError

MAX_KEPT_BYTES = 2 << 20
"""A longer stream is not kept for the cache."""

_encode = msgspec.json.Encoder().encode


class Reply(Protocol):
    """The caller's end of the request. `headers` are lines (`gateway.header_lines`)."""

    async def whole(self, status: int, headers: bytes, body: bytes) -> None: ...

    async def start_stream(self, headers: bytes) -> None: ...

    async def send(self, data: bytes) -> None: ...

    @property
    def ready(self) -> bool:
        """Whether a stream that has begun may go on by `send_now`."""
        ...

    def send_now(self, data: bytes) -> None:
        """As `send`, without waiting for anything; only while `ready`."""
        ...

    async def end(self) -> None: ...

    async def fail(self, error: LeadlineError, headers: bytes, comment: bytes = b"") -> None:
        """An error body, or where a stream has begun an error event, and the comment: never a success terminator."""
        ...


class Relay:
    """Hands a stream on to the caller, and bills its attempt when it ends, however it ends."""

    def __init__(self, ticket: Ticket, reply: Reply) -> None:
        self._ticket = ticket
        self._reply = reply
        route = ticket.route
        resumes = route is not None and route.on_stream_failure == "resume" and resumable(ticket.call)
        self._transcript = Transcript() if resumes else None
        self._keeping = ticket.cache_key is not None or casts_shadows(ticket)
        self._broke: AttemptRecord | None = None
        self.started = False
        self._metered = False
        self.kept = Kept()
        self.usage_event: Event | None = None
        self._last: Event | None = None

    @property
    def complete(self) -> bool:
        """Whether `kept` is the whole answer, of one model, with its usage."""
        return self._keeping and self._metered

    def continued(self) -> ChatCall | None:
        """The call for the rest of an answer that broke off; None where the route or the request allows none."""
        return self._transcript.continued(self._ticket.call) if self._transcript is not None else None

    def resumes(self) -> None:
        """Another target goes on with it."""
        assert self._transcript is not None
        if self._broke is not None and not self._transcript.resumed:
            self._ticket.told(self._broke)
        self._transcript.resumed = self._ticket.resumed = True
        self._keeping = False

    async def run(self, stream: AnswerStream, attempt: AttemptRecord) -> None:
        """What one attempt streams. Raises UpstreamError when it breaks off."""
        ticket, reply, state = self._ticket, self._reply, stream.state
        outcome = ""
        try:
            await self._start()
            stream.listen(self._tell_now)
            async for events in stream:
                if told := self._told(events):
                    await reply.send(told)
            outcome = "ok"
            self._metered = state.usage is not None
            if self.usage_event is None and state.usage is not None and self._last is not None:
                self.usage_event = _usage_chunk(self._last, state.usage)
        except UpstreamError as error:
            outcome = error.cause
            attempt.error = error.kept
            raise
        except Exception:
            outcome = "error"
            raise
        finally:
            # Billed before anything is awaited: a second cancel must not find the attempt open. A count that came
            # before the end of the stream is not the whole count.
            try:
                usage = state.usage if state.done else state.so_far()
                outcome = outcome or ticket.interruption()
                ticket.end_attempt(
                    attempt,
                    outcome,
                    usage,
                    delivered_bytes=state.delivered_bytes,
                    deltas=state.deltas,
                    plan=state.plan if state.done else None,
                )
                self._broke = attempt
                if self._transcript is not None and self._transcript.resumed:
                    ticket.told(attempt)
            finally:
                await stream.close()

    async def tell(self, groups: AsyncGenerator[list[Event]]) -> None:
        """What a plan of several calls says, which bills them itself."""
        async with aclosing(groups):
            async for events in groups:
                await self._start()
                if told := self._told(events):
                    await self._reply.send(told)
        self._metered = True

    def _tell_now(self, events: list[Event]) -> bool:
        """Tell them within the read that brought them, if the caller keeps up: no task is woken for it."""
        reply = self._reply
        if not reply.ready:
            return False
        if told := self._told(events):
            reply.send_now(told)
        return True

    def _told(self, events: list[Event]) -> bytes:
        """As the caller gets them. A last chunk of usage alone waits for the receipt."""
        transcript, told = self._transcript, b""
        for event in events:
            if transcript is not None:
                event = transcript.renamed(event) if transcript.resumed else event
                transcript.note(event)
            if self._keeping:
                self._keep(event)
            if event.usage_only:
                self.usage_event = event
            else:
                told += write_event(event.data)
                self._last = event
        return told

    async def _start(self) -> None:
        if not self.started:
            self.started = True
            await self._reply.start_stream(self._ticket.headers(final=False))

    async def replay(self, answer: Answer) -> None:
        """A whole answer, whose attempt has been billed, as the stream that its caller asked for."""
        chunks = as_stream(answer.body)
        events = [Event(chunk, False) for chunk in chunks[:-1]]
        self.usage_event = Event(chunks[-1], True)
        for event in (*events, self.usage_event):
            if self._keeping:
                self._keep(event)
        self._metered = answer.usage is not None
        self.started = True
        await self._reply.start_stream(self._ticket.headers(final=False))
        await self._reply.send(b"".join(write_event(event.data) for event in events))

    def _keep(self, event: Event) -> None:
        self.kept.add(event)
        self._keeping = self.kept.size <= MAX_KEPT_BYTES


def _usage_chunk(last: Event, usage: Usage) -> Event:
    """Of a stream whose usage came beside a choice: `last` is its last chunk."""
    frame = msgspec.json.decode(last.data, type=dict[str, msgspec.Raw])
    return Event(_encode({**frame, "choices": [], "usage": told_as(usage)}), usage_only=True)


def casts_shadows(ticket: Ticket) -> bool:
    return ticket.decision is not None and bool(ticket.decision.shadow)


def last_events(ticket: Ticket, usage_event: Event | None) -> bytes:
    """The receipt, to those who asked for usage; the cost as a comment, which every client ignores; the end."""
    out = b""
    if ticket.call.include_usage and usage_event is not None:
        fields = msgspec.json.decode(usage_event.data, type=dict[str, msgspec.Raw])
        fields["leadline"] = msgspec.Raw(_encode(ticket.receipt()))
        if ticket.resumed and ticket.told_usage is not None:  # the chunk knows the last of its writers alone
            fields["usage"] = msgspec.Raw(_encode(told_as(ticket.told_usage)))
        out = write_event(_encode(fields))
    if ticket.resumed:
        out += b": leadline-resumed\n\n"
    return out + cost_comment(ticket) + DONE


def cost_comment(ticket: Ticket) -> bytes:
    """What the request has cost, in a line that every reader of a stream ignores who does not look for it."""
    cost = ticket.record.cost_nanousd
    return b": leadline-cost-nanousd " + (b"unpriced" if cost is None else b"%d" % cost) + b"\n\n"
