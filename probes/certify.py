"""Thresholds with a proof: how far a score may be trusted before the loss that matters exceeds alpha. numpy only.

The loss of a row is what is lost when its answer is accepted although a better one was at hand: for a router, "the weak
model is wrong, the strong one right, and the query went to the weak one"; for a cascade, "accepted and wrong". A row is
accepted iff its score is above the threshold, so the loss never rises with the threshold, and both methods come down to
how much loss n rows may show:

- conformal risk control (Angelopoulos et al., arXiv 2208.02814): the mean loss of a new row is at most alpha, on
  average over draws of these rows, for the loosest t with n/(n+1) mean loss(t) + 1/(n+1) <= alpha;
- Learn-then-Test (Angelopoulos et al., arXiv 2110.01052): with probability 1 - delta over draws of these rows the
  threshold's expected loss is at most alpha. "The loss at t exceeds alpha" is tested from the strictest t to the
  loosest, and the first that cannot be rejected ends it. As the loss is monotone, every t may be tested, without a
  grid. The p-value is the binomial's own for losses of 0 and 1 (Clopper and Pearson), Hoeffding's and Bentkus's for
  others. With a horizon it is the realised mean loss of that many further rows that is at most alpha with probability
  1 - delta: what one can count afterwards has noise of its own. The p-value is then the hypergeometric's, and it must
  be below delta / 2: rows are never quite exchangeable (out-of-fold scores are of other heads), and a promise that can
  be counted should hold when it is counted.

Both ask that the rows and the queries to come are exchangeable, and that the score has not seen the rows' labels.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np
import numpy.typing as npt

from probes.calibrate import Array
from probes.errors import CertificateError
from probes.manifest import BELOW_ALL, Certificate, Manifest

Method = Literal["crc", "ltt"]
METHODS: tuple[Method, ...] = ("ltt", "crc")
ALPHAS = (0.02, 0.05, 0.1)
DELTA = 0.05
ROOM = 0.5
"""The share of delta at which a realised loss is tested."""
Horizon = int | Literal["rows"] | None
"""Further rows whose realised loss is bounded; "rows": as many as it is certified on; None: the expected loss is."""
SLACK = 1e-9
"""Of counts of rows: alpha * (n + 1) must not lose a row to the last bit of a float."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of n rows as a function of the threshold: one loses `size[i]` more while the threshold is < `at[i]`."""

    n: int
    at: Array
    """[steps] scores"""
    size: Array
    """[steps] in (0, 1]; a row's steps sum to at most 1"""

    def risk(self, threshold: float) -> float:
        """Mean loss per row at this threshold."""
        return float(self.size[self.at > threshold].sum()) / self.n


@dataclass(frozen=True, slots=True)
class Threshold:
    """Accept iff score > `value` (-inf: accept all); `risk` is the mean loss of the rows that it was taken from."""

    value: float
    risk: float
    n: int
    alpha: float
    method: Method
    delta: float | None
    """None for conformal risk control, whose promise is about the mean."""
    horizon: int | None = None
    """The promise is about the realised loss of this many further rows; None: about the expected loss."""


def accept_losses(scores: Array, wrong: Array) -> Losses:
    """Accept or not: `scores` [n], the higher the surer; `wrong` [n] in [0, 1] is what accepting the row loses."""
    scores, wrong = np.asarray(scores, np.float64), np.asarray(wrong, np.float64)
    if scores.ndim != 1 or wrong.shape != scores.shape:
        raise CertificateError(f"scores {scores.shape} and losses {wrong.shape} must be two lists of one length")
    _finite("score", scores)
    _share("loss", wrong)
    lost = wrong > 0
    return Losses(len(scores), scores[lost], wrong[lost])


def route_losses(probabilities: Array, quality: Array) -> Losses:
    """Choose among models, cheapest first, the last being the reference: both arguments are [n, models].

    A row goes to the first model whose probability is more than the threshold above the reference's, else to the
    reference. It loses what the reference's `quality` (in [0, 1]) is above the chosen model's. A looser threshold
    moves rows to cheaper models, some of which may be better on that row: the loss is kept at its highest so far, which
    makes it monotone and can only overstate it. With two models, quality 0 or 1, it is "weak wrong, strong right".
    """
    probabilities, quality = np.asarray(probabilities, np.float64), np.asarray(quality, np.float64)
    if probabilities.ndim != 2 or probabilities.shape != quality.shape or probabilities.shape[1] < 2:
        raise CertificateError(
            f"probabilities {probabilities.shape} and quality {quality.shape} must both be [rows, models], "
            "of two models or more"
        )
    _share("probability", probabilities)
    _share("quality", quality)
    margin = probabilities[:, :-1] - probabilities[:, -1:]
    lost = np.maximum(quality[:, -1:] - quality[:, :-1], 0.0)
    # The margin that a model must exceed to be chosen at any threshold: every cheaper model goes first.
    cheaper = np.maximum.accumulate(np.column_stack([np.full(len(margin), -np.inf), margin[:, :-1]]), axis=1)
    at, size, worst = [], [], np.zeros(len(margin))
    for model in reversed(range(margin.shape[1])):
        more = np.where(margin[:, model] > cheaper[:, model], lost[:, model] - worst, 0.0)
        rows = more > 0
        at.append(margin[rows, model])
        size.append(more[rows])
        worst = worst + np.maximum(more, 0.0)
    return Losses(len(margin), np.concatenate(at), np.concatenate(size))


def choose(probabilities: Array, threshold: float) -> npt.NDArray[np.intp]:
    """The model (column) that each row of [n, models] goes to, as `route_losses` has it."""
    cheap = probabilities[:, :-1] - probabilities[:, -1:] > threshold
    return np.asarray(np.where(cheap.any(1), cheap.argmax(1), probabilities.shape[1] - 1), np.intp)


def to_last(probabilities: Array) -> Array:
    """[n, models], where a row of which nothing is said (NaN) stays with the last, as a gateway keeps it there; of one
    model, with nobody."""
    silent = np.asarray(np.isnan(probabilities).any(axis=1))
    kept = np.where(silent[:, None], 0.0, probabilities)
    if kept.shape[1] > 1:
        kept[silent, -1] = 1.0
    return np.asarray(kept)


def certify(
    losses: Losses, alpha: float, method: Method = "ltt", delta: float = DELTA, horizon: Horizon = "rows"
) -> Threshold:
    """The loosest threshold that is proven to lose at most alpha; CertificateError where these rows prove nothing.

    A horizon belongs to ltt and to losses of 0 and 1; "rows" is None for others.
    """
    binary = bool((losses.size == 1.0).all())
    if horizon == "rows" and not binary:
        horizon = None
    require_rows(losses.n, alpha, method, delta, horizon)
    if horizon == "rows":
        horizon = losses.n if method == "ltt" else None
    total = float(losses.size.sum())
    if total == 0 or total > losses.n - SLACK:
        raise CertificateError(
            f"of {losses.n} rows {'none' if total == 0 else 'every one'} can lose: labels of one class say nothing "
            "about where the score errs; check the label columns"
        )
    order = np.argsort(-losses.at, kind="stable")
    at, lost = losses.at[order], np.cumsum(losses.size[order])
    # Rows of one score are accepted together: what counts is the sum after the last of them.
    last = np.append(at[1:] != at[:-1], True)
    if horizon is not None and not binary:
        raise CertificateError("a horizon asks for losses of 0 or 1: leave it out to bound the expected loss")
    allowed = _allowed(losses.n, alpha, method, delta, horizon, binary)
    over = np.flatnonzero(last & (lost > allowed + SLACK))
    value = float(at[over[0]]) if len(over) else -math.inf
    return Threshold(value, losses.risk(value), losses.n, alpha, method, None if method == "crc" else delta, horizon)


def require_rows(n: int, alpha: float, method: Method, delta: float = DELTA, horizon: Horizon = "rows") -> None:
    """Refuse what n rows cannot prove, however few of them lose; says how many it takes."""
    if not _proves(n, alpha, method, delta, horizon):
        needed = rows_needed(alpha, method, delta, horizon, above=n)
        if horizon == "rows":
            horizon = n if method == "ltt" else None
        sure = "" if method == "crc" else f" with {1 - delta:.4g} confidence"
        sure += "" if horizon is None else f" over the next {horizon} queries"
        raise CertificateError(
            f"{n} rows are too few to certify a loss of at most {alpha:g}{sure}: even without one loss it takes "
            f"{needed}; label more rows, or ask for a larger alpha"
        )


def resplit(
    losses: Callable[[npt.NDArray[np.intp]], Losses],
    n: int,
    alpha: float,
    method: Method = "ltt",
    delta: float = DELTA,
    *,
    splits: int = 200,
    seed: int = 0,
) -> Array:
    """Does it hold? The realised risk [splits] on random halves of n rows, each certified on the other half.

    `losses` makes the losses of the rows it is given. Conformal risk control promises that the mean of the result is at
    most alpha; Learn-then-Test, with its horizon of as many rows, that a share 1 - delta of it is.
    """
    rng = np.random.default_rng(seed)
    risks = np.empty(splits)
    for i in range(splits):
        rows = rng.permutation(n)
        threshold = certify(losses(rows[: n // 2]), alpha, method, delta)
        risks[i] = losses(rows[n // 2 :]).risk(threshold.value)
    return risks


def issue(
    probabilities: Array,
    quality: Array,
    heads: Sequence[str],
    *,
    alpha: float,
    method: Method,
    delta: float = DELTA,
    horizon: Horizon = "rows",
    rows: Literal["held_out", "out_of_fold"],
    data_sha256: str,
    manifest: Manifest,
) -> Certificate:
    """A certificate of this artifact for [n, heads] of its probabilities and what its models' answers were worth.

    Of one head, the loss is "accepted and wrong"; of several, cheapest first, "the cheaper wrong, the last right".
    """
    probabilities, quality = np.asarray(probabilities, np.float64), np.asarray(quality, np.float64)
    if len(heads) == 1:
        _share("quality", quality)
        losses = accept_losses(probabilities[:, 0], 1 - quality[:, 0])
    else:
        losses = route_losses(probabilities, quality)
    found = certify(losses, alpha, method, delta, horizon)
    threshold = max(found.value, BELOW_ALL)
    if len(heads) == 1:
        shares = {heads[0]: float((probabilities[:, 0] > threshold).mean())}
    else:
        chosen = choose(probabilities, threshold)
        shares = {head: float((chosen == i).mean()) for i, head in enumerate(heads)}
    return Certificate(
        loss="accepted_wrong" if len(heads) == 1 else "weak_wrong_strong_right",
        heads=tuple(heads),
        method=method,
        alpha=alpha,
        delta=found.delta,
        horizon=found.horizon,
        threshold=threshold,
        n=losses.n,
        risk=found.risk,
        shares=shares,
        rows=rows,
        data_sha256=data_sha256,
        tensors_sha256=manifest.tensors_sha256,
        encoder_sha256=manifest.encoder_sha256,
        created=date.today().isoformat(),
    )


def rows_needed(
    alpha: float, method: Method = "ltt", delta: float = DELTA, horizon: Horizon = "rows", *, above: int = 0
) -> int:
    """Rows, more than `above`, below which not even a sample without any loss proves alpha."""
    few, enough = above, above + 1
    if horizon == "rows" and method == "ltt":
        # The chance jumps down where alpha allows one more loss among as many rows to come, and creeps up in between.
        steps = itertools.count(math.floor(alpha * enough + SLACK) + 1)
        starts = itertools.chain([enough], (math.ceil(k / alpha - SLACK) for k in steps))
        return next(n for n in starts if _proves(n, alpha, method, delta, horizon))
    while not _proves(enough, alpha, method, delta, horizon):
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if _proves(middle, alpha, method, delta, horizon) else (middle, enough)
    return enough


def _proves(n: int, alpha: float, method: Method, delta: float, horizon: Horizon) -> bool:
    """Whether n rows without any loss prove alpha."""
    if not 0 < alpha < 1:
        raise CertificateError(f"alpha {alpha!r} is no bound on a share: give a number between 0 and 1, such as 0.05")
    if not 0 < delta < 1:
        raise CertificateError(f"delta {delta!r} is no chance of error: give a number between 0 and 1, such as 0.05")
    if method == "crc":
        if isinstance(horizon, int):
            raise CertificateError("conformal risk control bounds the mean over any horizon: give one with ltt alone")
        return alpha * (n + 1) - 1 >= -SLACK
    if horizon is None:
        return n * math.log1p(-alpha) <= math.log(delta) + SLACK
    ahead = n if horizon == "rows" else horizon
    if ahead < 1 and n > 0:
        raise CertificateError(f"horizon {ahead} is no number of queries: give 1 or more, or none")
    return n > 0 and _too_many_to_come(0, n, alpha, ahead) <= delta * ROOM


def _allowed(n: int, alpha: float, method: Method, delta: float, horizon: int | None, binary: bool) -> float:
    """The largest sum of losses of n rows at which alpha is still proven."""
    if method == "crc":
        return alpha * (n + 1) - 1
    if horizon is not None:
        proven, not_proven = 0, n
        while not_proven - proven > 1:
            seen = (proven + not_proven) // 2
            fine = _too_many_to_come(seen, n, alpha, horizon) <= delta * ROOM
            proven, not_proven = (seen, not_proven) if fine else (proven, seen)
        return proven
    if binary:
        return float(np.searchsorted(_binomial_cdf(n, alpha), delta, side="right") - 1)
    low, high = 0.0, n * alpha
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if hoeffding_bentkus(middle / n, n, alpha) <= delta else (low, middle)
    return low


def _too_many_to_come(seen: int, n: int, alpha: float, horizon: int) -> float:
    """P(over `horizon` further rows lose more than alpha) at the score above which exactly `seen` of n rows lose.

    That happens iff of the seen + floor(alpha horizon) + 1 highest losing scores of all rows at most `seen` are among
    these n, and every set of n of all n + horizon rows is as likely to be these.
    """
    top = seen + math.floor(alpha * horizon + SLACK) + 1
    if top > n + horizon:
        return 0.0
    k = np.arange(max(0, top - horizon), min(seen, n) + 1)
    factorial = _log_factorials(n + horizon)

    def log_choose(total: int, chosen: npt.NDArray[np.intp] | int) -> Array:
        return np.asarray(factorial[total] - factorial[chosen] - factorial[total - chosen])

    log_pmf = log_choose(n, k) + log_choose(horizon, top - k) - log_choose(n + horizon, top)
    return float(np.exp(log_pmf).sum())


def hoeffding_bentkus(risk: float, n: int, alpha: float) -> float:
    """p-value of "the mean exceeds alpha" for n losses in [0, 1] of mean `risk` (Bates et al., arXiv 2101.02703)."""
    r = min(risk, alpha)
    distance = (r * math.log(r / alpha) if r > 0 else 0.0) + (1 - r) * math.log((1 - r) / (1 - alpha))
    bentkus = math.e * float(_binomial_cdf(n, alpha)[min(n, math.ceil(n * risk - SLACK))])
    return min(1.0, math.exp(-n * distance), bentkus)


def _binomial_cdf(n: int, p: float) -> Array:
    """P(at most k of n), k = 0 .. n."""
    factorial, k = _log_factorials(n), np.arange(n + 1.0)
    log_pmf = factorial[-1] - factorial - factorial[::-1] + k * math.log(p) + (n - k) * math.log1p(-p)
    return np.asarray(np.minimum(np.cumsum(np.exp(log_pmf)), 1.0))


def _log_factorials(n: int) -> Array:
    """log(k!), k = 0 .. n."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, n + 1)))])


def _finite(what: str, values: Array) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise CertificateError(
            f"{what} of row {bad[0][0]} is {values[tuple(bad[0])]}: {len(bad)} such values; "
            "label or score these rows, or leave them out if that does not depend on the answer"
        )


def _share(what: str, values: Array) -> None:
    _finite(what, values)
    bad = np.argwhere((values < 0) | (values > 1))
    if len(bad):
        raise CertificateError(f"{what} of row {bad[0][0]} is {values[tuple(bad[0])]:g}: it must lie in [0, 1]")
