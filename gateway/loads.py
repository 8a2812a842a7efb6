"""What the targets of a policy are doing: under way, first tokens, the speeds of reading and writing. Routers decide by
it. A worker measures what it sends itself; what other workers have under way, they tell (`gateway.shared_loads`).

Only kept where a route asks for time: the meters of a policy that does not are None.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from msgspec import Struct

from gateway.ledger.records import AttemptRecord
from routers.types import Load

KEPT = 64
"""First tokens that percentiles are taken over, and the line through them."""
SMOOTHING = 0.2
"""How much one answer's speed counts in the mean of all before it."""
LEAST_READ = 12
"""First tokens from which the speed of prefill is read, ..."""
APART_TOKENS = 64
"""... where the prompts of the longer third are so many tokens longer than those of the shorter one."""
EVERY = 4
"""First tokens after which it is read anew."""


class Told(Struct, frozen=True, omit_defaults=True):
    """What one worker tells the others of a model."""

    running: int = 0
    tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    start_ms: float = 0.0
    ttft_ms_p50: float | None = None
    ttft_ms_p95: float | None = None


class Meter:
    """Of one model."""

    __slots__ = ("_first", "_fresh", "_reading", "_speed", "_streamed", "elsewhere", "running", "slots")

    def __init__(self, slots: int | None = None) -> None:
        self.running = 0
        self.slots = slots
        self.elsewhere: Sequence[Told] = ()
        """What the other workers tell."""
        self._first: deque[tuple[int, float]] = deque(maxlen=KEPT)
        """(tokens of the prompt that were read for it, milliseconds until the first token)"""
        self._fresh = 0
        self._reading: tuple[float, float] | None = None
        """(milliseconds per token of prompt, milliseconds of the rest); None: prompts were too few, or too alike."""
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
        self._first.append((attempt.input_tokens + attempt.cache_write_tokens, attempt.first_byte_us / 1000))
        self._fresh += 1
        if self._fresh >= EVERY and len(self._first) >= LEAST_READ:
            self._fresh, self._reading = 0, reading(self._first)
        writing_us = attempt.duration_us - attempt.first_byte_us
        if tokens > 1 and writing_us > 0:
            before = self._speed if self._streamed else None
            self._streamed = True
            self._speed = _smoothed(before, (tokens - 1) / writing_us * 1e6)

    def told(self) -> Told:
        ordered = sorted(ms for _, ms in self._first)
        return Told(
            running=self.running,
            tokens_per_s=self._speed,
            prefill_tokens_per_s=None if self._reading is None else 1000 / self._reading[0],
            start_ms=0.0 if self._reading is None else self._reading[1],
            ttft_ms_p50=ordered[len(ordered) // 2] if ordered else None,
            ttft_ms_p95=ordered[min(len(ordered) * 19 // 20, len(ordered) - 1)] if ordered else None,
        )

    def load(self) -> Load:
        """Under way: by all workers. Times: as measured here, and where nothing was, as on average elsewhere."""
        own, others = self.told(), self.elsewhere
        running = own.running + sum(one.running for one in others)
        read = own if own.prefill_tokens_per_s is not None else _mean_reading(others)
        return Load(
            queue=0 if self.slots is None else max(0, running - self.slots),
            running=running if self.slots is None else min(running, self.slots),
            slots=self.slots,
            tokens_per_s=_own_or_mean(own.tokens_per_s, [one.tokens_per_s for one in others]),
            prefill_tokens_per_s=read.prefill_tokens_per_s,
            start_ms=read.start_ms,
            ttft_ms_p50=_own_or_mean(own.ttft_ms_p50, [one.ttft_ms_p50 for one in others]),
            ttft_ms_p95=_own_or_mean(own.ttft_ms_p95, [one.ttft_ms_p95 for one in others]),
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

    def keep(self, model: str, before: "Loads") -> None:
        """Go on with what was measured of a model that stays where it was; its places are the new policy's."""
        meter = before._meters[model]
        meter.slots = self._meters[model].slots
        self._meters[model] = meter

    def told(self) -> dict[str, Told]:
        """Of the models that have anything to tell."""
        found = {name: meter.told() for name, meter in self._meters.items()}
        return {name: told for name, told in found.items() if told != Told()}

    def hear(self, workers: Sequence[Mapping[str, Told]]) -> None:
        """What all other workers tell now, in place of what they told before."""
        for name, meter in self._meters.items():
            meter.elsewhere = [told[name] for told in workers if name in told]


def reading(first: Iterable[tuple[int, float]]) -> tuple[float, float] | None:
    """(ms per token of prompt, ms of the rest) of (tokens, ms to the first token): Tukey's resistant line, through the
    medians of the outer thirds, so that the few that waited for a place do not bend it. None: it cannot be told."""
    ordered = sorted(first)
    third = len(ordered) // 3
    if third == 0:
        return None
    short, long = ordered[:third], ordered[-third:]
    apart = median(tokens for tokens, _ in long) - median(tokens for tokens, _ in short)
    if apart < APART_TOKENS:
        return None
    slope = (median(ms for _, ms in long) - median(ms for _, ms in short)) / apart
    if slope <= 0:
        return None
    return slope, max(0.0, median(ms - slope * tokens for tokens, ms in ordered))


def _mean_reading(others: Sequence[Told]) -> Told:
    known = [one for one in others if one.prefill_tokens_per_s is not None]
    if not known:
        return Told()
    speeds = [one.prefill_tokens_per_s or 0.0 for one in known]
    return Told(
        prefill_tokens_per_s=sum(speeds) / len(speeds), start_ms=sum(one.start_ms for one in known) / len(known)
    )


def _own_or_mean(own: float | None, others: Sequence[float | None]) -> float | None:
    if own is not None:
        return own
    known = [value for value in others if value is not None]
    return sum(known) / len(known) if known else None


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)
