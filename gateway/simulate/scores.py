"""What the policy's own probes say of every prompt, kept on disk as it is measured: a run goes on where it broke.

A file per (probes, heads, prompts): its name is their digest, its content one line of JSON a prompt, appended batch by
batch.
"""

import fcntl
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from routers.types import Signals

BATCH = 64
_encode, _decode = msgspec.json.Encoder().encode, msgspec.json.Decoder(Signals).decode


class Prober(Protocol):
    """What measures: `gateway.in_order.InOrder`."""

    @property
    def version(self) -> str: ...

    def sound(self, conversations: Sequence[Sequence[dict[str, str]]], heads: Mapping[str, str]) -> list[Signals]: ...


def score_file(folder: Path, version: str, heads: Mapping[str, str], prompts: Sequence[str]) -> Path:
    """Where what these probes say of these prompts is kept."""
    digest = hashlib.sha256(f"{version} {sorted(heads.items())}".encode())
    for prompt in prompts:
        text = prompt.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(text) + text)
    return folder / f"{version.replace('/', '-')}.{digest.hexdigest()[:16]}.signals"


def probe_signals(
    probe: Prober, heads: Mapping[str, str], prompts: Sequence[str], folder: Path, *, progress: bool = False
) -> list[Signals]:
    """Of each prompt, as one user message. What `folder` holds of them already is not measured again.

    `heads`: model of the policy to head.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    with score_file(folder, probe.version, heads, prompts).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another run over the same prompts: when it is done, all is there
        file.seek(0)
        kept = file.read()
        whole = kept[: kept.rfind(b"\n") + 1]
        file.truncate(len(whole))  # half a line of a run that was killed
        found = [_decode(line) for line in whole.splitlines()]
        bar = tqdm(total=len(prompts), initial=len(found), desc="probes", disable=not progress, unit="query")
        with bar:
            for start in range(len(found), len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                said = probe.sound([[{"role": "user", "content": text}] for text in batch], heads)
                file.write(b"".join(_encode(one) + b"\n" for one in said))
                file.flush()
                found += said
                bar.update(len(batch))
    return found
