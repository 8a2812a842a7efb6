"""Routing among many models: the best score per query, and the least cost at the accuracy of always-strong."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from results_file import Row
from routing_data import Outcomes

from probes.calibrate import Array
from probes.evaluate import folds, interval, resamples

WEIGHTS = np.concatenate([[0.0], np.geomspace(1.0, 3000.0, 50)])
"""Of cost, in accuracy per USD."""
CANDIDATES = 4


def best_of_many(table: Outcomes, predicted: Mapping[str, Array], ours: str, times: int, seed: int) -> list[Row]:
    """Mean score when each query goes to the model with the highest prediction; random and oracle beside."""
    n, everyone = table.scores.shape
    rng = np.random.default_rng(seed)
    got = {name: table.scores[np.arange(n), p.argmax(1)] for name, p in predicted.items()}
    got["random"] = table.scores[np.arange(n), rng.integers(0, everyone, n)]
    got["always weak (worst single)"] = table.scores[:, table.scores.mean(0).argmin()]
    got["always strong (best single)"] = table.scores[:, table.scores.mean(0).argmax()]
    got["oracle"] = table.scores.max(1)
    means = {name: np.array([found[i].mean() for i in resamples(n, times, seed)]) for name, found in got.items()}
    rows = [Row(name, "accuracy", float(found.mean()), *interval(list(means[name]))) for name, found in got.items()]
    for name in got:
        if name != ours:
            gap = float((got[ours] - got[name]).mean())
            rows.append(Row(f"{ours} − {name}", "accuracy difference", gap, *interval(list(means[ours] - means[name]))))
    single, oracle = got["always strong (best single)"].mean(), got["oracle"].mean()
    rows.append(Row(ours, "share of the gap to the oracle", float((got[ours].mean() - single) / (oracle - single))))
    return rows


def cheapest_at_equal_accuracy(
    table: Outcomes, predicted: Mapping[str, Array], expected_cost: Array, times: int, seed: int
) -> list[Row]:
    """Cost saved against always asking the best model, at no less accuracy.

    A query goes to the candidate with the highest predicted score minus weight times expected cost. Candidates (the
    best model and up to three more, greedily) and weight are chosen on four folds, as the cheapest that reach the best
    model's accuracy there, and applied to the fifth: nothing of a query is used for its own choice.
    """
    if table.cost is None:
        raise ValueError("the table has no costs")
    n = len(table.scores)
    every = np.arange(n)
    strong = int(table.scores.mean(0).argmax())
    choices: dict[str, Any] = {name: np.full(n, strong) for name in predicted}
    for seen, unseen in folds(n, seed + 1):
        for name, p in predicted.items():
            candidates, weight = _choose(p[seen], expected_cost[seen], table.scores[seen], table.cost[seen])
            worth = p[unseen][:, candidates] - weight * expected_cost[unseen][:, candidates]
            choices[name][unseen] = np.array(candidates)[worth.argmax(1)]
    choices["random"] = np.random.default_rng(seed).integers(0, table.scores.shape[1], n)
    choices["always weak (cheapest)"] = np.full(n, int(table.cost.mean(0).argmin()))
    # Among the right answers the cheapest; where nobody is right, the cheapest of all.
    choices["oracle"] = (table.cost + 1e3 * (table.scores < table.scores.max(1, keepdims=True))).argmin(1)
    base_score, base_cost = table.scores[:, strong], table.cost[:, strong]
    always = f"always strong ({table.models[strong]})"
    rows = [
        Row("pool", "models", float(table.scores.shape[1]), unit="models"),
        Row(always, "accuracy", float(base_score.mean())),
        Row(always, "cost", 1e3 * float(base_cost.mean()), unit="USD per 1,000"),
    ]
    draws = list(resamples(n, times, seed))
    for name, choice in choices.items():
        score, cost = table.scores[every, choice], table.cost[every, choice]
        saved = [1 - float(cost[i].sum() / base_cost[i].sum()) for i in draws]
        gained = [float((score[i] - base_score[i]).mean()) for i in draws]
        rows.append(Row(name, "accuracy", float(score.mean()), *interval([float(score[i].mean()) for i in draws])))
        rows.append(Row(name, "accuracy − always strong", float((score - base_score).mean()), *interval(gained)))
        rows.append(Row(name, "cost saved", 1 - float(cost.sum() / base_cost.sum()), *interval(saved), "share"))
    return rows


def _choose(p: Array, expected: Array, scores: Array, cost: Array) -> tuple[list[int], float]:
    """(candidates, weight of cost) that are cheapest among those which reach the best model's accuracy."""
    best = int(scores.mean(0).argmax())
    target, every = scores[:, best].mean() - 1e-9, np.arange(len(scores))

    def cheapest(candidates: list[int]) -> tuple[float, float]:
        found = float("inf"), 0.0
        for weight in WEIGHTS:
            choice = np.array(candidates)[(p[:, candidates] - weight * expected[:, candidates]).argmax(1)]
            spent = float(cost[every, choice].sum())
            if spent < found[0] and scores[every, choice].mean() >= target:
                found = spent, float(weight)
        return found

    candidates, current = [best], cheapest([best])
    while len(candidates) < CANDIDATES:
        rest = [model for model in range(scores.shape[1]) if model not in candidates]
        tried = {model: cheapest([*candidates, model]) for model in rest}
        model = min(tried, key=lambda one: tried[one][0])
        if tried[model][0] >= current[0]:
            break
        candidates, current = [*candidates, model], tried[model]
    return candidates, current[1]
