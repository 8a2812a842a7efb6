"""What the reasoning benchmark has asked is kept: a run goes on where one before it ended, and asks nothing twice."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from reasoning_bench import Bench, Part
from reasoning_run import Kind, Run, TimeIsUp, draw, load
from reasoning_samples import RULES, replay

from local_engine.model import LocalModel
from local_engine.plan_types import SpeculateSteps
from local_engine.reason.voting import Ballot

ALONE, SHARED = Kind("alone"), Kind("shared", plan=SpeculateSteps(draft="nano"))
NEVER = float("-inf")


@pytest.fixture(scope="module")
def models() -> Mapping[str, LocalModel]:
    return load(("nano", "base"))


def test_a_run_goes_on_where_one_before_it_ended(models: Mapping[str, LocalModel], tmp_path: Path) -> None:
    asked = draw(5, (1, 2), 6)
    first = Run(models, 1, 1, tmp_path).ask_all([ALONE], asked[:8])
    with pytest.raises(TimeIsUp):
        Run(models, 1, 1, tmp_path, until=NEVER).ask_all([ALONE], asked)
    again = Run(models, 1, 1, tmp_path, until=NEVER).ask_all([Kind("of another name")], asked[:8])
    assert again["of another name"] == first["alone"]
    whole = Run(models, 1, 1, tmp_path).ask_all([ALONE], asked)["alone"]
    assert whole.right[:8] == first["alone"].right
    assert len(whole.right) == len(asked) == 12


def test_what_changes_an_answer_is_asked_anew(models: Mapping[str, LocalModel], tmp_path: Path) -> None:
    asked = draw(5, (1,), 2)
    Run(models, 1, 1, tmp_path).ask_all([ALONE], asked)
    other = Kind("alone", effort="high")
    for kind, seed, questions in ((SHARED, 1, asked), (other, 1, asked), (ALONE, 2, asked), (ALONE, 1, asked[:1])):
        with pytest.raises(TimeIsUp):
            Run(models, 1, seed, tmp_path, until=NEVER).ask_all([kind], questions)


def test_the_parts_of_a_section_are_asked_apart(models: Mapping[str, LocalModel], tmp_path: Path) -> None:
    """The other kinds are asked a fifth of the questions; time is taken one answer at a time."""
    asked = draw(5, (1,), 5)

    def bench(part: Part) -> Bench:
        return Bench(models, (1,), 1, problems=5, timed=1, batch=4, folder=tmp_path, parts=(part,))

    with pytest.raises(TimeIsUp):
        bench("answers").ask([ALONE], [SHARED], [ALONE], asked, asked[:1])
    answers, times = bench("times").ask([ALONE], [SHARED], [ALONE], asked, asked[:1])
    assert {name: len(did.right) for name, did in answers.items()} == {"alone": 5, "shared": 1}
    assert list(times) == ["alone"]
    assert answers["shared"].right == answers["alone"].right[:1], "the text is base's own"
    assert times["alone"].cpu_s > 0


def test_a_vote_is_replayed_as_it_would_have_been_drawn() -> None:
    def samples(*answers: str) -> list[Ballot]:
        return [Ballot(answer, -1.0, 10, -0.5, path) for path, answer in enumerate(answers)]

    agreeing = samples("7", "7", "7", *"123456789abcd")
    assert replay(agreeing, RULES["posterior 0.9, by count"]) == ("7", 3, 30)
    torn = samples("7", "8", "7", "8", "8", "8", *["8"] * 10)
    said, drawn, tokens = replay(torn, RULES["posterior 0.9, by count"])
    assert (said, tokens) == ("8", 10 * drawn)
    assert 3 < drawn < 16
    assert replay(agreeing, ("never", 0.9, "count"))[1] == 16
