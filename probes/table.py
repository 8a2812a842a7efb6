"""A table of labelled prompts, read from a file with what is wrong with its cells said."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from probes.calibrate import Array
from probes.cells import Unreadable, at_row, conversation, read_columns, read_frame
from probes.errors import TableError
from probes.text import render
from probes.types import Kind

MIN_ROWS = 20


@dataclass(frozen=True, slots=True)
class Table:
    """Prompts with labels [n, heads]; `sources` names each head's column; `groups` [n] or None.

    Labels are in {0, 1, NaN}; those of a head for tokens are numbers of tokens, or NaN.
    """

    prompts: list[str]
    labels: Array
    names: tuple[str, ...]
    sources: tuple[str, ...]
    groups: npt.NDArray[np.object_] | None = None
    kinds: tuple[Kind, ...] = ()
    """What each head foretells; P(correct) where left out."""
    experts: npt.NDArray[np.object_] | None = None
    """[n], names of kinds of prompts, of which each is to have a probe of its own where it has labels enough."""

    def __post_init__(self) -> None:
        if not self.kinds:
            object.__setattr__(self, "kinds", ("correct",) * len(self.names))

    def sha256(self) -> str:
        """Digest of the prompts, the labels and the heads' names, in order."""
        digest = hashlib.sha256("\x1f".join(self.names).encode())
        for prompt, row in zip(self.prompts, self.labels, strict=True):
            digest.update(prompt.encode("utf-8", "surrogatepass") + b"\x1f" + row.tobytes())
        return digest.hexdigest()

    def labelled(self) -> "Table":
        """The rows that have a label for every head."""
        rows = np.flatnonzero(~np.isnan(self.labels).any(1))
        prompts = [self.prompts[row] for row in rows]
        groups, experts = (None if names is None else names[rows] for names in (self.groups, self.experts))
        return replace(self, prompts=prompts, labels=self.labels[rows], groups=groups, experts=experts)

    def column(self, name: str) -> Array:
        """Labels [n] of one head."""
        return np.asarray(self.labels[:, self.names.index(name)])


def read_table(
    path: Path,
    prompt: str,
    heads: Mapping[str, str],
    *,
    drop_if: str | None = None,
    group_column: str | None = None,
    experts: str | None = None,
    tokens: Mapping[str, str] | None = None,
    domain: str | None = None,
    reasoning: tuple[str, str] | None = None,
) -> Table:
    """Read a parquet or csv table; `heads` maps head to column. Raises TableError naming field, value and fix.

    A prompt is a text, or a conversation as a list of messages or as JSON, which is read whole as a gateway reads it.

    Beside P(correct): `tokens` maps heads to columns of answer lengths, `domain` is a column of names, `reasoning` a
    pair of 0/1 columns (right without thinking, right with it), of which thinking pays where only the second is 1.
    """
    tokens = tokens or {}
    frame = read_frame(path)  # for the labels; prompts as they stand: a conversation stays one, "007" stays a text
    for option, column in [
        ("--prompt", prompt),
        *((f"--head {name}", column) for name, column in heads.items()),
        *([("--drop-if", drop_if)] if drop_if else []),
        *([("--group-column", group_column)] if group_column else []),
        *([("--experts", experts)] if experts else []),
        *((f"--tokens {name}", column) for name, column in tokens.items()),
        *([("--domain", domain)] if domain else []),
        *(("--reasoning", column) for column in reasoning or ()),
    ]:
        if column not in frame.columns:
            raise TableError(f"{path}: no column {column!r} for {option}; it has {', '.join(map(str, frame.columns))}")
    if not heads:
        raise TableError("no heads: give --head NAME=COLUMN at least once")
    frame[prompt] = pd.Series(read_columns(path, [prompt])[prompt], index=frame.index, dtype=object)
    if drop_if:
        frame = frame[~_binary(frame[drop_if], path, drop_if).astype(bool)]
    if len(frame) < MIN_ROWS:
        raise TableError(f"{path}: {len(frame)} usable rows; a probe needs at least {MIN_ROWS}")
    prompts = [_text(cell, path, prompt, row) for row, cell in frame[prompt].items()]
    labels = np.column_stack([_binary(frame[column], path, column) for column in heads.values()])
    for name, column, known in zip(heads, heads.values(), (~np.isnan(labels)).sum(0), strict=True):
        if known == 0:
            raise TableError(f"{path}: column {column!r} holds no label for head {name!r}")
    groups, mixed = (
        None if column is None else frame[column].astype(str).to_numpy(dtype=object)
        for column in (group_column, experts)
    )
    found = [(name, column, "correct", labels[:, at]) for at, (name, column) in enumerate(heads.items())]
    found += [
        (f"{name}.tokens", column, "out_tokens", _lengths(frame[column], path, column))
        for name, column in tokens.items()
    ]
    if domain:
        names = frame[domain].astype(str)
        known = frame[domain].notna().to_numpy()
        for name in sorted(set(names[known])):
            found.append((f"domain.{name}", domain, "domain", np.where(known, (names == name).to_numpy(float), np.nan)))
    if reasoning:
        without, with_it = (_binary(frame[column], path, column) for column in reasoning)
        pays = np.where(np.isnan(without + with_it), np.nan, (with_it > without).astype(float))
        found.append(("needs_reasoning", " < ".join(reasoning), "needs_reasoning", pays))
    every, sources, kinds, columns = zip(*found, strict=True)
    return Table(prompts, np.column_stack(columns), every, sources, groups, kinds, mixed)


def _text(cell: object, path: Path, column: str, row: object) -> str:
    """What the probe reads of a text or a conversation."""
    try:
        return render(conversation(cell))
    except Unreadable as error:
        wrong = "is empty" if str(error) == "empty" else f"cannot be read ({error})"
        raise TableError(f"{path}: column {column!r} {wrong} in {at_row(row)}; drop or fill such rows") from None


def _lengths(column: Any, path: Path, name: str) -> Array:
    """A column of answer lengths as numbers from 0, NaN where empty."""
    numbers = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = (np.isnan(numbers) & column.notna().to_numpy()) | (numbers < 0) | np.isinf(numbers)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        found = column.iloc[row : row + 1].tolist()[0]
        raise TableError(
            f"{path}: column {name!r} holds {found!r} in {at_row(column.index[row])}; lengths are tokens, 0 or more"
        )
    return np.asarray(numbers)


def _binary(column: Any, path: Path, name: str) -> Array:
    """A label column as 0, 1, NaN."""
    numbers = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = (np.isnan(numbers) & column.notna().to_numpy()) | ~(np.isnan(numbers) | np.isin(numbers, [0, 1]))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise TableError(
            f"{path}: column {name!r} holds {column.iloc[row : row + 1].tolist()[0]!r} in {at_row(column.index[row])}; "
            "labels are 0 or 1 (or true, false), empty where unknown"
        )
    return np.asarray(numbers)
