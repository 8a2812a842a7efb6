"""Numbers as a reader wants them. Rounding is for the eye: the exact value always stands beside it."""

import datetime as dt
from decimal import ROUND_HALF_EVEN, Decimal


def short_money(nanousd: int) -> str:
    """Rounded: cents from a dollar on, four decimals from a cent on, three significant digits below."""
    sign, amount = "-" if nanousd < 0 else "", abs(Decimal(nanousd)).scaleb(-9)
    if amount == 0:
        return "$0"
    if amount >= 1:
        return f"{sign}${amount.quantize(Decimal('0.01'), ROUND_HALF_EVEN):,}"
    digits = 4 if amount >= Decimal("0.01") else 2 - amount.adjusted()
    whole, _, rest = f"{amount:.{digits}f}".partition(".")
    return f"{sign}${whole}.{rest.rstrip('0'):0<2}"


def instant(at_ms: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock(at_ms: int) -> str:
    """`21 Nov 14:03:09`, in UTC."""
    at = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC)
    return f"{at.day} {at:%b %H:%M:%S}"


def duration(us: int | None) -> str:
    if us is None:
        return "–"
    if us < 1000:
        return f"{us} µs"
    if us < 1_000_000:
        return f"{us / 1000:.3g} ms" if us < 100_000 else f"{us / 1000:.0f} ms"
    return f"{us / 1_000_000:.2f} s" if us < 60_000_000 else f"{us / 60_000_000:.1f} min"


def count(number: int) -> str:
    return f"{number:,}"
