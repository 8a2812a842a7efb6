"""What every simulation is compared with. What learns does so out of fold; what has a dial spends what the policy does.

random          each model with the policy's share, whatever the query
always          each model alone: the cheapest, the dearest, the most accurate
prompt length   the longer the prompt, the stronger the model
group prior     mean correctness by group and model, where a group column is named
TF-IDF + LR     of two models P(only the stronger is right), of more P(correct) each
k-means         mean correctness by cluster of prompts (TF-IDF, 64 components) and model
oracle          the cheapest of the models that do best on the query
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gateway.simulate.routed import Routed, at_cost
from gateway.simulate.table import Array, Outcomes
from probes.evaluate import IntArray, folds

CLUSTERS = 32
COMPONENTS = 64
NEAREST = 3
SOFTNESS = 9.0
"""Of the weights of a query's nearest clusters: softmax(−9 · (1 − cosine))."""


def baselines(table: Outcomes, cost: Array | None, policy: Routed, seed: int = 0) -> list[Routed]:
    """All of them; those with a dial at the policy's mean cost."""
    n, m = table.correct.shape
    predicted = _dial(table, cost)
    budget = float(policy.cost.mean()) if policy.cost is not None else float(policy.share @ predicted)
    found = [Routed.of("random", np.broadcast_to(policy.share / max(policy.share.sum(), 1e-12), (n, m)), table, cost)]
    found += _always(table, cost)
    qualities = {"prompt length": _length(table)}
    splits = folds(n, seed)
    if table.groups is not None:
        qualities["group prior"] = _prior(table, table.groups.astype(str), splits)
    qualities |= _learnt(table, splits, seed)
    found += [at_cost(name, quality, predicted, table, cost, budget) for name, quality in qualities.items()]
    best = table.correct.max(1, keepdims=True) - table.correct  # 0 for those that do best
    paid = cost if cost is not None else np.broadcast_to(predicted, (n, m))
    choice = np.argmin(np.where(best == 0, paid, np.inf), axis=1)
    return [*found, Routed.of("oracle", np.eye(m)[choice], table, cost)]


def _dial(table: Outcomes, cost: Array | None) -> Array:
    """[m], what a query costs at each model on average; without costs, how strong the model is among the others."""
    if cost is not None:
        return np.asarray(cost.mean(0))
    order = np.argsort(np.argsort(table.correct.mean(0), kind="stable"), kind="stable")
    return order.astype(np.float64)


def _always(table: Outcomes, cost: Array | None) -> Iterator[Routed]:
    accuracy = table.correct.mean(0)
    paid = _dial(table, cost)
    roles: dict[int, list[str]] = {}
    roles.setdefault(int(np.argmin(paid)), []).append("always weak")
    roles.setdefault(int(np.argmax(paid)), []).append("always strong")
    roles.setdefault(int(np.argmax(accuracy)), []).append("best single")
    for index, role in roles.items():
        weights = np.zeros(table.correct.shape)
        weights[:, index] = 1.0
        yield Routed.of(f"{', '.join(role)}: {table.models[index]}", weights, table, cost)


def _length(table: Outcomes) -> Array:
    """[n, m]: the rank of the prompt's length times the strength of the model."""
    sizes = np.array([len(prompt) for prompt in table.prompts])
    rank = np.argsort(np.argsort(sizes, kind="stable"), kind="stable") / len(sizes)
    accuracy = table.correct.mean(0)
    spread = float(accuracy.max() - accuracy.min())
    strength = (accuracy - accuracy.min()) / spread if spread > 0 else np.zeros(len(accuracy))
    return np.asarray(rank[:, None] * strength[None, :])


def _prior(table: Outcomes, groups: npt.NDArray[np.str_], splits: Sequence[tuple[IntArray, IntArray]]) -> Array:
    """[n, m] mean correctness by group, out of fold; of a group that no other fold holds, the mean of all."""
    names, member = np.unique(groups, return_inverse=True)
    out = np.zeros(table.correct.shape)
    for train, test in splits:
        out[test] = _means(table.correct[train], member[train], len(names))[member[test]]
    return out


def _means(correct: Array, member: npt.NDArray[np.intp], count: int) -> Array:
    """[count, m] mean of the members' rows; the mean of all where there is no member."""
    sizes = np.bincount(member, minlength=count)
    overall = correct.mean(0)
    sums = np.stack([np.bincount(member, correct[:, j], minlength=count) for j in range(correct.shape[1])], axis=1)
    return np.asarray(np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], overall))


def _learnt(table: Outcomes, splits: Sequence[tuple[IntArray, IntArray]], seed: int) -> dict[str, Array]:
    """Out of fold qualities [n, m] of the two that learn from words; nothing where no two prompts share one."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    regression, clusters = np.zeros(table.correct.shape), np.zeros(table.correct.shape)
    for train, test in splits:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, dtype=np.float32)
        try:
            words = vectorizer.fit_transform([table.prompts[i] for i in train])
        except ValueError:
            return {}
        asked = vectorizer.transform([table.prompts[i] for i in test])
        regression[test] = _regression(words, asked, table.correct[train])
        clusters[test] = _clusters(words, asked, table.correct[train], seed)
    return {"TF-IDF + LR": regression, "k-means": clusters}


def _regression(words: object, asked: object, correct: Array) -> Array:
    """[tests, m]."""
    if correct.shape[1] == 2:
        order = np.argsort(correct.mean(0), kind="stable")
        gap = _probability(words, asked, correct[:, order[1]] - correct[:, order[0]] > 0)
        out = np.zeros((len(gap), 2))
        out[:, order[1]] = gap
        return out
    return np.column_stack([_probability(words, asked, column > 0.5) for column in correct.T])


def _probability(words: object, asked: object, label: npt.NDArray[np.bool_]) -> Array:
    from sklearn.linear_model import LogisticRegression

    if label.all() or not label.any():
        return np.full(asked.shape[0], float(label[0]))  # type: ignore[attr-defined]  # a sparse matrix, untyped
    model = LogisticRegression(max_iter=1000).fit(words, label)
    return np.asarray(model.predict_proba(asked)[:, 1])


def _clusters(words: object, asked: object, correct: Array, seed: int) -> Array:
    """[tests, m]: accuracy tables of the nearest clusters, weighted by nearness (Avengers-Pro)."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    if min(words.shape) > COMPONENTS:  # type: ignore[attr-defined]  # a sparse matrix, untyped
        svd = TruncatedSVD(COMPONENTS, random_state=seed)
        known, new = normalize(svd.fit_transform(words)), normalize(svd.transform(asked))
    else:
        known, new = words.toarray(), asked.toarray()  # type: ignore[attr-defined]
    count = min(CLUSTERS, len(np.unique(known, axis=0)))
    fitted = KMeans(count, n_init=3, random_state=seed).fit(known)
    table = _means(correct, fitted.labels_, count)
    distance = 1.0 - new @ normalize(fitted.cluster_centers_).T
    near = np.argsort(distance, axis=1)[:, :NEAREST]
    weights = np.exp(-SOFTNESS * np.take_along_axis(distance, near, axis=1))
    return np.asarray((weights[:, :, None] * table[near]).sum(1) / weights.sum(1, keepdims=True))
