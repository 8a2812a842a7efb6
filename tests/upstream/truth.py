"""The truth file: one row per call that reached the upstream, written before the call's last byte leaves.

A call that is answered over time writes its row when it arrives and again as it ends; the later line replaces the
earlier, so whatever is killed in between, the row is there.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tests.upstream.oracle import Tokens

Phase = Literal["received", "headers", "body", "complete"]


@dataclass
class Row:
    """One call as its provider saw it."""

    id: str
    """Unique among the rows."""
    call: str
    """The caller's own name of it; one call may come in several attempts."""
    attempt: int
    """1 for the first of this call."""
    path: str
    model: str
    stream: bool
    fault: str = ""
    variant: str = ""
    phase: Phase = "received"
    reported: bool = False
    """The usage went out whole, in a form that can be believed."""
    tokens: Tokens = field(default_factory=Tokens)
    nanousd: int = 0
    """What the provider bills."""
    disconnected: bool = False
    """The caller left first."""
    delivered_tokens: int = 0
    delivered_bytes: int = 0
    """UTF-8 bytes of text (content, reasoning, tool arguments) handed to the network."""


class TruthFile:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, row: Row) -> None:
        os.write(self._fd, json.dumps(asdict(row)).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


def read_truth(path: Path) -> list[Row]:
    """The last word on each call, in order of arrival."""
    rows: dict[str, Row] = {}
    for line in path.read_bytes().splitlines():
        row = Row(**json.loads(line))
        row.tokens = Tokens(**row.tokens)  # type: ignore[arg-type]
        rows[row.id] = row
    return list(rows.values())
