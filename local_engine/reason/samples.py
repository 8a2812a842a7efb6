"""Several samples of one prompt, until they agree: the prompt is read once, and forked for each of them.

How many run at a time follows from what it would take to stop (`voting.least_more`): no sample is begun that an
agreement of those before it would make needless. Each is a `Generation` of its own, so exits, formats and tools hold
for all. What a caller is shown is one of them, whole, when it is chosen; the rest is counted and forgotten.
"""

import math
from dataclasses import dataclass, field

import msgspec

from local_engine.chat import InvalidRequest, Tool
from local_engine.generation import Generation
from local_engine.model import LocalModel
from local_engine.plan_types import ModelUse, PlanUse, Sampled, Vote
from local_engine.primitives import Primitives
from local_engine.reason.answers import answer_class
from local_engine.reason.voting import Ballot, least_more, winner
from local_engine.room import out_of_room
from local_engine.sequence import Sequence
from local_engine.turns import Turn
from local_engine.types import Delta, Event, Failed, Finished, FinishReason, Generate

MOST_SAMPLES = 128


@dataclass(slots=True, eq=False)
class _Sample:
    generation: Generation
    tokens: int = 0
    logprob: float = 0.0
    lowest: float = 0.0
    path: int = 0
    given: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    told: list[Delta] = field(default_factory=list)
    """What it would have shown."""
    end: Finished | None = None
    given_up: bool = False

    @property
    def over(self) -> bool:
        return self.end is not None or self.given_up

    def ballot(self) -> Ballot:
        says = self.end is not None and self.end.finish_reason in ("stop", "tool_calls")
        content = "".join(delta.content for delta in self.told) if says else ""
        return Ballot(answer_class(content), self.logprob, self.tokens, self.lowest, self.path)


class Samples:
    """Controller of a vote."""

    _engine: Primitives
    _root: Sequence

    def __init__(
        self,
        command: Generate,
        plan: Vote,
        model: LocalModel,
        prompt: list[int],
        tools: list[Tool] | None,
        most_tokens: int,
    ) -> None:
        """Raises InvalidRequest for what cannot be voted on."""
        if (problem := _problem(command, plan)) is not None:
            raise InvalidRequest(problem, "plan")
        self._command, self._plan, self._model = command, plan, model
        self._prompt, self._tools, self._most_tokens = prompt, tools, most_tokens
        self._samples: list[_Sample] = []
        self._sample_of: dict[Sequence, _Sample] = {}
        self._cached_tokens = 0
        self.done = False
        self._generation(0)  # what cannot be run is refused now, not after the prompt is read

    def begin(self, engine: Primitives) -> None:
        self._engine = engine
        asked = self._command.sampling.max_tokens
        limit = None if asked is None else len(self._prompt) + asked
        self._root = engine.open(self._command.model, self._prompt, limit=limit)

    def stepped(self, turn: Turn) -> list[Event]:
        if turn.sequence is self._root:
            if turn.out_of_room:
                return self._refuse(len(self._prompt))
            if turn.rested:
                self._cached_tokens = self._root.cached or 0
                self._draw()
            return []
        sample = self._sample_of[turn.sequence]
        told = sample.generation.stepped(turn)
        for choice in turn.choices[: sample.generation.written_tokens - sample.tokens]:
            sample.tokens += 1
            sample.logprob += choice.logprob
            sample.lowest = min(sample.lowest, choice.logprob)
            sample.path = hash((sample.path, choice.token))
        sequence = turn.sequence
        sample.given, sample.rows = sequence.given, sequence.rows
        sample.drafted, sample.accepted = sequence.drafted, sequence.accepted
        for event in told:
            if isinstance(event, Failed):
                self.done = True
                return [event]
            if isinstance(event, Delta):
                sample.told.append(event)
            elif isinstance(event, Finished):
                sample.end = event
        if not sample.over and self._hopeless(sample):
            sample.given_up = True
            self._engine.close(turn.sequence)
        return self._decide() if sample.over else []

    def ended(self, reason: FinishReason) -> list[Event]:
        """Out of time: the best of what there is. Cancelled: nobody is there to be told."""
        finished = [sample for sample in self._samples if sample.end is not None]
        if reason == "deadline" and finished:
            return self._show(finished)
        self.done = True
        counts = self._counts(shown=None)
        return [Finished(self._command.id, reason, len(self._prompt), *counts[:2], plan=counts[2])]

    def _decide(self) -> list[Event]:
        over = [sample for sample in self._samples if sample.over]
        if self._more(over):
            self._draw()
            return []
        return self._show([sample for sample in over if sample.end is not None])

    def _more(self, over: list[_Sample]) -> int:
        plan = self._plan
        return least_more([sample.ballot() for sample in over], plan.stop, plan.bound, plan.most)

    def _draw(self) -> None:
        """Begin as many samples as it takes to stop if all agree, less those that run."""
        over = [sample for sample in self._samples if sample.over]
        running = len(self._samples) - len(over)
        for _ in range(self._more(over) - running):
            sample = _Sample(self._generation(len(self._samples)))
            before = set(self._engine.sequences)
            sample.generation.begin(self._engine)
            (sequence,) = set(self._engine.sequences) - before
            self._sample_of[sequence] = sample
            self._samples.append(sample)

    def _generation(self, number: int) -> Generation:
        sampling = self._command.sampling
        if sampling.seed is not None:
            sampling = msgspec.structs.replace(sampling, seed=sampling.seed + number)
        command = msgspec.structs.replace(self._command, plan=self._plan.exit, sampling=sampling)
        source = self._root if hasattr(self, "_root") else None
        return Generation(
            command, self._model, self._prompt, self._tools, self._most_tokens, source=source, measure=True
        )

    def _hopeless(self, sample: _Sample) -> bool:
        """After DeepConf (Fu et al. 2025, arXiv 2508.15260): a path is given up when its confidence falls below that
        of a finished one. There it is the mean over a window of tokens, here the least."""
        bound = self._plan.prune
        if bound is None or sample.lowest >= bound:
            return False
        return any(other.end is not None and other.lowest >= bound for other in self._samples)

    def _show(self, finished: list[_Sample]) -> list[Event]:
        """One of them, with the counts of all."""
        chosen = finished[winner([sample.ballot() for sample in finished], self._plan.weigh)]
        assert chosen.end is not None, "it is among the finished ones"
        self.done = True
        output, reasoning, use = self._counts(shown=self._samples.index(chosen))
        end = msgspec.structs.replace(
            chosen.end,
            output_tokens=output,
            reasoning_tokens=reasoning,
            cached_tokens=self._cached_tokens,
            drafted_tokens=sum(sample.drafted for sample in self._samples),
            accepted_tokens=sum(sample.accepted for sample in self._samples),
            plan=use,
        )
        return [*chosen.told, end]

    def _counts(self, shown: int | None) -> tuple[int, int, PlanUse]:
        """(output tokens, of them reasoning, what was done) of all samples."""
        output = sum(sample.tokens for sample in self._samples)
        forced = sum(s.end.plan.forced_tokens for s in self._samples if s.end is not None and s.end.plan is not None)
        kept = 0
        answers = 0
        for at, sample in enumerate(self._samples):
            if sample.end is not None:
                own = sample.end
                answers += own.output_tokens - own.reasoning_tokens
                kept += own.output_tokens if at == shown else 0
        prompt, cached = len(self._prompt), self._cached_tokens
        read = prompt - cached + sum(sample.given for sample in self._samples)
        computed = prompt - cached + sum(sample.rows for sample in self._samples)
        model = ModelUse(self._model.card.name, prompt, cached, output, output - answers, read, computed)
        use = PlanUse(
            [model],
            discarded_tokens=output + forced - kept,
            forced_tokens=forced,
            shown=shown,
            samples=[_told(sample) for sample in self._samples],
        )
        return output + forced, output + forced - answers, use

    def _refuse(self, tokens: int) -> list[Event]:
        self.done = True
        return [out_of_room(self._command.id, self._command.model, tokens)]


def _told(sample: _Sample) -> Sampled:
    ballot = sample.ballot()
    logprob = sample.logprob if math.isfinite(sample.logprob) else 0.0
    return Sampled(ballot.answer, sample.tokens, logprob, sample.lowest, sample.end is not None)


def _problem(command: Generate, plan: Vote) -> str | None:
    if command.n != 1:
        return f"plan: a vote is about one answer, not n = {command.n}"
    if command.taps is not None:
        return "plan: samples of a vote cannot be tapped; leave out taps"
    if command.sampling.temperature == 0:
        return "plan: a vote needs samples that differ, and temperature is 0; set it above, such as 0.7"
    if not 1 <= plan.most <= MOST_SAMPLES:
        return f"plan.most must be from 1 to {MOST_SAMPLES} samples, not {plan.most}"
    if not 0 < plan.bound < 1:
        return f"plan.bound must be between 0 and 1, not {plan.bound}"
    if plan.prune is not None and plan.prune >= 0:
        return f"plan.prune is a natural logarithm, below 0, not {plan.prune}"
    if plan.exit is not None and plan.exit.rule == "trace":
        return "plan.exit: samples of a vote cannot be traced"
    return None
