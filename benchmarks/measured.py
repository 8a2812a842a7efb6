"""What sections of the gateway benchmark hand back: values by round, made into rows with their spread."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from results_file import Row
from rich.console import Console
from rich.table import Table

_Key = tuple[str, str]


class Measured:
    """Values of (name, metric) over the rounds."""

    def __init__(self) -> None:
        self._values: dict[_Key, list[float]] = defaultdict(list)
        self._units: dict[str, str] = {}

    def add(self, name: str, metric: str, value: float, unit: str) -> None:
        self._values[name, metric].append(value)
        self._units[metric] = unit

    def add_points(self, name: str, metric: str, mine: Sequence[float], theirs: Sequence[float]) -> None:
        """The mean of paired differences, in points, with its 95 % interval by the normal distribution."""
        gains = [100 * (one - other) for one, other in zip(mine, theirs, strict=True)]
        mean, half = statistics.fmean(gains), 1.96 * statistics.stdev(gains) / len(gains) ** 0.5
        self._values[name, metric] = [mean - half, mean, mean + half]
        self._units[metric] = "points"

    def add_interval(self, name: str, metric: str, resampled: Sequence[float], unit: str) -> None:
        """The median of resamples with their middle 95 %."""
        ordered = sorted(resampled)
        at = [round(share * (len(ordered) - 1)) for share in (0.025, 0.5, 0.975)]
        self._values[name, metric] = [ordered[each] for each in at]
        self._units[metric] = unit

    def last(self, name: str, metric: str) -> float | None:
        values = self._values.get((name, metric))
        return values[-1] if values else None

    def add_ratios(self, metric: str, over: tuple[str, ...]) -> None:
        """The last value of everybody's `metric`, over each rival's of the same round."""
        for name in [name for name, found in self._values if found == metric]:
            for rival in over:
                ours, theirs = self.last(name, metric), self.last(rival, metric)
                if ours is not None and theirs:
                    self.add(name, f"{metric}_over_{rival}", ours / theirs, "ratio")

    def rows(self) -> list[Row]:
        """Medians over the rounds, with the lowest and the highest."""
        return [
            Row(
                name, metric, round(statistics.median(values), 4), round(min(values), 4), round(max(values), 4),
                self._units[metric],
            )
            for (name, metric), values in self._values.items()
        ]  # fmt: skip


def show(rows: list[Row], title: str, columns: dict[str, str], note: str = "") -> None:
    """A table of names by metrics; `columns`: metric → heading. Nothing where no row has any of them."""
    found = {(row.name, row.metric): row for row in rows}
    names = list(dict.fromkeys(row.name for row in rows if row.metric in columns))
    if not names:
        return
    table = Table(title=f"{title}; median (lowest–highest)", caption=note, caption_justify="left")
    for heading in ("", *columns.values()):
        table.add_column(heading, justify="right" if heading else "left")
    for name in names:
        cells = [found.get((name, metric)) for metric in columns]
        table.add_row(name, *["-" if row is None else cell(row) for row in cells])
    Console(width=160).print(table)


def cell(row: Row) -> str:
    form = ",.3g" if abs(row.value) < 1000 else ",.0f"
    if row.low == row.high:
        return f"{row.value:{form}}"
    return f"{row.value:{form}} ({row.low:{form}}–{row.high:{form}})"
