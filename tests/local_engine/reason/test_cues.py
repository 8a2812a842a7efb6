import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_engine.reason.answers import answer_class
from local_engine.reason.cues import Cue, CueFinder
from local_engine.reason.loops import goes_round


def found(pieces: list[str], words: tuple[str, ...] = ("wait", "hmm", "hold on")) -> list[Cue]:
    finder = CueFinder(words)
    return [cue for piece in pieces if (cue := finder.push(piece))]


@pytest.mark.parametrize(
    ("pieces", "cues"),
    [
        (["so 4", ". ", "Wait", ","], [Cue("wait", 2, 2)]),
        (["so 4", ".", " Wait", ","], [Cue("wait", 2, 2)]),
        (["W", "ai", "t", " ", "no"], [Cue("wait", 0, 2)]),
        (["wait", "ing", " ", "await", " "], []),
        (["a", "wait", "."], []),
        (["wait", "_", "for", " "], []),
        (["hold", " on", ","], [Cue("hold on", 0, 1)]),
        (["hold", " one", " "], []),
        (["HMM", "?", " hmm", "\n"], [Cue("hmm", 0, 0), Cue("hmm", 2, 2)]),
        (["wait"], []),
    ],
)
def test_a_cue_is_a_whole_word_in_whatever_tokens(pieces: list[str], cues: list[Cue]) -> None:
    assert found(pieces) == cues


@settings(deadline=None)
@given(st.text("waithm .\n", max_size=60), st.integers(0, 10**6))
def test_where_a_text_is_cut_into_tokens_does_not_matter(text: str, seed: int) -> None:
    rng = random.Random(seed)
    pieces: list[str] = []
    rest = text
    while rest:
        size = rng.randint(1, 3)
        pieces.append(rest[:size])
        rest = rest[size:]
    starts = [sum(map(len, pieces[:n])) for n in range(len(pieces))]
    letters = found(list(text), ("wait", "hmm"))
    tokens = found(pieces, ("wait", "hmm"))
    # Letters find every cue; of several that one token completes, the first counts.
    assert {(starts[cue.first], cue.word) for cue in tokens} <= {
        (max(start for start in starts if start <= cue.first), cue.word) for cue in letters
    }
    assert bool(tokens) == bool(letters)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["w", "ait", "wait", " ", "hold", " on", "x", ".", " hm"]), max_size=30))
def test_what_is_certain_is_never_cut_off(pieces: list[str]) -> None:
    finder = CueFinder(("wait", "hmm", "hold on"))
    certain = 0
    for piece in pieces:
        cue = finder.push(piece)
        assert cue is None or cue.first >= certain
        assert finder.pending >= certain
        certain = finder.pending


def test_nothing_is_held_back_that_cannot_be_a_cue() -> None:
    finder = CueFinder(("wait",))
    assert [(finder.push(piece), finder.pending)[1] for piece in ("12", " +", " wa", "s", " W", "ait")] == [
        1, 2, 2, 4, 4, 4,
    ]  # fmt: skip


def test_words_that_cannot_be_found_are_refused() -> None:
    for words in ((), ("",), ("wait,",)):
        with pytest.raises(ValueError, match="cues must be words"):
            CueFinder(words)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("The answer is 1,234.", "1234", True),
        ("so \\boxed{12} and 13", "12.0", True),
        ("-5", "5", False),
        ("It is  Paris.", "it is paris", True),
        ("3.50", "3.5", True),
        ("v2 7", "7", True),
    ],
)
def test_answers_agree_by_what_they_come_to(left: str, right: str, same: bool) -> None:
    assert (answer_class(left) == answer_class(right)) is same


def test_a_loop_is_a_stretch_that_comes_again_and_again() -> None:
    check = ["Wait", ",", " let", " me", " check", ".", "\n", "2", " + ", "2"]
    assert not goes_round(check * 2)
    assert goes_round(["7", *check * 4])
    assert goes_round(["Wait", " "] * 20)
    assert not goes_round(["0"] * 12), "a long number is no loop"
    assert not goes_round([str(n) for n in range(200)])
    assert not goes_round([*check * 4, "else"])
