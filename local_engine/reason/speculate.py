"""Step speculation: a small model writes the thought, the command's own model, the base, steps in where it has to.

Both models have a sequence of their own that holds the accepted text, each after a prompt by its own chat template.
One of them writes at a time, the other rests with its KV: what the one wrote the other reads once, when it goes on.
A judgement is the base's pass over what the draft wrote (`Primitives.offer`): what it keeps is in its KV from then on,
and it adds a token of its own, so nothing accepted is ever computed again. When to judge, keep or hand over is a
`Method`'s to say (`method.py`).

Where the draft fails, or its window is full, the base goes on alone, and the plan's use says so. A model without
thinking tags has no thought to close: then all of its answer is speculated on, and a loop ends it.
"""

import math
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from local_engine.answer import Answer
from local_engine.model import LocalModel
from local_engine.plan_types import ModelUse, PlanUse, SpeculateSteps
from local_engine.primitives import Primitives
from local_engine.reason.glimprouter import GLIMPSE
from local_engine.reason.guards import LoopGuard
from local_engine.reason.method import JUDGE, Do, Method, Move
from local_engine.reason.specreason import RATINGS
from local_engine.reason.steps import Boundary, StepSplitter
from local_engine.room import out_of_room
from local_engine.sampler import Choice, Sampler
from local_engine.sequence import Sequence, common_prefix
from local_engine.turns import Turn
from local_engine.types import Event, FinishReason, Generate, SamplingParams

BASE: Final = 0
DRAFT: Final = 1
AFTER_THOUGHT: Final = "\n\n"

State = Literal["base writes", "draft writes", "base judges", "base rates"]


@dataclass(slots=True)
class _Count:
    """What was done, by whom."""

    output: list[int] = field(default_factory=lambda: [0, 0])
    reasoning: list[int] = field(default_factory=lambda: [0, 0])
    rows: list[int] = field(default_factory=lambda: [0, 0])
    accepted: dict[int | None, int] = field(default_factory=dict)
    drafted_steps: int = 0
    accepted_steps: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """An answer of the draft's that was not good enough (`cascade.py`): the first that the base judges."""

    sequence: Sequence
    """It holds the draft's prompt and what was written, with its sampler."""
    choices: Tokens[Choice]
    tell: Callable[[PlanUse], PlanUse]
    """Adds what became of the attempt."""
    degraded: str = ""
    """Why the draft cannot go on."""


class StepSpeculation:
    """Controller of one answer by two models."""

    _engine: Primitives
    _base: Sequence
    _draft: Sequence

    def __init__(
        self,
        command: Generate,
        plan: SpeculateSteps,
        method: Method,
        models: tuple[LocalModel, LocalModel],
        prompts: tuple[list[int], list[int]],
        most_tokens: tuple[int, int],
        attempt: Attempt | None = None,
    ) -> None:
        """`models`, `prompts` and `most_tokens` (of a sequence): the base's, the draft's."""
        base, draft = models
        self._command, self._plan, self._method = command, plan, method
        self._models, self._prompts = models, prompts
        room = most_tokens[0] - len(prompts[0])
        asked = command.sampling.max_tokens
        self._max_tokens = room if asked is None else min(asked, room)
        self._draft_limit = min(len(prompts[1]) + self._max_tokens, most_tokens[1])
        self._sampler = Sampler(
            command.sampling, base.device, prompt_tokens=len(prompts[0]), end_tokens=base.end_tokens,
            measure=plan.method == "entropy",
        )  # fmt: skip
        # The same seed: where the models agree, they draw the same token.
        self._draft_sampler = Sampler(
            msgspec.structs.replace(command.sampling, top_logprobs=GLIMPSE if plan.method == "glimprouter" else 0),
            draft.device, prompt_tokens=len(prompts[1]), end_tokens=draft.end_tokens,
            measure=plan.unsure is not None or plan.method in ("entropy", "glimprouter"),
        )  # fmt: skip
        self._rater = Sampler(SamplingParams(temperature=0, top_logprobs=RATINGS), base.device, measure=True)
        self._digits = {base.tokenizer.convert_tokens_to_ids(str(digit)): digit for digit in range(10)}
        self._cue = _tokens(base, plan.cue)
        self._answer = Answer(command, base, prompts[0], self._sampler, has_tools=False, choice=0, plan=self._use)
        self._guard = LoopGuard()
        self._accepted, self._ahead = self._splitter(), self._splitter()
        self._text = array("i")  # what is accepted; either sequence is to hold it after its prompt
        self._pending: list[Choice] = []  # what the draft wrote after it
        self._moves: list[Move] = []  # of the tokens of the step that the draft is in
        self._state: State = "base writes"
        self._closed = _is_closed(base, prompts[0])
        self._draft_thinks = False
        self._unused = [0, 0]  # of what each wrote last: what nobody looked at, as it was not its turn any more
        self._count = _Count()
        self._boundary = Boundary.INSIDE
        self._closed_by = self._degraded = ""
        self._base_steps = plan.base_steps
        self._refused = self._interrupted = False
        self._attempt = attempt

    @property
    def done(self) -> bool:
        return self._answer.over or self._refused

    def begin(self, engine: Primitives) -> None:
        self._engine = engine
        base_prompt, draft_prompt = self._prompts
        # The base writes the first token: it has just read the prompt, so that token is free.
        limit = len(base_prompt) + self._max_tokens
        self._base = engine.open(self._command.model, base_prompt, self._sampler, limit=limit)
        if self._attempt is not None:
            return self._begin_from(self._attempt)
        self._draft = engine.open(
            self._plan.draft, draft_prompt, limit=self._draft_limit, writes_on=self._writes_on, expendable=True
        )

    def _begin_from(self, attempt: Attempt) -> None:
        """Have the base judge what the draft has written, all of it at once."""
        self._draft, self._degraded = attempt.sequence, attempt.degraded
        self._draft.taps, self._draft.writes_on = None, self._writes_on
        self._unused[DRAFT] = len(self._draft.ids) - len(self._prompts[DRAFT]) - len(attempt.choices)
        thinks = self._answer.thinking
        for choice in attempt.choices:
            thinks = self._wrote(DRAFT, choice.token, thinks)
            self._count.drafted_steps += self._ahead.push(choice.token) is Boundary.STEP
            if choice.token not in self._models[DRAFT].end_tokens:
                self._pending.append(choice)
        if self._degraded:
            self._count.rows[DRAFT] = self._draft.rows
            self._engine.close(self._draft)
        else:
            self._engine.rest(self._draft)
        if self._pending:
            self._offer()

    def ended(self, reason: FinishReason) -> list[Event]:
        return self._answer.end(reason)

    def stepped(self, turn: Turn) -> list[Event]:
        if turn.sequence is self._draft:
            if turn.error is not None:
                return self._go_alone(f"{self._plan.draft} failed: {turn.error}")
            if turn.out_of_room:
                return self._go_alone(f"the KV budget of {self._plan.draft} is full")
            return self._draft_wrote(turn.choices)
        self._answer.cached_tokens = self._base.cached or 0
        self._answer.drafted_tokens, self._answer.accepted_tokens = self._base.drafted, self._base.accepted
        if turn.out_of_room and not self.done:
            return self._out_of_room()
        if self._state == "base judges":
            return self._judged(turn.choices)
        return self._rated(turn.choices[0]) if self._state == "base rates" else self._base_wrote(turn.choices)

    # ---- the draft writes -------------------------------------------------------------------------------------------

    def _writes_on(self, choice: Choice) -> bool:
        """Whether the draft's next token is wanted whatever becomes of this one: then the same step may bring it."""
        self._moves.append(self._moved(choice))
        return self._moves[-1].do is Do.WRITE and not self._cannot_write()

    def _moved(self, choice: Choice) -> Move:
        """What follows a token that the draft has written; asked once for each."""
        self._draft_thinks = self._wrote(DRAFT, choice.token, self._draft_thinks)
        boundary = self._ahead.push(choice.token)
        self._count.drafted_steps += boundary is Boundary.STEP
        self._pending.append(choice)
        return self._method.drafted(choice, self._piece(choice), boundary)

    def _draft_wrote(self, choices: Tokens[Choice]) -> list[Event]:
        moves, self._moves = self._moves, []
        events: list[Event] = []
        for at, choice in enumerate(choices):
            self._unused[DRAFT] = len(choices) - 1 - at
            move = moves[at] if at < len(moves) else self._moved(choice)
            last = at + 1 >= len(moves)  # those before it were decided without a look at the room
            if move.do is Do.WRITE and last and self._cannot_write():
                move = JUDGE
            if move.take_back:
                del self._pending[-move.take_back :]
            if move.do is Do.JUDGE:
                return events + self._offer()
            if move.do is Do.RATE:
                return events + self._ask_rating()
            if move.do is not Do.WRITE:
                events += self._accept(self._taken_pending(), DRAFT)
                if not self._goes_on:
                    return events
                if move.do is Do.HAND_OVER or self._at_base():
                    return events + self._to_base()
        if choices and self._draft.at_rest:
            return events + self._go_alone(f"the window of {self._plan.draft} is full")
        return events

    def _cannot_write(self) -> bool:
        """Whether the draft has to be judged for want of room."""
        full = len(self._text) + len(self._pending) >= self._max_tokens
        return full or len(self._pending) >= self._plan.max_step_tokens or self._draft.at_rest

    def _to_draft(self) -> list[Event]:
        """Let the draft go on from what is accepted, while the base rests."""
        if self._degraded or self._at_base():
            return self._to_base()
        if len(self._prompts[DRAFT]) + len(self._text) >= self._draft.limit:
            return self._go_alone(f"the window of {self._plan.draft} is full")
        self._engine.rest(self._base)
        self._state = "draft writes"
        self._draft_thinks = self._answer.thinking
        self._ahead.follow(self._accepted)
        self._sync(self._draft, DRAFT)
        if self._draft.sampler is None:
            self._engine.write(self._draft, self._draft_sampler)
        else:
            self._engine.resume(self._draft)
        return []

    def _at_base(self) -> bool:
        """Whether what comes next is the base's own: its first steps, or the answer."""
        return self._base_steps > 0 or (self._closed and not self._method.answers)

    def _go_alone(self, why: str) -> list[Event]:
        """Without the draft from here on."""
        if self._degraded:
            return []
        self._degraded = why
        self._count.rows[DRAFT] = self._draft.rows
        self._engine.close(self._draft)
        self._pending.clear()
        return self._to_base() if self._state == "draft writes" else []

    # ---- the base judges --------------------------------------------------------------------------------------------

    def _offer(self) -> list[Event]:
        if not self._degraded:
            self._engine.rest(self._draft)
        self._sync(self._base, BASE)
        del self._pending[max(0, self._base.limit - len(self._base.ids) - 1) :]
        self._state = "base judges"
        self._engine.offer(self._base, [choice.token for choice in self._pending], self._method.floor)
        return []

    def _judged(self, choices: Tokens[Choice]) -> list[Event]:
        """Kept is the beginning of the offer, and at least one token is the base's own: more where room was short."""
        pending = self._taken_pending()
        offered = [choice.token for choice in pending]
        count = 0
        while count < min(len(choices) - 1, len(offered)) and choices[count].token == offered[count]:
            count += 1
        thinking = self._answer.thinking
        for choice in choices[:count]:
            thinking = self._models[BASE].thinks_after(choice.token, thinking)
        for choice in choices[count:]:
            thinking = self._wrote(BASE, choice.token, thinking)
        self._state = "base writes"
        if not self._method.accepts(choices[:count], len(offered)):
            return self._to_base()
        events = self._accept(choices[:count], DRAFT)
        if self._goes_on:
            events += self._accept(choices[count:], BASE)
        if not self._goes_on:
            return events
        own = choices[-1]
        rest = pending[count + 1 :]
        if rest and count == len(choices) - 1 and own.token == offered[count]:
            self._pending = rest  # it would have written this token too: what comes after it may still be right
            return events + self._offer()
        if count == len(offered) or self._method.written(own, self._piece(own), self._boundary):
            return events + self._to_draft()
        return events + self._to_base()

    def _ask_rating(self) -> list[Event]:
        self._engine.rest(self._draft)
        self._sync(self._base, BASE)
        asked = [*(choice.token for choice in self._pending), *self._cue]
        if len(self._base.ids) + len(asked) >= self._base.limit:
            self._pending.clear()
            return self._to_base()
        self._state = "base rates"
        self._engine.append(self._base, asked)
        self._engine.write(self._base, self._rater)
        return []

    def _rated(self, choice: Choice) -> list[Event]:
        """The expected digit, of those among the likeliest tokens; none: 0."""
        shares = {self._digits[token]: math.exp(logprob) for token, logprob in choice.top if token in self._digits}
        rating = sum(digit * share for digit, share in shares.items()) / (sum(shares.values()) or 1.0)
        self._wrote(BASE, choice.token, self._answer.thinking)
        written = self._taken_pending()
        good = self._method.rated(rating)
        self._engine.truncate(self._base, len(self._prompts[BASE]) + len(self._text) + good * len(written))
        self._engine.write(self._base, self._sampler)
        self._engine.rest(self._base)
        self._state = "base writes"
        if not good:
            return self._to_base()
        events = self._accept(written, DRAFT)
        return events + self._to_draft() if self._goes_on else events

    # ---- the base writes --------------------------------------------------------------------------------------------

    def _base_wrote(self, choices: Tokens[Choice]) -> list[Event]:
        events: list[Event] = []
        first = not self._text
        for at, choice in enumerate(choices):
            self._unused[BASE] = len(choices) - 1 - at
            self._wrote(BASE, choice.token, self._answer.thinking)
            events += self._accept([choice], BASE)
            if not self._goes_on:
                return events
            self._base_steps -= self._base_steps > 0 and self._boundary is Boundary.STEP
            over = first or self._method.written(choice, self._piece(choice), self._boundary)
            if over and not (self._degraded or self._at_base()):
                return events + self._to_draft()
        return events

    def _to_base(self) -> list[Event]:
        """Let the base go on from what is accepted, while the draft rests."""
        if not self._degraded:
            self._engine.rest(self._draft)
        self._pending.clear()
        self._state = "base writes"
        self._sync(self._base, BASE)
        self._engine.resume(self._base)
        return []

    # ---- what is accepted -------------------------------------------------------------------------------------------

    def _accept(self, choices: Iterable[Choice], by: int | None) -> list[Event]:
        """Show these tokens; by None: forced. Not all where the answer ends, or the thought has to be closed."""
        events: list[Event] = []
        self._interrupted = False
        for choice in choices:
            step = self._accepted.text
            self._text.append(choice.token)
            self._count.accepted[by] = self._count.accepted.get(by, 0) + 1
            self._boundary = self._accepted.push(choice.token)
            self._closed = self._closed or self._boundary is Boundary.CLOSED
            events += self._answer.take(choice, self._max_tokens)
            if self.done:
                return events
            reason = ""
            if self._boundary is Boundary.STEP:
                self._count.accepted_steps += by == DRAFT
                reason = self._guard.read(step)
            budget = self._plan.max_thinking_tokens
            if budget is not None and not self._closed and self._answer.reasoning_tokens >= budget:
                reason = "budget"
            if reason and not self._closed:
                return events + self._close(reason)
        return events

    @property
    def _goes_on(self) -> bool:
        """Whether what was just accepted is followed by more of the same thought, or its answer."""
        return not (self.done or self._interrupted)

    def _close(self, reason: str) -> list[Event]:
        """End the thought for the models, and have it answered; where no thought can be closed, end the answer."""
        self._closed_by, self._interrupted = reason, True
        close = self._models[BASE].end_think_token
        if close is None or not self._answer.thinking:
            return self._answer.end("length")
        forced = [Choice(token, math.nan, []) for token in (close, *_tokens(self._models[BASE], AFTER_THOUGHT))]
        events = self._accept(forced, None)
        self._interrupted = True
        return events if self.done else events + self._to_base()

    def _sync(self, sequence: Sequence, whose: int) -> None:
        """Let it hold what is accepted: what it has besides is taken back, what it has not it will read."""
        start = len(self._prompts[whose])
        have = sequence.ids[start : len(sequence.ids) - self._unused[whose]]
        self._unused[whose] = 0
        same = common_prefix(have, self._text)
        if start + same < len(sequence.ids):
            self._engine.truncate(sequence, start + same)
        if same < len(self._text):
            self._engine.append(sequence, self._text[same:])

    def _wrote(self, who: int, token: int, thinking: bool) -> bool:
        """Count a token, written for the thought or the answer; whether what comes after it is of a thought."""
        after = self._models[BASE].thinks_after(token, thinking)
        self._count.output[who] += 1
        self._count.reasoning[who] += thinking or after  # both markers are of the thought
        return after

    def _taken_pending(self) -> list[Choice]:
        taken, self._pending = self._pending, []
        return taken

    def _piece(self, choice: Choice) -> bytes:
        return self._models[BASE].pieces[choice.token]

    def _splitter(self) -> StepSplitter:
        base = self._models[BASE]
        return StepSplitter(base.pieces, close=base.end_think_token, open=base.think_token, ends=base.end_tokens)

    def _out_of_room(self) -> list[Event]:
        if self._answer.output_tokens:
            return self._answer.end("length")
        self._refused = True
        return [out_of_room(self._command.id, self._command.model, len(self._base.ids))]

    def _use(self) -> PlanUse:
        count = self._count
        rows = self._base.rows, count.rows[DRAFT] or self._draft.rows
        names = self._command.model, self._plan.draft
        forced = count.accepted.get(None, 0)
        use = PlanUse(
            [
                ModelUse(
                    names[whose],
                    len(self._prompts[whose]),
                    sequence.cached or 0,
                    count.output[whose],
                    count.reasoning[whose],
                    sequence.read,
                    rows[whose],
                )
                for whose, sequence in ((BASE, self._base), (DRAFT, self._draft))
            ],
            drafted_steps=count.drafted_steps,
            accepted_steps=count.accepted_steps,
            drafted_tokens=count.output[DRAFT],
            accepted_tokens=count.accepted.get(DRAFT, 0),
            discarded_tokens=sum(count.output) + forced - len(self._text),
            forced_tokens=forced,
            closed_by=self._closed_by,
            degraded=self._degraded,
        )
        return use if self._attempt is None else self._attempt.tell(use)


def _tokens(model: LocalModel, text: str) -> list[int]:
    tokens: list[int] = model.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return tokens


def _is_closed(model: LocalModel, prompt: Tokens[int]) -> bool:
    """Whether the prompt ends after a thought: nothing but the answer is left."""
    marks = (token for token in reversed(prompt) if token in (model.think_token, model.end_think_token))
    return model.end_think_token is not None and next(marks, None) == model.end_think_token
