"""When may a thought be left? A probe over what is known at a cue, and thresholds with a proof per request.

LYNX (Akgül et al., arXiv 2512.05325) trains a probe on "forced exits", and calibrates it per event: a threshold that
one cue is right with probability 1 - delta. A request takes the first confident cue of several that depend on each
other, so its risk is more. Here the exchangeable unit is the trajectory: it loses at every threshold below the largest
p among those of its cues where leaving goes wrong. That is one number per trajectory, the loss is monotone, and
`certify.py` does the rest. What is lost is never understated: a rule that leaves earlier, and rightly, loses less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from probes.calibrate import Array, brier, ece, sigmoid
from probes.certify import SLACK, Losses, certify
from probes.errors import CertificateError

Bools = npt.NDArray[np.bool_]
Form = Literal["expected", "high_probability", "per_event"]
Loss = Literal["wrong", "harm"]
FORMS: Final[tuple[Form, ...]] = ("expected", "high_probability", "per_event")
LOSSES: Final[tuple[Loss, ...]] = ("wrong", "harm")
DELTAS: Final = (0.01, 0.02, 0.05, 0.1, 0.2)
LEAST_OF_A_CLASS: Final = 20
"""Cues where leaving is right, and where it is wrong, that a fit needs at least."""
BELOW_ALL: Final = -1.0
"""The threshold that leaves at every cue."""


@dataclass(frozen=True, slots=True)
class Cues:
    """All cues of n trajectories, in order."""

    n: int
    of: npt.NDArray[np.intp]
    """[cues] the trajectory of each, ascending; one without a cue has none"""
    values: Array
    """[cues, features]"""
    right: Bools
    """[cues] is the answer forced here right?"""
    right_at_end: Bools
    """[n] is the answer at the thought's own end?"""

    def take(self, rows: npt.NDArray[np.intp]) -> "Cues":
        """Those of some trajectories, in the order given."""
        place = np.full(self.n, -1, np.intp)
        place[rows] = np.arange(len(rows))
        of = place[self.of]
        picked = np.argsort(of, kind="stable")[int((of < 0).sum()) :]
        return Cues(len(rows), of[picked], self.values[picked], self.right[picked], self.right_at_end[rows])

    def lost(self, loss: Loss) -> Bools:
        """[cues] does leaving here lose? `harm`: only where the thought's own end would have been right."""
        wrong = ~self.right
        return wrong if loss == "wrong" else wrong & self.right_at_end[self.of]


@dataclass(frozen=True, slots=True)
class ExitFit:
    """A logistic regression on standardised features."""

    mean: Array
    scale: Array
    weight: Array
    bias: float

    def predict(self, values: Array) -> Array:
        """[cues] P(right) of [cues, features]."""
        return sigmoid((values - self.mean) / self.scale @ self.weight + self.bias)


def fit(cues: Cues, *, c: float = 1.0) -> ExitFit:
    """Raises CertificateError where one class has too few cues to learn from."""
    from sklearn.linear_model import LogisticRegression

    right, wrong = int(cues.right.sum()), int((~cues.right).sum())
    if min(right, wrong) < LEAST_OF_A_CLASS:
        raise CertificateError(
            f"leaving is right at {right} cues and wrong at {wrong}: a fit needs {LEAST_OF_A_CLASS} of each at least; "
            "ask more questions, or harder and easier ones"
        )
    mean, scale = cues.values.mean(0), cues.values.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    model = LogisticRegression(C=c, max_iter=5000).fit((cues.values - mean) / scale, cues.right)
    return ExitFit(mean, scale, np.asarray(model.coef_[0], np.float64), float(model.intercept_[0]))


def exit_losses(cues: Cues, p: Array, loss: Loss) -> Losses:
    """What leaving above a threshold loses per trajectory, as a function of it."""
    lost = cues.lost(loss)
    worst = np.full(cues.n, -np.inf)
    np.maximum.at(worst, cues.of[lost], p[lost])
    worst = worst[np.isfinite(worst)]
    return Losses(cues.n, worst, np.ones(len(worst)))


def threshold(cues: Cues, p: Array, delta: float, form: Form, loss: Loss = "wrong") -> float:
    """Leave where p is above this. Raises CertificateError where the trajectories are too few for delta.

    `high_probability`: of as many further requests, at most a share delta is left and loses, with a chance of 95%.
    """
    if form == "per_event":
        return _per_event(cues, p, delta, loss)
    losses = exit_losses(cues, p, loss)
    if len(losses.at) == 0:
        raise CertificateError(f"leaving goes wrong in none of {cues.n} trajectories: there is nothing to calibrate on")
    if form == "expected":
        return max(certify(losses, delta, "crc").value, BELOW_ALL)
    return max(certify(losses, delta, "ltt").value, BELOW_ALL)


def _per_event(cues: Cues, p: Array, delta: float, loss: Loss) -> float:
    """The published rule: leave where the conformal set is exactly {right}, so p >= 1 - q_right and p > q_wrong."""
    lost = cues.lost(loss)
    quantiles = []
    for scores in (1 - p[~lost], p[lost]):
        n = len(scores)
        if n + SLACK < 1 / delta - 1:
            raise CertificateError(f"{n} cues of a class are too few for delta {delta:g}: it takes {1 / delta - 1:.0f}")
        quantiles.append(np.sort(scores)[min(n, int(np.ceil((n + 1) * (1 - delta) - SLACK))) - 1])
    return float(max(quantiles[1], np.nextafter(1 - quantiles[0], -1)))


@dataclass(frozen=True, slots=True)
class Left:
    """What a threshold does to trajectories."""

    at: npt.NDArray[np.intp]
    """[n] the cue (row) at which each is left; -1: never"""
    right: Bools
    """[n] is it answered rightly?"""
    risk: float
    """Share of trajectories that are left and lose by it."""


def leave(cues: Cues, p: Array, above: float, loss: Loss = "wrong") -> Left:
    """Leave each trajectory at its first cue whose p is above the threshold."""
    at = np.full(cues.n, -1, np.intp)
    taken = np.flatnonzero(p > above)
    first, where = np.unique(cues.of[taken], return_index=True)
    at[first] = taken[where]
    left = at >= 0
    right = np.where(left, cues.right[at] if len(cues.right) else False, cues.right_at_end)
    lost = cues.lost(loss)
    risk = float(lost[at[left]].sum()) / cues.n
    return Left(at, np.asarray(right, np.bool_), risk)


@dataclass(frozen=True, slots=True)
class Resplits:
    """Does a promise hold? Risks realised on random halves, each calibrated on the other."""

    form: Form
    delta: float
    risks: Array
    """[splits]"""
    shares_left: Array
    """[splits] of trajectories that were left early"""

    @property
    def held(self) -> float:
        """Share of splits with a realised risk of at most delta."""
        return float((self.risks <= self.delta + SLACK).mean())


def resplit(
    cues: Cues, p: Array, delta: float, form: Form, loss: Loss = "wrong", *, splits: int = 200, seed: int = 0
) -> Resplits:
    """`p` must come from a probe that has seen none of these trajectories.

    Every cut into halves is used both ways, which halves the noise of the mean. What is realised is counted on as many
    trajectories as the other half has, and has noise of its own, for which the high-probability form allows.
    """
    rng = np.random.default_rng(seed)
    risks, shares = np.empty(splits), np.empty(splits)
    with_p = replace(cues, values=p[:, None])
    for split in range(splits):
        if split % 2 == 0:
            rows = rng.permutation(cues.n)
            ours, theirs = with_p.take(rows[: cues.n // 2]), with_p.take(rows[cues.n // 2 :])
        else:
            ours, theirs = theirs, ours
        above = threshold(ours, ours.values[:, 0], delta, form, loss)
        left = leave(theirs, theirs.values[:, 0], above, loss)
        risks[split], shares[split] = left.risk, float((left.at >= 0).mean())
    return Resplits(form, delta, risks, shares)


def quality(cues: Cues, p: Array) -> dict[str, float]:
    """How well p tells right from wrong, on cues that the fit has not seen."""
    from sklearn.metrics import roc_auc_score

    labels = cues.right.astype(np.float64)
    return {
        "auc": round(float(roc_auc_score(labels, p)), 4),
        "brier": round(brier(p, labels), 4),
        "ece": round(ece(p, labels), 4),
        "base_rate": round(float(labels.mean()), 4),
    }


def fit_budget(prompt_tokens: Array, needed: Array, quantile: float = 0.9) -> tuple[float, float]:
    """(base, per prompt token): the line below which `quantile` of trajectories needed fewer thinking tokens."""
    from sklearn.linear_model import QuantileRegressor

    line = QuantileRegressor(quantile=quantile, alpha=0.0, solver="highs").fit(prompt_tokens[:, None], needed)
    return float(line.intercept_), float(line.coef_[0])


def halves(keys: Sequence[str], seed: int = 0) -> Bools:
    """[n] True: to be fitted on; False: to be calibrated on. The same for the same key, whatever comes beside it."""
    from hashlib import blake2b

    salt = str(seed).encode()
    return np.array([blake2b(key.encode(), digest_size=1, key=salt).digest()[0] % 2 == 0 for key in keys])
