"""Request rates by GCRA (the leaky bucket as a meter): one number per key, exact spacing, no windows to reset."""

from collections import OrderedDict
from collections.abc import Sequence

from gateway.errors import RateLimited

MAX_TRACKED = 100_000


class RateLimiter:
    """In process. `clock` values are seconds, monotonic."""

    def __init__(self) -> None:
        self._arrival: OrderedDict[tuple[str, float], float] = OrderedDict()

    def admit(self, limits: Sequence[tuple[str, float, float]], *, now: float) -> None:
        """Count one request against (scope, rate per second, burst) limits: against all of them, or against none.

        `burst` requests may come at once after a pause; in the long run no more than the rate pass. Raises
        RateLimited, with the wait, when the request comes too early for one of them.
        """
        due_at: list[tuple[tuple[str, float], float]] = []
        for scope, rate_per_s, burst in limits:
            interval = 1.0 / rate_per_s
            due = max(self._arrival.get((scope, rate_per_s), now), now)
            wait = due - now - interval * (burst - 1)
            if wait > 1e-9:
                raise RateLimited(
                    f"Rate limit of {scope}: faster than {rate_per_s * 60:g} requests/min; retry in {wait:.3f} s.",
                    retry_after_s=wait,
                )
            due_at.append(((scope, rate_per_s), due + interval))
        for limit, due in due_at:
            self._arrival[limit] = due
            self._arrival.move_to_end(limit)
        while len(self._arrival) > MAX_TRACKED:
            self._arrival.popitem(last=False)
