"""A cascade of a small model and base: which answers are accepted, what that saves, and whether the risk holds.

Attempts of one seed fit the rule (half of them) and certify its threshold (the other half): "accepted and wrong, where
base is right" at most one answer in a hundred, by conformal risk control. Other problems test it. The threshold on the
mean, and on the lowest, log-probability of the attempt is certified in the same way. Then the engine runs the plans;
"offered" ones let base read what was not accepted and keep the beginning that it would have written itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from measured import Measured
from reasoning_attempts import Attempt, attempts
from reasoning_run import Kind, ask_all, draw, load
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from local_engine.reason.accept import FIRST_LOOK, price_of_going_on
from local_engine.types import AcceptRule, AnswerFeature, Cascade
from probes.certify import accept_losses, certify

ALPHA: Final = 0.01
FEATURES: Final[tuple[AnswerFeature, ...]] = (
    "mean_logprob", "min_logprob", "mean_entropy", "max_entropy", "log_tokens",
)  # fmt: skip
DEARER: Final = 10.0
FIT_SEED: Final = 7_000_000
NEVER: Final = AcceptRule(weights={}, bias=-1e9, at_least=1.0)
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answers:
    """Attempts of the small model and whether base is right on the same problems."""

    tried: list[Attempt]
    base_right: Array

    @property
    def right(self) -> Array:
        return np.array([attempt.right for attempt in self.tried], float)

    def features(self) -> Array:
        return np.array([[attempt.features[name] for name in FEATURES] for attempt in self.tried])

    def costly(self) -> Array:
        """What accepting each one loses: it is wrong, and base's is right."""
        return (1 - self.right) * self.base_right


def measure(seed: int, levels: Sequence[int], n: int, batches: Sequence[int], into: Measured) -> None:
    torch.set_num_threads(1)
    models = load()
    mixes = dict.fromkeys([*((level,) for level in levels if level <= 2), tuple(levels[:2]), tuple(levels)])
    for name in ("draft", "nano"):
        base, small = models["base"], models[name]
        for mix in mixes:
            asked = draw(seed, mix, n)
            known = draw(FIT_SEED + seed, mix, max(n, 300))
            learn, test = (
                Answers(attempts(small, group), np.array([each.right for each in attempts(base, group)], float))
                for group in (known, asked)
            )
            label = f"{name} → base, level {'+'.join(map(str, mix))}"
            rule = _rule(label, learn, test, into)
            _run(label, models, name, rule, asked, into)


def _rule(label: str, learn: Answers, test: Answers, into: Measured) -> AcceptRule:
    half = len(learn.tried) // 2
    features, right = learn.features(), learn.right
    fitted = LogisticRegression(C=10.0, max_iter=2000).fit(features[:half], right[:half])
    scores = {
        "rule": (fitted.predict_proba(features)[:, 1], fitted.predict_proba(test.features())[:, 1]),
        "mean log-probability": (features[:, 0], test.features()[:, 0]),
        "lowest log-probability": (features[:, 1], test.features()[:, 1]),
        "length": (-features[:, 4], -test.features()[:, 4]),
    }
    into.add(f"{label}: leave it off", "accuracy", float(test.base_right.mean()), "share")
    into.add(f"{label}: leave it off", "cost", 1.0, "ratio")
    at_least = 1.0
    for name, (known, fresh) in scores.items():
        threshold = certify(accept_losses(known[half:], learn.costly()[half:]), ALPHA, "crc").value
        taken = fresh > threshold
        _tell(f"{label}: {name}", test, taken, into)
        into.add(f"{label}: {name}", "auc", float(roc_auc_score(test.right, fresh)), "auc")
        into.add(f"{label}: {name}", "curve", _curve(test, fresh), "share")
        if name == "rule":
            at_least = float(np.nextafter(threshold, 1.0))
    return _prospect(learn, fitted, min(1.0, max(0.0, at_least)))


def _tell(name: str, test: Answers, taken: npt.NDArray[np.bool_], into: Measured) -> None:
    good = np.where(taken, test.right, test.base_right)
    into.add(name, "problems", len(good), "problems")
    into.add(name, "accuracy", float(good.mean()), "share")
    into.add(name, "points_over_off", 100 * float((good - test.base_right).mean()), "points")
    into.add(name, "accepted", float(taken.mean()), "share")
    into.add(name, "risk", float((taken * test.costly()).mean()), "share")


def _curve(test: Answers, score: Array) -> float:
    """Mean accuracy over all shares of accepted answers: the area under accuracy by acceptance."""
    order = np.argsort(-score, kind="stable")
    good = np.cumsum(test.right[order]) + test.base_right.sum() - np.cumsum(test.base_right[order])
    return float(good.mean()) / len(score)


def _prospect(learn: Answers, fitted: LogisticRegression, at_least: float) -> AcceptRule:
    """The rule, and when to abandon: P(accepted in the end) over what is written at each token."""
    accepted = fitted.predict_proba(learn.features())[:, 1] >= at_least
    rows, ends = [], []
    for attempt, end in zip(learn.tried, accepted, strict=True):
        for so_far in attempt.so_far[FIRST_LOOK - 1 :]:
            rows.append([so_far[name] for name in FEATURES])
            ends.append(end)
    bias, weights = float(fitted.intercept_[0]), dict(zip(FEATURES, map(float, fitted.coef_[0]), strict=True))
    if len(set(ends)) < 2:
        return AcceptRule(weights=weights, bias=bias, at_least=at_least)
    prospect = LogisticRegression(C=10.0, max_iter=2000).fit(np.array(rows), np.array(ends))
    tokens = float(np.mean([attempt.tokens for attempt in learn.tried]))
    return AcceptRule(
        weights=weights,
        bias=bias,
        at_least=at_least,
        prospect_weights=dict(zip(FEATURES, map(float, prospect.coef_[0]), strict=True)),
        prospect_bias=float(prospect.intercept_[0]),
        # About half of an attempt is left at a token of it, and acceptance saves one of base's answers.
        go_on_above=price_of_going_on(tokens / 2, 1.0, saved=DEARER * tokens),
    )


def _run(label: str, models: dict, name: str, rule: AcceptRule, asked: list, into: Measured) -> None:  # type: ignore[type-arg]
    patient = AcceptRule(weights=rule.weights, bias=rule.bias, at_least=rule.at_least)
    ways = [
        Kind("off"),
        Kind(f"{name} alone", model=name),
        Kind("engine", plan=Cascade(draft=name, accept=patient)),
        Kind("engine, abandoning", plan=Cascade(draft=name, accept=rule)),
        Kind("engine, offered to base", plan=Cascade(draft=name, accept=patient, hint="offer")),
        Kind("engine, always offered", plan=Cascade(draft=name, accept=NEVER, hint="offer")),
    ]
    outcomes = ask_all({each: models[each] for each in (name, "base")}, ways, asked, 8)
    off = outcomes["off"]
    ratio = (off.cpu_s / off.tokens) / (outcomes[f"{name} alone"].cpu_s / outcomes[f"{name} alone"].tokens)
    whole = outcomes["engine"].written(name)
    for kind in ways:
        did, row = outcomes[kind.name], f"{label}: {kind.name}"
        into.add(row, "problems", len(did.right), "problems")
        into.add(row, "accuracy", float(np.mean(did.right)), "share")
        into.add(row, "points_over_off", 100 * float(np.mean(did.right) - np.mean(off.right)), "points")
        for metric, prices in (("cost", {name: 1.0, "base": ratio}), ("cost_base_10x", {name: 1.0, "base": DEARER})):
            into.add(row, metric, did.cost(kind, prices) / off.cost(ways[0], prices), "ratio")
        into.add(row, "cpu_speedup", off.cpu_s / did.cpu_s, "ratio")
        if uses := did.uses():
            into.add(row, "accepted", float(np.mean([not use.escalated for use in uses])), "share")
            into.add(row, "not_generated", 1 - did.written(name) / whole, "share")
