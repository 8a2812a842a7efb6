"""One choice of a `Generate` on its way out: its text, its counts, and why it ended."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from local_engine.detok import Piece, TextStream
from local_engine.model import LocalModel
from local_engine.plan_types import PlanUse
from local_engine.reason.leaving import Leaving
from local_engine.sampler import Choice, Sampler
from local_engine.tool_calls import ToolCallParser
from local_engine.turns import Hidden
from local_engine.types import Delta, Event, Finished, FinishReason, Generate, SamplingParams, Tapped, TokenLogprob


@dataclass(slots=True, eq=False)
class Answer:
    """One choice: what it has said, and what of it has been told."""

    command: Generate
    model: LocalModel
    prompt: list[int]
    sampler: Sampler
    has_tools: bool
    choice: int
    over: bool = False
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    leaving: Leaving | None = None
    """Where its thought may be left early."""
    plan: Callable[[], PlanUse] | None = None
    """Tells at the end what a plan did."""
    tapped: list[Tapped] = field(default_factory=list)
    _text: TextStream = field(init=False)
    _shows_thought: bool = field(init=False)
    """Stop strings and log-probabilities count within the thought, too."""
    output_tokens: int = 0
    reasoning_tokens: int = 0
    _untold_tokens: int = 0
    _untold_reasoning: int = 0
    _prompt_told: bool = False
    _untold_logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        begun = self.command.thought
        self._shows_thought = begun is not None and not begun.over
        thinking = self._shows_thought or self.model.think_token in self.prompt[-2:]
        calls = ToolCallParser(self.model.tools) if self.has_tools and self.model.tools else None
        self._text = TextStream(
            self.model, self._params.stop, thinking=thinking, tools=calls,
            stops_thought=self._shows_thought, begins=not (self.command.prefix or (begun and begun.text)),
        )  # fmt: skip

    @property
    def thinking(self) -> bool:
        return self._text.thinking

    @property
    def _params(self) -> SamplingParams:
        return self.command.sampling

    @property
    def discarded_tokens(self) -> int:
        """Written, and told to nobody."""
        return self.leaving.discarded_tokens if self.leaving is not None else 0

    @property
    def written_tokens(self) -> int:
        """By the model, told or not."""
        return self.output_tokens if self.leaving is None else self.leaving.written_tokens

    def take_all(self, choices: list[Choice], max_tokens: int) -> list[Event]:
        """More tokens; those after an end are void."""
        events: list[Event] = []
        for choice in choices:
            if not self.over:
                events += self.take(choice, max_tokens)
        return events

    def take(self, choice: Choice, max_tokens: int) -> list[Event]:
        """One more token, and the events it causes."""
        events = self._said(choice)
        if self._ends(choice) or self._text.stopped:
            return events + self.end("stop")
        if self.output_tokens + self.discarded_tokens >= max_tokens:
            return events + self.end("length")
        return events

    def _ends(self, choice: Choice) -> bool:
        return choice.token in self.model.end_tokens or choice.token in self._params.stop_token_ids

    def _said(self, choice: Choice) -> list[Event]:
        was_thinking = self._text.thinking
        ended = self._ends(choice)
        piece = Piece() if ended else self._text.push(choice.token)
        self.output_tokens += 1
        self._untold_tokens += 1
        if was_thinking or self._text.thinking:  # both markers count as thinking
            self.reasoning_tokens += 1
            self._untold_reasoning += 1
        wanted = self._shows_thought or not (was_thinking or self._text.thinking)
        if wanted and self._params.logprobs and not ended and choice.token not in self.model.special_tokens:
            told = self._logprob(choice)
            if told.token:
                self._untold_logprobs.append(told)
        return self.told(piece)

    def end(self, reason: FinishReason) -> list[Event]:
        """The closing events: what was held back, then the counts."""
        held = self.leaving.flush() if self.leaving is not None else []
        before = [event for choice in held for event in self._said(choice)]
        self.over = True
        last = [*before, *self.told(self._text.finish(), last=True)]
        if reason == "stop" and self._text.tool_calls:
            reason = "tool_calls"
        return [
            *last,
            Finished(
                self.command.id,
                reason,
                len(self.prompt),
                self.output_tokens + self.discarded_tokens,
                self.reasoning_tokens + self.discarded_tokens,
                cached_tokens=self.cached_tokens,
                choice=self.choice,
                drafted_tokens=self.drafted_tokens,
                accepted_tokens=self.accepted_tokens,
                plan=self.plan() if self.plan is not None else None,
                stopped_by=self._text.stopped_by,
            ),
        ]

    def told(self, piece: Piece, *, last: bool = False) -> list[Event]:
        if piece == Piece() and not self.tapped and not (last and self._untold_logprobs):
            return []
        delta = Delta(
            self.command.id,
            piece.content,
            piece.reasoning,
            self._untold_tokens,
            self._untold_logprobs,
            self.choice,
            self.tapped,
            list(piece.tool_calls),
            self._untold_reasoning,
            0 if self._prompt_told else len(self.prompt),
            0 if self._prompt_told else self.cached_tokens,
        )
        self._untold_tokens, self._untold_reasoning, self._prompt_told = 0, 0, True
        self._untold_logprobs, self.tapped = [], []
        return [delta]

    def reveal(self, hidden: Hidden) -> None:
        """Hidden states to go out with the next delta."""
        if not hidden.positions:
            return
        tokens, layers, width = hidden.states.shape
        data = hidden.states.to("cpu", torch.float16).numpy().astype("<f2").tobytes()
        self.tapped.append(Tapped(hidden.positions, (tokens, layers, width), data))

    def _logprob(self, choice: Choice) -> TokenLogprob:
        pieces = self.model.pieces
        top = [(pieces[token], logprob) for token, logprob in choice.top]
        return TokenLogprob(pieces[choice.token][self._text.left_out :], choice.logprob, top, choice.entropy)
