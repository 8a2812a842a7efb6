"""Threads that share the work of a step: they take it piece by piece, and never take Python's lock.

Work comes in phases, each of as many units as there are panels of a product, rows of a norm, heads to attend with.
Every thread has a stretch of them of its own, the same at each step, so that its core's caches keep the weights; one
that is done helps the others. So a phase waits for units that somebody began, not for threads: one that comes late,
because it slept or its core is taken, costs what it would have done. Only the end of a job waits for helpers that are
within it, since its words may be gone then.

Helpers look for work for a moment after they had some, then they sleep.
"""

import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

from local_engine.simd import I64, PTR, Kernel, Variable, Writer

logger = logging.getLogger(__name__)

_LINE_WORDS: Final = 8
"""Of a line of the caches: words that are written by several threads have one of their own."""
_LOOKS: Final = 4000
"""How often a helper looks for work before it sleeps: 0.2 ms on an Intel Xeon, what Python needs between two steps."""
MOST: Final = 1024
"""Threads of a team."""

# Of the team's words, in lines of the caches of their own:
_INSIDE: Final = 0
"""Helpers that may be looking at the work's words."""
_TAKEN: Final = _LINE_WORDS
_JOB: Final = 2 * _LINE_WORDS
_WORDS: Final = _JOB + 1
_FIRST: Final = 3 * _LINE_WORDS
"""Of each thread: its state, odd while there is work for it, another number each time, less than 0 when all is over;
and whether it sleeps."""
_TEAM_WORDS: Final = _FIRST + MOST * _LINE_WORDS

JOB_TYPES: Final = [PTR, I64]
"""Of a job, (words, index): every thread calls it with an index of its own; the one that asked has 0."""


def supported() -> bool:
    """Whether several threads can share work here."""
    return sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class Sharing:
    """How one of `threads` threads takes its part of a job's phases."""

    index: Any
    threads: Any
    claims: Variable | None
    """The address of the phase's words: how many units are done, then for each stretch how often it was claimed. None:
    there is one thread, which needs none."""

    @contextmanager
    def phase(self, w: Writer, units: Any, each: Any) -> Iterator[tuple[Any, Any, Any]]:
        """The body runs for (first, end, end of the stretch) of units, at most `each` at a time where there are several
        threads; afterwards all of them are done, by whomever."""
        if self.claims is None:
            yield w.whole(0), units, units
            return
        claims = w.pointer(self.claims.value)
        with w.where(w.told(claims, w.whole(0)), "<", units), w.loop(w.whole(0), self.threads) as turn:
            owner = w.rest(w.add(self.index, turn), self.threads)
            first = w.part(w.times(units, owner), self.threads)
            last = w.part(w.times(units, w.add(owner, 1)), self.threads)
            place = w.add(owner, 1)
            with w.forever() as leave:
                leave(w.add(first, w.times(w.told(claims, place), each)), ">=", last)
                begin = w.add(first, w.times(w.raised(claims, place, 1), each))
                leave(begin, ">=", last)
                end = w.lesser(w.add(begin, each), last)
                yield begin, end, last
                w.raised(claims, w.whole(0), w.minus(end, begin))
        with w.forever() as leave:
            leave(w.told(claims, w.whole(0)), ">=", units)
            w.pause()
        self.claims.value = w.add(self.claims.value, w.times(_phase_words(w, self.threads), 8))


def _phase_words(w: Writer, threads: Any) -> Any:
    return w.times(w.add(w.part(threads, _LINE_WORDS), 1), _LINE_WORDS)


def claims_room(phases: int, threads: int) -> int:
    """How many words a job of so many phases counts in: zeros when it begins."""
    return phases * (threads // _LINE_WORDS + 1) * _LINE_WORDS


@cache
def lead() -> Kernel:
    """(team, job, words, threads): the caller does a job with all helpers that come, up to `threads` in all.

    Where the team is another thread's for now, the caller does it alone.
    """
    w = Writer("lead", [PTR, I64, PTR, I64])
    team, job, words, threads = w.arguments
    taken = w.swapped(team, w.whole(_TAKEN), 1)
    with w.where(taken, "==", w.whole(0)):
        w.store_int(job, team, w.whole(_JOB))
        w.store_int(w.address(words), team, w.whole(_WORDS))
        with w.loop(w.whole(1), threads) as index:
            state = _state(w, index)
            w.raised(team, state, 1)
            with w.where(w.told(team, w.add(state, 1)), ">", w.whole(0)):
                w.wake(team, state)
    w.call_at(job, JOB_TYPES, words, w.whole(0))
    with w.where(taken, "==", w.whole(0)):
        with w.loop(w.whole(1), threads) as index:
            w.raised(team, _state(w, index), 1)
        with w.forever() as leave:
            leave(w.told(team, w.whole(_INSIDE)), "==", w.whole(0))
            w.pause()
        w.swapped(team, w.whole(_TAKEN), 0)
    return w.compiled()


def _state(w: Writer, index: Any) -> Any:
    """The word of a thread's state, before the one that says whether it sleeps."""
    return w.add(w.times(index, _LINE_WORDS), _FIRST)


@cache
def _help() -> Kernel:
    """(team, index): do a part of what the team does, until all is over."""
    w = Writer("help", [PTR, I64])
    team, index = w.arguments
    inside, state = w.whole(_INSIDE), _state(w, index)
    seen, looks = w.variable(w.whole(0)), w.variable(w.whole(0))
    with w.forever() as leave:
        now = w.told(team, state)
        leave(now, "<", w.whole(0))
        fresh = w.either(now, "!=", seen.value, w.rest(now, 2), w.whole(0))
        with w.where(fresh, "!=", w.whole(0)):
            w.raised(team, inside, 1)
            with w.where(w.told(team, state), "==", now):  # else it may be over, and its words gone
                job, words = (w.load_int(team, w.whole(word)) for word in (_JOB, _WORDS))
                w.call_at(job, JOB_TYPES, words, index)
            w.raised(team, inside, -1)
            seen.value, looks.value = now, w.whole(0)
        with w.where(fresh, "==", w.whole(0)):
            w.pause()
            looks.value = w.add(looks.value, 1)
            with w.where(looks.value, ">", w.whole(_LOOKS)):
                w.swapped(team, w.add(state, 1), 1)
                w.sleep_while(team, state, now)
                w.swapped(team, w.add(state, 1), 0)
                looks.value = w.whole(0)
    return w.compiled()


@cache
def _over() -> Kernel:
    """(team, threads): have all helpers return, once what they do is done. Whoever asks for the team is alone then."""
    w = Writer("over", [PTR, I64])
    team, threads = w.arguments
    with w.forever() as leave:
        leave(w.swapped(team, w.whole(_TAKEN), 1), "==", w.whole(0))
        w.pause()
    with w.loop(w.whole(1), threads) as index:
        w.swapped(team, _state(w, index), -1)
        w.wake(team, _state(w, index))
    return w.compiled()


class _Team:
    """The helpers of this process. They live as long as it does."""

    def __init__(self) -> None:
        self._words = torch.zeros(_TEAM_WORDS, dtype=torch.int64)  # which begins with a line
        self.address = self._words.data_ptr()
        self._helpers: list[threading.Thread] = []
        self._lock = threading.Lock()

    def reach(self, threads: int) -> None:
        """Have helpers enough for so many threads in all, or as many as the system gives."""
        with self._lock:
            if not self._helpers and threads > 1:
                lead()
                atexit.register(self._end)  # before what they run is unloaded
                os.register_at_fork(after_in_child=self._forked)
            while len(self._helpers) < min(threads, MOST) - 1:
                index = len(self._helpers) + 1
                helper = threading.Thread(
                    target=_help(), args=(self.address, index), name=f"engine-helper-{index}", daemon=True
                )
                try:
                    helper.start()
                except RuntimeError as error:
                    logger.warning("an engine of %d threads has %d: %s", threads, index, error)
                    return
                self._helpers.append(helper)

    def _forked(self) -> None:
        """A forked process has no helpers: it does all alone."""
        self._words[_TAKEN] = 1
        self._helpers = []

    def _end(self) -> None:
        if self._helpers:
            _over()(self.address, len(self._helpers) + 1)
        for helper in self._helpers:
            helper.join()


_team: Final = _Team()


def team(threads: int) -> int:
    """The address of the team's words, as `lead` takes it; with helpers for so many threads in all."""
    _team.reach(threads)
    return _team.address
