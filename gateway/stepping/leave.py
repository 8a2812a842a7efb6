"""Leaving a thought over calls: its stream is watched, ended where a rule says so, and the answer is asked for there.

The rules are those of `local_engine.reason` that read words and log-probabilities (no hidden states come over an API),
and its guards against loops. What may be part of a cue is held back until that is certain, so that a thought is cut
before its cue and nobody has seen it. Answers that a rule wants forced are asked for beside the stream, which goes on
meanwhile. Tokens are those that the server lists, else the words of what it sends.
"""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from gateway.errors import LeadlineError
from gateway.stepping import ask
from gateway.stepping.calls import Calls, Full, Gone
from gateway.stepping.following import Following, Heard
from gateway.stepping.said import STEP_END
from gateway.upstream.types import Event, PlanReport
from local_engine.plan_types import Exit
from local_engine.reason.budget import TokenBudget
from local_engine.reason.convergence import Convergence
from local_engine.reason.guards import LoopGuard
from local_engine.reason.momentum import Momentum
from local_engine.reason.redundancy import Redundancy
from local_engine.reason.thought import Moment, Rule, Verdict
from local_engine.reason.watch import Notice, Watch
from routers.cost import ESTIMATED_BYTES_PER_TOKEN, MOST_LOOKS

LOOK_TOKENS: Final = 64
"""Of an answer that is forced to be looked at."""
LAST_LOOK_S: Final = 2.0
"""So long is a look waited for that is under way at the end of the thought: its bill is better than an estimate."""
_MOST_RESERVED: Final = 512


class Leaving:
    """One thought that may be left before its end, and its answer."""

    def __init__(self, calls: Calls, plan: Exit) -> None:
        self._calls, self._plan = calls, plan
        self._asked = calls.call.sampling.max_tokens
        self._rule = _rule(plan)
        self._watch = Watch(self._rule, plan.rule, 1, max_tokens=self._most(plan.max_thinking_tokens))
        self._guard = LoopGuard()
        self._step = ""
        self._told = 0
        """Tokens of the thought that are out."""
        self._looking: asyncio.Task[tuple[Moment, str]] | None = None
        self._looks = 0
        self._by = ""
        self._cut = 0
        """Where the thought ends, once `_by` says why."""

    async def events(self) -> AsyncGenerator[list[Event]]:
        """Chunks in the groups in which they are due. Raises Gone and UpstreamError for the model's failures."""
        try:
            async with aclosing(self._thinking()) as groups:
                async for events in groups:
                    yield events
        except Full:
            yield self._calls.teller.end("length")
        finally:
            teller = self._calls.teller
            teller.thought_tokens = teller.thought_tokens or self._told  # where it broke off
            await self._look_away()

    @property
    def report(self) -> PlanReport:
        counts: dict[str, int | str] = {
            "by": self._by,
            "thought_tokens": self._calls.teller.thought_tokens,
            "discarded_tokens": self._calls.discarded,
            "looks": self._looks,
            "cached_tokens": self._calls.cached[self._calls.base],
        }
        return PlanReport("exit", {name: value for name, value in counts.items() if value})

    async def _thinking(self) -> AsyncGenerator[list[Event]]:
        calls, teller = self._calls, self._calls.teller
        following = Following(thought=False, over=False)
        call = ask.rest(calls.call, "", over=False, tokens=self._asked, top=1 if self._rule.measures else 0)
        async with aclosing(calls.rest("think", call, following)) as stream:
            async for heard in stream:
                events = [event for piece in heard for event in self._heard(piece)]
                if self._by:
                    calls.leaving = True
                if events:
                    calls.shows()
                    yield events
                if self._by:
                    break
        if not self._by:
            events = self._flush(len(self._watch.thought))
            if events:
                yield events
            if following.over or following.finish not in ("", "stop"):
                teller.thought_tokens, teller.answer_tokens = following.thought_tokens, following.answer_tokens
                await self._last_look()
                yield teller.end(following.finish or "stop")
                return
            self._by, self._cut = "unclosed", len(self._watch.thought)
        teller.thought_tokens = following.thought_tokens if self._by == "unclosed" else self._cut
        await self._last_look()
        thought = self._watch.thought.said(0, self._cut)
        left = None if self._asked is None else max(1, self._asked - self._cut)
        calls.leaving = False
        try:
            async with aclosing(self._answer(thought, left)) as answer:
                async for events in answer:
                    yield events
        except Full:
            if left is None:
                raise
            async with aclosing(self._answer(thought, None)) as answer:  # all that there is room for
                async for events in answer:
                    yield events

    async def _answer(self, thought: str, tokens: int | None) -> AsyncGenerator[list[Event]]:
        calls, teller = self._calls, self._calls.teller
        following = Following(thought=True, over=True)
        call = ask.rest(calls.call, thought, over=True, tokens=tokens)
        try:
            async with aclosing(calls.rest("answer", call, following)) as stream:
                async for heard in stream:
                    calls.shows()
                    yield [teller.delta({"content": piece.text}) for piece in heard if piece.kind == "answer"]
        finally:
            teller.answer_tokens = following.thought_tokens + following.answer_tokens
        yield teller.end(following.finish or "stop")

    def _heard(self, piece: Heard) -> list[Event]:
        """What is certain after this piece, and may be told."""
        if piece.kind == "answer" and not self._by:
            return [*self._flush(len(self._watch.thought)), self._calls.teller.delta({"content": piece.text})]
        for text, logprob in piece.tokens:
            if self._by:  # of the same group, after the cut
                continue
            why, cut = self._verdict(self._watch.push(text, logprob, math.nan))
            self._step += text
            if not why and self._step.endswith(STEP_END):
                why, cut = self._guard.read(self._step.encode()), len(self._watch.thought)
                self._step = ""
            if why and (why != self._plan.rule or self._pays(len(self._watch.thought))):
                self._by, self._cut = why, max(cut, self._told)
        return self._flush(self._cut if self._by else self._watch.certain)

    def _verdict(self, notice: Notice | None) -> tuple[str, int]:
        """(why the thought ends, before which token); "": it goes on."""
        if self._looking is not None and self._looking.done():
            moment, answer = self._looking.result()
            self._looking = None
            if self._rule.heard(moment, answer) is Verdict.EXIT:
                return self._plan.rule, self._watch.certain
        if notice is None:
            return "", 0
        if notice.verdict is Verdict.EXIT:
            return notice.why, notice.moment.cut
        if self._looking is None and self._looks < MOST_LOOKS:
            self._looks += 1
            self._looking = asyncio.create_task(self._look(notice.moment), name="forced-answer")
        return "", 0

    async def _look(self, moment: Moment) -> tuple[Moment, str]:
        """The answer that is forced here; "" where none could be had, or paid for: the thought goes on without."""
        thought = self._watch.thought.said(0, moment.cut)
        try:
            said, _ = await self._calls.said(
                self._calls.base, "verify", lambda call: ask.forced_answer(call, thought, tokens=LOOK_TOKENS)
            )
        except (Full, Gone, LeadlineError):
            return moment, ""
        return moment, said.text.strip()

    async def _last_look(self) -> None:
        """One that is under way is waited for, as it is short; but not for long, as its answer is not wanted."""
        if self._looking is not None:
            await asyncio.wait((self._looking,), timeout=min(LAST_LOOK_S, self._calls.remaining_s() / 2))
            await self._look_away()

    async def _look_away(self) -> None:
        """End a look that is under way, when nothing else is."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
            self._looking = None
            self._calls.end_running()

    def _flush(self, upto: int) -> list[Event]:
        text = self._watch.thought.said(self._told, upto)
        self._told = max(self._told, upto)
        return [self._calls.teller.thought(text)] if text else []

    def _pays(self, written: int) -> bool:
        """Whether all that could still be written costs more than to read the prompt and the thought once more."""
        price = self._calls.price
        if price is None:
            return True
        left = (self._calls.longest if self._asked is None else self._asked) - written
        read = -(-self._calls.call.body_bytes // ESTIMATED_BYTES_PER_TOKEN) + written
        return left * price.output >= read * price.input

    def _most(self, limit: int | None) -> int | None:
        """Tokens of a thought: the plan's limit, and what leaves room for an answer."""
        if self._asked is None:
            return limit
        room = max(1, self._asked - min(_MOST_RESERVED, self._asked // 2))
        return room if limit is None else min(limit, room)


def _rule(plan: Exit) -> Rule:
    """The plan's. Policies are refused that ask for a probe, or for a budget that was never fitted."""
    match plan.rule:
        case "convergence":
            return Convergence(plan.agree)
        case "momentum":
            return Momentum(gamma=plan.gamma)
        case "budget" if plan.budget is not None:
            return TokenBudget(plan.budget)
        case _:
            return Redundancy(plan.agree)
