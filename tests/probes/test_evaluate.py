"""Routing metrics on data where the answer is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probes.evaluate import apgr, auc, baselines, cpt, curve, error_interval, folds, head_rows, routing_rows

_RNG = np.random.default_rng(0)
WEAK = (_RNG.random(2000) < 0.6).astype(float)
STRONG = (_RNG.random(2000) < 0.8).astype(float)


@pytest.fixture
def rng() -> np.random.Generator:
    """Of each test alone: which tests ran before it in this process is chance."""
    return np.random.default_rng(1)


def test_the_curve_runs_from_all_strong_to_all_weak(rng: np.random.Generator) -> None:
    line = curve(rng.random(2000), WEAK, STRONG)
    assert (line.share[0], line.share[-1]) == (1.0, 0.0)
    assert (line.accuracy[0], line.accuracy[-1]) == (STRONG.mean(), WEAK.mean())


def test_a_constant_score_recovers_exactly_half() -> None:
    assert apgr(np.ones(2000), WEAK, STRONG) == pytest.approx(0.5)


def test_random_recovers_about_half_and_an_oracle_more_than_all(rng: np.random.Generator) -> None:
    random = [apgr(rng.random(2000), WEAK, STRONG) for _ in range(50)]
    assert np.mean(random) == pytest.approx(0.5, abs=0.03)
    assert apgr(STRONG - WEAK, WEAK, STRONG) > 1


def test_a_reversed_score_loses_what_the_score_gains(rng: np.random.Generator) -> None:
    scores = (STRONG - WEAK) + rng.normal(0, 2, 2000)
    assert apgr(scores, WEAK, STRONG) + apgr(-scores, WEAK, STRONG) == pytest.approx(1, abs=0.01)


def test_apgr_by_hand() -> None:
    # Ten queries; only the two highest scored need the strong model. Accuracy: 0.8 + min(share, 0.2).
    weak = np.array([1.0] * 8 + [0.0] * 2)
    area = 0.1 * (0.85 + 0.95) + 0.8 * 1.0
    assert apgr(np.arange(10.0), weak, np.ones(10)) == pytest.approx((area - 0.8) / 0.2)
    assert cpt(np.arange(10.0), weak, np.ones(10), 0.5) == pytest.approx(0.1)
    assert cpt(np.arange(10.0), weak, np.ones(10), 0.8) == pytest.approx(0.16)


def test_cpt_takes_the_first_crossing_where_accuracy_is_not_monotone() -> None:
    # From the cheap end accuracy runs .4 .5 .6 .5 .4 .3 .4 .5 .6 .7 .6: half the gap is reached at one in ten, and lost
    # again.
    weak = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert cpt(np.arange(10.0), weak, 1.0 - weak, 0.5) == pytest.approx(0.1)


def test_no_gap_gives_no_number() -> None:
    assert np.isnan(apgr(np.arange(4.0), np.ones(4), np.ones(4)))


def test_auc_counts_ties_half() -> None:
    assert auc(np.array([0.0, 1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0.875)


def test_missing_labels_are_left_out() -> None:
    p, y = np.array([0.2, 0.9, 0.5, 0.4]), np.array([0.0, 1.0, np.nan, 1.0])
    rows = {row.metric: row.value for row in head_rows("head", p, y, times=10)}
    assert rows["n"] == 3
    assert rows["base rate"] == pytest.approx(2 / 3)


def test_no_group_stands_on_both_sides_of_a_fold() -> None:
    groups = np.array(list("aabbccddeeff") * 3, dtype=object)
    seen = []
    for train, test in folds(len(groups), 0, groups):
        assert not set(groups[train]) & set(groups[test])
        seen += list(test)
    assert sorted(seen) == list(range(len(groups)))


def test_paired_rows_tell_a_good_router_from_random(rng: np.random.Generator) -> None:
    scores = (STRONG - WEAK) + rng.normal(0, 1, 2000)
    rows = routing_rows({"good": scores, "random": rng.random(2000)}, WEAK, STRONG, reference="good", times=200)
    difference = next(row for row in rows if row.metric == "APGR difference")
    assert difference.low is not None
    assert difference.low > 0


def test_baselines_on_real_outcomes(routellm_mmlu: Path) -> None:
    frame = pd.read_parquet(routellm_mmlu)
    frame = frame[~frame["contaminated"]].reset_index(drop=True)
    weak = frame["mixtral_8x7b_correct"].to_numpy(dtype=float)
    strong = frame["gpt4_1106_correct"].to_numpy(dtype=float)
    keep = np.random.default_rng(0).permutation(len(frame))[:3000]
    prompts = frame["prompt"].iloc[keep].tolist()
    groups = frame["domain"].to_numpy(dtype=object)[keep]
    scores = baselines(prompts, weak[keep], strong[keep], folds(3000, 0), groups=groups)
    found = {name: apgr(values, weak[keep], strong[keep]) for name, values in scores.items()}
    assert found["random"] == pytest.approx(0.5, abs=0.06)
    assert found["prompt length"] == pytest.approx(0.59, abs=0.06)
    assert found["group prior"] == pytest.approx(0.67, abs=0.06)
    assert found["oracle"] == pytest.approx(1.28, abs=0.06)


def test_the_interval_of_a_calibration_error_holds_it_where_resamples_all_lie_above() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(400)
    rows = {row.metric: row for row in head_rows("h", p, (rng.random(400) < p).astype(float), times=200)}
    found = rows["ECE"]
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low < found.value < found.high
    assert error_interval(0.02, [0.05, 0.06, 0.07]) == pytest.approx((0.0105, 0.0295))
    assert error_interval(0.001, [0.05, 0.06, 0.07])[0] == 0
