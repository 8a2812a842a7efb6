"""Moments as a person types them at a command: how far back, or a date."""

import datetime as dt

import typer

from routers.units import UnitError, parse_duration_ms


def moment(option: str, text: str, now_ms: int) -> int:
    """Milliseconds since 1970 of `7d` (so long ago) or of an ISO date, of UTC without a zone. Raises BadParameter."""
    try:
        return now_ms - parse_duration_ms(text)
    except UnitError:
        pass
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: write how far back, such as 7d, or a date, 2026-11-01") from None
    return int((found if found.tzinfo is not None else found.replace(tzinfo=dt.UTC)).timestamp() * 1000)
