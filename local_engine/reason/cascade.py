"""A cascade on one engine: a small model answers first, and where its answer is not good enough, the command's model.

Nothing of an attempt is told before it is accepted (`accept.py`). It ends where the small model's answer would, at a
stop string too; one that is not worth its end is abandoned in the middle. The larger model reads its prompt only when
it is asked. With the hint `offer` it then judges the small model's answer as well, in one pass, keeps it up to the
first token that it finds too improbable, and both go on from there as in step speculation (`speculate.py`).
"""

import msgspec

from local_engine.answer import Answer
from local_engine.model import LocalModel
from local_engine.plan_types import Cascade, ModelUse, PlanUse, SpeculateSteps
from local_engine.primitives import Primitives
from local_engine.reason.accept import AnswerWatch, abandons, accepts, p_correct
from local_engine.reason.score import Scored
from local_engine.reason.speculate import Attempt, StepSpeculation
from local_engine.sampler import Choice, Sampler
from local_engine.sequence import Sequence
from local_engine.turns import Hidden, Turn
from local_engine.types import Event, Failed, Finished, FinishReason, Generate, TapSpec


class CascadeAnswer:
    """Controller of one answer by one of two models."""

    _engine: Primitives
    _draft: Sequence

    def __init__(
        self,
        command: Generate,
        plan: Cascade,
        models: tuple[LocalModel, LocalModel],
        prompts: tuple[list[int], list[int]],
        most_tokens: tuple[int, int],
    ) -> None:
        """`models`, `prompts` and `most_tokens` (of a sequence): the command's model's, the small one's."""
        self._command, self._plan, self._models, self._prompts = command, plan, models, prompts
        asked = command.sampling.max_tokens
        rooms = [most - len(prompt) for most, prompt in zip(most_tokens, prompts, strict=True)]
        self._max_tokens = tuple(room if asked is None else min(asked, room) for room in rooms)
        self._answers = [
            Answer(
                command, model, prompt, self._sampler(model, prompt, measure), has_tools=False, choice=0, plan=self._use
            )
            for model, prompt, measure in zip(models, prompts, (False, True), strict=True)
        ]
        self._answer = self._answers[1]  # the one that is told
        self._watch = AnswerWatch()
        self._attempt: list[Choice] = []
        self._untold: list[Event] = []  # of the attempt: told once it is accepted
        self._base: Sequence | None = None
        self._most_tokens = most_tokens
        self._base_tokens = self._base_thought = 0
        self._shared: StepSpeculation | None = None  # who goes on where it is offered
        self._accepted: bool | None = None
        self._abandoned = False
        self._p: float | None = None
        self._degraded = ""
        self._refused = False

    @property
    def done(self) -> bool:
        return self._shared.done if self._shared is not None else self._answer.over or self._refused

    def begin(self, engine: Primitives) -> None:
        self._engine = engine
        prompt = self._prompts[1]
        limit = len(prompt) + self._max_tokens[1]
        layers = self._plan.accept.hidden_layers
        taps = TapSpec(layers, "generated") if layers else None
        sampler = self._answers[1].sampler
        self._draft = engine.open(self._plan.draft, prompt, sampler, limit=limit, taps=taps, expendable=True)

    def ended(self, reason: FinishReason) -> list[Event]:
        if self._shared is not None:
            return self._shared.ended(reason)
        self._answer = self._answers[0]
        return self._answer.end(reason)

    def stepped(self, turn: Turn) -> list[Event]:
        if self._shared is not None:
            return self._shared.stepped(turn)
        if turn.sequence is not self._draft:
            return self._base_wrote(turn)
        if turn.error is not None or turn.out_of_room:
            why = f"failed: {turn.error}" if turn.error is not None else "has no room for it"
            self._degraded = f"{self._plan.draft} {why}"
            return self._escalate()
        answer = self._answer
        answer.cached_tokens = self._draft.cached or 0
        for choice in turn.choices:
            if turn.hidden is not None:  # of tokens before this one
                self._look(turn.hidden)
            self._attempt.append(choice)
            self._watch.push(choice.logprob, choice.entropy)
            self._untold += answer.take(choice, self._max_tokens[1])
            end = self._untold[-1] if answer.over else None
            if isinstance(end, Finished) and end.finish_reason == "stop":
                self._p = p_correct(self._plan.accept, self._watch)
                return self._send(end) if accepts(self._plan.accept, self._watch) else self._escalate()
            if abandons(self._plan.accept, self._watch):
                self._abandoned = True
                return self._escalate()
        return self._escalate() if answer.over else []

    def _look(self, hidden: Hidden) -> None:
        """Keep the states of the token that the small model was least sure of; they come with later tokens."""
        for position, states in zip(hidden.positions, hidden.states, strict=True):
            if self._watch.in_doubt_at(position - len(self._prompts[1])):
                self._watch.doubt = states.flatten().tolist()

    def _send(self, end: Finished) -> list[Event]:
        self._accepted = True
        return [*self._untold[:-1], msgspec.structs.replace(end, plan=self._use())]

    def _escalate(self) -> list[Event]:
        self._accepted = False
        if self._plan.hint == "offer":
            return self._share()
        self._answer = self._answers[0]
        prompt, room = self._prompts[0], self._max_tokens[0]
        self._base = self._engine.open(self._command.model, prompt, self._answer.sampler, limit=len(prompt) + room)
        self._engine.close(self._draft)
        return []

    def _share(self) -> list[Event]:
        """Let the larger model judge the attempt, and the small one draft on where that ends."""
        plan = SpeculateSteps(draft=self._plan.draft)
        method = Scored(self._plan.floor, plan.unsure, plan.lookahead)
        attempt = Attempt(self._draft, self._attempt, self._told, self._degraded)
        rest = method, self._models, self._prompts, self._most_tokens, attempt
        self._shared = StepSpeculation(self._command, plan, *rest)
        self._shared.begin(self._engine)
        return []

    def _told(self, use: PlanUse) -> PlanUse:
        return msgspec.structs.replace(use, escalated=True, abandoned=self._abandoned, p_correct=self._p)

    def _base_wrote(self, turn: Turn) -> list[Event]:
        assert self._base is not None, "it has been asked"
        answer = self._answer
        answer.cached_tokens = self._base.cached or 0
        answer.drafted_tokens, answer.accepted_tokens = self._base.drafted, self._base.accepted
        if turn.out_of_room:
            if answer.output_tokens:
                return answer.end("length")
            self._refused = True
            model = self._command.model
            return [Failed(self._command.id, "context_length_exceeded", f"no room for the prompt in the KV of {model}")]
        events: list[Event] = []
        for choice in turn.choices:
            before = answer.thinking
            self._base_tokens += 1
            self._base_thought += before or self._models[0].thinks_after(choice.token, before)
            events += answer.take(choice, self._max_tokens[0])
            if answer.over:
                break
        return events

    def _sampler(self, model: LocalModel, prompt: list[int], measure: bool) -> Sampler:
        return Sampler(
            self._command.sampling,
            model.device,
            prompt_tokens=len(prompt),
            end_tokens=model.end_tokens,
            measure=measure,
        )

    def _use(self) -> PlanUse:
        written, base = len(self._attempt), self._base
        in_text = written if self._accepted else 0
        return PlanUse(
            [
                ModelUse(
                    self._command.model,
                    0 if base is None else len(self._prompts[0]),
                    0 if base is None else base.cached or 0,
                    self._base_tokens,
                    self._base_thought,
                    0 if base is None else base.read,
                    0 if base is None else base.rows,
                ),
                ModelUse(
                    self._plan.draft,
                    len(self._prompts[1]),
                    self._draft.cached or 0,
                    written,
                    self._answers[1].reasoning_tokens,
                    self._draft.read,
                    self._draft.rows,
                ),
            ],
            drafted_tokens=written,
            accepted_tokens=in_text,
            discarded_tokens=written - in_text,
            degraded=self._degraded,
            escalated=self._accepted is False,
            abandoned=self._abandoned,
            p_correct=self._p,
        )
