"""The generator: seeded, held out, right in every line, and hard in graded ways."""

import random
import statistics

import pytest

from local_engine.arithmetic import LEVELS, Problem, other_prompt, problems, split_of
from local_engine.arithmetic_steps import Operation, Result, Step, work_out

OPERATIONS = {1: {1}, 2: {2}, 3: {3}, 4: {4, 5}, 5: {6, 7}, 6: {8, 9, 10}}


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_decides_the_problems(level: int) -> None:
    assert problems(3, level, 20) == problems(3, level, 20)
    assert problems(3, level, 20) != problems(4, level, 20)


@pytest.mark.parametrize("level", LEVELS)
def test_problems_are_different_and_held_out(level: int) -> None:
    drawn = problems(1, level, 150)
    assert len({problem.question for problem in drawn}) == 150
    assert {split_of(problem.question) for problem in drawn} == {"eval"}
    assert {split_of(problem.question) for problem in problems(1, level, 50, split="train")} == {"train"}


def meant(part: str) -> int:
    """A part of a line, read as Python reads it."""
    value: int = eval(part.replace("mod", "%"))
    return value


@pytest.mark.parametrize("level", LEVELS)
def test_every_part_of_every_line_is_worth_the_same(level: int) -> None:
    for problem in problems(2, level, 200):
        assert problem.level == level
        assert len(problem.steps) in OPERATIONS[level]
        assert problem.steps[-1].value == problem.answer
        for step in problem.steps:
            for line in (step.short, step.long):
                assert {meant(part) for part in line.split(" = ")} == {step.value}, line
            assert len(step.long) >= len(step.short)


def test_written_expressions_mean_their_answer() -> None:
    checked = 0
    for problem in problems(6, 4, 300):
        expression = problem.question.replace("×", "*").removeprefix("Compute ").rstrip(" =?.")
        if not set(expression.replace("mod", "%")) - set("0123456789+-*%() "):
            checked += 1
            assert meant(expression) == problem.answer, problem.question
    assert checked > 50


def test_every_operation_occurs_and_higher_levels_are_harder() -> None:
    drawn: dict[int, list[Problem]] = {level: problems(5, level, 150) for level in LEVELS}
    for level in LEVELS[1:]:
        operators = {operation.operator for problem in drawn[level] for operation in problem.operations}
        assert operators == {"+", "-", "*", "mod"}
    carries = [statistics.mean(problem.carries for problem in drawn[level]) for level in LEVELS]
    assert carries == sorted(carries)


def test_questions_of_one_length_differ_in_their_carries() -> None:
    by_length: dict[int, set[int]] = {}
    for problem in problems(8, 3, 300):
        by_length.setdefault(len(problem.question), set()).add(problem.carries)
    assert max(len(carries) for carries in by_length.values()) >= 5


@pytest.mark.parametrize(
    ("step", "short", "long", "carries"),
    [
        (Step(347, "+", 285, 632), "347 + 285 = 632", "347 + 285 = 547 + 85 = 627 + 5 = 632", 2),
        (Step(632, "-", 285, 347), "632 - 285 = 347", "632 - 285 = 432 - 85 = 352 - 5 = 347", 2),
        (Step(47, "*", 6, 282), "47 * 6 = 282", "47 * 6 = 240 + 42 = 282", 2),
        (Step(47, "*", 36, 1692), "47 * 36 = 1410 + 282 = 1692", "47 * 36 = 47 * 30 + 47 * 6 = 1410 + 282 = 1692", 4),
        (Step(19, "*", 70, 1330), "19 * 70 = 1330", "19 * 70 = 700 + 630 = 1330", 1),
        (Step(1692, "mod", 7, 5), "1692 mod 7 = 292 mod 7 = 12 mod 7 = 5", "1692 mod 7 = 292 mod 7 = 12 mod 7 = 5", 3),
        (Step(1692, "mod", 17, 9), "1692 mod 17 = 162 mod 17 = 9", "1692 mod 17 = 162 mod 17 = 9", 3),
        (Step(4, "-", 63, -59), "4 - 63 = -59", "4 - 63 = -59", 1),
        (Step(20, "+", 80, 100), "20 + 80 = 100", "20 + 80 = 100", 1),
    ],
)
def test_lines_and_carries_of_known_steps(step: Step, short: str, long: str, carries: int) -> None:
    assert (step.short, step.long, step.carries) == (short, long, carries)


def test_a_slip_is_carried_on() -> None:
    operations = (Operation("*", 6, 7), Operation("+", Result(0), 8), Operation("-", 100, Result(1)))
    assert [step.value for step in work_out(operations)] == [42, 50, 50]
    slipped = work_out(operations, {0: -10})
    assert [step.short for step in slipped] == ["6 * 7 = 32", "32 + 8 = 40", "100 - 40 = 60"]


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="level must be one of"):
        problems(1, 9, 1)


def test_other_prompts_leave_no_placeholder() -> None:
    rng = random.Random(1)
    drawn = [other_prompt(rng) for _ in range(500)]
    assert not any("{" in prompt for prompt in drawn)
    assert len(set(drawn)) > 250
