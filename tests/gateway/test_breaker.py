"""The breaker against a model of it: what it grants, when it opens, and that nothing keeps it open for ever."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from gateway.upstream.breaker import MAX_REST_S, Breaker
from routers.policy import Breaker as BreakerRule

RULE = BreakerRule(failures=3, window_ms=30_000, open_ms=15_000)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class BreakerMachine(RuleBasedStateMachine):
    """Attempts come and go at any time, also long after the breaker opened; the model keeps a diary instead of rules.

    `outage`: since when the target is left alone, and until when; None: it is not. `out`: permits that are out, each
    with the outage in which it was granted.
    """

    permits = Bundle("permits")
    answering = Bundle("answering")

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.breaker = Breaker(RULE, self.clock)
        self.until: float | None = None
        self.rest = False
        self.probe: int | None = None
        self.row: list[float] = []
        """When attempts failed, since the last whole answer."""

    def now_open(self) -> bool:
        if self.until is not None and self.rest and self.clock.now >= self.until:
            self.until, self.rest = None, False
        return self.until is not None

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 14.9, 15.0, 31.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(target=permits)
    def acquire(self) -> Any:
        permit = self.breaker.acquire()
        if not self.now_open():
            assert permit == 0, "closed: everybody may"
            return 0
        assert self.until is not None
        if self.clock.now < self.until or self.probe is not None:
            assert permit is None, "open, or somebody tries it already"
            return multiple()
        assert permit, "half open: one may try"
        self.probe = permit
        return permit

    @rule(target=answering, permit=consumes(permits))
    def answered(self, permit: int) -> int:
        self.breaker.answered()
        if self.now_open() and not self.rest:
            self.until = self.probe = None
        return permit

    @rule(permit=consumes(answering))
    def succeeded(self, permit: int) -> None:
        self.breaker.succeeded()
        if self.now_open() and not self.rest:
            self.until = self.probe = None
        self.row = []

    @rule(permit=consumes(permits), limited=st.booleans())
    def failed(self, permit: int, limited: bool) -> None:
        self._fail(permit, limited)

    @rule(permit=consumes(answering))
    def broke_off(self, permit: int) -> None:
        self._fail(0, False)

    def _fail(self, permit: int, limited: bool) -> None:
        is_open = self.until is not None  # a rest that has passed ends when somebody asks
        self.breaker.failed(permit, limited=limited)
        if is_open and (self.probe is None or permit != self.probe):
            return
        now = self.clock.now
        self.row.append(now)
        last = self.row[-RULE.failures :]
        if (permit and permit == self.probe) or (len(last) == RULE.failures and now - last[0] <= RULE.window_ms / 1000):
            self.until, self.rest, self.probe = now + RULE.open_ms / 1000, limited, None

    @rule(permit=consumes(permits), seconds=st.sampled_from([0.0, 2.0, 20.0, 3600.0]))
    def limited(self, permit: int, seconds: float) -> None:
        self.breaker.limited(seconds, permit)
        if permit and permit == self.probe:
            self.probe = None
        until = self.clock.now + min(seconds, MAX_REST_S)
        if self.probe is None and (self.until is None or until > self.until):
            self.until, self.rest = until, True

    @rule(permit=consumes(permits))
    def abandoned(self, permit: int) -> None:
        self.breaker.abandoned(permit)
        if permit and permit == self.probe:
            self.probe = None

    @invariant()
    def says_what_it_does(self) -> None:
        if not hasattr(self, "clock"):
            return
        is_open = self.now_open()
        free = not is_open or (self.until is not None and self.clock.now >= self.until and self.probe is None)
        assert (self.breaker.closed_in_s() is None) == free
        assert (self.breaker.reason() is None) == free
        assert self.breaker.rate_limited == (is_open and self.rest)
        if not is_open:
            assert self.breaker.state == "closed"
        else:
            half = self.probe is not None or free
            assert self.breaker.state == ("half_open" if half else "open")


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(RULE, clock)
    for _ in range(RULE.failures):
        breaker.failed(breaker.acquire() or 0)
    assert breaker.state == "open"
    return breaker


def test_half_open_lets_one_through_at_a_time_and_an_abandoned_one_gives_its_place_back() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 15
    probe = breaker.acquire()
    assert probe
    assert breaker.acquire() is None
    breaker.abandoned(0)  # somebody who left, of those that went out before it opened
    assert breaker.acquire() is None, "the probe is still out"
    breaker.abandoned(probe)
    assert breaker.acquire()


def test_late_failures_of_the_same_outage_do_not_prolong_it() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 14
    breaker.failed(0)
    clock.now += 1
    assert breaker.acquire()


def test_a_target_whose_answers_begin_and_never_end_is_left_alone() -> None:
    breaker = Breaker(RULE, Clock())
    for _ in range(RULE.failures):
        assert breaker.acquire() == 0
        breaker.answered()
        breaker.failed()
    assert breaker.acquire() is None


def test_a_second_429_extends_the_pause_and_a_shorter_one_does_not_end_it() -> None:
    clock = Clock()
    breaker = Breaker(RULE, clock)
    breaker.limited(10)
    breaker.limited(20)
    breaker.limited(1)
    assert breaker.closed_in_s() == 20
    breaker.succeeded()
    assert breaker.rate_limited
    clock.now += 20
    assert breaker.acquire() == 0, "nothing needs to be tried out"


@pytest.mark.parametrize("seconds", [120.0, 1e6])
def test_no_provider_may_ask_for_longer_than_a_minute(seconds: float) -> None:
    breaker = Breaker(RULE, Clock())
    breaker.limited(seconds)
    assert breaker.closed_in_s() == MAX_REST_S


def test_without_a_rule_it_never_opens() -> None:
    breaker = Breaker(None, Clock())
    for _ in range(100):
        breaker.failed(breaker.acquire() or 0)
        breaker.limited(60)
    assert breaker.acquire() == 0
