"""When each method judges, keeps or hands over: token by token, without a model."""

import math
from dataclasses import dataclass, field

import pytest

from local_engine.reason.entropy import EntropySwitch
from local_engine.reason.glimprouter import GlimpRouter, entropy_of
from local_engine.reason.guards import LoopGuard
from local_engine.reason.method import Do, Method
from local_engine.reason.score import Scored
from local_engine.reason.speculative_thinking import VERIFY_TOKENS, SpeculativeThinking
from local_engine.reason.steps import Boundary


@dataclass
class Said:
    token: int = 0
    logprob: float = 0.0
    entropy: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)


def moves(method: Method, words: list[str]) -> list[tuple[str, int]]:
    """What follows each of the draft's tokens, and how many are taken back; a blank line ends a step."""
    found = []
    for word in words:
        boundary = Boundary.STEP if word.endswith("\n\n") else Boundary.INSIDE
        move = method.drafted(Said(), word.encode(), boundary)
        found.append((move.do.name, move.take_back))
    return found


def test_score_judges_at_step_ends_or_before_a_token_that_the_draft_doubts() -> None:
    method = Scored(unsure=-1.0, lookahead=2)
    for boundary, logprob, expected in [
        (Boundary.INSIDE, -0.5, (Do.WRITE, 0)),
        (Boundary.STEP, -0.5, (Do.WRITE, 0)),
        (Boundary.STEP, -0.5, (Do.JUDGE, 0)),
        (Boundary.INSIDE, -1.5, (Do.JUDGE, 1)),
        (Boundary.STEP, -0.5, (Do.WRITE, 0)),
        (Boundary.TURN, -0.5, (Do.JUDGE, 1)),
    ]:
        move = method.drafted(Said(logprob=logprob), b"x", boundary)
        assert (move.do, move.take_back) == expected


def test_entropy_of_a_part_is_that_of_the_part_made_whole() -> None:
    assert entropy_of([(1, math.log(0.2)), (2, math.log(0.2))]) == pytest.approx(math.log(2))
    assert entropy_of([(1, math.log(0.9))]) == pytest.approx(0.0)
    assert entropy_of([]) == 0.0


def test_glimprouter_looks_at_the_first_token_that_is_a_word() -> None:
    method = GlimpRouter(threshold=0.6)
    unsure = Said(top=[(1, math.log(0.5)), (2, math.log(0.5))])
    assert method.drafted(unsure, b"\n", Boundary.INSIDE).do is Do.KEEP, "white space"
    assert method.drafted(Said(top=[(1, 0.0)]), b"12", Boundary.INSIDE).do is Do.KEEP
    assert method.drafted(unsure, b"7", Boundary.INSIDE).do is Do.KEEP, "not the first one"
    assert method.drafted(unsure, b"\n\n", Boundary.STEP).do is Do.KEEP
    move = method.drafted(unsure, b"Wait", Boundary.INSIDE)
    assert (move.do, move.take_back) == (Do.HAND_OVER, 1)
    assert not method.written(Said(), b"Hm", Boundary.INSIDE)
    assert method.written(Said(), b"\n\n", Boundary.STEP)
    assert method.drafted(unsure, b"So", Boundary.INSIDE).do is Do.HAND_OVER


@pytest.mark.parametrize(
    ("words", "handed_over"),
    [
        pytest.param(["2 + 2", " = 4"], 0, id="nothing to doubt"),
        pytest.param(["Wait", ", no"], 4, id="doubt"),
        pytest.param(["Another", " one"], 4, id="doubt in any case"),
        pytest.param(["waiting", " room"], 0, id="a part of a word"),
        pytest.param(["Yes", ", wait"], 0, id="yes and no"),
        pytest.param(["let me", " check"], VERIFY_TOKENS, id="verifying"),
    ],
)
def test_speculative_thinking_hands_over_on_words_of_doubt(words: list[str], handed_over: int) -> None:
    method = SpeculativeThinking(look=4)
    found = moves(method, [*words, " .", " ."])
    if not handed_over:
        assert found == [("WRITE", 0)] * 3 + [("KEEP", 0)]
        return
    assert found == [("WRITE", 0)] * 3 + [("HAND_OVER", 4)]
    written = 1
    while not method.written(Said(), b"x", Boundary.INSIDE):
        written += 1
    assert written == handed_over
    assert moves(method, ["Wait"]) == [("KEEP", 0)], "not after a delimiter"


def test_speculative_thinking_hands_over_for_longer_after_many_doubts() -> None:
    method, given = SpeculativeThinking(look=1), []
    for _ in range(36):
        assert moves(method, ["wait"]) == [("HAND_OVER", 1)]
        given.append(1)
        while not method.written(Said(), b"x", Boundary.INSIDE):
            given[-1] += 1
        method.drafted(Said(), b"\n\n", Boundary.STEP)
    assert [(at, tokens) for at, tokens in enumerate(given, 1) if tokens > 1] == [(15, 125), (35, 150)]


def test_entropy_switches_over_a_mean_and_back_under_half_of_it() -> None:
    method = EntropySwitch(threshold=0.4, window=2)
    does = [method.drafted(Said(entropy=entropy), b"x", Boundary.INSIDE).do for entropy in (0.1, 0.6, 0.3)]
    assert does == [Do.KEEP, Do.KEEP, Do.HAND_OVER]
    assert [method.written(Said(entropy=entropy), b"x", Boundary.INSIDE) for entropy in (0.3, 0.2, 0.1)] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        pytest.param(["a", "a"], "", id="twice is no loop"),
        pytest.param(["b", "a", "a", "a"], "repeats", id="three times"),
        pytest.param(["a", " a ", "a\n"], "repeats", id="white space aside"),
        pytest.param(["a", "b"] * 3, "repeats", id="two in turn"),
        pytest.param(["a", "b", "a", "c", "a", "b"], "", id="something new"),
        pytest.param([f"Wait, {n}" for n in range(32)], "", id="many doubts"),
        pytest.param([f"Wait, {n}" for n in range(33)], "reflections", id="too many doubts"),
        pytest.param([f"Waiting {n}" for n in range(40)], "", id="no doubts"),
    ],
)
def test_what_is_a_loop(steps: list[str], reason: str) -> None:
    guard = LoopGuard()
    found = [guard.read(step.encode()) for step in steps]
    assert found[-1] == reason
    assert not any(found[:-1])
