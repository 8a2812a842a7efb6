"""Step speculation over calls: a smaller model writes the steps of a thought, and the base steps in where it has to.

Each call goes on from the thought so far, whose beginning the server has in its prefix cache, where it has one: what it
reports as cached is in every attempt and in the plan's own count. A draft that cannot be had leaves the base alone with
what stands; a base that cannot be had ends the plan.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from gateway.ledger.records import NOT_ACCEPTED, AttemptRecord
from gateway.stepping import ask
from gateway.stepping.calls import Calls, Full, Gone, Make
from gateway.stepping.following import Following
from gateway.stepping.methods import method_of
from gateway.stepping.said import STEP_END, Said, rating_of
from gateway.upstream.types import Event, PlanReport
from local_engine.plan_types import SpeculateSteps
from local_engine.reason.guards import LoopGuard
from routers.cost import MOST_STEP_TOKENS, MOST_STEPS


class Speculation:
    """One thought of two models, and its answer."""

    def __init__(self, calls: Calls, plan: SpeculateSteps, draft: str) -> None:
        self._calls, self._plan, self._draft = calls, plan, draft
        self._method = method_of(plan)
        self._longest = min(plan.max_thinking_tokens or calls.longest, calls.longest)
        """Tokens of the thought: no more than one call could have written, as no more is expected to be paid for."""
        self._guard = LoopGuard()
        self._thought = ""
        self._step = ""
        """What stands of the step that is being written."""
        self._over = self._alone = False
        """Closed; or left to the base alone."""
        self._drafted_steps = self._accepted_steps = self._base_steps = self._verified = 0
        self._drafted = self._accepted = 0
        self._closed_by = self._degraded = ""

    async def events(self) -> AsyncGenerator[list[Event]]:
        """Chunks in the groups in which they are due. Raises Gone and UpstreamError for the base's failures."""
        try:
            async with aclosing(self._events()) as groups:
                async for events in groups:
                    yield events
        except Full:
            self._closed_by = "length"
            yield self._calls.teller.end("length")

    async def _events(self) -> AsyncGenerator[list[Event]]:
        by_base: int | None = 0  # how many tokens the base writes next; None: to the end of the step
        for _ in range(MOST_STEPS):
            if self._over or self._alone or self._degraded or not self._left:
                break
            if by_base == 0:
                text, by_base = await self._drafting()
            else:
                asked = self._asked(self._calls.base, by_base, self._method.base_top)
                said, _ = await self._calls.said(self._calls.base, "step", asked)
                self._base_steps += 1
                by_base = 0 if self._method.written(said) else None
                self._alone = not said.ended and not said.text.strip()
                text = self._stands(said.text, said.written, said.closed)
            if text:
                self._calls.shows()
                yield [self._calls.teller.thought(text)]
        else:
            self._closed_by, self._over = "steps", True
        async with aclosing(self._rest()) as rest:
            async for events in rest:
                yield events

    @property
    def report(self) -> PlanReport:
        """In the names of the engine's own plans, where they count the same."""
        calls = self._calls
        counts: dict[str, int | str] = {
            "drafted_steps": self._drafted_steps,
            "accepted_steps": self._accepted_steps,
            "escalated_steps": self._base_steps,
            "verifications": self._verified,
            "drafted_tokens": self._drafted,
            "accepted_tokens": self._accepted,
            "discarded_tokens": calls.discarded,
            "read_tokens": calls.read[calls.base],
            "cached_tokens": calls.cached[calls.base],
            "draft_read_tokens": calls.read[self._draft],
            "draft_cached_tokens": calls.cached[self._draft],
            "closed_by": self._closed_by,
            "degraded": self._degraded,
        }
        return PlanReport("speculate", {name: value for name, value in counts.items() if value})

    async def _drafting(self) -> tuple[str, int | None]:
        """The draft's turn: what stands of what it wrote, and how many tokens the base writes next (as `events`)."""
        calls, method = self._calls, self._method
        try:
            said, attempt = await self._drafted_by(method.look or None, method.draft_top)
            ruling = method.looked(said)
            text = said.text if ruling.keep is None else said.upto(ruling.keep)
            tokens = said.written if ruling.keep is None else ruling.keep
            if ruling.hand_over:
                attempt.outcome = attempt.outcome if text else NOT_ACCEPTED
                return self._stands(text, tokens, by_draft=True), ruling.tokens
            # What was looked at is good: now the rest of the step.
            if method.look and not said.closed and not (ruling.keep is None and said.ended):
                said, attempt = await self._drafted_by(None, 0, text)
                text, tokens = text + said.text, tokens + said.written
        except Gone:
            self._degraded = "draft_failed"
            return "", 0
        if not said.ended and not text.strip():  # it has no step more: where it was judged, that is the base's to say
            self._over = said.closed and not method.rates
            self._alone = not self._over
            return "", 0
        self._drafted_steps += 1
        if not method.rates:
            return self._stands(text, tokens, said.closed, by_draft=True), 0
        asked = self._thought + text
        rated, _ = await calls.said(calls.base, "verify", lambda call: ask.rating(call, asked, self._plan.cue))
        self._verified += 1
        if method.accepts(rating_of(rated)):
            return self._stands(text, tokens, said.closed, by_draft=True), 0
        attempt.outcome = NOT_ACCEPTED
        return "", None

    async def _drafted_by(self, tokens: int | None, top: int, ahead: str = "") -> tuple[Said, AttemptRecord]:
        said, attempt = await self._calls.said(self._draft, "draft", self._asked(self._draft, tokens, top, ahead))
        self._drafted += said.written
        return said, attempt

    def _asked(self, model: str, tokens: int | None, top: int, ahead: str = "") -> Make:
        thought = self._thought + ahead
        most = min(tokens or MOST_STEP_TOKENS, self._left, self._calls.room(model))
        return lambda call: ask.step(call, thought, tokens=most, top=top)

    def _stands(self, text: str, tokens: int, closed: bool = False, *, by_draft: bool = False) -> str:
        """Accept this text; the same, to be told."""
        self._thought += text
        self._step += text
        self._calls.teller.thought_tokens += tokens
        self._accepted += tokens if by_draft else 0
        self._over = self._over or closed
        if self._step.endswith(STEP_END):
            self._accepted_steps += by_draft
            why = self._guard.read(self._step.encode())
            self._step = ""
            if why and not self._over:
                self._closed_by, self._over = why, True
        if not self._over and self._calls.teller.thought_tokens >= self._longest:
            self._closed_by, self._over = "budget", True
        return text

    @property
    def _left(self) -> int:
        """Tokens that the answer may still have."""
        asked = self._calls.call.sampling.max_tokens
        used = self._calls.teller.thought_tokens
        return max(0, min(self._longest, self._longest if asked is None else asked) - used)

    async def _rest(self) -> AsyncGenerator[list[Event]]:
        """What is still to come, by the base alone: of the thought, unless it is over, and the answer."""
        calls, teller = self._calls, self._calls.teller
        asked, finish = calls.call.sampling.max_tokens, "length"
        while asked is None or teller.thought_tokens + teller.answer_tokens < asked:
            left = None if asked is None else asked - teller.thought_tokens - teller.answer_tokens
            following = Following(
                thought=bool(self._thought), over=self._over, separated=calls.base in calls.separating
            )
            left = None if left is None else min(left, calls.room(calls.base))
            call = ask.rest(calls.call, self._thought, over=self._over, tokens=left)
            try:
                async with aclosing(calls.rest("answer" if self._over else "think", call, following)) as stream:
                    async for heard in stream:
                        if heard:
                            calls.shows()
                            yield [
                                teller.thought(piece.text)
                                if piece.kind == "thought"
                                else teller.delta({"content": piece.text})
                                for piece in heard
                            ]
                        self._thought += "".join(piece.text for piece in heard if piece.kind == "thought")
            finally:
                teller.thought_tokens += following.thought_tokens
                teller.answer_tokens += following.answer_tokens
            finish = following.finish or "stop"
            if following.over or finish != "stop" or self._over:
                break
            self._over, self._closed_by = True, "unclosed"  # it stopped in its thought: closed for it, and answered
        yield teller.end(finish)
