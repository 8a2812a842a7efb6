"""The estimator keeps scikit-learn's promises and its own: missing labels, gaps, left-out scores, calibration."""

from typing import Any

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from probes.calibrate import Isotonic, ece, fit_linear, sigmoid
from probes.groups import SHRINK, recognise
from probes.heads import rbf
from probes.kernel import ProbeClassifier
from probes.ridge import ridge

EXPECTED_FAILURES = {
    "check_supervised_y_2d": "a column of labels means one head, not a vector to be ravelled",
}


@parametrize_with_checks([ProbeClassifier()], expected_failed_checks=lambda _: EXPECTED_FAILURES)  # type: ignore[untyped-decorator]
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def _problem(n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and true probabilities of two heads."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 12)) * np.linspace(0.1, 5, 12) + 3
    z = (X - 3) / np.linspace(0.1, 5, 12)
    p = sigmoid(np.column_stack([z[:, 0] + z[:, 5], z[:, 1] - z[:, 7] + 1]))
    return X, (rng.random(p.shape) < p).astype(float), p


def test_probabilities_are_near_the_truth() -> None:
    X, y, truth = _problem()
    model = ProbeClassifier().fit(X, y)
    assert np.abs(model.predict_proba(X) - truth).mean() < 0.06
    assert ece(model.predict_proba(X)[:, 0], y[:, 0]) < 0.05


def test_left_out_scores_are_those_of_a_fit_without_the_row() -> None:
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(40, 6)), rng.random((40, 2))
    found, base = ridge(inputs, labels, (2.0,)), labels.mean(0)
    for row in range(3):
        rest = np.delete(inputs, row, 0)
        weight = np.linalg.solve(rest.T @ rest + 2.0 * np.eye(6), rest.T @ (np.delete(labels, row, 0) - base))
        np.testing.assert_allclose(inputs[row] @ weight + base, found.left_out[row], atol=1e-10)


def test_the_strength_with_the_least_error_is_taken() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(300, 20))
    signal = inputs @ rng.normal(size=(20, 1))
    assert ridge(inputs, signal, (1e-3, 1e4)).strengths == 1e-3
    assert ridge(inputs, rng.normal(size=(300, 1)), (1e-3, 1e4)).strengths == 1e4


def test_each_direction_of_the_labels_has_the_strength_that_it_can_bear() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 20))
    common = inputs @ rng.normal(size=(20, 1))
    found = ridge(inputs, common + rng.normal(size=(400, 3)), (1e-3, 1e6))
    # How the three differ is noise: they are foretold alike, and what they share is not shrunk for it.
    assert found.strengths.tolist() == [1e6, 1e6, 1e-3]
    assert np.ptp(found.left_out - found.bias, axis=1).max() < 0.2
    assert np.corrcoef(found.left_out[:, 0], common[:, 0])[0, 1] > 0.99


def test_the_difference_of_two_heads_is_the_regression_of_their_gap() -> None:
    X, y, _ = _problem(600)
    model = ProbeClassifier(gammas=(1.0,), strengths=(3.0,)).fit(X, y)
    base = y.mean(0)
    linear = (model.heads_.decision_function(X) - np.log(base / (1 - base))) * base * (1 - base) + base
    similarity = model.heads_.similarity
    assert similarity is not None
    values, vectors = np.linalg.eigh(rbf(similarity.landmarks, similarity.landmarks, 1.0))
    kept = values > 1e-6 * values[-1]
    gap = ridge(similarity(X) @ (vectors[:, kept] / np.sqrt(values[kept])), y[:, 1:] - y[:, :1], (3.0,))
    direct = similarity(X) @ (vectors[:, kept] / np.sqrt(values[kept])) @ gap.weight + gap.bias
    np.testing.assert_allclose(linear[:, 1] - linear[:, 0], direct[:, 0], atol=1e-3)


def test_what_resembles_nothing_gets_the_base_rate() -> None:
    X, y, _ = _problem()
    model = ProbeClassifier(calibration="platt").fit(X, y)
    far = np.full((1, 12), 1e6)
    np.testing.assert_allclose(model.predict_proba(far)[0], y.mean(0), atol=0.06)


def test_a_head_learns_from_its_labelled_rows_only() -> None:
    X, y, _ = _problem()
    holes = y.copy()
    holes[1000:, 0] = np.nan
    alone = ProbeClassifier().fit(X, holes).predict_proba(X)
    wrong = np.where(np.isnan(holes), 1 - y, holes)
    assert np.abs(alone[:, 0] - ProbeClassifier().fit(X, wrong).predict_proba(X)[:, 0]).max() > 0.3
    np.testing.assert_allclose(alone[:, 1], ProbeClassifier().fit(X, y).predict_proba(X)[:, 1], atol=0.05)


def test_a_head_with_one_class_is_its_smoothed_base_rate() -> None:
    X, y, _ = _problem(200)
    y[:, 0] = 0.0
    model = ProbeClassifier().fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X)[:, 0], 1 / 202, rtol=1e-6)
    assert model.regressed_.tolist() == [False, True]
    y[:, 1] = 1.0
    np.testing.assert_allclose(ProbeClassifier().fit(X, y).predict_proba(X), [[1 / 202, 201 / 202]] * 200, rtol=1e-6)


def test_a_parameter_without_a_choice_is_refused() -> None:
    X, y, _ = _problem(100)
    with pytest.raises(ValueError, match="strengths is empty"):
        ProbeClassifier(strengths=()).fit(X, y)
    with pytest.raises(ValueError, match="gammas is empty"):
        ProbeClassifier(gammas=()).fit(X, y)


def test_features_that_are_no_numbers_are_refused() -> None:
    X, y, _ = _problem(100)
    X[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        ProbeClassifier().fit(X, y)


def test_each_head_is_calibrated_by_the_number_of_its_labels() -> None:
    X, y, _ = _problem(3200)
    y[:600, 0] = np.nan
    few, many = ProbeClassifier().fit(X, y).heads_.calibrators
    assert not isinstance(few, Isotonic)
    assert isinstance(many, Isotonic)


def test_labels_outside_0_1_are_refused() -> None:
    X, y, _ = _problem(100)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ProbeClassifier().fit(X, y * 2)


def test_scores_between_0_and_1_are_foretold() -> None:
    X, _, truth = _problem(1500)
    model = ProbeClassifier().fit(X, truth)
    assert np.abs(model.predict_proba(X) - truth).mean() < 0.05
    assert isinstance(model.heads_.calibrators[0], Isotonic)


def _tasks(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and names of four tasks, each of which another of four models can do."""
    rng = np.random.default_rng(seed)
    member = rng.integers(0, 4, n)
    X = np.random.default_rng(7).normal(size=(4, 10))[member] * 1.5 + rng.normal(size=(n, 10))
    y = (rng.random((n, 4)) < np.where(np.arange(4) == member[:, None], 0.8, 0.3)).astype(float)
    return X, y, np.array(["code", "facts", "logic", "sums"], object)[member]


def test_groups_are_recognised_and_their_means_foretold() -> None:
    X, y, groups = _tasks(1500, 0)
    model = ProbeClassifier(landmarks=200).fit(X, y, groups=groups)
    known = model.heads_.groups
    assert known is not None
    assert known.names == ("code", "facts", "logic", "sums")
    unseen, truth, _ = _tasks(1500, 1)
    p = model.predict_proba(unseen)
    assert np.abs(p - 0.3).min(axis=1).max() < 0.1
    assert truth[np.arange(1500), p.argmax(1)].mean() > 0.75
    assert ece(p[:, 0], truth[:, 0]) < 0.06


def test_a_rows_own_label_does_not_enter_what_its_group_says_of_it() -> None:
    rng = np.random.default_rng(0)
    inputs, member = rng.normal(size=(60, 3)), np.repeat(np.array(["a", "b", "c"], object), 20)
    inputs[:20, 0] += 6.0
    inputs[20:40, 1] += 6.0
    labels = rng.random((60, 2))
    before = recognise(inputs, member, labels, (1.0,))
    changed = labels.copy()
    changed[5] = 1.0 - changed[5]
    changed[7, 1] = np.nan
    after = recognise(inputs, member, changed, (1.0,))
    # Through the mean of all rows, by which groups are shrunk, it does a little.
    np.testing.assert_allclose(after.own[5, 0], before.own[5, 0], atol=0.005)
    assert abs(after.own[6, 0] - before.own[6, 0]) > 0.005
    assert np.isfinite(after.looked_up).all()
    # The group says what the mean of its other rows is.
    others = np.r_[np.arange(5), np.arange(6, 20)]
    expected = (labels[others, 0].sum() + SHRINK * labels[:, 0].mean()) / (19 + SHRINK)
    np.testing.assert_allclose(before.own[5, 0], expected)


def test_one_group_is_none() -> None:
    X, y, groups = _tasks(200, 0)
    alone = ProbeClassifier(landmarks=50).fit(X, y, groups=np.full(200, "all", object))
    assert alone.heads_.groups is None
    np.testing.assert_array_equal(alone.predict_proba(X), ProbeClassifier(landmarks=50).fit(X, y).predict_proba(X))
    with pytest.raises(ValueError, match="X has 200 rows, groups 100"):
        ProbeClassifier().fit(X, y, groups=groups[:100])


def test_a_line_is_fitted_to_scores_between_0_and_1_and_cut_there() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    line = fit_linear(x, np.clip(0.5 + 0.1 * x, 0, 1))
    np.testing.assert_allclose(line(np.array([-9.0, -1.0, 0.0, 1.0, 9.0])), [0.0, 0.4, 0.5, 0.6, 1.0], atol=1e-6)
    falling = fit_linear(x, np.clip(0.5 - 0.1 * x, 0, 1))
    np.testing.assert_allclose(falling(x), 0.5, atol=0.01)


def _kinds(n: int = 1200, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and kinds: what tells right from wrong in one kind says the opposite in the other."""
    rng = np.random.default_rng(seed)
    kinds = np.where(rng.random(n) < 0.7, "exam", "sum").astype(object)
    X = rng.normal(size=(n, 8))
    X[:, 0] += np.where(kinds == "exam", 6.0, -6.0)
    z = 2.0 * X[:, 1] * np.where(kinds == "exam", 1.0, -1.0)
    return X, (rng.random((n, 2)) < sigmoid(np.column_stack([z, z + 1.0]))).astype(float), kinds


def test_each_kind_has_a_probe_of_its_own_which_speaks_where_it_is_recognised() -> None:
    X, y, kinds = _kinds()
    fresh, truth, told = _kinds(600, seed=1)
    mixed = ProbeClassifier(components=8, landmarks=60).fit(X, y, experts=kinds)
    experts = mixed.heads_.experts
    assert experts is not None
    assert experts.kinds == ("exam", "sum")
    p = mixed.predict_proba(fresh)
    for at, kind in enumerate(experts.kinds):
        rows, own = told == kind, experts.own[at]
        assert own is not None
        alone = ProbeClassifier(components=8, landmarks=60).fit(X[kinds == kind], y[kinds == kind])
        np.testing.assert_allclose(p[rows], alone.predict_proba(fresh[rows]), atol=0.02)
        assert np.mean((p[rows] - truth[rows]) ** 2) < 0.2 < truth[rows].var()


def test_a_kind_with_too_few_labels_is_left_to_the_probe_of_all() -> None:
    X, y, kinds = _kinds()
    y[kinds == "sum", 0] = np.nan
    y[np.flatnonzero(kinds == "sum")[20:], 1] = np.nan
    mixed = ProbeClassifier(components=8, landmarks=60).fit(X, y, experts=kinds)
    plain = ProbeClassifier(components=8, landmarks=60).fit(X, y)
    experts = mixed.heads_.experts
    assert experts is not None
    assert [None if own is None else own.names for own in experts.own] == [("head0", "head1"), None]
    sums = kinds == "sum"
    np.testing.assert_allclose(mixed.predict_proba(X[sums]), plain.predict_proba(X[sums]), atol=0.02)
    few = ProbeClassifier(components=8, landmarks=60).fit(X[:200], y[:200], experts=kinds[:200])
    assert few.heads_.experts is None
    with pytest.raises(ValueError, match="X has 1200 rows, experts 3"):
        ProbeClassifier().fit(X, y, experts=kinds[:3])
