"""Money, prices, durations and rates as people write them, read exactly: no float ever holds money."""

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Literal, get_args

Window = Literal["hour", "day", "week", "month", "total"]

_AMOUNT = r"\$(?P<amount>\d{1,9}(?:\.\d{1,15})?)"
MONEY_PATTERN = rf"^{_AMOUNT}$".replace("?P<amount>", "?:")
TOKEN_PRICE_PATTERN = rf"^{_AMOUNT}/Mtok$".replace("?P<amount>", "?:")
DURATION_PATTERN = r"^\d{1,9}(?:\.\d{1,3})?(?:ms|s|min|h|d)$"
BUDGET_PATTERN = rf"^{_AMOUNT}/(?:{'|'.join(get_args(Window))})$".replace("?P<amount>", "?:")
BUDGET_OR_TOTAL_PATTERN = rf"^{_AMOUNT}(?:/(?:{'|'.join(get_args(Window))}))?$".replace("?P<amount>", "?:")
RATE_PATTERN = r"^[1-9]\d{0,8}/(?:s|min|h)$"
PERCENT_PATTERN = r"^(?:\d{1,2}(?:\.\d{1,2})?|100)%$"

_MONEY = re.compile(rf"{_AMOUNT}\Z", re.ASCII)
_TOKEN_PRICE = re.compile(rf"{_AMOUNT}/Mtok\Z", re.ASCII)
_DURATION = re.compile(r"(?P<count>\d{1,9}(?:\.\d{1,3})?)(?P<unit>ms|s|min|h|d)\Z", re.ASCII)
_BUDGET = re.compile(rf"{_AMOUNT}/(?P<window>{'|'.join(get_args(Window))})\Z", re.ASCII)
_RATE = re.compile(r"(?P<count>\d{1,9})/(?P<unit>s|min|h)\Z", re.ASCII)
_PERCENT = re.compile(r"(?P<count>\d{1,3}(?:\.\d{1,2})?)%\Z", re.ASCII)

_UNIT_MS = {"ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_UNIT_S = {"s": 1, "min": 60, "h": 3_600}


class UnitError(ValueError):
    """A quantity that cannot be read: what is wrong, and in `fix` what to write instead."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Budget:
    """An amount of money per window."""

    nanousd: int
    window: Window


@dataclass(frozen=True, slots=True)
class Rate:
    """A number of requests, or of tokens, per span of seconds."""

    count: int
    per_s: int


def parse_money(text: str) -> int:
    """`$0.01` in nano-dollars. Raises UnitError, also for an amount finer than one nano-dollar."""
    match = _MONEY.match(text)
    if match is None:
        raise UnitError("not an amount of money", "write dollars with their sign, such as $0.01")
    return _nanousd(match["amount"])


def parse_token_price(text: str) -> int:
    """`$0.25/Mtok` in nano-dollars per million tokens. Raises UnitError, also for a finer price than it can hold."""
    match = _TOKEN_PRICE.match(text)
    if match is None:
        raise UnitError("not a price", "write dollars per million tokens, such as $0.25/Mtok")
    return _nanousd(match["amount"])


def parse_duration_ms(text: str) -> int:
    """`250ms`, `60s`, `5min`, `1.5h` or `1d` in milliseconds. Raises UnitError, also for parts of a millisecond."""
    match = _DURATION.match(text)
    if match is None:
        raise UnitError("not a duration", "write a number and ms, s, min, h or d, such as 250ms or 1h")
    milliseconds = Decimal(match["count"]) * _UNIT_MS[match["unit"]]
    if milliseconds != int(milliseconds):
        raise UnitError("finer than one millisecond", "write whole milliseconds")
    return int(milliseconds)


def parse_budget(text: str) -> Budget:
    """`$50/month`. Raises UnitError."""
    match = _BUDGET.match(text)
    if match is None:
        windows = ", ".join(get_args(Window))
        raise UnitError("not a budget", f"write dollars per window ({windows}), such as $50/month")
    window: Window = match["window"]  # type: ignore[assignment]  # the pattern lists the windows
    return Budget(_nanousd(match["amount"]), window)


def parse_rate(text: str, *, of: Literal["requests", "tokens"] = "requests") -> Rate:
    """`600/min`. Raises UnitError, also for a rate of zero."""
    match = _RATE.match(text)
    if match is None:
        example = "600/min" if of == "requests" else "100000/min"
        raise UnitError("not a rate", f"write {of} per s, min or h, such as {example}")
    if int(match["count"]) == 0:
        raise UnitError("a rate of zero admits nobody", "write at least 1, or revoke the key")
    return Rate(int(match["count"]), _UNIT_S[match["unit"]])


def parse_percent(text: str) -> float:
    """`5%` or `0.25%`, above 0 and up to 100, as a number of percent. Raises UnitError."""
    match = _PERCENT.match(text)
    if match is None:
        raise UnitError("not a percentage", "write a number and its sign, such as 5%")
    percent = float(match["count"])
    if not 0 < percent <= 100:
        raise UnitError("not between 0% and 100%", "write more than 0% and at most 100%, such as 5%")
    return percent


@lru_cache(maxsize=4096)
def format_money(nanousd: int) -> str:
    """`$0.0125`: exact, without trailing zeros."""
    dollars, rest = divmod(abs(nanousd), 1_000_000_000)
    text = "%s$%d.%09d" % ("-" if nanousd < 0 else "", dollars, rest)  # noqa: UP031  # twice as fast as an f-string
    return text.rstrip("0").rstrip(".")


def format_duration(milliseconds: int) -> str:
    """`90s`, `1500ms`, `2h`: exact, in the largest unit that holds it whole."""
    unit = next(unit for unit in reversed(_UNIT_MS) if milliseconds % _UNIT_MS[unit] == 0)
    return f"{milliseconds // _UNIT_MS[unit]}{unit}"


def _nanousd(amount: str) -> int:
    nanousd = Decimal(amount).scaleb(9)  # at most 24 digits: exact in the default context of 28
    if nanousd != int(nanousd):
        raise UnitError("finer than one nano-dollar", "write at most nine decimals")
    return int(nanousd)
