"""Leave a thought at a cue when a probe is sure enough that the answer is there.

LYNX (Akgül et al. 2025, arXiv 2512.05325) "attaches exit decisions to naturally occurring reasoning cues, trains a
lightweight probe on hidden states at those cue tokens using supervision from forced exits, and wraps the resulting
scores in split conformal prediction". Its guarantee is per event. Ours is per request: the calibration knows, of each
trajectory, the largest p among its cues at which the forced answer was wrong, and a thought is left only where p is
above the threshold that this allows. The threshold is fitted elsewhere and read from the artifact (`artifact.py`).
"""

from dataclasses import dataclass

from local_engine.plan_types import Exit
from local_engine.reason.artifact import ExitArtifact, ExitProbe
from local_engine.reason.budget import TokenBudget
from local_engine.reason.convergence import Convergence
from local_engine.reason.momentum import Momentum
from local_engine.reason.redundancy import Redundancy
from local_engine.reason.thought import Kind, Moment, Rule, Verdict, features

MAX_AGREE = 16


@dataclass(slots=True)
class ProbeExit:
    """Leave at the first cue whose p is above the threshold."""

    probe: ExitProbe
    threshold: float
    kinds: frozenset[Kind] = frozenset({"cue"})
    measures: bool = True
    p: float | None = None
    """At the last cue."""

    def look(self, moment: Moment) -> Verdict:
        self.p = self.probe.p([*features(moment), *moment.hidden])
        return Verdict.EXIT if self.p > self.threshold else Verdict.GO_ON

    def heard(self, moment: Moment, answer: str) -> Verdict:
        return Verdict.GO_ON


@dataclass(slots=True)
class AtCue:
    """Leave at the first cue whatever it is: what a clever rule has to beat."""

    kinds: frozenset[Kind] = frozenset({"cue"})
    measures: bool = False

    def look(self, moment: Moment) -> Verdict:
        return Verdict.EXIT

    def heard(self, moment: Moment, answer: str) -> Verdict:
        return Verdict.GO_ON


@dataclass(slots=True)
class Trace:
    """Force an answer at every cue, and go on: how the other rules' data are made."""

    kinds: frozenset[Kind] = frozenset({"cue"})
    measures: bool = True

    def look(self, moment: Moment) -> Verdict:
        return Verdict.ASK

    def heard(self, moment: Moment, answer: str) -> Verdict:
        return Verdict.GO_ON


@dataclass(slots=True)
class Never:
    """Nothing but the limits."""

    kinds: frozenset[Kind] = frozenset()
    measures: bool = False

    def look(self, moment: Moment) -> Verdict:
        return Verdict.GO_ON

    def heard(self, moment: Moment, answer: str) -> Verdict:
        return Verdict.GO_ON


def make_rule(asked: Exit, artifact: ExitArtifact | None, prompt_tokens: int) -> Rule:
    """The rule for one thought. Raises ValueError naming the field, the value and the fix."""
    if not 1 < asked.agree <= MAX_AGREE:
        raise ValueError(f"plan.agree must be from 2 to {MAX_AGREE}, not {asked.agree}")
    match asked.rule:
        case "none":
            return Never()
        case "cue":
            return AtCue()
        case "trace":
            return Trace()
        case "convergence":
            return Convergence(asked.agree)
        case "redundancy":
            return Redundancy(asked.agree)
        case "momentum":
            if not 0 < asked.gamma <= 1:
                raise ValueError(f"plan.gamma must be over 0 and at most 1, not {asked.gamma}")
            return Momentum(gamma=asked.gamma)
        case "budget" if asked.budget is not None:
            if asked.budget < 1:
                raise ValueError(f"plan.budget must be at least 1 token, not {asked.budget}")
            return TokenBudget(asked.budget)
    if artifact is None:
        raise ValueError(
            f"plan.rule {asked.rule!r} needs a fitted artifact, and this model has none: run `leadline exits fit`,"
            " or take a rule that is not fitted (convergence, redundancy, momentum, cue)"
        )
    if asked.rule == "budget":
        return artifact.budget.of(prompt_tokens)
    return ProbeExit(artifact.probe, artifact.manifest.threshold(asked.delta, asked.form, asked.loss))
