"""The calls of one plan: each an attempt, with its hold, its breaker, its retries and its bill."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable

from gateway.attempts import AttemptEngine, followed, stream
from gateway.ledger.records import LEFT, AttemptKind, AttemptRecord
from gateway.ledger.settle import Usage
from gateway.stepping.following import Following, Heard
from gateway.stepping.said import Said, read_said
from gateway.stepping.teller import Teller
from gateway.ticket import Ticket
from gateway.told import told
from gateway.upstream.types import AnswerStream, ChatCall, Target, UpstreamError

MARGIN = 32
"""Tokens that a call adds by itself: tags, and the cue of a rating."""
Make = Callable[[ChatCall], ChatCall]


class Full(Exception):
    """The base's context has no room for more of what has begun: the answer ends here, by its length."""


class Gone(Exception):
    """A model cannot be had: it has been tried as often as its policy allows. The errors are where they were noted."""


class Calls:
    def __init__(self, engine: AttemptEngine, ticket: Ticket, base: Target, errors: list[UpstreamError]) -> None:
        self._engine = engine
        self._ticket = ticket
        self.base = base.model
        self.longest = base.max_output
        """Tokens of an answer of the base."""
        self.price = base.price
        """Of the base."""
        self.call = told(ticket, base.model)
        self.errors = errors
        """Of the base."""
        self.draft_errors: list[UpstreamError] = []
        self.teller = Teller(base.model)
        self.read: Counter[str] = Counter()
        """Tokens of prompts, by model."""
        self.cached: Counter[str] = Counter()
        """Of them, those that the server had."""
        self._context = {target.model: target.context for target in ticket.world.targets.values()}
        self._filled: Counter[str] = Counter()
        """Tokens of a model's context, as its last call left it."""
        self.leaving = False
        """A stream that is closed before its end is ended by the plan, and not because its caller left."""
        self.separating: set[str] = set()
        """Models that have been heard to tell a thought apart from an answer: what is content then is answer."""

    async def said(self, model: str, kind: AttemptKind, make: Make) -> tuple[Said, AttemptRecord]:
        """What a model says to one call that comes whole. Raises Gone, and Full."""
        known, errors = self.errors if model == self.base else self.draft_errors, list[UpstreamError]()
        self._unseen()
        found = await self._engine.on_target(
            self._ticket, model, followed, errors, lambda *to: make(told(*to)), kind=kind
        )
        if found is None:
            known += errors
            self._must_fit(model, errors)
            raise Gone(model)
        answer, attempt = found
        try:
            said = read_said(answer, separates=model in self.separating)
        except UpstreamError as error:
            known.append(error)
            self._ticket.end_attempt(attempt, error.cause, answer.usage, delivered_bytes=answer.delivered_bytes)
            raise Gone(model) from error
        self._ticket.end_attempt(attempt, "ok", answer.usage, delivered_bytes=answer.delivered_bytes)
        self._count(model, answer.usage)
        if said.separated:
            self.separating.add(model)
        return said, attempt

    async def rest(self, kind: AttemptKind, call: ChatCall, following: Following) -> AsyncGenerator[list[Heard]]:
        """The base's stream, as it is heard; whoever closes this early ends it there, and pays for what was written.

        Raises Gone before its first word, Full likewise, and UpstreamError after it.
        """
        self._unseen()
        errors: list[UpstreamError] = []
        found = await self._engine.on_target(self._ticket, self.base, stream, errors, lambda *_: call, kind=kind)
        if found is None:
            self.errors += errors
            self._must_fit(self.base, errors)
            raise Gone(self.base)
        answer, attempt = found
        outcome = ""
        try:
            async for events in answer:
                yield [heard for event in events for heard in following.hear(event)]
            outcome = "ok"
            self._engine.succeeded(self._ticket, self.base)
        except UpstreamError as error:
            outcome, attempt.error = error.cause, error.kept
            self._engine.failed(self._ticket, self.base, error)
            raise
        except BaseException:
            outcome = LEFT if self.leaving else self._ticket.interruption()
            raise
        finally:
            await self._end(answer, attempt, outcome, following)

    async def _end(self, answer: AnswerStream, attempt: AttemptRecord, outcome: str, following: Following) -> None:
        """Billed before anything is awaited: see `gateway.lifecycle`."""
        state = answer.state
        usage = state.usage if state.done else state.so_far()
        following.counted(usage)
        try:
            self._ticket.end_attempt(
                attempt,
                outcome,
                usage,
                delivered_bytes=state.delivered_bytes,
                deltas=max(state.deltas, following.thought_tokens + following.answer_tokens),
            )
            self._count(self.base, usage)
        finally:
            await answer.close()

    def _count(self, model: str, usage: Usage | None) -> None:
        if usage is not None:
            self.teller.read(usage)
            read = usage.input + usage.cached_input + usage.cache_write
            self.read[model] += read
            self.cached[model] += usage.cached_input
            self._filled[model] = read + usage.output + usage.reasoning

    def room(self, model: str) -> int:
        """Tokens that a model can still write, as far as its last call tells; at least one: it says itself when none
        is left."""
        return max(1, self._context[model] - self._filled[model] - MARGIN)

    def _must_fit(self, model: str, errors: list[UpstreamError]) -> None:
        if model == self.base and self.teller.begun and errors[-1].cause == "context_length":
            raise Full(model)

    @property
    def discarded(self) -> int:
        """Tokens that were written and are billed, but are not in what the caller got: steps that did not stand, first
        looks, marks, answers that were only tried, and what came after a cut."""
        written = sum(attempt.output_tokens + attempt.reasoning_tokens for attempt in self._ticket.attempts)
        return max(0, written - self.teller.thought_tokens - self.teller.answer_tokens)

    def _unseen(self) -> None:
        """Nobody has seen a word yet: what comes next may be the first of them."""
        if not self.teller.begun:
            self._ticket.record.first_byte_us = None

    def remaining_s(self) -> float:
        """Until the request's deadline; infinite without one."""
        return self._ticket.remaining_s()

    def end_running(self) -> None:
        """Bill what was cancelled from here."""
        self._ticket.end_running(self._ticket.interruption())

    def shows(self) -> None:
        """What is told is the base's answer, whoever wrote it."""
        target = self._ticket.world.targets[self.base]
        self._ticket.record.model_served, self._ticket.record.provider = target.model, target.provider
