"""One `Generate`: its choices, their text on its way out, and why each ended."""

from functools import partial

import msgspec

from local_engine.answer import Answer
from local_engine.chat import InvalidRequest, Tool
from local_engine.constrain import GrammarConstraint
from local_engine.detok import Piece
from local_engine.model import LocalModel
from local_engine.plan_types import Exit, PlanUse
from local_engine.primitives import Primitives
from local_engine.reason.leaving import ExitPlan, Leaving
from local_engine.room import out_of_room
from local_engine.sampler import Sampler
from local_engine.sequence import Sequence
from local_engine.turns import Turn
from local_engine.types import Event, FinishReason, Generate


class Generation:
    """Controller of `n` choices of one prompt: choice 0 reads it, the others are forked from it once it is read."""

    def __init__(
        self,
        command: Generate,
        model: LocalModel,
        prompt: list[int],
        tools: list[Tool] | None,
        most_tokens: int,
        *,
        source: Sequence | None = None,
        measure: bool = False,
    ) -> None:
        """`source`: a sequence that has read the prompt; `measure`: the choices' log-probabilities are wanted.

        Raises InvalidRequest for a format or a tool choice that cannot be held.
        """
        self._source = source
        self._measure = measure
        self._command = command
        self._model = model
        self._prompt = prompt
        asked, room = command.sampling.max_tokens, most_tokens - len(prompt)
        self._max_tokens = room if asked is None else min(asked, room)
        self._engine: Primitives | None = None
        if command.tool_choice == "required" and not tools:
            raise InvalidRequest("tool_choice: a call is required, and there are no tools; send some", "tool_choice")
        self._tools = tools
        self._exit: ExitPlan | None = None
        if isinstance(command.plan, Exit):
            self._exit = ExitPlan.of(command.plan, model, prefix=command.prefix, taps=command.taps)
        self._taps = (self._exit and self._exit.taps()) or command.taps
        self._answers = [Answer(command, model, prompt, self._sampler(n), bool(tools), n) for n in range(command.n)]
        if self._exit is not None:
            for answer in self._answers:
                answer.leaving = Leaving(self._exit, prompt, self._max_tokens, command.sampling)
                answer.plan = partial(_exit_use, answer, answer.leaving)
        self._answer_of: dict[Sequence, Answer] = {}

    @property
    def done(self) -> bool:
        return all(answer.over for answer in self._answers)

    @property
    def written_tokens(self) -> int:
        """By the model, for all choices; without what a step brought after an end, or after a cut of a thought."""
        return sum(answer.written_tokens for answer in self._answers)

    def begin(self, engine: Primitives) -> None:
        self._engine = engine
        limit = len(self._prompt) + self._max_tokens
        sampler = self._answers[0].sampler
        if self._source is None:
            first = engine.open(self._command.model, self._prompt, sampler, limit=limit, taps=self._taps)
        else:
            first = engine.fork(self._source, sampler, length=len(self._prompt))
            first.taps = self._taps
        self._answer_of[first] = self._answers[0]

    def stepped(self, turn: Turn) -> list[Event]:
        assert self._engine is not None, "it has begun"
        sequence = turn.sequence
        answer = self._answer_of[sequence]
        if turn.choices and len(self._answer_of) < len(self._answers):
            self._fork(sequence, self._engine)
        answer.drafted_tokens, answer.accepted_tokens = sequence.drafted, sequence.accepted
        if answer.choice == 0:
            answer.cached_tokens = sequence.cached or 0
        events: list[Event] = []
        hidden = turn.hidden
        leaving = answer.leaving
        if hidden is not None and leaving is not None and leaving.reads_hidden:
            leaving.reveal(hidden)
            hidden = None
        for at, choice in enumerate(turn.choices, len(sequence.ids) - len(turn.choices)):
            if hidden is not None:  # of a run of tokens those before this one: an end in the run is the end
                told, hidden = hidden.split(at - 1)
                answer.reveal(told)
            held = answer.sampler.constraint is not None  # asked first: where nothing can match, an end is no answer's
            complete = held and answer.sampler.done(sequence.ids[: at + 1])
            if leaving is None:
                events += answer.take(choice, self._max_tokens)
            else:
                certain, void = leaving.take(self._engine, sequence, at, choice)
                events += answer.take_all(certain, self._max_tokens)
                if void:
                    break
                if leaving.trying:
                    continue
            if answer.over:
                break
            if complete:
                events += answer.end("stop")
                break
        if hidden is not None and not turn.choices:
            answer.reveal(hidden)
        if turn.out_of_room and not answer.over:
            events += answer.end("length") if answer.output_tokens else self._refuse(len(sequence.ids))
        if answer.over:
            self._engine.close(sequence)
        elif answer.tapped:
            events += answer.told(Piece())
        return events

    def ended(self, reason: FinishReason) -> list[Event]:
        return [event for answer in self._answers if not answer.over for event in answer.end(reason)]

    def _refuse(self, tokens: int) -> list[Event]:
        for answer in self._answers:
            answer.over = True
        return [out_of_room(self._command.id, self._command.model, tokens)]

    def _fork(self, first: Sequence, engine: Primitives) -> None:
        for answer in self._answers[1:]:
            fork = engine.fork(first, answer.sampler, length=len(self._prompt))
            fork.taps = self._taps if self._taps and self._taps.where != "prompt" else None
            self._answer_of[fork] = answer

    def _sampler(self, choice: int) -> Sampler:
        params = self._command.sampling
        if params.seed is not None:
            params = msgspec.structs.replace(params, seed=params.seed + choice)
        return Sampler(
            params,
            self._model.device,
            self._constraint(),
            prompt_tokens=len(self._prompt),
            end_tokens=self._model.end_tokens,
            measure=self._measure or (self._exit is not None and self._exit.measures),
        )

    def _constraint(self) -> GrammarConstraint | None:
        command, grammars = self._command, self._model.grammars
        calls, form = command.tool_choice == "required", command.sampling.response_format
        if not calls and form is None:
            return None
        if command.prefix or command.thought is not None:
            field = "tool_choice" if calls else "response_format"
            raise InvalidRequest(f"{field}: cannot be held where the answer has begun; leave out one of them", field)
        if calls and form is not None:
            raise InvalidRequest(
                f"tool_choice: an answer that is a call cannot be of {form.field}, too; leave out one of them",
                "tool_choice",
            )
        if calls and self._tools:
            return grammars.tool_call(self._tools, command.tool, self._prompt)
        assert form is not None
        return grammars.formatted(form, self._prompt)


def _exit_use(answer: Answer, leaving: Leaving) -> PlanUse:
    return leaving.use((answer.output_tokens, answer.reasoning_tokens), len(answer.prompt), answer.cached_tokens)
