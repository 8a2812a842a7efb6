"""Follows one thought token by token, and says when to leave it. No torch here: a gateway can watch a remote stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from local_engine.reason.cues import CUES, CueFinder
from local_engine.reason.loops import LONGEST_PERIOD, ROUNDS, goes_round
from local_engine.reason.thought import STEP_END, Moment, Rule, Thought, Verdict

_LOOK_FOR_LOOPS: Final = 16
"""Every so many tokens."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Leave the thought, or try an answer, before its token `moment.cut`."""

    verdict: Verdict
    moment: Moment
    why: str
    """The rule's name; `limit` or `loop`."""


def no_hidden(token: int) -> Sequence[float]:
    """Where no hidden states are read."""
    return ()


class Watch:
    """`hidden` gives the hidden states at a token of the thought, counted from 0, when a cue has ended there."""

    def __init__(
        self,
        rule: Rule,
        name: str,
        prompt_tokens: int,
        *,
        cues: Sequence[str] = CUES,
        max_tokens: int | None = None,
        hidden: Callable[[int], Sequence[float]] = no_hidden,
    ) -> None:
        self.rule = rule
        self.thought = Thought(prompt_tokens)
        self._name = name
        self._finder = CueFinder(cues)
        self._max_tokens = max_tokens
        self._hidden = hidden

    @property
    def certain(self) -> int:
        """So many tokens stay, whatever comes: later ones may yet be cut off."""
        return self._finder.pending if "cue" in self.rule.kinds else len(self.thought)

    def push(self, text: str, logprob: float, entropy: float) -> Notice | None:
        """One more token of the thought; not None: there is something to do before the next."""
        thought = self.thought
        thought.texts.append(text)
        thought.logprobs.append(logprob)
        thought.entropies.append(entropy)
        n = len(thought)
        cue = self._finder.push(text)
        moment: Moment | None = None
        if cue is not None:
            moment = Moment(thought, "cue", cue.first, self._hidden(cue.last))
            thought.turns.append(cue.first)
        elif thought.said(n - 2, n).endswith(STEP_END):
            moment = Moment(thought, "step", n)
        if moment is not None and moment.kind in self.rule.kinds:
            verdict = self.rule.look(moment)
            if verdict is not Verdict.GO_ON:
                return Notice(verdict, moment, self._name)
        if self._max_tokens is not None and n >= self._max_tokens:
            return Notice(Verdict.EXIT, Moment(thought, "step", n), "limit")
        if n % _LOOK_FOR_LOOPS == 0 and goes_round(thought.texts[-(ROUNDS + 1) * LONGEST_PERIOD :]):
            return Notice(Verdict.EXIT, Moment(thought, "step", n), "loop")
        return None
