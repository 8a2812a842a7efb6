"""What the next step computes: one token budget, shared by everything that is not computed yet. No torch here.

| sequence | tokens it needs | tokens it gets |
| --- | --- | --- |
| writes | 1 | 1, before anybody else |
| writes, with a draft of k | 1 + k | 1, and of the drafts what the budget leaves (half of it beside prompts) |
| reads a prompt or forced text; scores; was preempted | what is pending | a fair share of the rest |

The rule is vLLM's (V1): there are no phases, only `pending` tokens, so a sequence that comes back is never mistaken for
one that writes. Shares are max-min fair: no prompt waits for the end of a longer one. Memory is asked for in the order
of the ranks; when there is none, rests come first, then the last of the line gives its KV back and computes again
later (preemption by recompute). The first of the line is never preempted, so everything ends.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from local_engine.sequence import Sequence


class Room(Protocol):
    """Where the KV of sequences lives."""

    def take(self, sequence: Sequence, length: int) -> bool:
        """Make room for `length` tokens of it in all, giving it a slot if it has none; False when there is none."""
        ...

    def give(self, sequence: Sequence) -> None:
        """Free everything it has, for it to be computed again later."""
        ...

    def soon(self, sequence: Sequence, running: list[Sequence]) -> bool:
        """Whether somebody before it is computing a prefix of it, which it will be given if it waits."""
        ...


@dataclass(slots=True)
class Plan:
    """One step."""

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    """How many tokens to compute of whom, drafts included; best rank first."""
    preempted: list[Sequence] = field(default_factory=list)
    stuck: list[Sequence] = field(default_factory=list)
    """Those who do not fit although nobody else holds any room."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.work)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


class Scheduler:
    """Plans the steps of one model. At most `max_running` sequences take part in one; no step waits for a clock."""

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self.running: list[Sequence] = []
        """Those with a slot, best rank first."""
        self.waiting: list[Sequence] = []
        """Those without, best rank first."""
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Plan for it from now on; it runs if it has a slot already, as a fork has."""
        insort(self.running if sequence.slot is not None else self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Plan for it no more. Its room is the caller's to free."""
        (self.running if sequence.slot is not None else self.waiting).remove(sequence)

    @property
    def busy(self) -> bool:
        """Whether anything is left to compute."""
        return any(s.pending for s in self.running) or any(s.pending for s in self.waiting)

    @property
    def active(self) -> list[Sequence]:
        """Those with a slot that take part in the next step, if nobody gets in before them."""
        return [s for s in self.running if s.pending][: self._max_running]

    def plan(self, room: Room, budget: int) -> Plan:
        """The next step, of at most `budget` tokens, or one for each running sequence where that is more."""
        plan = Plan()
        self._keep(room, plan)
        self._admit(room, plan)
        active = [s for s in self.running if s.pending and s not in plan.stuck][: self._max_running]
        plan.work = list(_shared(active, max(budget, self._max_running)))
        return plan

    def _keep(self, room: Room, plan: Plan) -> None:
        """Room for what the running ones are about to compute, at the cost of the last in line."""
        for sequence in [s for s in self.running if s.pending]:
            while sequence.slot is not None and not room.take(sequence, len(sequence.ids) + len(sequence.draft)):
                if sequence.draft:
                    sequence.undraft()
                    continue
                victim = self._victim(sequence)
                if victim is None:
                    plan.stuck.append(sequence)
                    break
                plan.preempted.append(victim)
                self.preempt(victim, room)

    def _admit(self, room: Room, plan: Plan) -> None:
        """Let the first in line in, while there is room, or somebody behind it has some."""
        active = [s for s in self.running if s.pending]
        for sequence in [s for s in self.waiting if s.pending and (s.arriving is None or s.arriving.ready)]:
            if len(active) >= self._max_running and active[self._max_running - 1].rank < sequence.rank:
                return
            if room.soon(sequence, self.running):
                continue
            while not room.take(sequence, len(sequence.ids) + 1):
                victim = self._victim(sequence)
                if victim is None:
                    if not self.running:
                        plan.stuck.append(sequence)
                    return
                plan.preempted.append(victim)
                self.preempt(victim, room)
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_rank)
            active = [s for s in self.running if s.pending]

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Who gives its room for `sequence`: one at rest, else the last in line, itself perhaps; None when alone."""
        resting = [s for s in self.running if not s.pending]
        if resting:
            return resting[-1]
        if self.running and self.running[-1].rank >= sequence.rank and self.running != [sequence]:
            return self.running[-1]
        return None

    def preempt(self, victim: Sequence, room: Room) -> None:
        """Back into the line, without its KV."""
        self.running.remove(victim)
        room.give(victim)
        victim.forget()
        insort(self.waiting, victim, key=_rank)
        self.preemptions += 1


def _shared(active: list[Sequence], budget: int) -> Iterable[tuple[Sequence, int]]:
    reading = [s for s in active if s.pending > 1]
    left = budget - (len(active) - len(reading))
    drafts = (left - len(reading)) // 2 if reading else left
    counts: dict[Sequence, int] = {}
    for sequence in active:
        if sequence.pending == 1:
            del sequence.draft[drafts:]
            drafts -= len(sequence.draft)
            left -= len(sequence.draft)
            counts[sequence] = 1 + len(sequence.draft)
    for at, sequence in enumerate(sorted(reading, key=lambda s: s.pending)):
        due = sequence.pending - bool(sequence.draft)  # its last token is read with what it was offered
        counts[sequence] = min(due, left // (len(reading) - at))
        left -= counts[sequence]
    return ((sequence, counts[sequence]) for sequence in active)
