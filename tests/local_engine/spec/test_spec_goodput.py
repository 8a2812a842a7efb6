"""Draft lengths: the best ones where drafts pay, and never much slower than plain decoding where they do not."""

import random
from collections.abc import Callable, Mapping

import pytest
import torch

from local_engine.sampler import Sampler
from local_engine.spec.acceptance import Acceptance
from local_engine.spec.draft import Context, Draft
from local_engine.spec.goodput import Goodput
from local_engine.spec.steptime import StepTime
from local_engine.types import SamplingParams

SAMPLER = Sampler(SamplingParams(temperature=0), torch.device("cpu"))
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
MACHINES: dict[str, Callable[[int], float]] = {
    "memory-bound": lambda rows: 5e-3 + 5e-6 * rows,
    "compute-bound": lambda rows: 2e-4 + 1e-3 * rows,
    "in-between": lambda rows: 2e-3 * max(1.0, rows / 12),
    "cliff": lambda rows: 1e-3 * (1.0 if rows <= 3 else 2.0 + rows / 64),
}


def measured(machine: Callable[[int], float]) -> Mapping[int, float]:
    return {rows: machine(rows) for rows in ROWS}


def best_goodput(machine: Callable[[int], float], sequences: int, rate: float, most: int) -> float:
    """Tokens per second of the best fixed draft length, known in advance."""
    return max(
        sequences * sum(rate**at for at in range(length + 1)) / machine(sequences * (1 + length))
        for length in range(most + 1)
    )


def simulate(
    machine: Callable[[int], float], goodput: Goodput, sequences: int, rate: float, steps: int, believed: float
) -> float:
    """Tokens per second of `steps` steps in which each drafted token is right at `rate`, and believed at `believed`."""
    rng = random.Random(f"{sequences}/{rate}/{believed}")
    seconds, tokens = 0.0, 0
    chances = [[believed ** (at + 1) for at in range(8)] for _ in range(sequences)]
    for _ in range(steps):
        lengths = [0] * sequences if goodput.paused(sequences) else goodput.lengths(chances)
        step_s = machine(sequences + sum(lengths))
        emitted = 0
        for length in lengths:
            emitted += 1
            while length and rng.random() < rate:
                emitted += 1
                length -= 1
        goodput.settle(step_s, sequences, emitted, drafted=any(lengths))
        seconds += step_s
        tokens += emitted
    return tokens / seconds


@pytest.mark.parametrize("sequences", [1, 8, 32])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("machine", MACHINES)
def test_known_rates_give_the_best_fixed_length(machine: str, rate: float, sequences: int) -> None:
    goodput = Goodput(StepTime(measured(MACHINES[machine])))
    reached = simulate(MACHINES[machine], goodput, sequences, rate, 600, believed=rate)
    assert reached >= 0.95 * best_goodput(MACHINES[machine], sequences, rate, 8)


@pytest.mark.parametrize("sequences", [1, 8, 32])
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("machine", MACHINES)
def test_wrong_beliefs_cost_no_more_than_three_percent(machine: str, rate: float, sequences: int) -> None:
    goodput = Goodput(StepTime(measured(MACHINES[machine])))
    reached = simulate(MACHINES[machine], goodput, sequences, rate, 1500, believed=0.95)
    assert reached >= 0.97 * sequences / MACHINES[machine](sequences)


def test_a_confident_draft_is_longer_than_a_doubtful_one_beside_it() -> None:
    goodput = Goodput(StepTime({1: 1e-3, 4: 1e-3, 5: 2e-3, 64: 20e-3}))
    assert goodput.lengths([[0.9, 0.8, 0.7], [0.1, 0.01, 0.0]]) == [2, 0]


def test_prompt_chunks_in_a_step_leave_less_room_for_drafts() -> None:
    goodput = Goodput(StepTime(measured(MACHINES["in-between"])))
    chances = [[0.5, 0.25, 0.12]]
    assert goodput.lengths(chances) == [3]
    assert goodput.lengths(chances, other_rows=300) == [2]


@pytest.mark.parametrize(("pass_s", "depth"), [(0.0, 6), (0.4e-3, 2), (2e-3, 0)])
def test_a_drafting_model_is_asked_as_often_as_its_time_is_worth(pass_s: float, depth: int) -> None:
    goodput = Goodput(StepTime({1: 1e-3, 64: 1e-3}))
    assert goodput.depth(0.7, 1, pass_s, most=6) == depth


def test_rates_are_learned_by_grade_and_lean_to_the_sequence() -> None:
    acceptance = Acceptance()
    lucky, unlucky = (Context([1], SAMPLER) for _ in range(2))
    rng = random.Random(4)
    for _ in range(400):
        for context, factor in ((lucky, 1.0), (unlucky, 0.5)):
            draft = Draft([5, 6], [0, 1])
            first, second = rng.random() < 0.9 * factor, rng.random() < 0.6 * factor
            acceptance.learn(context, "p", draft, first * (1 + second))
    good, bad = (acceptance.chances(context, "p", [0, 1]) for context in (lucky, unlucky))
    assert good[0] == pytest.approx(0.9, abs=0.12)
    assert good[1] == pytest.approx(0.54, abs=0.12)
    assert bad[0] == pytest.approx(0.45, abs=0.12)
    assert bad[1] < 0.25
    stranger = acceptance.chances(Context([1], SAMPLER), "p", [0, 1])
    assert bad[0] < stranger[0] < good[0]
    acceptance.forget(unlucky)
    assert acceptance.chances(unlucky, "p", [0, 1]) == stranger
    assert acceptance.chances(lucky, "other", [0]) == [0.5]


def test_step_times_are_learned_without_a_calibration() -> None:
    step_time = StepTime()
    rng = random.Random(3)
    machine = MACHINES["cliff"]
    for _ in range(3000):
        rows = rng.choice([1, 3, 4, 8, 16])
        step_time.observe(rows, machine(rows) * rng.uniform(0.9, 1.1))
    for rows in (1, 3, 4, 8, 16):
        assert step_time(rows) == pytest.approx(machine(rows), rel=0.1)


def test_a_machine_that_slows_down_is_followed_and_one_hiccup_is_not() -> None:
    step_time = StepTime({1: 1e-3, 64: 4e-3})
    step_time.observe(1, 10.0)
    assert step_time(1) < 1.1e-3
    for _ in range(200):
        step_time.observe(1, 3e-3)
    assert step_time(1) == pytest.approx(3e-3, rel=0.05)
    assert step_time(64) > 6e-3
