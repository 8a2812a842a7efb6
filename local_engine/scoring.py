"""One `Score`: candidates after one prompt, which is read once and forked for each of them."""

from local_engine.primitives import Primitives
from local_engine.room import out_of_room
from local_engine.sequence import Scores, Sequence
from local_engine.turns import Turn
from local_engine.types import CandidateScore, Event, Failed, Finished, FinishReason, Score, ScoreResult


class Scoring:
    """Controller: the prompt but for its last token is read; then every candidate, and that token, at once."""

    def __init__(self, command: Score, prompt: list[int], candidates: list[list[int]]) -> None:
        self._command = command
        self._prompt = prompt
        self._candidates = candidates
        self._engine: Primitives | None = None
        self._asked: dict[Sequence, int] = {}
        self._scores: dict[int, Scores] = {}
        self._cached_tokens = 0
        self._refused = False

    @property
    def done(self) -> bool:
        return self._refused or len(self._scores) == len(self._candidates)

    def begin(self, engine: Primitives) -> None:
        self._engine = engine
        engine.open(self._command.model, self._prompt)

    def stepped(self, turn: Turn) -> list[Event]:
        assert self._engine is not None, "it has begun"
        if turn.out_of_room:
            self._refused = True
            return [out_of_room(self._command.id, self._command.model, len(turn.sequence.ids))]
        if turn.rested:
            self._cached_tokens = turn.sequence.cached or 0
            for at, tokens in enumerate(self._candidates):
                self._asked[self._engine.score(turn.sequence, tokens)] = at
        if turn.scores is not None:
            self._scores[self._asked[turn.sequence]] = turn.scores
        return [self._result()] if self.done else []

    def ended(self, reason: FinishReason) -> list[Event]:
        if reason == "deadline":
            return [Failed(self._command.id, "deadline", "the time for the scores ran out")]
        return [Finished(self._command.id, reason, len(self._prompt), 0, 0, cached_tokens=self._cached_tokens)]

    def _result(self) -> ScoreResult:
        return ScoreResult(
            self._command.id,
            [
                CandidateScore(tokens, self._scores[at].logprobs, self._scores[at].entropies)
                for at, tokens in enumerate(self._candidates)
            ],
            len(self._prompt),
            self._cached_tokens,
        )
