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
    """`clock` gives monotonic seconds. A `rule` of None never opens."""

    def __init__(self, rule: BreakerRule | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rule = rule
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=rule.failures if rule is not None else 1)
        self._open_until = 0.0
        self._probing = False
        self._limited = False

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
        return 0.05 if self._probing else None

    def reason(self) -> str | None:
        """Why the target is left alone now; None when it is not."""
        wait = self.closed_in_s()
        if wait is None:
            return None
        if self._probing and self._clock() >= self._open_until:
            return "breaker half open: one request is trying it"
        return f"{'rate limited' if self._limited else 'breaker open'} for another {wait:.1f} s"

    def acquire(self) -> bool:
        """Whether an attempt may go out. Each granted one ends in `succeeded`, `failed` or `abandoned`."""
        if not self._open_until:
            return True
        if self.closed_in_s() is not None:
            return False
        if self._open_until:
            self._probing = True
        return True

    def succeeded(self) -> None:
        if self._failures or self._open_until:
            self._failures.clear()
            self._probing = False
            if not self._limited:
                self._open_until = 0.0

    def failed(self) -> None:
        """One more failure; opens when the rule's count is reached within its window, and again after a failed try."""
        rule = self._rule
        if rule is None:
            return
        now = self._clock()
        self._failures.append(now)
        full = len(self._failures) == rule.failures and now - self._failures[0] <= rule.window_ms / 1000
        if self._probing or full:
            self._probing = self._limited = False
            self._open_until = now + rule.open_ms / 1000

    def limited(self, seconds: float) -> None:
        """The provider asked to be left alone this long (a 429): later answers extend the pause, none shortens it."""
        if self._rule is None:
            return
        until = self._clock() + min(seconds, MAX_REST_S)
        self._probing = False
        if until > self._open_until:
            self._open_until = until
            self._limited = True

    def abandoned(self) -> None:
        """The attempt ended without telling anything about the target: its caller left."""
        self._probing = False

    @property
    def rate_limited(self) -> bool:
        """Left alone because its provider said so."""
        return self._limited and self.closed_in_s() is not None

    @property
    def state(self) -> Literal["closed", "half_open", "open"]:
        if self.closed_in_s() is None:
            return "half_open" if self._open_until else "closed"
        return "half_open" if self._probing else "open"
