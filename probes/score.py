"""A probe over every row of a table, kept in parts: a run that is killed goes on where it was.

Beside OUT stands OUT.parts: `job.json`, which says what is scored by what, and a file per chunk of rows. A part is
written under another name and renamed, so it is whole or not there; so is OUT. A part of another job is not used.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from probes.cells import Unreadable, conversation
from probes.errors import TableError
from probes.manifest import read_manifest, reading_of
from probes.text import Message, render

ABSTAINED = "the probe abstains: unlike what it was fitted on"
CHUNK = 256
"""Rows that a killed run loses at most."""


class Prober(Protocol):
    """What scores: `probes.runtime.EncoderProbe`."""

    @property
    def version(self) -> str: ...

    @property
    def heads(self) -> tuple[str, ...]: ...

    def probe(self, conversations: Sequence[Sequence[Message]]) -> list[dict[str, float]]: ...


class StaticProber:
    """A static probe as a prober; of what it abstains from it says nothing."""

    def __init__(self, folder: Path) -> None:
        from probes.static import StaticProbe

        self._probe = StaticProbe.load(folder)
        self.version = self._probe.version
        self.heads = tuple(head.name for head in self._probe.manifest.heads if head.kind == "correct")

    def probe(self, conversations: Sequence[Sequence[Message]]) -> list[dict[str, float]]:
        return [dict(self._probe.read(render(messages)).p_success) for messages in conversations]


class ListenedProber:
    """A probe of tier prefill or self as a prober: the local model reads each conversation."""

    def __init__(self, folder: Path, source: str) -> None:
        from probes.artifact import read
        from probes.scored import heard_by

        self._artifact = read(folder)
        self._heard = heard_by(self._artifact, source)
        self.version = self._artifact.version
        self.heads = tuple(head.name for head in self._artifact.manifest.heads if head.kind == "correct")

    def probe(self, conversations: Sequence[Sequence[Message]]) -> list[dict[str, float]]:
        from probes.scored import listened

        if not conversations:
            return []
        features = listened(self._artifact, self._heard, [render(messages) for messages in conversations])
        values = self._artifact.heads.predict_proba(features)
        return [dict(reading_of(self._artifact.manifest.heads, row).p_success) for row in values.tolist()]


def prober(folder: Path, encoder: str) -> Prober:
    """What the artifact in `folder` is read with; ArtifactError or EncoderError."""
    tier = read_manifest(folder).tier
    if tier == "static":
        return StaticProber(folder)
    if tier in ("prefill", "self"):
        return ListenedProber(folder, encoder)
    from probes.runtime import EncoderProbe

    return EncoderProbe.load(folder, encoder)


@dataclass(frozen=True, slots=True)
class Scored:
    """One row: P(correct) per head, or why there is none."""

    p: dict[str, float] | None
    reason: str | None


Decide = Callable[[int, Sequence[Message] | None, Mapping[str, float] | None], Mapping[str, object]]
"""(row, its conversation, its probabilities) to the columns that the decision adds."""


def score_cells(
    cells: Sequence[object], probe: Prober, out: Path, source: Mapping[str, str], *, progress: bool = False
) -> list[Scored]:
    """Score every cell; parts of an earlier run of the same job beside `out` are not scored again.

    `source` names the cells: where they are from, and its digest.
    """
    from tqdm import tqdm

    job = {**source, "probe": probe.version, "heads": probe.heads, "chunk": CHUNK}
    found: list[Scored] = []
    with (
        _parts(out, json.dumps(job)) as parts,
        tqdm(total=len(cells), desc=probe.version, unit="row", disable=not progress) as bar,
    ):
        for start in range(0, len(cells), CHUNK):
            part = parts / f"{start:010}.json"
            chunk = cells[start : start + CHUNK]
            if part.exists():
                found += [Scored(p, reason) for p, reason in json.loads(part.read_bytes())]
                bar.update(len(chunk))
                continue
            scored = list(_score(chunk, probe))
            write_whole(part, json.dumps([(row.p, row.reason) for row in scored]).encode())
            found += scored
            bar.update(len(chunk))
    return found


def _score(cells: Sequence[object], probe: Prober) -> Iterator[Scored]:
    read: list[list[Message] | str] = []
    for cell in cells:
        try:
            read.append(conversation(cell))
        except Unreadable as error:
            read.append(str(error))
    found = iter(probe.probe([one for one in read if not isinstance(one, str)]))
    for one in read:
        p = None if isinstance(one, str) else next(found)
        yield Scored(p, None) if p else Scored(None, one if isinstance(one, str) else ABSTAINED)


def write_scores(
    out: Path,
    rows: Sequence[Scored],
    cells: Sequence[object],
    heads: Sequence[str],
    decide: Decide,
    kept: Mapping[str, list[Any]],
    facts: Mapping[str, object],
) -> dict[tuple[str, str | None], int]:
    """Write OUT whole and remove its parts; returns how often each decision was taken, apart by the reason why a row
    was not scored (None: it was).

    Columns: `row`, those kept, `p_<head>`, what `decide` says, `reason` (null where the row could be read).
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    decided = [
        decide(i, None if row.p is None else conversation(cell), row.p)
        for i, (row, cell) in enumerate(zip(rows, cells, strict=True))
    ]
    columns: dict[str, Any] = {"row": pa.array(range(len(rows)), pa.int64())}
    columns |= {name: _column(values) for name, values in kept.items()}
    for head in heads:
        columns[f"p_{head}"] = pa.array([None if row.p is None else row.p.get(head) for row in rows], pa.float64())
    for name in dict.fromkeys(name for one in decided for name in one):
        columns[name] = pa.array([one.get(name) for one in decided])
    columns["reason"] = pa.array([row.reason for row in rows], pa.string())
    table = pa.table(columns).replace_schema_metadata({"leadline": json.dumps(dict(facts))})
    part = out.with_name(f"{out.name}.part")
    parquet.write_table(table, part, compression="zstd")
    os.replace(part, out)
    shutil.rmtree(_folder(out), ignore_errors=True)
    counts: dict[tuple[str, str | None], int] = {}
    for row, one in zip(rows, decided, strict=True):
        choice = str(one.get("decision")), row.reason
        counts[choice] = counts.get(choice, 0) + 1
    return counts


def _column(values: list[Any]) -> Any:
    """As it came; what has no one type becomes text."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


@contextmanager
def _parts(out: Path, job: str) -> Iterator[Path]:
    """The folder of this job's parts, for one run at a time; those of another job are removed."""
    folder = _folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TableError(f"{out}: another run is writing it; wait for that, or give another --out") from None
        known = folder / "job.json"
        if not known.exists() or known.read_text(encoding="utf-8") != job:
            for old in folder.glob("*.json"):
                old.unlink()
            write_whole(known, job.encode())
        yield folder


def write_whole(path: Path, data: bytes) -> None:
    """A reader finds all of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def file_sha256(path: Path) -> str:
    """TableError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}") from None
