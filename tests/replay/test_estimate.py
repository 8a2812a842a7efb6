"""The estimator against simulated logs whose truth is known."""

import numpy as np
import pytest

from gateway.replay.estimate import CLIP, Array, Logged, doubly_robust

ACTIONS = 3


def world(seed: int, n: int = 400, explore: float = 0.3) -> tuple[Logged, Array, float]:
    """(logs, a target policy, its true value): the chance of a good answer depends on context and action, not linearly;
    the logging policy prefers the cheap action, and more so on easy queries."""
    rng = np.random.default_rng(seed)
    x = rng.random(n)
    truth = np.stack([1 - x**2, 0.9 - 0.4 * x, np.full(n, 0.8)], axis=1)
    likes = np.where(x[:, None] < 0.5, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    logging = (1 - explore) * likes + explore / ACTIONS
    action = (rng.random((n, 1)) > logging.cumsum(1)).sum(1).clip(0, ACTIONS - 1)
    rows = np.arange(n)
    outcome = (rng.random(n) < truth[rows, action]).astype(float)
    features = np.ones((n, ACTIONS, 2))
    features[:, :, 1] = x[:, None]
    target = np.where(x[:, None] < 0.3, [[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]])
    u = (np.arange(200_000) + 0.5) / 200_000  # the true value, by integration over x
    value = float(np.where(u < 0.3, 1 - u**2, 0.8).mean())
    return Logged(action, logging[rows, action], outcome, features), target, value


def test_the_interval_holds_the_truth_as_often_as_it_says_and_the_mean_is_right() -> None:
    runs = 400
    found = []
    for seed in range(runs):
        logs, target, value = world(seed, n=2000)
        evaluation = doubly_robust(logs, target, seed=seed)
        assert evaluation is not None
        assert not evaluation.rough
        found.append((evaluation.after.value, evaluation.after.low <= value <= evaluation.after.high))
    values = np.array([v for v, _ in found])
    held = np.mean([inside for _, inside in found])
    assert 0.92 <= held <= 0.98  # 95% of 400, give or take 2.8 standard errors
    assert abs(values.mean() - value) < 3 * values.std() / runs**0.5


def test_it_varies_less_than_inverse_propensity_scores_do() -> None:
    pairs = []
    for seed in range(200):
        logs, target, _ = world(seed)
        evaluation = doubly_robust(logs, target, seed=seed)
        assert evaluation is not None
        weights = target[np.arange(len(logs.action)), logs.action] / logs.propensity
        pairs.append((evaluation.after.value, float((np.minimum(weights, CLIP) * logs.outcome).mean())))
    robust, plain = np.array(pairs).std(0)
    assert robust < 0.75 * plain


def test_a_useless_outcome_model_biases_nothing() -> None:
    runs = []
    for seed in range(300):
        logs, target, value = world(seed)
        noise = np.random.default_rng(seed).random(logs.features.shape)
        noise[:, :, 0] = 1.0
        evaluation = doubly_robust(Logged(logs.action, logs.propensity, logs.outcome, noise), target, seed=seed)
        assert evaluation is not None
        runs.append(evaluation.after.value - value)
    assert abs(np.mean(runs)) < 3 * float(np.std(runs)) / len(runs) ** 0.5


def test_repricing_is_biased_where_another_model_writes_other_answers() -> None:
    """The dear model costs ten times as much a token and writes a third of them: repricing says 2600, it is 1000."""
    rng = np.random.default_rng(0)
    n = 3000
    action = (rng.random(n) < 0.2).astype(np.intp)
    tokens = np.where(action == 0, rng.normal(300, 30, n), rng.normal(100, 10, n))
    cost = tokens * np.where(action == 0, 1.0, 10.0)
    features = np.ones((n, 2, 1))
    logs = Logged(action, np.where(action == 0, 0.8, 0.2), cost, features)
    target = np.tile([0.0, 1.0], (n, 1))
    evaluation = doubly_robust(logs, target)
    assert evaluation is not None
    assert evaluation.after.value == pytest.approx(1000, rel=0.02)
    repriced = float((tokens * 10).mean())
    assert repriced > 2 * evaluation.after.high


def test_what_stays_the_same_is_exact() -> None:
    rng = np.random.default_rng(1)
    outcome = rng.random(100)
    action = rng.integers(0, 2, 100)
    logs = Logged(action, np.ones(100), outcome, np.ones((100, 2, 1)))
    evaluation = doubly_robust(logs, np.eye(2)[action])
    assert evaluation is not None
    assert evaluation.after.value == pytest.approx(outcome.mean())
    assert (evaluation.change.low, evaluation.change.high) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert evaluation.effective_n == pytest.approx(100)


def test_unknown_outcomes_are_left_out_few_are_no_estimate_and_cut_weights_are_told() -> None:
    logs, target, _ = world(0)
    outcome = logs.outcome.copy()
    outcome[29:] = np.nan
    assert doubly_robust(Logged(logs.action, logs.propensity, outcome, logs.features), target) is None
    outcome[29:60] = 1.0
    evaluation = doubly_robust(Logged(logs.action, logs.propensity, outcome, logs.features), target)
    assert evaluation is not None
    assert evaluation.n == 60
    rare = np.where(target[np.arange(400), logs.action] > 0, 1 / (2 * CLIP), logs.propensity)
    evaluation = doubly_robust(Logged(logs.action, rare, logs.outcome, logs.features), target)
    assert evaluation is not None
    assert evaluation.largest_weight == pytest.approx(2 * CLIP)
    assert evaluation.clipped == pytest.approx(float((target[np.arange(400), logs.action] > 0).mean()))
