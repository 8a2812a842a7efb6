"""The table of a simulation: for each query, how well each model answered, and what that cost.

Wide: one row a query, `--model strong=gpt4_correct[:cost_usd[:out_tokens]]` names a model's columns. Long: one row per
query and model, `--by COLUMN` names the column that holds the model, `--model strong=VALUE` what stands in it.
Costs are read as US dollars and kept as whole nano-dollars.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from probes.cells import at_row, read_frame
from probes.errors import TableError

Array = npt.NDArray[np.float64]
MIN_ROWS = 20
MAX_COST_USD = 1e6
"""Of one answer. Above, the column holds something else."""


@dataclass(frozen=True, slots=True)
class Long:
    """The columns of a table with one row per query and model."""

    by: str
    query: tuple[str, ...]
    """Columns that together name a query."""
    correct: str = "correct"
    cost: str | None = None
    tokens: str | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a table holds what."""

    prompt: str
    models: Mapping[str, tuple[str, str | None, str | None]]
    """Wide: model of the policy → (correctness, cost, output tokens). Long: → (the value in `long.by`, None, None)."""
    long: Long | None = None
    p_success: Mapping[str, str] = field(default_factory=dict)
    """Model of the policy → a column with its P(success)."""
    group: str | None = None
    drop_if: str | None = None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What each of m models did on each of n queries."""

    prompts: list[str]
    models: tuple[str, ...]
    correct: Array
    """[n, m] in [0, 1]."""
    cost: Array | None
    """[n, m] whole nano-dollars; None: the table has no costs."""
    tokens: Array | None
    """[n, m] output tokens; None: the table has none."""
    p_success: Mapping[str, Array]
    """Model → [n], where the table brings its own."""
    groups: npt.NDArray[np.object_] | None
    incomplete: int
    """Queries left out, as not every model has an outcome there."""


def read_outcomes(path: Path, columns: Columns, prompts: Path | None = None) -> Outcomes:
    """Read a table whole. `prompts`: another table that holds the prompts of a long one, under the same query columns.

    Raises TableError, which names the column, the row and the fix.
    """
    frame = _read(path)
    _require(frame, path, _wanted(columns, own_prompts=prompts is None))
    if columns.drop_if is not None:
        dropped = _numbers(frame[columns.drop_if], path, columns.drop_if, 0, 1)
        frame = frame[~(dropped > 0.5)]
    if columns.long is not None:
        frame, named = _widened(frame, path, columns, columns.long, prompts)
    else:
        named = dict(columns.models)
    return _outcomes(frame, path, columns, named)


_PARTS = ("correctness", "cost", "output tokens")


def _wanted(columns: Columns, *, own_prompts: bool) -> dict[str, str]:
    """By option, the columns that the table must have. `own_prompts`: what is known of a query stands in it, too."""
    wanted = _of_queries(columns) if own_prompts else {}
    if (long := columns.long) is None:
        for model, found in columns.models.items():
            wanted |= {f"--model {model} ({part})": c for part, c in zip(_PARTS, found, strict=True) if c is not None}
    else:
        wanted |= {"--by": long.by, **{f"--query {c}": c for c in long.query}, **_options(_held(long))}
    return wanted | ({"--drop-if": columns.drop_if} if columns.drop_if is not None else {})


def _of_queries(columns: Columns) -> dict[str, str]:
    named = {"--prompt": columns.prompt, **({"--group": columns.group} if columns.group else {})}
    return named | {f"--p-success {model}": column for model, column in columns.p_success.items()}


def _outcomes(
    frame: Any, path: Path, columns: Columns, named: Mapping[str, tuple[str, str | None, str | None]]
) -> Outcomes:
    correct = np.column_stack([_numbers(frame[c], path, c, 0, 1) for c, _, _ in named.values()])
    cost = _per_model(frame, path, [c for _, c, _ in named.values()], "cost", MAX_COST_USD)
    tokens = _per_model(frame, path, [c for _, _, c in named.values()], "output tokens", 1e9)
    known = ~np.isnan(correct).any(1)
    for part in (cost, tokens):
        if part is not None:
            known &= ~np.isnan(part).any(1)
    p_success = {}
    for model, column in columns.p_success.items():
        values = p_success[model] = _numbers(frame[column], path, column, 0, 1)
        known &= ~np.isnan(values)
    blank = frame[columns.prompt].isna().to_numpy()
    if (blank & known).any():
        row = frame.index[np.flatnonzero(blank & known)[0]]
        raise TableError(f"{path}: column {columns.prompt!r} is empty in {at_row(row)}; drop or fill such rows")
    if known.sum() < MIN_ROWS:
        raise TableError(
            f"{path}: {int(known.sum())} of {len(frame)} queries have an outcome of every model named; a comparison "
            f"needs at least {MIN_ROWS}: name fewer models, or fill the table"
        )
    groups = None if columns.group is None else frame[columns.group].astype(str).to_numpy(dtype=object)[known]
    return Outcomes(
        prompts=[str(text) for text in frame[columns.prompt][known]],
        models=tuple(named),
        correct=correct[known],
        cost=None if cost is None else np.rint(cost[known] * 1e9),
        tokens=None if tokens is None else tokens[known],
        p_success={model: values[known] for model, values in p_success.items()},
        groups=groups,
        incomplete=int((~known).sum()),
    )


def _read(path: Path) -> Any:
    frame = read_frame(path)
    if not len(frame):
        raise TableError(f"{path}: holds no rows")
    return frame


def _widened(
    frame: Any, path: Path, columns: Columns, long: Long, prompts: Path | None
) -> tuple[Any, dict[str, tuple[str, str | None, str | None]]]:
    """One row a query, with columns of each model named after the policy's model."""
    held = _held(long)
    key = list(long.query)
    frame = frame.astype(dict.fromkeys((long.by, *key), str))
    texts = frame
    if prompts is not None:
        texts = _read(prompts)
        _require(texts, prompts, {f"--query {c}": c for c in key} | _of_queries(columns))
        texts = texts.astype(dict.fromkeys(key, str))
        if (again := texts.duplicated(key)).any():
            twice = texts.loc[again, key].iloc[0].tolist()
            raise TableError(f"{prompts}: the query {twice} stands in several rows; --query must name one")
    unknown = {model: value for model, (value, _, _) in columns.models.items() if not (frame[long.by] == value).any()}
    if unknown:
        some = ", ".join(map(str, frame[long.by].unique()[:8]))
        told = ", ".join(f"{value!r} (--model {model})" for model, value in unknown.items())
        raise TableError(f"{path}: column {long.by!r} never holds {told}; it holds {some}, …")
    wide = texts.drop_duplicates(key).set_index(key)
    named: dict[str, tuple[str, str | None, str | None]] = {}
    for model, (value, _, _) in columns.models.items():
        rows = frame[frame[long.by] == value]
        if (again := rows.duplicated(key)).any():
            twice = rows.loc[again, key].iloc[0].tolist()
            raise TableError(f"{path}: {value!r} has several rows for the query {twice}; keep one of them")
        rows = rows.set_index(key)
        own = {part: f"{model}: {column}" for part, column in held.items()}
        wide = wide.join(rows[list(held.values())].set_axis(list(own.values()), axis=1), how="left")
        named[model] = own["correct"], own.get("cost"), own.get("tokens")
    return wide.reset_index(), named


def _held(long: Long) -> dict[str, str]:
    """By option, the columns of what is known of an answer."""
    values = {"correct": long.correct, "cost": long.cost, "tokens": long.tokens}
    return {part: column for part, column in values.items() if column is not None}


def _options(held: Mapping[str, str]) -> dict[str, str]:
    return {f"--{part}": column for part, column in held.items()}


def _require(frame: Any, path: Path, wanted: Mapping[str, str]) -> None:
    """Raises TableError with every column that is not there."""
    has = [str(column) for column in frame.columns]
    missing = []
    for option, column in wanted.items():
        if column not in frame.columns:
            close = get_close_matches(column, has, n=1)
            missing.append(f"{column!r} for {option}" + (f" (did you mean `{close[0]}`?)" if close else ""))
    if missing:
        raise TableError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(has)}; name those that it has by these options"
        )


def _per_model(frame: Any, path: Path, names: Sequence[str | None], what: str, most: float) -> Array | None:
    """[n, m], or None where no model has such a column; some with and some without is an error."""
    given = [name for name in names if name is not None]
    if not given:
        return None
    if len(given) < len(names):
        raise TableError(f"--model: a column of {what} for some models only ({', '.join(given)}); give it for all")
    return np.column_stack([_numbers(frame[name], path, name, 0, most) for name in given])


def _numbers(column: Any, path: Path, name: str, low: float, high: float) -> Array:
    """A column as numbers in [low, high], NaN where it is empty."""
    numbers = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = (np.isnan(numbers) & column.notna().to_numpy()) | (numbers < low) | (numbers > high)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise TableError(
            f"{path}: column {name!r} holds {column.iloc[row : row + 1].tolist()[0]!r} in {at_row(column.index[row])}; "
            f"it takes numbers from {low:g} to {high:g}, and is empty where nothing is known"
        )
    return np.asarray(numbers)
