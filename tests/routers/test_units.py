"""Quantities are read exactly, or not at all."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers import units
from routers.units import Budget, Rate, UnitError


@pytest.mark.parametrize(
    ("text", "nanousd"),
    [
        ("$0", 0),
        ("$0.01", 10_000_000),
        ("$0.000000001", 1),
        ("$1.10", 1_100_000_000),
        ("$999999999.999999999", 999_999_999_999_999_999),
        ("$0.100000000000000", 100_000_000),
    ],
)
def test_money_is_exact(text: str, nanousd: int) -> None:
    assert units.parse_money(text) == nanousd


@given(st.integers(min_value=0, max_value=10**18 - 1))
def test_money_survives_writing_and_reading(nanousd: int) -> None:
    assert units.parse_money(units.format_money(nanousd)) == nanousd


@given(st.integers(min_value=0, max_value=10**18 - 1))
def test_a_price_is_its_decimal_times_a_billion(nanousd: int) -> None:
    text = f"${Decimal(nanousd).scaleb(-9):f}/Mtok"
    assert units.parse_token_price(text) == nanousd


@pytest.mark.parametrize("text", ["$0.0000000001", "$1.0000000005"])
def test_nothing_is_rounded(text: str) -> None:
    with pytest.raises(UnitError, match="finer than one nano-dollar"):
        units.parse_money(text)


@pytest.mark.parametrize(
    "text", ["0.01", "$", "$-1", "-$1", "$1e3", "$ 1", "$1,000", "$.5", "$1.", "€1", "$1 ", "$1\n", "$١"]
)
def test_what_is_not_money(text: str) -> None:
    with pytest.raises(UnitError) as caught:
        units.parse_money(text)
    assert "$0.01" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("250ms", 250), ("60s", 60_000), ("1.5h", 5_400_000), ("5min", 300_000), ("1d", 86_400_000), ("0.001s", 1)],
)
def test_durations(text: str, milliseconds: int) -> None:
    assert units.parse_duration_ms(text) == milliseconds


@pytest.mark.parametrize("text", ["60", "5m", "-1s", "1 h", "1.5ms", "1h30min", "s", "1s\n"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(UnitError):
        units.parse_duration_ms(text)


def test_budgets_and_rates() -> None:
    assert units.parse_budget("$50/month") == Budget(50_000_000_000, "month")
    assert units.parse_rate("600/min") == Rate(600, 60)
    assert units.parse_rate("10/s") == Rate(10, 1)


@pytest.mark.parametrize("text", ["$50", "$50/fortnight", "50/month", "$50/ month"])
def test_what_is_not_a_budget(text: str) -> None:
    with pytest.raises(UnitError, match="not a budget"):
        units.parse_budget(text)


@pytest.mark.parametrize("text", ["0/min", "600", "600/day", "1.5/s", "-1/s"])
def test_what_is_not_a_rate(text: str) -> None:
    with pytest.raises(UnitError):
        units.parse_rate(text)


@pytest.mark.parametrize(("text", "percent"), [("5%", 5), ("0.25%", 0.25), ("100%", 100)])
def test_percentages(text: str, percent: float) -> None:
    assert units.parse_percent(text) == percent


@pytest.mark.parametrize("text", ["5", "%", "0%", "100.01%", "-1%", "1.234%", "5 %", "5%\n"])
def test_what_is_not_a_percentage(text: str) -> None:
    with pytest.raises(UnitError):
        units.parse_percent(text)


@given(st.integers(min_value=1, max_value=10**9))
def test_durations_survive_writing_and_reading(milliseconds: int) -> None:
    assert units.parse_duration_ms(units.format_duration(milliseconds)) == milliseconds
