"""The requests list as CSV: the rows of the screen, all of them, money in integers of nano-dollars."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Engine

from gateway.dashboard.words import instant
from gateway.ledger import browse
from gateway.ledger.browse import Slice

COLUMNS = (
    "id", "created_at", "tenant", "key_id", "endpoint", "stream", "model_requested", "model_served", "provider",
    "route", "outcome", "http_status", "error_code", "cache", "attempts", "input_tokens", "cached_input_tokens",
    "cache_write_tokens", "output_tokens", "reasoning_tokens", "cost_nanousd", "cost_estimated", "baseline_nanousd",
    "first_byte_us", "duration_us", "overhead_us", "session", "scope", "policy_version",
)  # fmt: skip
ROWS_AT_ONCE = 500
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def csv_lines(engine: Engine, of: Slice) -> Iterator[str]:
    """A header, then the slice, newest first. An absent value is an empty cell: an unpriced cost is not 0."""
    yield _lines([COLUMNS])
    for rows in browse.pages(engine, of, size=ROWS_AT_ONCE):
        yield _lines(
            [_cell(instant(row["created_at_ms"]) if name == "created_at" else row[name]) for name in COLUMNS]
            for row in rows
        )


def _cell(value: Any) -> str:
    """As text that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA_STARTS) else text


def _lines(rows: Any) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()
