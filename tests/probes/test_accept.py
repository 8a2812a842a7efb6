"""The accept rule of a cascade: what it keeps is right as often as asked, and a policy can hold it as it is written."""

import numpy as np
import pytest

from probes.accept import FEATURES, answer_features, fit_accept
from probes.errors import TableError
from routers.cascade import accepts
from routers.load import parse
from routers.types import Cascade
from tests.routers.test_aims import HEAD


def _answers(n: int, seed: int = 0) -> tuple[list[list[float]], np.ndarray]:
    """Answers of 5 to 60 tokens; the surer ones are right more often."""
    rng = np.random.default_rng(seed)
    sure = rng.normal(size=n)
    right = rng.random(n) < 1 / (1 + np.exp(-2 * sure))
    mean = 0.5 * np.exp(-sure)
    return [list(-rng.exponential(m, size=rng.integers(5, 60))) for m in mean], right.astype(float)


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_what_is_accepted_is_right_as_often_as_asked(share: float) -> None:
    logprobs, right = _answers(3000)
    rule = fit_accept(answer_features(logprobs), right, right_at_least=share)
    assert rule.accepted_right >= share
    assert rule.keeps_right > rule.keeps_wrong
    assert rule.weights["mean_logprob"] > 0

    policy = parse(HEAD + f'  - {{name: a, when: {{model: auto}}, candidates: ["weak>strong"], {rule}}}\n')
    plan = policy.routes[0].plans["weak>strong"]
    assert isinstance(plan, Cascade)
    fresh, truth = _answers(3000, seed=1)
    kept = np.array([accepts(plan.accept, values) for values in fresh])
    assert truth[kept].mean() > share - 0.04, "on answers it has not seen, by the gateway's own code"
    assert kept[truth > 0].mean() == pytest.approx(plan.accept.keeps_right, abs=0.05)
    assert kept[truth < 1].mean() == pytest.approx(plan.accept.keeps_wrong, abs=0.05)


def test_what_cannot_be_fitted_is_said() -> None:
    logprobs, right = _answers(300)
    features = answer_features(logprobs)
    assert features.shape == (300, len(FEATURES))
    with pytest.raises(TableError, match="0 of 300 answers are of the rarer kind"):
        fit_accept(features, np.ones(300), right_at_least=0.9)
    with pytest.raises(TableError, match="ask for less"):
        fit_accept(np.zeros((300, 3)), right, right_at_least=0.99)
    for broken in ([], [float("nan")], [-1.0, float("-inf")]):
        with pytest.raises(TableError, match="row 1: an answer needs"):
            answer_features([[-1.0], broken])
