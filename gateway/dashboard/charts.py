"""Bars for the templates to draw: geometry and words, no markup.

A chart's plot is `width` by 100 units, stretched to whatever room the page has; a column is `COLUMN` units wide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLUMN = 10
HEIGHT = 100


@dataclass(frozen=True, slots=True)
class Part:
    """One series' part of one column."""

    x: int
    y: str
    height: str
    series: int


@dataclass(frozen=True, slots=True)
class Column:
    x: int
    label: str
    total: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    columns: tuple[Column, ...]
    ceiling: int
    """What the top of the plot stands for."""

    @property
    def total(self) -> int:
        return sum(column.total for column in self.columns)

    @property
    def width(self) -> int:
        return len(self.columns) * COLUMN

    @property
    def ticks(self) -> list[str]:
        """Labels of the first, the middle and the last column."""
        last = len(self.columns) - 1
        return [self.columns[at].label for at in dict.fromkeys((0, last // 2, last))]


def stacked(values: Sequence[Sequence[int]], label: Callable[[int], str]) -> Chart:
    """A column per entry of `values`, a part per series with something in it, the first series at the bottom."""
    ceiling = nice_ceiling(max((sum(column) for column in values), default=0))
    columns = []
    for index, column in enumerate(values):
        below, parts = 0, []
        for series, value in enumerate(column):
            if value > 0:
                below += value
                parts.append(Part(index * COLUMN, _units(ceiling - below, ceiling), _units(value, ceiling), series))
        columns.append(Column(index * COLUMN, label(index), below, tuple(parts)))
    return Chart(tuple(columns), ceiling)


def nice_ceiling(value: int) -> int:
    """The next 1, 2, 4, 6 or 8 times a power of ten, so that half of it is a round number too (unless it is 1)."""
    power = 1
    while True:
        for step in (1, 2, 4, 6, 8):
            if step * power >= value:
                return step * power
        power *= 10


def percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _units(value: int, ceiling: int) -> str:
    return f"{HEIGHT * value / ceiling:.3f}"
