"""Threads that share a job: every unit is done once, whoever comes, and nobody waits for those who do not."""

import subprocess
import sys
import threading
import time
from array import array
from functools import cache

import pytest
import torch

from local_engine import kernels, team
from local_engine.simd import Kernel, Writer, address

pytestmark = [
    pytest.mark.skipif(not team.supported(), reason="threads share work on Linux alone"),
    pytest.mark.skipif(not kernels.made_for(torch.float32), reason="our kernels are not for this CPU"),
]
PHASES = 40
UNITS = 23


@cache
def counting() -> Kernel:
    """(words, index): words are threads, claims, each, counts. A phase adds to each unit's count what the phase before
    left in the seventh unit after it."""
    w = Writer("counting", team.JOB_TYPES)
    words, index = w.arguments
    threads, claims, each, counts = (w.load_int(words, w.whole(word)) for word in range(4))
    sharing = team.Sharing(index, threads, w.variable(claims))
    place = w.pointer(counts)
    with (
        w.loop(w.whole(0), w.whole(PHASES)) as phase,
        sharing.phase(w, w.whole(UNITS), each) as (begin, end, _),
        w.loop(begin, end) as unit,
    ):
        # What a neighbour has after the phase before: another thread wrote it, most likely.
        before = w.load_int(place, w.add(w.times(phase, UNITS), w.rest(w.add(unit, 7), UNITS)))
        there = w.add(w.times(w.add(phase, 1), UNITS), unit)
        w.store_int(w.add(w.load_int(place, there), before, unit, 1), place, there)
    return w.compiled()


def counted(threads: int, each: int, helpers: int | None = None, job: Kernel | None = None) -> list[int]:
    counts = array("q", bytes(8 * UNITS * (PHASES + 1)))
    claims = array("q", bytes(8 * team.claims_room(PHASES, threads)))
    words = array("q", [threads, address(claims), each, address(counts)])
    place = team.team(threads if helpers is None else helpers)
    team.lead()(place, (job or counting()).address, address(words), threads)
    return counts.tolist()


def expected() -> list[int]:
    rows = [[0] * UNITS]
    for _ in range(PHASES):
        rows.append([rows[-1][(unit + 7) % UNITS] + unit + 1 for unit in range(UNITS)])
    return [number for row in rows for number in row]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("each", [1, 4, UNITS])
def test_every_unit_is_done_once_and_a_phase_begins_when_the_one_before_is_done(threads: int, each: int) -> None:
    right = expected()
    assert all(counted(threads, each) == right for _ in range(50))


@cache
def meeting() -> Kernel:
    """(words, index): words are threads, claims, and how many indexes each unit saw. A unit ends when a second thread
    has one, too, or after some seconds."""
    w = Writer("meeting", team.JOB_TYPES)
    words, index = w.arguments
    threads, claims, met = (w.load_int(words, w.whole(word)) for word in range(3))
    sharing, place = team.Sharing(index, threads, w.variable(claims)), w.pointer(met)
    with sharing.phase(w, threads, w.whole(1)) as (begin, _, _):
        w.raised(place, w.whole(0), 1)
        looks = w.variable(w.whole(0))
        with w.forever() as leave:
            leave(w.told(place, w.whole(0)), ">", w.whole(1))
            leave(looks.value, ">", w.whole(200_000_000))
            looks.value = w.add(looks.value, 1)
            w.pause()
        w.store_int(index, place, w.add(begin, 1))
    return w.compiled()


def test_helpers_help() -> None:
    for _ in range(5):
        met, claims = array("q", bytes(8 * 3)), array("q", bytes(8 * team.claims_room(1, 2)))
        words = array("q", [2, address(claims), address(met)])
        team.lead()(team.team(2), meeting().address, address(words), 2)
        assert sorted(met[1:]) == [0, 1], "each thread had a unit"


@cache
def late() -> Kernel:
    """(words, index): as `counting`, but helpers come when the caller has done all there is."""
    w = Writer("late", team.JOB_TYPES)
    words, index = w.arguments
    claims = w.pointer(w.load_int(words, w.whole(1)))
    done = team.claims_room(PHASES - 1, 3)
    with w.where(index, ">", w.whole(0)), w.forever() as leave:
        leave(w.told(claims, w.whole(done)), ">=", w.whole(UNITS))
        w.pause()
    w.call(counting(), words, index)
    return w.compiled()


def test_helpers_that_come_late_find_nothing_to_do() -> None:
    assert all(counted(3, 2, job=late()) == expected() for _ in range(20))


def test_more_stretches_than_units_or_helpers() -> None:
    assert counted(2 * UNITS, 1, helpers=2) == expected()


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    right, wrong = expected(), list[int]()

    def call() -> None:
        wrong.extend(1 for _ in range(200) if counted(3, 2) != right)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


ALONE = """
import os, sys, time
import torch
from tests.local_engine.test_team import counted, expected
for _ in range(3):
    assert counted(3, 2) == expected()
    time.sleep(0.05)  # so that the helpers sleep
child = os.fork()
if not child:
    os._exit(0 if counted(3, 2) == expected() else 1)  # which has no helpers
assert os.waitpid(child, 0)[1] == 0
assert counted(3, 2) == expected()
print("done")
"""


def test_a_process_ends_with_its_helpers_and_a_forked_one_does_without() -> None:
    ended = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("done\n", 0), ended.stderr


@cache
def slow() -> Kernel:
    """(words, index): every thread takes some 100 ms."""
    w = Writer("slow", team.JOB_TYPES)
    with w.loop(w.whole(0), w.whole(2_000_000)):
        w.pause()
    return w.compiled()


BUSY = """
import threading, time
from local_engine import team
from tests.local_engine.test_team import slow

def work():
    place, job, lead = team.team(3), slow().address, team.lead()
    while True:
        lead(place, job, 0, 3)

threading.Thread(target=work, daemon=True).start()
time.sleep(1)
print("done")
"""


def test_a_process_ends_while_a_thread_of_it_is_at_work() -> None:
    ended = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("done\n", 0), ended.stderr


def test_helpers_sleep_while_there_is_nothing_to_do() -> None:
    counted(4, 1)
    time.sleep(0.1)
    begin = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begin < 0.15
