"""Draft lengths: the best ones where drafts pay, and never much slower than plain decoding where they do not."""

import itertools
import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sized

import pytest
import torch

from local_engine.sampler import Sampler
from local_engine.sequence import Sequence
from local_engine.spec.acceptance import Acceptance
from local_engine.spec.draft import NOTHING, Draft, Weigh, Worth
from local_engine.spec.goodput import Goodput, expected
from local_engine.spec.rests import Rests
from local_engine.spec.speculator import Speculator
from local_engine.spec.steptime import StepTime
from local_engine.types import SamplingParams
from tests.local_engine.spec.spec_harness import writing

SAMPLER = Sampler(SamplingParams(temperature=0), torch.device("cpu"))
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
MACHINES: dict[str, Callable[[int], float]] = {
    "memory-bound": lambda rows: 5e-3 + 5e-6 * rows,
    "compute-bound": lambda rows: 2e-4 + 1e-3 * rows,
    "in-between": lambda rows: 2e-3 * max(1.0, rows / 12),
    "cliff": lambda rows: 1e-3 * (1.0 if rows <= 3 else 2.0 + rows / 64),
}


def measured(machine: Callable[[int], float]) -> Mapping[tuple[int, int], float]:
    return {(rows, sequences): machine(rows) for rows in ROWS for sequences in (1, 2, 4, 8, 16, 32)}


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
        length = 0 if goodput.owed_s(sequences) > 0 else goodput.best(expected(chances, 8), sequences).length
        step_s = machine(sequences * (1 + length))
        emitted = 0
        for _ in range(sequences):
            emitted += 1 + next((at for at in range(length) if rng.random() >= rate), length)
        goodput.settle(step_s, sequences, emitted, sequences * length)
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


def test_prompt_chunks_in_a_step_are_no_reason_to_verify_what_is_hardly_ever_right() -> None:
    goodput = Goodput(StepTime(measured(MACHINES["in-between"])))
    kept = expected([[0.5, 0.25, 0.12]], 3)
    assert kept == [1.0, 1.5, 1.75, 1.87]
    assert goodput.best(kept, 1).length == 3
    assert goodput.best(kept, 1, other_rows=300).length == 2


@pytest.mark.parametrize(("pass_s", "length"), [(0.0, 6), (0.4e-3, 2), (2e-3, 0)])
def test_a_drafting_model_is_asked_as_often_as_its_time_is_worth(pass_s: float, length: int) -> None:
    goodput = Goodput(StepTime({(1, 1): 1e-3, (64, 1): 1e-3}))
    kept = expected([[0.7**at for at in range(1, 7)]], 6)
    assert goodput.best(kept, 1, pass_s=pass_s).length == length


def test_rates_are_learned_by_grade_and_lean_to_the_sequence() -> None:
    acceptance = Acceptance()
    lucky, unlucky = (writing([1], SAMPLER) for _ in range(2))
    rng = random.Random(4)
    for _ in range(400):
        for sequence, factor in ((lucky, 1.0), (unlucky, 0.5)):
            draft = Draft([5, 6], [0, 1])
            first, second = rng.random() < 0.9 * factor, rng.random() < 0.6 * factor
            acceptance.learn(sequence, "p", draft, first * (1 + second))
    good, bad = (acceptance.chances(sequence, "p", [0, 1]) for sequence in (lucky, unlucky))
    assert good[0] == pytest.approx(0.9, abs=0.12)
    assert good[1] == pytest.approx(0.54, abs=0.12)
    assert bad[0] == pytest.approx(0.45, abs=0.12)
    assert bad[1] < 0.25
    stranger = acceptance.chances(writing([1], SAMPLER), "p", [0, 1])
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
    step_time = StepTime({(1, 1): 1e-3, (64, 1): 4e-3})
    step_time.observe(1, 10.0)
    assert step_time(1) < 1.2e-3
    for _ in range(200):
        step_time.observe(1, 3e-3)
    assert step_time(1) == pytest.approx(3e-3, rel=0.05)
    assert step_time(64) > 6e-3


def test_many_sequences_cost_more_than_many_rows_of_one() -> None:
    step_time = StepTime()
    for _ in range(300):
        step_time.observe(32, 3e-3, sequences=1)
        step_time.observe(32, 6e-3, sequences=32)
    assert step_time(32, 1) == pytest.approx(3e-3, rel=0.05)
    assert step_time(32, 32) == pytest.approx(6e-3, rel=0.05)


def test_plain_steps_are_known_apart_from_the_others() -> None:
    step_time = StepTime({(1, 1): 1e-3, (8, 1): 2e-3})
    for _ in range(40):
        step_time.observe_plain(1, 1e-3)
        for _ in range(4):
            step_time.observe(8, 4e-3)
    assert step_time(1) == pytest.approx(1e-3)
    assert step_time(8) == pytest.approx(4e-3, rel=0.1)


def test_plain_steps_not_timed_lately_are_not_fresh() -> None:
    step_time = StepTime()
    for _ in range(3):
        assert not step_time.fresh(1)
        step_time.observe_plain(1, 1e-3)
    for rows in range(1, 129):
        assert step_time.fresh(1)
        step_time.observe(rows % 4 + 1, 1e-3)
    assert not step_time.fresh(1), "drafts of few tokens tell nothing of none"


class Wrong:
    """Drafts what never comes, and counts how often it is asked."""

    name = "wrong"

    def __init__(self) -> None:
        self.asked = 0
        self.last_asked_for = 0

    def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft]:
        self.asked += 1
        self.last_asked_for = len(sequences)
        return [Draft([9] * most, [0] * most) for _ in sequences]

    def observe(self, sequence: Sequence, start: int, drafted: Sized[int], predictions: Sized[int]) -> None:
        """It does not learn."""

    def forget(self, sequence: Sequence) -> None:
        """It keeps nothing."""


def asked_in(steps: int, machine: Callable[[int], float], sequences: int) -> tuple[int, float]:
    """How often a proposer that is never right is asked in so many steps, and what they took, in plain steps."""
    now = 0.0
    proposer = Wrong()
    speculator = Speculator([proposer], step_time=StepTime(measured(machine)), clock=lambda: now)
    writers = [writing([1, 2, 3], SAMPLER) for _ in range(sequences)]
    for writer in writers:
        writer.limit = 1 << 20
    for _ in range(steps):
        drafts = [NOTHING] * sequences if speculator.rests(sequences) else speculator.propose(writers)
        rows = sum(1 + len(draft.tokens) for draft in drafts)
        now += machine(rows)
        for writer, draft in zip(writers, drafts, strict=True):
            writer.ids.append(5)
            speculator.learn(writer, len(draft.tokens), [5], [])
        if speculator.timed:
            speculator.settle(rows, sequences)
    return proposer.asked, now / (steps * machine(sequences))


@pytest.mark.parametrize("sequences", [1, 8])
def test_who_is_never_right_is_asked_ever_more_rarely_and_costs_little(sequences: int) -> None:
    asked, took = asked_in(4000, lambda rows: 1e-3 * (0.7 + 0.3 * rows), sequences)
    assert 0 < asked < 100
    assert took < 1.03


def test_where_looks_do_not_pay_a_few_sequences_stand_for_all() -> None:
    asked, now = [], 0.0
    proposer = Wrong()
    machine = MACHINES["in-between"]
    speculator = Speculator([proposer], step_time=StepTime(measured(machine)), clock=lambda: now)
    writers = [writing([1, 2, 3], SAMPLER) for _ in range(8)]
    for _ in range(1000):
        before = proposer.asked
        drafts = [NOTHING] * 8 if speculator.rests(8) else speculator.propose(writers)
        asked += [proposer.last_asked_for] * (proposer.asked - before)
        for writer, draft in zip(writers, drafts, strict=True):
            speculator.learn(writer, len(draft.tokens), [5], [])
        rows = sum(1 + len(draft.tokens) for draft in drafts)
        now += machine(rows)
        if speculator.timed:
            speculator.settle(rows, 8)
    assert asked[0] == 4
    assert asked[-4:] == [4, 4, 4, 4], "the others are looked at where those promise something"


def test_a_rest_is_of_one_size_of_batch() -> None:
    rests = Rests()
    assert not rests.rests(8)
    rests.rest(20)
    assert not rests.rests(1)
    assert [rests.rests(9) for _ in range(21)] == [True] * 20 + [False]
    assert rests.taken() == 20
    assert rests.taken() == 0


def test_the_first_step_of_a_rest_is_never_timed() -> None:
    rests = Rests()
    timed = []
    rests.rests(8)
    rests.rest(257)
    for _ in range(257):
        assert rests.rests(8)
        timed.append(rests.timed)
    assert [at for at, one in enumerate(timed) if one] == [128, 256]


def test_rests_grow_while_looks_find_nothing_and_end_where_drafts_gain() -> None:
    rests = Rests()
    lengths = []
    for _ in range(7):
        assert not rests.rests(1)
        rests.looked(0.0, found=False, gained=False)
        lengths.append(next(steps for steps in itertools.count() if not rests.rests(1)))
    assert lengths == [0, 0, 0, 16, 32, 64, 64]
    rests.looked(1.0, found=False, gained=False)
    assert next(steps for steps in itertools.count() if not rests.rests(1)) == 200, "a look is half a percent"
    rests.looked(0.0, found=True, gained=True)
    assert rests.pay
    assert not rests.rests(1)


def test_nobody_is_asked_where_even_right_drafts_would_not_pay() -> None:
    asked, took = asked_in(400, lambda rows: 1e-3 * rows, 8)
    assert asked == 0
    assert took == pytest.approx(1)


class Reader:
    """Drafts what comes, for 50 µs a token, but for its first pass, in which it reads a prompt for 40 ms."""

    name = "reader"

    def __init__(self, spend: Callable[[float], None]) -> None:
        self._spend = spend
        self._pass_s = 40e-3

    def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft]:
        grades: list[int] = []
        while len(grades) < most:
            self._spend(self._pass_s)
            self._pass_s = 50e-6
            if not grades:
                weigh.begin(1)
            if weigh(sequences, [[*grades, 0]]) is Worth.LEAVE:
                break
            grades.append(0)
        return [Draft([5] * len(grades), list(grades))]

    def observe(self, sequence: Sequence, start: int, drafted: Sized[int], predictions: Sized[int]) -> None:
        """It knows all."""

    def forget(self, sequence: Sequence) -> None:
        """It keeps nothing."""


def test_a_drafter_that_leads_is_asked_though_it_read_a_prompt_first_and_free_ones_hardly_are() -> None:
    now = 0.0

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    free, writer, steps = Wrong(), writing([1, 2, 3], SAMPLER), 0
    machine = MACHINES["memory-bound"]
    speculator = Speculator([free], Reader(spend), step_time=StepTime(measured(machine)), clock=lambda: now)
    while len(writer.ids) < 4000:
        (draft,) = [NOTHING] if speculator.rests(1) else speculator.propose([writer])
        spend(machine(1 + len(draft.tokens)))
        written = [5] * (1 + len(draft.tokens)) if draft.tokens[:1] == [5] else [5]
        writer.ids.extend(written)
        speculator.learn(writer, len(draft.tokens), written, [])
        if speculator.timed:
            speculator.settle(1 + len(draft.tokens), 1)
        steps += 1
    assert steps < 1000
    assert free.asked < steps / 8
    assert now < 0.4 * 4000 * machine(1)
