"""Stop rules and weights over ballots made by hand."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_engine.reason.voting import Ballot, answer_entropy, lead_probability, least_more, weights, winner


def ballots(*answers: str, logprob: float = -1.0) -> list[Ballot]:
    return [Ballot(answer, logprob, 10, -0.5, at) for at, answer in enumerate(answers)]


def test_a_lead_is_a_binomial_tail() -> None:
    assert lead_probability(3, 0) == 15 / 16
    assert lead_probability(0, 0) == 0.5
    assert lead_probability(2, 2) == 0.5
    assert lead_probability(5, 1) == pytest.approx(1 - (1 + 7) / 2**7)
    rng = random.Random(0)
    drawn = [rng.betavariate(5, 3) > 0.5 for _ in range(20_000)]
    assert lead_probability(4, 2) == pytest.approx(sum(drawn) / len(drawn), abs=0.01)


@pytest.mark.parametrize(
    ("said", "stop", "bound", "more"),
    [
        ((), "posterior", 0.9, 3),
        (("1", "1", "1"), "posterior", 0.9, 0),
        (("1", "2"), "posterior", 0.9, 4),
        (("1", "1", "1"), "posterior", 0.95, 1),
        (("1", "1", "1"), "agreement", 0.9, 0),
        (("1", "2"), "agreement", 0.9, 8),
        (("1", "1", "1", "1", "2"), "entropy", 0.4, 0),
        (("1", "1", "2"), "entropy", 0.4, 1),
        (("1",) * 9, "never", 0.9, 7),
        (("", "", ""), "posterior", 0.9, 3),
    ],
)
def test_how_many_more_it_takes(said: tuple[str, ...], stop: str, bound: float, more: int) -> None:
    assert least_more(ballots(*said), stop, bound, 16) == more  # type: ignore[arg-type]  # parametrised as text


@settings(deadline=None)
@given(st.lists(st.sampled_from(["1", "2", "3", ""]), max_size=16))
def test_when_nobody_can_catch_up_it_stops_and_the_winner_stands(said: list[str]) -> None:
    most = 16
    if least_more(ballots(*said), "posterior", 1 - 1e-9, most) or len(said) == most or not any(said):
        return
    rest = most - len(said)
    leader = said[winner(ballots(*said), "count")]
    for other in {"1", "2", "3"} - {leader}:
        everything = ballots(*said, *[other] * rest)
        assert everything[winner(everything, "count")].answer == leader


def test_weights_count_a_path_once_where_they_are_probabilities() -> None:
    twice = [Ballot("1", -2.0, 10, -1, path=7), Ballot("1", -2.0, 10, -1, path=7), Ballot("2", -1.0, 10, -1, path=8)]
    assert weights(twice, "count") == {"1": 2.0, "2": 1.0}
    assert weights(twice, "probability") == pytest.approx({"1": math.exp(-2), "2": math.exp(-1)})
    assert weights(twice, "perplexity") == pytest.approx({"1": math.exp(-0.2), "2": math.exp(-0.1)})
    assert twice[winner(twice, "count")].answer == "1"
    assert twice[winner(twice, "probability")].answer == "2"


def test_the_most_probable_sample_of_the_winning_answer_is_shown() -> None:
    some = [Ballot("1", -9.0, 10, -1, 0), Ballot("1", -2.0, 10, -1, 1), Ballot("2", -0.1, 10, -1, 2)]
    assert winner(some, "count") == 1
    assert winner([Ballot("", -1.0, 5, -1, 0), Ballot("3", -50.0, 5, -9, 1)], "count") == 1
    assert winner(ballots("", ""), "count") == 0, "none says anything: one is shown all the same"


def test_entropy_is_of_shares() -> None:
    assert answer_entropy([3]) == 0
    assert answer_entropy([1, 1]) == pytest.approx(math.log(2))
    assert answer_entropy([]) == math.inf
