"""The planner alone, with memory that is a number: budgets kept, nobody starved, every token computed once."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_engine.scheduler import Plan, Scheduler
from local_engine.sequence import AGING_S, Sequence, place, token_ids

WRITES: object = object()
"""Stands for a sampler: the planner only asks whether there is one."""


@dataclass
class Blocks:
    """Room for so many tokens in blocks of four, and what is in it."""

    capacity: int
    taken: dict[Sequence, int] = field(default_factory=dict)

    def take(self, sequence: Sequence, length: int) -> bool:
        needed = -(-length // 4) * 4
        others = sum(size for owner, size in self.taken.items() if owner is not sequence)
        if others + needed > self.capacity:
            return False
        self.taken[sequence] = max(needed, self.taken.get(sequence, 0))
        sequence.slot = 0
        return True

    def give(self, sequence: Sequence) -> None:
        del self.taken[sequence]

    def soon(self, sequence: Sequence, running: list[Sequence]) -> bool:
        return False


@dataclass
class World:
    """Runs plans as the engine does: what is computed is recorded, and who is due says the next number."""

    room: Blocks
    scheduler: Scheduler
    budget: int
    outputs: dict[Sequence, int] = field(default_factory=dict)
    """How many tokens each one has still to write."""
    kv: dict[Sequence, list[int]] = field(default_factory=dict)
    """What the cache holds."""
    computed: int = 0
    serial: int = 0

    def arrive(self, prompt: int, output: int, *, priority: int = 0, at: float = 0.0) -> Sequence:
        self.serial += 1
        tokens = token_ids(self.serial * 1000 + n for n in range(prompt))
        sequence = Sequence(tokens, place(priority, at, self.serial), prompt + output)
        sequence.sampler = WRITES  # type: ignore[assignment]
        self.outputs[sequence] = output
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Plan:
        plan = self.scheduler.plan(self.room, self.budget)
        for sequence in plan.preempted:
            self.kv.pop(sequence, None)
        budget = max(self.budget, self.scheduler._max_running)
        assert plan.tokens <= budget
        if any(count < sequence.pending for sequence, count in plan.work):
            assert plan.tokens == budget, "somebody could have had more"
        assert len({sequence for sequence, _ in plan.work}) == len(plan.work) <= self.scheduler._max_running
        for sequence, count in plan.work:
            self._compute(sequence, count)
        self.check()
        return plan

    def _compute(self, sequence: Sequence, count: int) -> None:
        assert count >= 1
        assert sequence.slot is not None
        text = [*sequence.ids, *sequence.draft]
        held = self.kv.setdefault(sequence, [])
        assert len(held) == sequence.computed, "computed twice, or never"
        held.extend(text[sequence.computed : sequence.computed + count])
        sequence.computed += count
        self.computed += count
        due = sequence.computed == len(text)
        if not due:
            assert sequence.computed < len(sequence.ids), "a draft is verified whole or not at all"
            return
        accepted = len(sequence.draft) // 2  # half of every draft turns out right
        for token in [*sequence.draft[:accepted], (sum(sequence.ids) + len(sequence.ids)) % 2**31]:
            if self.outputs[sequence]:
                sequence.ids.append(token)
                self.outputs[sequence] -= 1
        sequence.draft.clear()
        sequence.computed = min(sequence.computed, len(sequence.ids) - 1)
        del held[sequence.computed :]
        if not self.outputs[sequence]:
            self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.kv.pop(sequence, None)
        if sequence.slot is not None:
            self.room.give(sequence)
            sequence.forget()
        del self.outputs[sequence]

    def check(self) -> None:
        assert sum(self.room.taken.values()) <= self.room.capacity
        assert set(self.room.taken) == set(self.scheduler.running)
        for line in (self.scheduler.running, self.scheduler.waiting):
            assert [s.rank for s in line] == sorted(s.rank for s in line)


def world(*, capacity: int = 10_000, max_running: int = 4, budget: int = 16) -> World:
    return World(Blocks(capacity), Scheduler(max_running), budget)


arrivals = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 12), st.integers(-2, 2), st.integers(0, 8)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(arrivals, st.integers(80, 200), st.integers(1, 5), st.integers(1, 40), st.data())
def test_all_work_ends_within_the_budget_and_nothing_is_computed_twice(
    asked: list[tuple[int, int, int, int]], capacity: int, max_running: int, budget: int, data: st.DataObject
) -> None:
    """Any mix, with memory that must be fought for, drafts, and people who leave."""
    here = world(capacity=capacity, max_running=max_running, budget=budget)
    texts: dict[Sequence, tuple[list[int], int]] = {}
    for prompt, output, priority, gap in asked:
        for _ in range(gap):
            here.step()
        sequence = here.arrive(prompt, output, priority=priority)
        texts[sequence] = (list(sequence.ids), output)
    work = sum(prompt + output for prompt, output, _, _ in asked)
    steps = 0
    while here.outputs:
        for sequence in here.scheduler.running:
            room = here.outputs[sequence] - 1
            sequence.draft[:] = range(data.draw(st.integers(0, min(3, room)))) if sequence.pending == 1 else []
        if data.draw(st.integers(0, 30)) == 30:
            leaver = data.draw(st.sampled_from(sorted(here.outputs, key=lambda s: s.rank)))
            del texts[leaver]
            here.leave(leaver)
            continue
        plan = here.step()
        assert plan.work
        assert not plan.stuck
        steps += 1
        assert steps <= work * (1 + here.scheduler.preemptions), "no step without progress"
    assert not here.room.taken
    if not here.scheduler.preemptions:
        assert here.computed >= sum(len(ids) for ids, _ in texts.values())
    for sequence, (prompt_ids, output) in texts.items():
        assert sequence.ids[: len(prompt_ids)].tolist() == prompt_ids
        assert len(sequence.ids) == len(prompt_ids) + output


def test_every_token_is_computed_once_where_memory_suffices() -> None:
    here = world()
    for prompt in (50, 3, 20, 1, 33):
        here.arrive(prompt, 5)
    while here.outputs:
        here.step()
    assert here.computed == sum(prompt + 5 - 1 for prompt in (50, 3, 20, 1, 33))
    assert here.scheduler.preemptions == 0


@settings(deadline=None)
@given(st.integers(60, 200), st.lists(st.tuples(st.integers(1, 40), st.integers(2, 10)), min_size=2, max_size=6))
def test_preemption_changes_no_output(capacity: int, asked: list[tuple[int, int]]) -> None:
    def said(capacity: int) -> list[list[int]]:
        here = world(capacity=capacity, budget=8)
        sequences = [here.arrive(prompt, output) for prompt, output in asked]
        while here.outputs:
            here.step()
        return [sequence.ids.tolist() for sequence in sequences]

    assert said(capacity) == said(10_000)


def test_the_last_in_line_gives_way_and_comes_back() -> None:
    here = world(capacity=32)
    first, second = here.arrive(12, 12), here.arrive(12, 12)
    preempted: list[Sequence] = []
    while here.outputs:
        preempted += here.step().preempted
    assert preempted
    assert set(preempted) == {second}
    assert (len(first.ids), len(second.ids)) == (24, 24)


def test_who_comes_back_reads_all_of_it_again() -> None:
    """Preempted while it wrote: the next plan gives it a chunk of its text, not one token."""
    here = world(budget=16)
    sequence = here.arrive(20, 30)
    while len(sequence.ids) < 30:
        here.step()
    here.scheduler.preempt(sequence, here.room)
    here.kv.clear()
    sizes = [here.step().tokens for _ in range(3)]
    assert sizes == [16, 14, 1]


def test_a_long_prompt_never_holds_up_who_writes() -> None:
    here = world(budget=8)
    writer = here.arrive(1, 50)
    here.step()
    here.arrive(300, 1)
    for _ in range(40):
        assert dict(here.step().work)[writer] == 1


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one() -> None:
    here = world(budget=16)
    here.arrive(400, 1)
    here.step()
    short = here.arrive(12, 1)
    steps = 0
    while short in here.outputs:
        here.step()
        steps += 1
    assert steps <= 2


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))
def test_a_flood_of_higher_priority_goes_first_for_so_long_only(lead: int, per_second: int, max_running: int) -> None:
    """One step a second, and in each some that are more urgent: the one that waits is passed by a bounded number."""
    here = world(max_running=max_running)
    patient = here.arrive(2, 1, priority=0, at=0.0)
    passed = 0
    for second in range(200):
        for _ in range(per_second):
            here.arrive(2, 1, priority=lead, at=float(second))
        done = [s for s, _ in here.step().work]
        if patient in done:
            break
        passed += len(done)
    else:
        pytest.fail("it starved")
    assert passed <= per_second * (lead * AGING_S + 1)


def test_an_urgent_request_takes_the_place_of_others() -> None:
    here = world(max_running=2)
    slow = [here.arrive(2, 100) for _ in range(2)]
    here.step()
    urgent = here.arrive(2, 2, priority=1)
    assert [s for s, _ in here.step().work] == [urgent, slow[0]]
    here.step()
    here.step()
    assert {s for s, _ in here.step().work} == set(slow), "displaced, not preempted: it lost no work"
    assert here.scheduler.preemptions == 0


def test_a_rest_gives_its_room_first_and_stays_at_rest() -> None:
    here = world(capacity=68)
    resting = here.arrive(20, 1)
    resting.sampler = None
    here.scheduler.plan(here.room, 64)
    resting.computed, resting.at_rest = 20, True
    writer = here.arrive(40, 8)
    plan = here.scheduler.plan(here.room, 64)
    assert (plan.preempted, plan.work) == ([], [(writer, 40)])
    newcomer = here.arrive(12, 1)
    plan = here.scheduler.plan(here.room, 64)
    assert plan.preempted == [resting]
    assert {s for s, _ in plan.work} == {writer, newcomer}
    assert here.scheduler.waiting == [resting]
    here.leave(writer)
    here.leave(newcomer)
    assert not here.scheduler.busy, "nobody asked for it to be read again"


def test_drafts_leave_half_of_the_rest_to_prompts() -> None:
    here = world(budget=20)
    writer = here.arrive(1, 50)
    here.step()
    here.arrive(100, 1)
    writer.draft[:] = range(30)
    assert sorted(count for _, count in here.scheduler.plan(here.room, 20).work) == [10, 10]


def test_what_fits_nowhere_is_named() -> None:
    here = world(capacity=16)
    big = here.arrive(40, 1)
    assert here.step().stuck == [big]
