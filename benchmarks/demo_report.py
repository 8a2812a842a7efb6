"""From transcripts to a table: accuracy with intervals, strong-model share, cost, latency."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
from demo_client import Call
from results_file import Row, machine, versions
from rich.table import Table

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
RESAMPLES = 2000
Z95 = 1.959964
LIBRARIES = ("leadline", "openai", "aiohttp", "torch", "transformers", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to answer the same questions. Latency is None where nothing was called."""

    name: str
    n: int
    accuracy: float
    low: float
    high: float
    strong_share: float
    cost_usd: float
    latency_ms: tuple[float, float] | None = None
    graded: float | None = None
    """Accuracy graded from the text that the client received."""

    def rows(self) -> list[Row]:
        rows = [
            Row(self.name, "accuracy", self.accuracy, self.low, self.high),
            Row(self.name, "strong_share", self.strong_share),
            Row(self.name, "cost", self.cost_usd, unit="USD"),
            Row(self.name, "n", self.n, unit="questions"),
        ]
        if self.graded is not None:
            rows.append(Row(self.name, "accuracy_graded_from_text", self.graded))
        if self.latency_ms is not None:
            for metric, value in zip(("latency_p50", "latency_p95"), self.latency_ms, strict=True):
                rows.append(Row(self.name, metric, value, unit="ms, replayed"))
        return rows


def measured(name: str, calls: Sequence[Call]) -> Arm:
    """An arm whose calls were really made."""
    right = [call.correct for call in calls]
    low, high = wilson(sum(right), len(right))
    p50, p95 = np.percentile([call.latency_ms for call in calls], (50, 95))
    return Arm(
        name,
        len(calls),
        float(np.mean(right)),
        low,
        high,
        strong_share=float(np.mean([call.model == "strong" for call in calls])),
        cost_usd=sum(call.cost_nanousd or 0 for call in calls) / 1e9,
        latency_ms=(float(p50), float(p95)),
        graded=float(np.mean([call.graded for call in calls])),
    )


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share."""
    p, z2 = right / n, Z95 * Z95
    middle, half = p + z2 / (2 * n), Z95 * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


@dataclass(frozen=True, slots=True)
class Paired:
    """Routed, weak and strong answers to the same questions, question by question."""

    routed: Array
    """1 where the routed answer was right."""
    strong_used: Array
    weak: Array
    strong: Array
    weak_usd: Array
    strong_usd: Array
    length: Array
    """Characters of the prompt."""

    @classmethod
    def of(cls, routed: Sequence[Call], weak: Sequence[Call], strong: Sequence[Call]) -> "Paired":
        """All three in the order of `routed`."""
        by_question = [{call.task.question: call for call in arm} for arm in (weak, strong)]
        w, s = ([arm[call.task.question] for call in routed] for arm in by_question)

        def right(calls: Sequence[Call]) -> Array:
            return np.array([float(call.correct) for call in calls])

        def usd(calls: Sequence[Call]) -> Array:
            return np.array([(call.cost_nanousd or 0) / 1e9 for call in calls])

        used = np.array([float(call.model == "strong") for call in routed])
        length = np.array([float(len(call.task.question)) for call in routed])
        return cls(right(routed), used, right(w), right(s), usd(w), usd(s), length)

    def longest(self) -> "Paired":
        """The simplest router instead: as many questions to strong, the longest prompts first."""
        used = np.zeros_like(self.strong_used)
        used[np.argsort(-self.length, kind="stable")[: round(self.strong_used.sum())]] = 1
        return replace(self, strong_used=used, routed=np.where(used > 0, self.strong, self.weak))

    def computed(self, name: str) -> Arm:
        """The routed answers as an arm, priced as the calls of the named arms were."""
        low, high = wilson(round(self.routed.sum()), len(self.routed))
        cost = float(np.where(self.strong_used > 0, self.strong_usd, self.weak_usd).sum())
        share = float(self.strong_used.mean())
        return Arm(name, len(self.routed), float(self.routed.mean()), low, high, share, cost)

    def at_random(self, name: str) -> Arm:
        """What sending the same share to strong random is expected to give; the interval is over the questions."""
        share = float(self.strong_used.mean())
        low, high = self._interval(self._random)
        cost = float(((1 - share) * self.weak_usd + share * self.strong_usd).sum())
        return Arm(name, len(self.weak), self._random(np.arange(len(self.weak))), low, high, share, cost)

    def gain(self, name: str) -> Row:
        """Routed minus random at the same share: a paired bootstrap over the questions."""
        everything = np.arange(len(self.routed))
        low, high = self._interval(self._gain)
        return Row(name, "accuracy_over_random_at_equal_share", self._gain(everything), low, high)

    def _gain(self, at: Indices) -> float:
        return float(self.routed[at].mean()) - self._random(at)

    def _random(self, at: Indices) -> float:
        share = self.strong_used[at].mean()
        return float((1 - share) * self.weak[at].mean() + share * self.strong[at].mean())

    def _interval(self, statistic: Callable[[Indices], float]) -> tuple[float, float]:
        rng = np.random.default_rng(0)
        n = len(self.routed)
        low, high = np.percentile([statistic(rng.integers(n, size=n)) for _ in range(RESAMPLES)], (2.5, 97.5))
        return float(low), float(high)


def table(title: str, sections: Sequence[Sequence[Arm]], strong_usd: float | None) -> Table:
    """The arms side by side; costs also as a share of always-strong's."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for heading in ("accuracy [95%]", "to strong", "cost", "of strong's", "p50 / p95 ms", "n"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for section in sections:
        for arm in section:
            shown.add_row(*_cells(arm, strong_usd))
        shown.add_section()
    return shown


def _cells(arm: Arm, strong_usd: float | None) -> list[str]:
    return [
        arm.name,
        f"{arm.accuracy:.3f} [{arm.low:.3f}, {arm.high:.3f}]",
        f"{arm.strong_share:.1%}",
        f"${arm.cost_usd:.4f}",
        f"{arm.cost_usd / strong_usd:.0%}" if strong_usd else "",
        "computed" if arm.latency_ms is None else f"{arm.latency_ms[0]:.0f} / {arm.latency_ms[1]:.0f}",
        str(arm.n),
    ]


def results(command: str, date: str, notes: Sequence[str], rows: Sequence[Row]) -> dict[str, object]:
    """The content of the results file."""
    return {
        "machine": machine(),
        "date": date,
        "versions": versions(LIBRARIES),
        "command": command,
        "notes": list(notes),
        "rows": [asdict(row) for row in rows],
    }
