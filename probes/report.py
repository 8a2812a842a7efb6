"""Measured rows as a table for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from probes.evaluate import Row


PIPED_COLUMNS = 160
"""Where nobody's window says how wide a line may be: a file, a pipe, a log."""


def console() -> Console:
    """Tables are as wide as the window; where there is none, wide enough that no number is cut or folded."""
    found = Console()
    return found if found.is_terminal else Console(width=PIPED_COLUMNS)


def render_rows(title: str, rows: Sequence["Row"]) -> Table:
    """A rich table of rows with their 95% intervals."""
    table = Table(title=title, title_justify="left")
    table.add_column("name", overflow="fold")
    table.add_column("metric")
    for header in ("value", "95% interval"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("unit")
    for row in rows:
        value = f"{row.value:.0f}" if row.metric == "n" else f"{row.value:.4f}"
        spread = "" if row.low is None or row.high is None else f"{row.low:.4f} to {row.high:.4f}"
        table.add_row(row.name, row.metric, value, spread, row.unit)
    return table
