"""A cascade of a small model and base: which answers are accepted, what that saves, and whether the risk holds.

Attempts of one seed fit the rule (half of them) and certify its threshold (the rest): "accepted and wrong, where base
is right" at most one answer in two hundred, by conformal risk control. The threshold on the mean, and on the lowest,
log-probability of the attempt and on its length is certified in the same way. Other questions test all of them: what
each would accept is replayed over the attempts and base's answers. Then the engine runs the plans; "offered" ones let
base read what was not accepted and keep the beginning that it would have written itself.

Costs are metered as in the section on steps. A curve is what a cascade costs and gets right as its threshold goes from
accepting all to accepting nothing. "Dominates": of the points (cost, accuracy) of the plain cascade by the mean
log-probability, the share than which one of the rule's, with the rest offered, is no dearer and no worse.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from measured import Measured
from reasoning_attempts import Attempt, attempts, layers_of
from reasoning_bench import Bench
from reasoning_exits import tell_time
from reasoning_run import Kind, Outcome, draw
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from local_engine.plan_types import AcceptRule, AnswerFeature, Cascade
from local_engine.reason.accept import FIRST_LOOK, price_of_going_on
from local_engine.reason.trajectories import Question
from probes.certify import accept_losses, certify

ALPHA: Final = 0.005
FEATURES: Final[tuple[AnswerFeature, ...]] = (
    "mean_logprob", "min_logprob", "mean_entropy", "max_entropy", "log_tokens",
)  # fmt: skip
DEARER: Final = 10.0
SMALL: Final = "draft"
FIT_SEED: Final = 7_000_000
FIT_ON: Final = 3_000
RESAMPLES: Final = 400
SPLITS: Final = 200
PRICES: Final = {SMALL: 1.0, "base": DEARER}
OFF: Final = Kind("leave it off: base alone")
COLUMNS: Final = {
    "accuracy": "right", "points_over_off": "points over off", "accepted": "accepted", "risk": "risk",
    "cost_base_10x": "cost, base × 10", "not_generated": "tokens not generated", "cpu_saved": "CPU saved",
    "wall_saved": "wall saved",
}  # fmt: skip
RULE_COLUMNS: Final = {
    "auc": "AUC", "auc_over_mean_logprob": "over mean log-prob.", "curve": "mean over thresholds",
    "dominates": "dominates", "resplit_risk": "risk, 200 resplits", "resplit_accepted": "accepted",
    "cost_offered": "cost, rest offered",
}  # fmt: skip
NEVER: Final = AcceptRule(weights={}, bias=-1e9, at_least=1.0)
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answers:
    """Attempts of the small model and whether base is right on the same questions."""

    tried: list[Attempt]
    base_right: Array

    @property
    def right(self) -> Array:
        return np.array([attempt.right for attempt in self.tried], float)

    def features(self) -> Array:
        return np.array([[attempt.features[name] for name in FEATURES] for attempt in self.tried])

    def hidden(self) -> Array:
        width = max(len(attempt.doubt) for attempt in self.tried)
        return np.array([attempt.doubt or [0.0] * width for attempt in self.tried])

    def costly(self) -> Array:
        """What accepting each one loses: it is wrong, and base's is right."""
        return (1 - self.right) * self.base_right


@dataclass(frozen=True, slots=True)
class Probe:
    """P(correct) = sigmoid(features · weights + hidden · hidden_weights + bias)."""

    weights: Array
    hidden_weights: Array
    bias: float

    def scores(self, answers: Answers) -> Array:
        found: Array = answers.features() @ self.weights + answers.hidden() @ self.hidden_weights + self.bias
        return found


def fit(answers: Answers, *, hidden: bool) -> Probe:
    """Both kinds of values standardised; the states, which are many, pull on the fit a thirtieth as hard."""
    features, states = answers.features(), answers.hidden()
    scales = [values.std(0) + 1e-9 for values in (features, states)]
    means = [values.mean(0) for values in (features, states)]
    pulls = (30.0, 1.0 if hidden else 0.0)
    columns = [
        pull * (values - mean) / scale
        for pull, values, mean, scale in zip(pulls, (features, states), means, scales, strict=True)
    ]
    model = LogisticRegression(C=1e-3, max_iter=1000).fit(np.hstack(columns), answers.right)
    parts = np.split(model.coef_[0], [features.shape[1]])
    weights = [pull * part / scale for pull, part, scale in zip(pulls, parts, scales, strict=True)]
    bias = float(model.intercept_[0]) - sum(float(w @ mean) for w, mean in zip(weights, means, strict=True))
    return Probe(weights[0], weights[1], bias)


def measure(bench: Bench, into: Measured) -> None:
    mixes = dict.fromkeys([(bench.levels[0],), tuple(bench.levels[:2]), tuple(bench.levels)])
    bench.all_of([partial(_measure, bench, mix, into) for mix in mixes])


def _measure(bench: Bench, mix: Sequence[int], into: Measured) -> None:
    label = "level" + "s" * (len(mix) > 1) + " " + "+".join(map(str, mix))
    known = draw(FIT_SEED + bench.seed, mix, FIT_ON // len(mix))
    asked = draw(bench.seed, mix, bench.problems)
    timed = draw(bench.seed, mix, bench.timed)
    tried, by_base = (_attempts(bench, model, known, f"{label}, fit") for model in (SMALL, "base"))
    at = len(known) // 2
    learnt, held = (
        Answers(tried[part], np.array([one.right for one in by_base[part]], float))
        for part in (slice(at), slice(at, None))
    )
    probe, plain = fit(learnt, hidden=True), fit(learnt, hidden=False)
    rule = _rule(learnt, held, probe, layers_of(bench.models[SMALL]))
    ways = _ways(rule)
    answers, times = bench.ask([*ways[:2], *ways[-2:]], ways[2:4], ways, asked, timed)
    test = Answers(_attempts(bench, SMALL, asked, f"{label}, test"), np.array(answers[OFF.name].right, float))
    costs = _Costs(*(np.array(answers[way.name].costs(way, PRICES)) for way in (OFF, ways[1], ways[-1])))
    for name, scores in _scores(probe, plain).items():
        _tell_rule(f"{label}: {name}", scores, held, test, costs, into)
    for way in ways:
        _tell(f"{label}: {way.name}", way, answers, into)
        tell_time(f"{label}: {way.name}", way.name, times, OFF.name, into)


def _attempts(bench: Bench, model: str, asked: Sequence[Question], name: str) -> list[Attempt]:
    bench.check_time()
    return attempts(bench.models[model], asked, bench.folder / f"{name}, {model}.msgpack")


def _rule(learnt: Answers, held: Answers, probe: Probe, layers: tuple[int, ...]) -> AcceptRule:
    """Certified on `held`, and when to abandon: P(accepted in the end) over what is written at each token."""
    threshold = certify(accept_losses(probe.scores(held), held.costly()), ALPHA, "crc").value
    rule = AcceptRule(
        weights=dict(zip(FEATURES, map(float, probe.weights), strict=True)),
        bias=probe.bias,
        at_least=float(np.nextafter(1 / (1 + np.exp(-threshold)), 1.0)),
        hidden_layers=layers,
        hidden_weights=tuple(map(float, probe.hidden_weights)),
    )
    rows, ends = [], []
    for attempt, accepted in zip(learnt.tried, probe.scores(learnt) > threshold, strict=True):
        for so_far in attempt.so_far[FIRST_LOOK - 1 :]:
            rows.append([so_far[name] for name in FEATURES])
            ends.append(accepted)
    if len(set(ends)) < 2:
        return rule
    prospect = LogisticRegression(C=10.0, max_iter=2000).fit(np.array(rows), np.array(ends))
    tokens = float(np.mean([attempt.tokens for attempt in learnt.tried]))
    return msgspec.structs.replace(
        rule,
        prospect_weights=dict(zip(FEATURES, map(float, prospect.coef_[0]), strict=True)),
        prospect_bias=float(prospect.intercept_[0]),
        # About half of an attempt is left at a token of it, and acceptance saves one of base's answers.
        go_on_above=price_of_going_on(tokens / 2, 1.0, saved=DEARER * tokens),
    )


def _ways(rule: AcceptRule) -> list[Kind]:
    patient = msgspec.structs.replace(rule, go_on_above=0.0)
    return [
        OFF,
        Kind(f"{SMALL} alone", model=SMALL),
        Kind("engine", plan=Cascade(draft=SMALL, accept=patient)),
        Kind("engine, abandoning", plan=Cascade(draft=SMALL, accept=rule)),
        Kind("engine, offered to base", plan=Cascade(draft=SMALL, accept=patient, hint="offer")),
        Kind("engine, always offered", plan=Cascade(draft=SMALL, accept=NEVER, hint="offer")),
    ]


def _tell(name: str, way: Kind, answers: Mapping[str, Outcome], into: Measured) -> None:
    did, off, whole = (answers[name] for name in (way.name, OFF.name, "engine"))
    n = len(did.right)
    into.add(name, "problems", n, "problems")
    into.add(name, "accuracy", float(np.mean(did.right)), "share")
    into.add_points(name, "points_over_off", did.right, off.right[:n])
    into.add(name, "cost_base_10x", did.cost(way, PRICES) / sum(off.costs(OFF, PRICES)[:n]), "ratio")
    if uses := did.uses():
        into.add(name, "accepted", float(np.mean([not use.escalated for use in uses])), "share")
        lost = [not use.escalated and was > now for use, was, now in zip(uses, off.right, did.right, strict=False)]
        into.add(name, "risk", float(np.mean(lost)), "share")
        if n == len(whole.right):
            into.add(name, "not_generated", 1 - did.written(SMALL) / whole.written(SMALL), "share")


# ---- rules, replayed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Costs:
    """Of each test question's answer."""

    base: Array
    small: Array
    offered: Array
    """Of the small model's answer, read and repaired by base."""


def _scores(probe: Probe, plain: Probe) -> dict[str, Callable[[Answers], Array]]:
    return {
        "rule": probe.scores,
        "rule without hidden states": plain.scores,
        "mean log-probability": lambda answers: answers.features()[:, 0],
        "lowest log-probability": lambda answers: answers.features()[:, 1],
        "length": lambda answers: -answers.features()[:, 4],
    }


def _tell_rule(
    name: str, scores: Callable[[Answers], Array], held: Answers, test: Answers, costs: _Costs, into: Measured
) -> None:
    threshold = certify(accept_losses(scores(held), held.costly()), ALPHA, "crc").value
    score = scores(test)
    taken = score > threshold
    into.add(name, "problems", len(taken), "problems")
    into.add(name, "accepted", float(taken.mean()), "share")
    into.add(name, "risk", float((taken * test.costly()).mean()), "share")
    into.add_points(
        name, "points_over_off", np.where(taken, test.right, test.base_right).tolist(), test.base_right.tolist()
    )
    into.add(name, "cost_base_10x", float((costs.small + ~taken * costs.base).sum() / costs.base.sum()), "ratio")
    offered = np.where(taken, costs.small, costs.offered)
    into.add(name, "cost_offered", float(offered.sum() / costs.base.sum()), "ratio")
    into.add(name, "auc", float(roc_auc_score(test.right, score)), "auc")
    mean = test.features()[:, 0]
    gains = [_auc_gain(test.right, score, mean, np.random.default_rng(seed)) for seed in range(RESAMPLES)]
    into.add_interval(name, "auc_over_mean_logprob", gains, "auc")
    curve, theirs = (_accuracies(test, each) for each in (score, mean))
    into.add(name, "curve", float(curve.mean()), "share")
    into.add(name, "curve_at_least_mean_logprobs", float((curve >= theirs - 1e-12).mean()), "share")
    ours = _costs_of(score, costs.small, costs.offered), curve
    plain = _costs_of(mean, costs.small, costs.small + costs.base), theirs
    into.add(name, "dominates", _dominated(ours, plain), "share")
    risks, shares = _resplit(np.concatenate([scores(held), score]), np.concatenate([held.costly(), test.costly()]))
    into.add(name, "resplit_risk", float(np.mean(risks)), "share")
    into.add(name, "resplit_accepted", float(np.mean(shares)), "share")


def _auc_gain(right: Array, score: Array, other: Array, rng: np.random.Generator) -> float:
    rows = rng.integers(0, len(right), len(right))
    return float(roc_auc_score(right[rows], score[rows]) - roc_auc_score(right[rows], other[rows]))


def _accuracies(test: Answers, score: Array) -> Array:
    """Of the cascade, with the 1, 2, … n best answers accepted: the cost falls from one to the next by the same."""
    order = np.argsort(-score, kind="stable")
    right, base = test.right[order], test.base_right[order]
    found: Array = (np.cumsum(right) + base.sum() - np.cumsum(base)) / len(score)
    return found


def _costs_of(score: Array, accepted: Array, escalated: Array) -> Array:
    """What all answers cost with the 1, 2, … n best accepted."""
    order = np.argsort(-score, kind="stable")
    found: Array = np.cumsum(accepted[order]) + escalated.sum() - np.cumsum(escalated[order])
    return found


def _dominated(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> float:
    """The share of their points (cost, accuracy) than which one of ours is no dearer and no worse."""
    met = [(ours[1][ours[0] <= cost + 1e-9] >= right - 1e-12).any() for cost, right in zip(*theirs, strict=True)]
    return float(np.mean(met))


def _resplit(score: Array, costly: Array) -> tuple[list[float], list[float]]:
    """(realised risks, shares accepted) on one half of the answers of thresholds certified on the other, many times."""
    rng, found = np.random.default_rng(0), []
    for _ in range(SPLITS):
        rows = rng.permutation(len(score))
        known, fresh = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        taken = score[fresh] > certify(accept_losses(score[known], costly[known]), ALPHA, "crc").value
        found.append((float((taken * costly[fresh]).mean()), float(taken.mean())))
    return [risk for risk, _ in found], [share for _, share in found]
