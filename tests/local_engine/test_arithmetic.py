import random

import pytest

from local_engine.arithmetic import LEVELS, other_prompt, problems, split_of


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_decides_the_problems(level: int) -> None:
    assert problems(3, level, 20) == problems(3, level, 20)
    assert problems(3, level, 20) != problems(4, level, 20)


@pytest.mark.parametrize("level", LEVELS)
def test_problems_are_different_and_held_out(level: int) -> None:
    drawn = problems(1, level, 200)
    assert len({problem.question for problem in drawn}) == 200
    assert {split_of(problem.question) for problem in drawn} == {"eval"}
    assert {split_of(problem.question) for problem in problems(1, level, 50, split="train")} == {"train"}


@pytest.mark.parametrize("level", LEVELS)
def test_the_steps_are_right_and_end_in_the_answer(level: int) -> None:
    for problem in problems(2, level, 300):
        assert problem.level == problem.n_ops == len(problem.steps) == level
        for step in problem.steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert problem.steps[-1].endswith(f"= {problem.answer}")


def test_written_expressions_mean_their_answer() -> None:
    checked = 0
    for problem in problems(6, 3, 300):
        expression = problem.question.replace("×", "*").removeprefix("Compute ").rstrip(" =?.")
        if not set(expression) - set("0123456789+-* "):
            checked += 1
            assert eval(expression) == problem.answer, problem.question
    assert checked > 20


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="level must be one of"):
        problems(1, 9, 1)


def test_other_prompts_leave_no_placeholder() -> None:
    rng = random.Random(1)
    assert not any("{" in other_prompt(rng) for _ in range(500))
