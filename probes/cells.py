"""Prompts out of any table: a cell is a text, a conversation, or nothing that can be read, with the reason."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.errors import TableError
from probes.text import Message, render

SUFFIXES = (".parquet", ".csv", ".jsonl")


class Unreadable(Exception):  # not an error of the run: one row of it
    """A cell that no probe can read; the message is the reason."""


def at_row(number: object) -> str:
    """A row of a table, the same in all messages, and in the column `row` of what is scored."""
    return f"row {number} (the first is row 0)"


def read_frame(path: Path) -> Any:
    """A .parquet or .csv table with the types that pandas finds; rows are numbered as in the file, whatever index is
    stored with them. TableError names value and fix."""
    import pandas as pd

    if path.suffix not in (".parquet", ".csv"):
        raise TableError(f"{path}: unknown table type {path.suffix!r}; give a .parquet or .csv file")
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError:
        raise TableError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot be read: {error}") from None
    return frame.reset_index(drop=True)


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """These columns of a .parquet, .csv or .jsonl table, as Python values; TableError names field, value and fix."""
    import pandas as pd
    import pyarrow.parquet as parquet

    if path.suffix not in SUFFIXES:
        raise TableError(f"{path}: unknown table type {path.suffix!r}; give a {', '.join(SUFFIXES)} file")
    try:
        if path.suffix == ".parquet":
            names = parquet.read_schema(path).names
            _require(path, columns, names)
            table = parquet.read_table(path, columns=list(dict.fromkeys(columns)))
            return {name: table.column(name).to_pylist() for name in columns}
        if path.suffix == ".csv":
            # What is no UTF-8 comes as surrogates, and is told row by row.
            frame = pd.read_csv(path, dtype=str, encoding_errors="surrogateescape")
        else:
            frame = pd.DataFrame([json.loads(line) for line in path.read_bytes().splitlines() if line.strip()])
    except FileNotFoundError:
        raise TableError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot be read: {error}") from None
    _require(path, columns, list(map(str, frame.columns)))
    return {name: frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in columns}


def _require(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    for column in columns:
        if column not in names:
            raise TableError(f"{path}: no column {column!r}; it has {', '.join(names)}")


def conversation(cell: object) -> list[Message]:
    """The messages of a cell: a text is one, by the user; a list of messages, as values or as JSON, is itself.

    A body of a request (`{"messages": [...]}`) is read too. Raises Unreadable.
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError as error:
            raise Unreadable(f"not UTF-8 at byte {error.start}") from None
    if isinstance(cell, str):
        cell = _parsed(cell)
    if isinstance(cell, Mapping) and "messages" in cell:
        cell = cell["messages"]
    if cell is None or cell != cell:
        raise Unreadable("empty")
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        messages = [message for message in cell if isinstance(message, Mapping)]
        if len(messages) < len(cell):
            raise Unreadable("not a conversation: a message must be an object with role and content")
    else:
        messages = [{"role": "user", "content": cell if isinstance(cell, str) else str(cell)}]
    texts = [render([message]) for message in messages]
    if not any(map(str.strip, texts)):
        raise Unreadable("empty")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Unreadable("not Unicode: a surrogate without its other half") from None
    return messages


def _parsed(text: str) -> object:
    """A conversation that stands in a cell as JSON; any other text is itself."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    found = value.get("messages") if isinstance(value, dict) else value
    if isinstance(found, list) and found and all(isinstance(one, dict) and "role" in one for one in found):
        return found
    return text
