"""What the targets of a policy are doing, as this worker sees it: under way, first tokens, speed. Routers decide by it.

Only kept where a route asks for time: the meters of a policy that does not are None.
"""

from collections import deque
from collections.abc import Iterable

from gateway.ledger.records import AttemptRecord
from routers.types import Load

KEPT = 64
"""First tokens that percentiles are taken over."""
SMOOTHING = 0.2
"""How much one answer's speed counts in the mean of all before it."""


class Meter:
    """Of one model."""

    __slots__ = ("_first_ms", "_speed", "_streamed", "running", "slots")

    def __init__(self, slots: int | None = None) -> None:
        self.running = 0
        self.slots = slots
        self._first_ms: deque[float] = deque(maxlen=KEPT)
        self._speed: float | None = None
        self._streamed = False

    def ended(self, attempt: AttemptRecord, *, stream: bool) -> None:
        """An attempt is over. Of an answer that came whole, only the speed of the whole is known."""
        self.running -= 1
        tokens = attempt.output_tokens + attempt.reasoning_tokens
        if attempt.outcome != "ok" or attempt.first_byte_us is None or attempt.cost_estimated:
            return
        if not stream:
            if not self._streamed and attempt.duration_us > 0 and tokens > 0:
                self._speed = _smoothed(self._speed, tokens / attempt.duration_us * 1e6)
            return
        self._first_ms.append(attempt.first_byte_us / 1000)
        writing_us = attempt.duration_us - attempt.first_byte_us
        if tokens > 1 and writing_us > 0:
            before = self._speed if self._streamed else None
            self._streamed = True
            self._speed = _smoothed(before, (tokens - 1) / writing_us * 1e6)

    def load(self) -> Load:
        ordered = sorted(self._first_ms)
        return Load(
            queue=0 if self.slots is None else max(0, self.running - self.slots),
            running=self.running if self.slots is None else min(self.running, self.slots),
            slots=self.slots,
            tokens_per_s=self._speed,
            ttft_ms_p50=ordered[len(ordered) // 2] if ordered else None,
            ttft_ms_p95=ordered[min(len(ordered) * 19 // 20, len(ordered) - 1)] if ordered else None,
        )


class Loads:
    """Of the models of a policy, by its names."""

    def __init__(self, slots: dict[str, int | None]) -> None:
        self._meters = {name: Meter(places) for name, places in slots.items()}

    def began(self, model: str) -> None:
        self._meters[model].running += 1

    def ended(self, attempt: AttemptRecord, *, stream: bool) -> None:
        self._meters[attempt.model].ended(attempt, stream=stream)

    def of(self, models: Iterable[str]) -> dict[str, Load]:
        return {name: self._meters[name].load() for name in models if name in self._meters}


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)
