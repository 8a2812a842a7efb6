"""Request rates by GCRA (the leaky bucket as a meter): one number per key, exact spacing, no windows to reset."""

from collections import OrderedDict

from gateway.errors import RateLimited

MAX_TRACKED = 100_000


class RateLimiter:
    """In process. `clock` values are seconds, monotonic."""

    def __init__(self) -> None:
        self._arrival: OrderedDict[str, float] = OrderedDict()

    def admit(self, scope: str, *, rate_per_s: float, burst: float, now: float) -> None:
        """Count one request of `scope`; raises RateLimited, with the wait, when it comes too early.

        `burst` requests may come at once after a pause; in the long run no more than `rate_per_s` pass.
        """
        interval = 1.0 / rate_per_s
        due = max(self._arrival.get(scope, now), now)
        wait = due - now - interval * (burst - 1)
        if wait > 1e-9:
            raise RateLimited(
                f"Rate limit of {scope}: {rate_per_s * 60:g} requests/min reached; retry in {wait:.3f} s.",
                retry_after_s=wait,
            )
        self._arrival[scope] = due + interval
        self._arrival.move_to_end(scope)
        if len(self._arrival) > MAX_TRACKED:
            self._arrival.popitem(last=False)
