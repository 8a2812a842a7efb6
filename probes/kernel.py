"""The probe as a scikit-learn estimator: kernel ridge regression of many heads at once, calibrated.

Hidden states are scaled and projected (PCA); a prompt is its similarities to landmarks, rows drawn from the training
set (Nystroem's approximation, Williams and Seeger, 2001); all heads that share their labelled rows share one ridge
regression of the 0/1 label (`ridge.py`), in which what all have in common and what tells them apart, by which a router
ranks, have strengths of their own. Where prompts come in groups that it can recognise, it starts from a table of them
(`groups.py`) and regresses the rest; where they come in kinds that have little to do with each other, each may have a
probe of its own beside it (`experts.py`).
Training needs scikit-learn; what comes out (`heads_`) needs only numpy.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.utils.validation import check_is_fitted, validate_data

from probes.calibrate import Array, Calibrator, fit_calibrator, fit_isotonic, fit_linear, fit_platt
from probes.experts import fit_experts
from probes.groups import Recognised, recognise
from probes.heads import Experts, Groups, Heads, Similarity, rbf
from probes.multi_head import MultiHeadClassifier
from probes.ridge import Ridge, ridge

MIN_OF_CLASS = 2
"""Fewest labels of the rarer class for which a regression means anything; below it a head is its base rate."""
SMALLEST = 1e-6
"""Directions of the landmarks' own kernel below this share of the largest are noise, and left out."""
STILL = 1e-3
"""A feature whose spread is below this share of the median one's is not scaled up."""


class ProbeClassifier(MultiHeadClassifier):
    """Calibrated multi-head kernel probe.

    Parameters: `components` of the PCA after scaling; `landmarks`, at most as many as rows; `gammas`, widths of the
    similarity, and `strengths` of the ridge regression, of which those with the least leave-one-out error are taken;
    `calibration`, fitted on the left-out scores ("auto": by the number of the head's labels; labels between 0 and 1
    always get a line); `seed` of the PCA and of the landmarks.

    y is [n] with any two classes, and then this is an ordinary binary classifier (`predict_proba` is [n, 2]); or
    y is [n, heads] in [0, 1] with NaN where a head has no label, and then `predict_proba` is [n, heads], P(correct), or
    the expected score where labels are scores.
    Learnt: `heads_` (numpy-only inference), `regressed_` [heads] (False: too few labels, the head is its base rate),
    `gamma_`, `classes_`.
    """

    def __init__(
        self,
        components: int = 96,
        landmarks: int = 1000,
        gammas: tuple[float, ...] = (0.25, 1.0),
        strengths: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e6),
        calibration: Literal["auto", "platt", "isotonic"] = "auto",
        seed: int = 0,
    ) -> None:
        self.components = components
        self.landmarks = landmarks
        self.gammas = gammas
        self.strengths = strengths
        self.calibration = calibration
        self.seed = seed

    def fit(
        self,
        X: Any,
        y: Any,
        names: tuple[str, ...] | None = None,
        groups: npt.NDArray[np.object_] | None = None,
        experts: npt.NDArray[np.object_] | None = None,
    ) -> Self:
        """Fit all heads; `names` label them in `heads_`. With `groups` [n], these are recognised too; with `experts`
        [n], kinds of prompts, each kind that has labels enough also gets a probe of its own."""
        if not self.gammas:
            raise ValueError("gammas is empty: give at least one width of the similarity")
        X, labels = self._validate(X, y)
        for what, given in (("groups", groups), ("experts", experts)):
            if given is not None and len(given) != len(X):
                raise ValueError(f"X has {len(X)} rows, {what} {len(given)}")
        space = self._project(X)
        z = space.project(X)
        chosen = np.random.default_rng(self.seed).permutation(len(z))[: self.landmarks]
        landmarks = _half(z[np.sort(chosen)])
        fits = [self._regress(z, landmarks, gamma, labels, groups) for gamma in self.gammas]
        best = min(fits, key=lambda one: one.error)
        self.gamma_ = best.gamma
        self.regressed_ = np.zeros(labels.shape[1], bool)
        weight, bias = np.zeros((labels.shape[1], len(landmarks))), np.zeros(labels.shape[1])
        slopes = np.zeros(labels.shape[1])
        calibrators: list[Calibrator] = [_constant(column[~np.isnan(column)]) for column in labels.T]
        for rows, columns, one in best.found:
            for i, head in enumerate(columns):
                y_head = labels[rows, head]
                base = float(y_head.mean())
                # Log-odds to first order around the base rate: a temperature alone can then calibrate them.
                slopes[head] = slope = 1.0 / (base * (1.0 - base))
                centre = float(np.log(base / (1.0 - base))) - slope * base
                left_out = one.left_out[:, i]
                if best.recognised is not None:
                    left_out = left_out + best.recognised.looked_up[rows, head]
                weight[head], bias[head] = slope * (best.root @ one.weight[:, i]), slope * one.bias[i] + centre
                calibrators[head] = self._calibrator(slope * left_out + centre, y_head)
                self.regressed_[head] = True
        names = names or tuple(f"head{i}" for i in range(labels.shape[1]))
        similarity = replace(space, landmarks=landmarks, gamma=self.gamma_)
        self.heads_ = Heads(
            names,
            weight.astype(np.float32, order="C"),
            bias.astype(np.float32),
            tuple(calibrators),
            similarity,
            None if best.recognised is None else _groups_of(best.recognised, best.root, slopes),
            None if experts is None else self._experts(X, labels, names, experts, similarity, best.root),
        )
        return self

    def _probabilities(self, X: Any) -> Array:
        check_is_fitted(self)
        return self.heads_.predict_proba(validate_data(self, X, dtype=np.float64, reset=False))

    def _validate(self, X: Any, y: Any) -> tuple[Array, Array]:
        """Features [n, d] and labels [n, heads] as 0, 1, NaN."""
        self.multi_head_ = np.asarray(y).ndim == 2
        if self.multi_head_:
            X = validate_data(self, X, dtype=np.float64)
            labels = np.asarray(y, np.float64)
            if len(labels) != len(X):
                raise ValueError(f"X has {len(X)} rows, y {len(labels)}")
            known = labels[~np.isnan(labels)]
            if not ((known >= 0) & (known <= 1)).all():
                raise ValueError("labels of several heads must lie in [0, 1], or be NaN")
            self.classes_ = np.array([0, 1])
            return X, labels
        X, y = validate_data(self, X, y, dtype=np.float64)
        return X, self._binary(y)

    def _project(self, X: Array) -> Similarity:
        """Without landmarks yet. z is scaled, projected, and of mean square norm 1: a width means the same anywhere."""
        mean, scale = _single(X.mean(0)), X.std(0)
        # What hardly varies is noise, or rounding: it must not be blown up to the size of what does.
        scale = np.maximum(scale, max(STILL * float(np.median(scale)), float(np.finfo(np.float32).tiny)))
        scaled = (X - mean) / scale
        components = min(self.components, *X.shape)
        basis = PCA(components, random_state=self.seed).fit(scaled).components_.T
        norm = float(np.sqrt(((scaled @ basis) ** 2).sum(1).mean())) or 1.0
        return Similarity(mean, _single(scale * norm), _half(basis), np.empty((0, components)), 1.0)

    def _regress(
        self, z: Array, landmarks: Array, gamma: float, labels: Array, groups: npt.NDArray[np.object_] | None
    ) -> "_Width":
        values, vectors = np.linalg.eigh(rbf(landmarks, landmarks, gamma))
        kept = values > SMALLEST * values[-1]
        root = vectors[:, kept] / np.sqrt(values[kept])
        inputs = rbf(z, landmarks, gamma) @ root
        together = _together(labels)
        if groups is None or not together or len(set(groups)) < 2:
            recognised, rest, looked_up = None, labels, np.zeros_like(labels)
        else:
            recognised = recognise(inputs, groups, labels, self.strengths)
            rest, looked_up = labels - recognised.own, recognised.looked_up
        found = [(rows, at, ridge(inputs[rows], rest[np.ix_(rows, at)], self.strengths)) for rows, at in together]
        # What has no regression at all has no error either.
        error = 0.0
        for rows, at, one in found:
            left_out = one.left_out + looked_up[np.ix_(rows, at)]
            error += float(((labels[np.ix_(rows, at)] - left_out) ** 2).mean()) * len(at)
        return _Width(gamma, root, recognised, found, error)

    def _experts(
        self,
        X: Array,
        labels: Array,
        names: tuple[str, ...],
        kinds: npt.NDArray[np.object_],
        similarity: Similarity,
        root: Array,
    ) -> Experts | None:
        if len(set(kinds)) < 2:
            return None
        recognised = recognise(similarity(X) @ root, kinds, labels, self.strengths)

        def fit(rows: Array, columns: Array, heads: tuple[str, ...]) -> Heads:
            return ProbeClassifier(**self.get_params()).fit(rows, columns, heads).heads_

        return fit_experts(X, labels, kinds, names, recognised, root, fit)

    def _calibrator(self, scores: Array, y: Array) -> Calibrator:
        if not np.isin(y, [0, 1]).all():
            return fit_linear(scores, y)
        if self.calibration == "isotonic":
            return fit_isotonic(scores, y)
        return fit_calibrator(scores, y) if self.calibration == "auto" else fit_platt(scores, y)


@dataclass(frozen=True, slots=True)
class _Width:
    """What one width of the similarity gives."""

    gamma: float
    root: Array
    """Of the landmarks' inverse kernel."""
    recognised: Recognised | None
    found: list[tuple[Any, list[int], Ridge]]
    """(labelled rows, heads, their regression)"""
    error: float
    """Leave-one-out mean squares, summed over heads."""


def _groups_of(recognised: Recognised, root: Array, slopes: Array) -> Groups:
    weight, means = (root @ recognised.weight).T, slopes[:, None] * recognised.means
    return Groups(
        recognised.names,
        weight.astype(np.float32, order="C"),
        recognised.bias.astype(np.float32),
        means.astype(np.float32, order="C"),
    )


def _together(labels: Array) -> list[tuple[Any, list[int]]]:
    """(labelled rows, heads) of the heads that share their labelled rows and have both classes."""
    found: dict[bytes, tuple[Any, list[int]]] = {}
    for head, column in enumerate(labels.T):
        known = ~np.isnan(column)
        ones = float(column[known].sum())
        if min(ones, known.sum() - ones) >= MIN_OF_CLASS:
            found.setdefault(known.tobytes(), (np.flatnonzero(known), []))[1].append(head)
    return list(found.values())


def _constant(y: Array) -> Calibrator:
    """The smoothed base rate, whatever the score."""
    return fit_platt(np.zeros(len(y)), y)


def _single(values: Array) -> Array:
    return values.astype(np.float32).astype(np.float64)


def _half(values: Array) -> Array:
    """As float16 will keep them: what is stored is what was fitted."""
    return values.astype(np.float16).astype(np.float64)
