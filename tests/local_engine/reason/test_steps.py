import pytest

from local_engine.reason.steps import Boundary, StepSplitter

OPEN, CLOSE, END = 100, 101, 102
PIECES = {0: b"a", 1: b"\n", 2: b"\n\n", 3: b".\n\nWait", 4: b" b", OPEN: b"<think>", CLOSE: b"</think>", END: b"<end>"}


def boundaries(tokens: list[int], delimiter: bytes = b"\n\n") -> list[str]:
    splitter = StepSplitter(PIECES, close=CLOSE, ends={END}, open=OPEN, delimiter=delimiter)
    return [splitter.push(token).value for token in tokens]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param([0, 4, 2, 0, 2], ["inside", "inside", "step", "inside", "step"], id="one token"),
        pytest.param([0, 1, 1, 0], ["inside", "inside", "step", "inside"], id="across two tokens"),
        pytest.param([0, 3, 0], ["inside", "step", "inside"], id="in the middle of a token"),
        pytest.param([OPEN, 1, 1, 2, 0, 2], ["inside"] * 5 + ["step"], id="line breaks before the first word"),
        pytest.param([0, CLOSE, 2, 0], ["inside", "closed", "inside", "inside"], id="end of the thinking block"),
        pytest.param([0, END], ["inside", "turn"], id="end of the turn"),
        pytest.param([0, 2, 1, 0, 1], ["inside", "step", "inside", "inside", "inside"], id="nothing is counted twice"),
    ],
)
def test_where_steps_end(tokens: list[int], expected: list[str]) -> None:
    assert boundaries(tokens) == expected


def test_another_delimiter() -> None:
    assert boundaries([0, 1, 4, 1], b"\n") == ["inside", "step", "inside", "step"]


def test_one_goes_on_from_where_another_is() -> None:
    splitter, other = (StepSplitter(PIECES, close=None, ends=(END,)) for _ in range(2))
    for token in (0, 1):
        other.push(token)
    splitter.push(4)
    splitter.follow(other)
    assert (splitter.text, splitter.push(1), other.text) == (b"a\n", Boundary.STEP, b"a\n")


def test_an_empty_delimiter_is_refused() -> None:
    with pytest.raises(ValueError, match="delimiter"):
        StepSplitter(PIECES, close=None, ends=(END,), delimiter=b"")
