"""Go back over a thought only where one of its steps was unusually uncertain.

MUR, momentum uncertainty-guided reasoning (Yan et al. 2025, arXiv 2507.14958): the momentum of the steps' uncertainty
is m_t = alpha m_{t-1} + (1 - alpha) u_t, u_t being the mean negative log-likelihood of a step's tokens, and more
compute is spent on a step only where exp(u_t) > exp(m_{t-1}) / gamma. There a step gets samples; here a pass gets its
recheck: the thought is left at a cue unless a step of the pass before it stood out. Nothing is trained.
"""

import math
from dataclasses import dataclass

from local_engine.reason.thought import STEP_END, Kind, Moment, Thought, Verdict


@dataclass(slots=True)
class Momentum:
    alpha: float = 0.9
    gamma: float = 0.9
    """Smaller: fewer steps stand out, so that more thoughts are left."""
    kinds: frozenset[Kind] = frozenset({"cue"})
    measures: bool = True

    def look(self, moment: Moment) -> Verdict:
        first, stop = moment.passes[-1]
        return Verdict.GO_ON if self._stands_out(moment.thought, first, stop) else Verdict.EXIT

    def heard(self, moment: Moment, answer: str) -> Verdict:
        return Verdict.GO_ON

    def _stands_out(self, thought: Thought, first: int, stop: int) -> bool:
        momentum: float | None = None
        for uncertainty in step_uncertainties(thought, first, stop):
            if momentum is not None and uncertainty > momentum - math.log(self.gamma):
                return True
            momentum = uncertainty if momentum is None else self.alpha * momentum + (1 - self.alpha) * uncertainty
        return False


def step_uncertainties(thought: Thought, first: int, stop: int) -> list[float]:
    """The mean negative log-likelihood of each step from token `first` to `stop`; what is not measured is left out."""
    found: list[float] = []
    step: list[float] = []
    for at in range(first, stop):
        if math.isfinite(thought.logprobs[at]):
            step.append(-thought.logprobs[at])
        if step and (STEP_END in thought.texts[at] or at == stop - 1):
            found.append(sum(step) / len(step))
            step = []
    return found
