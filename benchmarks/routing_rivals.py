"""Everything a probe must beat, as predicted scores [n, models], out of fold: per query the higher goes first."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from routing_data import Outcomes, read_by_probe

from probes.calibrate import Array
from probes.extract import FloatArray
from probes.kernel import ProbeClassifier

Splits = Sequence[tuple[Any, Any]]
CLUSTERS = 64
NEIGHBOURS = 50
BINS = 20


def probe(
    features: FloatArray,
    scores: Array,
    splits: Splits,
    train: tuple[FloatArray, Array] | None = None,
    groups: npt.NDArray[np.object_] | None = None,
    *,
    experts: bool = False,
) -> Array:
    """Calibrated P(good answer) of the shipped recipe by all layers' hidden states, of which it reads its own; `train`
    adds rows to every fold's training set; with `experts`, either part has a probe of its own beside that of both, as
    the shipped probe's sources have.

    `groups` are told of training rows alone: those of test rows have to be recognised.
    """
    features, out = read_by_probe(features), np.empty_like(scores)
    for seen, unseen in splits:
        X, y = features[seen], scores[seen]
        if train is not None:
            X, y = np.concatenate([X, read_by_probe(train[0])]), np.concatenate([y, train[1]])
        known = None if groups is None else groups[seen]
        parts = np.where(np.arange(len(X)) < len(seen), "tested", "added").astype(object) if experts else None
        out[unseen] = ProbeClassifier().fit(X, y, groups=known, experts=parts).predict_proba(features[unseen])
    return out


def best_single(table: Outcomes, splits: Splits) -> Array:
    """The model that is best on the other folds, for every query."""
    out = np.empty_like(table.scores)
    for seen, unseen in splits:
        out[unseen] = table.scores[seen].mean(0)
    return out


def group_prior(table: Outcomes, splits: Splits) -> Array:
    """Each model's mean in the query's group, which it must be told; the overall mean in a group never seen."""
    return _cells(np.unique(table.groups.astype(str), return_inverse=True)[1], table.scores, splits)


def prompt_length(table: Outcomes, splits: Splits) -> Array:
    """Each model's mean among prompts of about this length."""
    chars = np.array([len(prompt) for prompt in table.prompts])
    edges = np.quantile(chars, np.linspace(0, 1, BINS + 1)[1:-1])
    return _cells(np.searchsorted(edges, chars), table.scores, splits)


def cluster_table(embedded: FloatArray, scores: Array, splits: Splits, seed: int = 0) -> Array:
    """k-means over unit embeddings, each model's mean per cluster (Avengers-Pro's core)."""
    from sklearn.cluster import KMeans

    out = np.empty_like(scores)
    for seen, unseen in splits:
        model = KMeans(min(CLUSTERS, len(seen) // 10), n_init=1, random_state=seed).fit(embedded[seen])
        member = np.empty(len(scores), np.intp)
        member[seen], member[unseen] = model.labels_, model.predict(embedded[unseen])
        out[unseen] = _cells(member, scores, [(seen, unseen)])[unseen]
    return out


def neighbours(embedded: FloatArray, scores: Array, splits: Splits, k: int = NEIGHBOURS) -> Array:
    """Each model's mean over the k nearest by cosine (RouterBench's kNN)."""
    out = np.empty_like(scores)
    for seen, unseen in splits:
        for part in np.array_split(unseen, max(1, len(unseen) // 500)):
            nearest = np.argpartition(-(embedded[part] @ embedded[seen].T), k, axis=1)[:, :k]
            out[part] = scores[seen][nearest].mean(1)
    return out


def words(prompts: Sequence[str], scores: Array, splits: Splits) -> Array:
    """TF-IDF of words and word pairs, ridge regression of every model's score."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    out = np.empty_like(scores)
    for seen, unseen in splits:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        counted = vectorizer.fit_transform([prompts[i] for i in seen])
        model = Ridge(alpha=3.0, solver="sparse_cg", tol=1e-3).fit(counted, scores[seen])
        out[unseen] = model.predict(vectorizer.transform([prompts[i] for i in unseen])).reshape(len(unseen), -1)
    return out


def unit(features: FloatArray, dims: int = 384) -> FloatArray:
    """Sentence embeddings: the last layer's mean, of unit length."""
    last = features[:, -dims:]
    return np.asarray(last / np.linalg.norm(last, axis=1, keepdims=True))


def _cells(member: Any, scores: Array, splits: Splits) -> Array:
    """Means per cell of the other folds' rows, shrunk by one row towards the mean of all."""
    out = np.empty_like(scores)
    for seen, unseen in splits:
        base, cells = scores[seen].mean(0), int(member.max()) + 1
        counts = np.bincount(member[seen], minlength=cells)
        sums = np.column_stack([np.bincount(member[seen], column, minlength=cells) for column in scores[seen].T])
        out[unseen] = ((sums + base) / (counts + 1)[:, None])[member[unseen]]
    return out
