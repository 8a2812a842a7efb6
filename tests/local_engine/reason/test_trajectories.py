from pathlib import Path

import pytest

from local_engine.model import LocalModel
from local_engine.reason.trajectories import AskingFailed, Question, arithmetic_questions, half_of, kept, trace
from local_engine.types import SamplingParams
from tests.local_engine.engine_harness import StartEngine

THINK = SamplingParams(temperature=0, effort="high", max_tokens=300)


def test_a_run_that_was_stopped_goes_on(bundled: LocalModel, start_engine: StartEngine, tmp_path: Path) -> None:
    engine = start_engine(bundled)
    questions = arithmetic_questions(3, 1, "fit")[:4]
    path = tmp_path / "trajectories.jsonl"
    first = trace(engine, "m", questions, path, sampling=THINK, together=1)
    known = [next(first), next(first)]
    first.close()
    path.write_bytes(path.read_bytes() + b'{"key": "cut off')
    rest = list(trace(engine, "m", questions, path, sampling=THINK, together=2))
    assert len(rest) == 2
    assert [one.key for one in kept(path)[:2]] == [one.key for one in known]
    assert {one.key for one in kept(path)} == {one.key for one in questions}
    assert kept(path)[:2] == known
    for one in kept(path):
        assert one.cues or one.output_tokens
        assert all(cue.tokens < one.reasoning_tokens for cue in one.cues)


def test_halves_do_not_meet() -> None:
    fit = {one.key for one in arithmetic_questions(1, 20, "fit")}
    test = {one.key for one in arithmetic_questions(2, 20, "test")}
    assert not fit & test
    assert len(fit) == len(test) == 6 * 20
    assert {half_of(key) for key in fit} == {"fit"}


def test_a_question_that_is_refused_ends_the_run(
    bundled: LocalModel, start_engine: StartEngine, tmp_path: Path
) -> None:
    long = Question("long", "1 + " * 2000, "0")
    with pytest.raises(AskingFailed, match="context window"):
        list(trace(start_engine(bundled), "m", [long], tmp_path / "t.jsonl", sampling=THINK))
