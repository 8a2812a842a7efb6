"""Ridge regression of several labels at once, each direction of them as strong as it can be foretold; numpy only.

Labels of models asked the same questions are alike: most of their variance is one direction, how hard a question is.
The others, by which the models differ and by which a router ranks, are weaker and noisier, and want a strength of their
own. So labels are turned to their principal components, each is regressed by itself, and the scores are turned back: a
simple form of multi-response shrinkage (Breiman and Friedman, Predicting multivariate responses, 1997).
"""

from dataclasses import dataclass

import numpy as np

from probes.calibrate import Array


@dataclass(frozen=True, slots=True)
class Ridge:
    """Scores of several heads are inputs @ weight + bias."""

    weight: Array
    """[inputs, heads]"""
    bias: Array
    """[heads]"""
    left_out: Array
    """[n, heads], each row's score by all the others"""
    strengths: Array
    """[heads], of the labels' components, that of the least variance first"""


def ridge(inputs: Array, labels: Array, strengths: tuple[float, ...]) -> Ridge:
    """For each component of the labels the strength with the least leave-one-out error.

    `inputs` [n, d], `labels` [n, heads]. One eigendecomposition gives these errors for every strength (Hastie,
    Tibshirani and Friedman, 7.10). The intercept is the labels' mean, and inputs are not centred: where they are all
    zero, the score is the base rate.
    """
    if not strengths:
        raise ValueError("strengths is empty: give at least one ridge strength")
    base = labels.mean(0)
    _, turn = np.linalg.eigh((labels - base).T @ (labels - base))
    turned = (labels - base) @ turn
    values, vectors = np.linalg.eigh(inputs.T @ inputs)
    values, rotated = np.maximum(values, 0.0), inputs @ vectors
    target = rotated.T @ turned
    least = np.full(labels.shape[1], np.inf)
    chosen, weight, residual = np.empty_like(least), np.empty_like(target), np.empty_like(turned)
    for strength in strengths:
        coefficients = target / (values + strength)[:, None]
        leverage = (rotated**2) @ (1.0 / (values + strength))
        missed = (turned - rotated @ coefficients) / np.maximum(1.0 - leverage, 1e-6)[:, None]
        error = (missed**2).mean(0)
        better = error < least
        least[better], chosen[better] = error[better], strength
        weight[:, better], residual[:, better] = coefficients[:, better], missed[:, better]
    return Ridge(vectors @ weight @ turn.T, base, labels - residual @ turn.T, chosen)
