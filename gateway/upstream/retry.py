"""When the same target is tried again, and how much all retries together may add to its load.

The budget follows Finagle's: requests pay in, retries take out, so that a total outage multiplies a provider's load by
little more than `1 + SHARE`, however many callers there are.
"""

import random
import time
from collections.abc import Callable

from gateway.upstream.types import UpstreamError

BACKOFF_S = 0.2
"""Before the first retry, doubled for each further one, with jitter."""
MAX_RETRY_AFTER_S = 5.0
"""A provider that asks for a longer wait is left for the next fallback."""
SHARE = 0.1
"""Retries per request, in the long run."""
PER_S = 0.2
"""Retries per second that are allowed in any case, so that a quiet gateway may retry at all."""
RESERVE = 10.0


class RetryBudget:
    """One per provider. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._balance = RESERVE
        self._at = clock()

    def deposit(self) -> None:
        """A request goes to this provider."""
        if self._balance < RESERVE:
            self._balance += SHARE

    def withdraw(self) -> bool:
        """Whether one more retry may go out."""
        now = self._clock()
        self._balance = min(RESERVE, self._balance + (now - self._at) * PER_S)
        self._at = now
        if self._balance < 1:
            return False
        self._balance -= 1
        return True


def wait_before_retry(error: UpstreamError, retry: int, rng: random.Random) -> float | None:
    """Seconds to wait before the `retry`-th further try (from 0); None when this error is not worth one.

    A provider's own word goes first: its `x-should-retry`, and its `Retry-After` up to `MAX_RETRY_AFTER_S`.
    """
    if not error.retryable:
        return None
    if error.retry_after_s is not None:
        return error.retry_after_s if error.retry_after_s <= MAX_RETRY_AFTER_S else None
    wait: float = BACKOFF_S * 2**retry * rng.uniform(0.5, 1)
    return wait
