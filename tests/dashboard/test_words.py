"""Rounding for the eye, and the geometry of the charts."""

from typing import Any

import pytest

from gateway.dashboard.charts import nice_ceiling, stacked
from gateway.dashboard.queries import time_line
from gateway.dashboard.words import duration, instant, short_money


@pytest.mark.parametrize(
    ("nanousd", "shown"),
    [
        (0, "$0"),
        (1, "$0.000000001"),
        (1_234_567, "$0.00123"),
        (12_345_678, "$0.0123"),
        (100_000_000, "$0.10"),
        (999_999_999, "$1.00"),
        (1_005_000_000, "$1.00"),
        (123_456_789_000_000, "$123,456.79"),
        (-4_200_000_000, "-$4.20"),
    ],
)
def test_money_is_rounded_to_what_a_reader_needs(nanousd: int, shown: str) -> None:
    assert short_money(nanousd) == shown


def test_durations_and_instants() -> None:
    assert [duration(us) for us in (None, 7, 7400, 812_345, 2_500_000, 90_000_000)] == [
        "–", "7 µs", "7.4 ms", "812 ms", "2.50 s", "1.5 min",
    ]  # fmt: skip
    assert instant(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"


@pytest.mark.parametrize(("value", "ceiling"), [(0, 1), (1, 1), (3, 4), (61, 80), (100, 100), (101, 200)])
def test_the_ceiling_is_the_next_round_number(value: int, ceiling: int) -> None:
    assert nice_ceiling(value) == ceiling


def test_parts_stand_on_each_other_and_fill_their_share_of_the_height() -> None:
    chart = stacked([[10, 0, 30], [0, 0, 0]], str)
    assert chart.ceiling == 40
    assert [(part.series, part.y, part.height) for part in chart.columns[0].parts] == [
        (0, "75.000", "25.000"),
        (2, "0.000", "75.000"),
    ]
    assert [column.total for column in chart.columns] == [40, 0]
    assert chart.ticks == ["0", "1"]


def test_every_attempt_is_seen_on_the_time_line() -> None:
    row = {"created_at_ms": 1000, "duration_us": 1_000_000}
    attempts: list[dict[str, Any]] = [
        {"started_at_ms": 1000, "duration_us": 200, "first_byte_us": None},
        {"started_at_ms": 1100, "duration_us": 900_000, "first_byte_us": 300_000},
        {"started_at_ms": 2000, "duration_us": 0, "first_byte_us": None},
    ]
    placed = [(line.start, line.waiting, line.running) for line in time_line(row, attempts)]
    assert placed == [(0, 1, 0), (10, 30, 60), (99, 1, 0)]
