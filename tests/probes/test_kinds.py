"""Heads of every kind over the same dense features, with landmarks and without."""

import numpy as np
import pytest

from probes.kernel import ProbeClassifier
from probes.kinds import Fits, LinearHeads, fit_dense
from probes.sparse import SparseProbeClassifier
from probes.types import Kind

KINDS: tuple[Kind, ...] = ("correct", "out_tokens", "domain", "domain", "needs_reasoning")
NAMES = ("a", "a.tokens", "domain.x", "domain.y", "needs_reasoning")


@pytest.mark.parametrize("estimator", [ProbeClassifier(landmarks=100), LinearHeads()], ids=["landmarks", "linear"])
def test_each_head_learns_what_it_is_taught(estimator: Fits) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 12))
    right, tokens, domain = X[:, 0] > 0, np.exp(3 + X[:, 1]), X[:, 2] > 0
    labels = np.column_stack([right, tokens, domain, ~domain, ~right]).astype(float)
    labels[:20, 1] = np.nan
    heads, spreads = fit_dense(X, labels, KINDS, NAMES, estimator)
    values = heads.predict_proba(X)
    assert ((values[:, 0] > 0.5) == right).mean() > 0.9
    assert ((values[:, 4] > 0.5) == ~right).mean() > 0.9
    assert np.corrcoef(np.log(values[:, 1]), np.log(tokens))[0, 1] > 0.9
    assert ((values[:, 2] > values[:, 3]) == domain).mean() > 0.9
    low, high = spreads[1] or (0.0, 0.0)
    within = (values[20:, 1] * low < tokens[20:]) & (tokens[20:] < values[20:, 1] * high)
    assert within.mean() > 0.75  # four of five, out of fold


def test_fewer_rows_than_features_give_the_heads_that_all_features_would() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 90)), (rng.random((40, 1)) < 0.5).astype(float)
    mean, std = X.mean(0), X.std(0)
    direct = SparseProbeClassifier(Cs=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1)).fit((X - mean) / std, y)
    unseen = rng.normal(size=(30, 90))
    found = LinearHeads().fit(X, y).heads_.predict_proba(unseen)
    np.testing.assert_allclose(found, direct.predict_proba((unseen - mean) / std), atol=1e-4)
