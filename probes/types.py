"""The words of the probes that cross a border. No torch, no numpy: routers and gateway workers import this."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """One measured signal: a value, where it came from and what it cost to get."""

    value: float
    source: str
    """Probe artifact and head, e.g. `mmlu-minilm@3f2a9c/weak`."""
    low: float | None = None
    high: float | None = None
    """Interval at the artifact's stated level; None where it states none."""
    cost_us: int = 0
