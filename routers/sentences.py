"""Conditions and bounds as people write them: days, hours, time zones, ranges of tokens."""

import re
from zoneinfo import available_timezones

from routers.units import UnitError
from routers.when import DAYS

DAYS_PATTERN = rf"^({'|'.join(DAYS)})(-({'|'.join(DAYS)}))?$"
HOURS_PATTERN = r"^([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)$"
TOKEN_RANGE_PATTERN = r"^(>= *\d{1,9}|<= *\d{1,9}|>= *\d{1,9} and <= *\d{1,9})$"
ZONE_PATTERN = r"^[A-Za-z][A-Za-z0-9_+/-]{0,63}$"

_HOURS = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)\Z", re.ASCII)
_TOKENS = re.compile(r"(?:>= *(?P<least>\d{1,9}))?(?P<both> and )?(?:<= *(?P<most>\d{1,9}))?\Z", re.ASCII)


def parse_days(text: str) -> frozenset[int]:
    """`mon` or `mon-fri`; 0 is Monday. Raises UnitError."""
    if not re.match(DAYS_PATTERN, text):
        raise UnitError("neither a day nor a span of days", f"write {', '.join(DAYS)}, or a span such as mon-fri")
    first, _, last = text.partition("-")
    start = DAYS.index(first)
    return frozenset((start + step) % 7 for step in range((DAYS.index(last or first) - start) % 7 + 1))


def parse_hours(text: str) -> tuple[int, int]:
    """`09:00-18:00` as minutes of the day; `22:00-06:00` goes on past midnight. Raises UnitError."""
    match = _HOURS.match(text)
    if match is None or not re.match(HOURS_PATTERN, text):
        raise UnitError("not a span of hours", "write two times of the day, such as 09:00-18:00 or 22:00-06:00")
    hour, minute, to_hour, to_minute = map(int, match.groups())
    start, end = hour * 60 + minute, to_hour * 60 + to_minute
    if start == end:
        raise UnitError("starts where it ends", f"write 00:00-24:00 for a whole day, or another end than {text[-5:]}")
    return start, end


def parse_zone(text: str) -> str:
    """The IANA name of a time zone, such as `Europe/Berlin`. Raises UnitError."""
    if re.match(ZONE_PATTERN, text) and (text == "UTC" or text in available_timezones()):
        return text
    raise UnitError("no time zone of this name", "write an IANA name such as Europe/Berlin or America/New_York, or UTC")


def parse_token_range(text: str) -> tuple[int, int | None]:
    """`>= 1000`, `<= 8000` or `>= 1000 and <= 8000`: least and most, both inclusive. Raises UnitError."""
    if not re.match(TOKEN_RANGE_PATTERN, text) or (match := _TOKENS.match(text)) is None:
        raise UnitError("not a range of tokens", 'write ">= 1000", "<= 8000" or ">= 1000 and <= 8000"')
    least, most = int(match["least"] or 0), match["most"]
    if most is not None and int(most) < least:
        raise UnitError("an empty range", "write the lower bound first, such as >= 1000 and <= 8000")
    return least, None if most is None else int(most)
