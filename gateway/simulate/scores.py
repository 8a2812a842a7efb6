"""P(success) of the policy's own probe for every prompt, kept on disk as it is measured: a run goes on where it broke.

A file per (probe, prompts): its name is their digest, its content float64 rows [n, heads], appended batch by batch.
"""

import fcntl
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gateway.simulate.table import Array

BATCH = 64


class Prober(Protocol):
    """What measures: `probes.runtime.EncoderProbe`."""

    @property
    def version(self) -> str: ...

    @property
    def heads(self) -> tuple[str, ...]: ...

    def probe(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[dict[str, float]]: ...


def score_file(folder: Path, version: str, prompts: Sequence[str]) -> Path:
    """Where the scores of these prompts by this probe are kept."""
    digest = hashlib.sha256(version.encode())
    for prompt in prompts:
        text = prompt.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(text) + text)
    return folder / f"{version.replace('/', '-')}.{digest.hexdigest()[:16]}.scores"


def probe_scores(probe: Prober, prompts: Sequence[str], folder: Path, *, progress: bool = False) -> Array:
    """[n, heads] of the probe, as one user message each. What `folder` holds of them already is not measured again."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    path = score_file(folder, probe.version, prompts)
    width = 8 * len(probe.heads)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another run over the same prompts: when it is done, all is there
        whole = path.stat().st_size // width
        file.truncate(whole * width)  # half a row of a run that was killed
        bar = tqdm(total=len(prompts), initial=whole, desc=f"probe {probe.version}", disable=not progress, unit="query")
        with bar:
            for start in range(whole, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                found = probe.probe([[{"role": "user", "content": text}] for text in batch])
                rows = np.array([[row[head] for head in probe.heads] for row in found], dtype=np.float64)
                file.write(rows.tobytes())
                file.flush()
                bar.update(len(batch))
    return np.fromfile(path, dtype=np.float64).reshape(len(prompts), len(probe.heads))
