"""A circuit breaker per target: closed, open for a while, then half open for one attempt at a time.

Own code, because it must know what a provider's `Retry-After` means and that a caller who leaves is no failure.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from routers.policy import Breaker as BreakerRule

MAX_REST_S = 60.0
"""A provider that asks for a longer pause is asked again after this long."""


class Breaker:
    """`clock` gives monotonic seconds. A `rule` of None never opens.

    `acquire` gives a permit, and each permit comes back once: in `answered`, `failed`, `limited` or `abandoned`. After
    `answered` comes `succeeded` or, where the answer breaks off, `failed`. Of attempts that were under way when the
    breaker opened, failures say nothing new.
    """

    def __init__(self, rule: BreakerRule | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rule = rule
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=rule.failures if rule is not None else 1)
        self._open_until = 0.0
        """0: closed."""
        self._limited = False
        self._probe: int | None = None
        """The permit of the attempt that tries the target out; None: none does."""
        self._probes = 0

    @property
    def closed(self) -> bool:
        """Nothing speaks against the target, without a look at the clock."""
        return not self._open_until

    def closed_in_s(self) -> float | None:
        """Seconds until the target may be tried again; None when it may be tried now."""
        if not self._open_until:
            return None
        wait = self._open_until - self._clock()
        if wait > 0:
            return wait
        if self._limited:  # a rate limit ends by itself: nothing needs to be tried out
            self._limited, self._open_until = False, 0.0
            return None
        return 0.05 if self._probe is not None else None

    def reason(self) -> str | None:
        """Why the target is left alone now; None when it is not."""
        wait = self.closed_in_s()
        if wait is None:
            return None
        if self._probe is not None:
            return "breaker half open: one request is trying it"
        return f"{'rate limited' if self._limited else 'breaker open'} for another {wait:.1f} s"

    def acquire(self) -> int | None:
        """A permit for one attempt; None when the target is left alone."""
        if not self._open_until:
            return 0
        if self.closed_in_s() is not None:
            return None
        if self._open_until:
            self._probes += 1
            self._probe = self._probes
            return self._probe
        return 0

    def answered(self) -> None:
        """A first byte came: the target is there again. Earlier failures count on until an answer is whole."""
        if self._open_until and not self._limited:
            self._open_until, self._probe = 0.0, None

    def succeeded(self) -> None:
        """An answer is whole."""
        self.answered()
        self._failures.clear()

    def failed(self, permit: int = 0, *, limited: bool = False) -> None:
        """One more failure; opens when the rule's count is reached within its window, and again after a failed try.

        `limited`: a rate limit that names no time. It counts like any other, and what it opens closes by itself.
        """
        rule = self._rule
        if rule is None or (self._open_until and permit != self._probe):
            return
        now = self._clock()
        self._failures.append(now)
        full = len(self._failures) == rule.failures and now - self._failures[0] <= rule.window_ms / 1000
        if full or self._probe is not None:
            self._open_until, self._limited, self._probe = now + rule.open_ms / 1000, limited, None

    def limited(self, seconds: float, permit: int = 0) -> None:
        """The provider asked to be left alone this long (a 429): later answers extend the pause, none shortens it."""
        if self._rule is None:
            return
        if permit == self._probe:
            self._probe = None
        until = self._clock() + min(seconds, MAX_REST_S)
        if until > self._open_until and self._probe is None:
            self._open_until, self._limited = until, True

    def abandoned(self, permit: int) -> None:
        """The attempt ended without telling anything about the target: its caller left."""
        if permit == self._probe:
            self._probe = None

    @property
    def rate_limited(self) -> bool:
        """Left alone because its provider said so."""
        return self.closed_in_s() is not None and self._limited

    @property
    def state(self) -> Literal["closed", "half_open", "open"]:
        if self.closed_in_s() is None:
            return "half_open" if self._open_until else "closed"
        return "half_open" if self._probe is not None else "open"
