"""How well a score routes between a weak and a strong model, and how sure we are. numpy only, but for the baselines.

Definitions are RouteLLM's (Ong et al., arXiv 2406.18665): a query goes to the strong model iff its score reaches a
threshold; eleven thresholds at the score's deciles trace accuracy against the share of strong calls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from probes.calibrate import Array, brier, ece

IntArray = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number with its 95% interval, where it has one."""

    name: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def to_json(self) -> dict[str, object]:
        """What has no value, as AUC of one class, is null."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy against the share of strong calls, from all strong to none: both arrays are [11]."""

    share: Array
    accuracy: Array
    weak: float
    strong: float


def curve(scores: Array, weak: Array, strong: Array) -> Curve:
    """Route by `scores` [n] at its deciles; `weak`, `strong` [n] are correctness in [0, 1]."""
    thresholds = np.quantile(scores, np.linspace(0.0, 1.0, 11))
    routed = scores[None, :] >= thresholds[:, None]
    routed[-1] = scores > thresholds[-1]
    accuracy = np.where(routed, strong, weak).mean(1)
    return Curve(routed.mean(1), accuracy, float(weak.mean()), float(strong.mean()))


def apgr(scores: Array, weak: Array, strong: Array) -> float:
    """Average performance gap recovered: 0.5 for random, above 1 possible for an oracle; NaN where no gap exists."""
    line = curve(scores, weak, strong)
    if line.strong == line.weak:
        return float("nan")
    area = -float(np.trapezoid(line.accuracy, line.share))
    return (area - line.weak) / (line.strong - line.weak)


def cpt(scores: Array, weak: Array, strong: Array, recovered: float) -> float:
    """Smallest share of strong calls that recovers this share of the gap, interpolated along the curve.

    Unlike RouteLLM's `np.interp`, which is silently wrong where accuracy falls along the curve, this takes the first
    crossing from the cheap end.
    """
    line = curve(scores, weak, strong)
    share, accuracy = line.share[::-1], line.accuracy[::-1]
    target = line.weak + recovered * (line.strong - line.weak)
    first = int(np.argmax(accuracy >= target - 1e-12))
    if first == 0:
        return float(share[0])
    rise = (target - accuracy[first - 1]) / (accuracy[first] - accuracy[first - 1])
    return float(share[first - 1] + rise * (share[first] - share[first - 1]))


Statistic = Callable[[Array, Array, Array], float]


def cpt50(scores: Array, weak: Array, strong: Array) -> float:
    return cpt(scores, weak, strong, 0.5)


def cpt80(scores: Array, weak: Array, strong: Array) -> float:
    return cpt(scores, weak, strong, 0.8)


def resamples(n: int, times: int, seed: int) -> Iterator[IntArray]:
    """Bootstrap row numbers. The same seed gives the same draws, so that routers are compared on the same queries."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        yield rng.integers(0, n, n)


def interval(draws: Sequence[float]) -> tuple[float, float]:
    """Central 95% of bootstrap draws; NaN where none of them has a value, as of labels of one class."""
    if np.isnan(draws).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


def error_interval(value: float, draws: Sequence[float]) -> tuple[float, float]:
    """Central 95% of draws of a calibration error, moved so that their mean is `value`, and not below 0.

    A resample's error is higher than the sample's, by about as much as the sample's is higher than the truth's: as they
    fall, the draws can lie beside the value whose spread they tell.
    """
    low, high = interval(list(np.asarray(draws) - float(np.nanmean(draws)) + value))
    return max(0.0, low), high


def routing_rows(
    routers: Mapping[str, Array],
    weak: Array,
    strong: Array,
    *,
    reference: str | None = None,
    times: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """APGR and CPT of every router's scores [n], with paired bootstrap intervals.

    With `reference`, also that router's APGR minus each other one's, on the same resamples. "always weak" and "always
    strong" have no curve: they are reported as accuracies.
    """
    rows = [
        Row("always weak", "accuracy", float(weak.mean()), unit="share"),
        Row("always strong", "accuracy", float(strong.mean()), unit="share"),
    ]
    draws = list(resamples(len(weak), times, seed))
    statistics: dict[str, Statistic] = {"APGR": apgr, "CPT50": cpt50, "CPT80": cpt80}
    spread: dict[str, Array] = {}
    for name, scores in routers.items():
        for metric, statistic in statistics.items():
            values = np.array([statistic(scores[i], weak[i], strong[i]) for i in draws])
            if metric == "APGR":
                spread[name] = values
            unit = "" if metric == "APGR" else "strong share"
            rows.append(Row(name, metric, statistic(scores, weak, strong), *interval(list(values)), unit=unit))
    if reference is not None:
        for name, scores in routers.items():
            if name != reference:
                gap = apgr(routers[reference], weak, strong) - apgr(scores, weak, strong)
                low, high = interval(list(spread[reference] - spread[name]))
                rows.append(Row(f"{reference} − {name}", "APGR difference", gap, low, high))
    return rows


def head_rows(name: str, probabilities: Array, labels: Array, *, times: int = 1000, seed: int = 0) -> list[Row]:
    """Brier, ECE and AUC of one head; the constant's Brier for comparison. Rows are left out that have no label, or of
    which the probe says nothing: their share is told."""
    labelled = ~np.isnan(labels)
    known = labelled & ~np.isnan(probabilities)
    p, y = probabilities[known], labels[known]
    silent = 1.0 - len(y) / max(1, int(labelled.sum()))
    if not len(y):
        return [Row(name, "abstains", silent, unit="share")]
    rows = [Row(name, "abstains", silent, unit="share")] if silent else []
    rows += [Row(name, "n", float(len(y)), unit="labels"), Row(name, "base rate", float(y.mean()), unit="share")]
    measures: dict[str, Callable[[Array, Array], float]] = {"Brier": brier, "ECE": ece, "AUC": auc}
    for metric, measure in measures.items():
        values = [measure(p[i], y[i]) for i in resamples(len(y), times, seed)]
        value = measure(p, y)
        spread = error_interval(value, values) if metric == "ECE" else interval(values)
        rows.append(Row(name, metric, value, *spread))
    rows.append(Row(name, "Brier of the base rate", float(y.mean() * (1 - y.mean()))))
    return rows


def auc(scores: Array, labels: Array) -> float:
    """Chance that a correct query outranks a wrong one, ties counting half; NaN with one class."""
    positive = labels > 0.5
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def folds(
    n: int, seed: int, groups: npt.NDArray[np.object_] | None = None, k: int = 5
) -> list[tuple[IntArray, IntArray]]:
    """(train, test) rows of k shuffled folds; with `groups` [n], no group stands on both sides."""
    rng = np.random.default_rng(seed)
    if groups is None:
        fold = rng.permutation(n) % k
    else:
        names, member = np.unique(groups.astype(str), return_inverse=True)
        fold = (rng.permutation(len(names)) % k)[member]
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(k) if np.any(fold == i)]


def baselines(
    prompts: Sequence[str],
    weak: Array,
    strong: Array,
    splits: Sequence[tuple[IntArray, IntArray]],
    *,
    groups: npt.NDArray[np.object_] | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """Scores [n] of the routers every table must show; those that learn do so out of fold.

    TF-IDF + logistic regression learns "only the strong model is right"; the group prior is the group's mean gap.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    gap = strong - weak
    out = {
        "random": np.random.default_rng(seed).random(len(prompts)),
        "prompt length": np.array([float(len(prompt)) for prompt in prompts]),
    }
    if groups is not None:
        prior = np.zeros(len(prompts))
        for train, test in splits:
            names, member = np.unique(groups[train].astype(str), return_inverse=True)
            means = dict(zip(names, np.bincount(member, gap[train]) / np.bincount(member), strict=True))
            prior[test] = [means.get(str(group), float(gap[train].mean())) for group in groups[test]]
        out["group prior"] = prior
    tfidf = np.zeros(len(prompts))
    for train, test in splits:
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(max_iter=1000)
        )
        pays = gap[train] > 0
        if pays.all() or not pays.any():  # nothing to be told apart
            tfidf[test] = float(pays[0])
            continue
        model.fit([prompts[i] for i in train], pays)
        tfidf[test] = model.predict_proba([prompts[i] for i in test])[:, 1]
    out["TF-IDF + LR (gap)"] = tfidf
    out["oracle"] = gap
    return out
