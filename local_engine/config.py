"""How an engine process is set up. No torch here: `configure_process` has to run before torch is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from local_engine.cpus import usable_cpus
from local_engine.errors import ModelLoadError

Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

_BUNDLED = Path(__file__).parent / "bundled"
SOCKET_PATH_BYTES = 100  # sun_path holds 104 (macOS) or 108 (Linux) bytes, the final zero included


def default_threads() -> int:
    """One core is left to the gateway: two processes fighting for the last core slow each other many times over."""
    return max(1, usable_cpus() - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    models: Mapping[str, str]
    """Name on the link -> a local path, a Hugging Face hub id, or `bundled/<name>`; may be empty, for probes alone."""
    socket_path: str
    threads: int = field(default_factory=default_threads)
    dtype: Dtype = "auto"
    """auto: float32 on CPU, where answers are then those of the models' cards, and the checkpoint's own type on CUDA.
    bfloat16 is 1.9 to 2.4 times as fast on an AMD EPYC, 2 to 3 times on an Intel Xeon with AMX, and for few rows alone
    on one that has AVX-512 BF16 without it; its answers differ now and then."""
    device: Device = "auto"
    max_running: int = 32
    """Sequences decoded at the same time; more wait in line."""
    prefill_chunk: int = 256
    """Most tokens of one step, the one of each decoding sequence counted first; bounds the time to honour a cancel.
    Where a step takes longer than 50 ms it is given fewer."""
    kv_bytes: int = 1 << 30
    """Most bytes of keys and values of running sequences, for each model; when it is full, the last in line waits."""
    prefix_bytes: int = 1 << 29
    """Most bytes of keys and values kept for prompts that begin alike, for each model; 0 keeps none."""
    prefix_disk: Path | None = None
    """A folder for what is kept of prompts, so that it survives a restart; as confidential as the prompts."""
    prefix_disk_bytes: int = 4 << 30
    prefix_redis: str | None = None
    """URL of a Redis for the same, shared by engines of several hosts; needs the redis package."""
    speculation: Mapping[str, str] = field(default_factory=dict)
    """How tokens are drafted, by the name of the model; `auto` for those not named. The text is the same, and its law.

    `off`, or one or more of these, joined by `+`; the engine takes of them, at each step, what makes the most tokens
    per second, and nothing where nothing pays. `ngram`: what followed the same tokens earlier in the text. `recycle`:
    what the model itself held likely after the same few tokens. `auto`: both. `draft:SOURCE`: a smaller model with the
    same tokenizer, named as in `models`. `exit:LAYER`: the first layers of the model itself. One of the last two."""
    exit_with_parent: bool = True
    """Stop when the process that started this one is gone, so that no engine outlives its supervisor."""

    def __post_init__(self) -> None:
        for name, source in self.models.items():
            if not name or not source:
                raise ValueError(f"models holds {name!r}: {source!r}; both the name and the path or hub id are needed")
        if not 0 < len(os.fsencode(self.socket_path)) <= SOCKET_PATH_BYTES:
            raise ValueError(f"socket_path {self.socket_path!r} must have 1 to {SOCKET_PATH_BYTES} bytes")
        for name, how in self.speculation.items():
            if name not in self.models:
                raise ValueError(f"speculation names {name!r}; the models are {', '.join(self.models) or 'none'}")
            try:
                read_speculation(how)
            except ValueError as error:
                raise ValueError(f"speculation of {name!r}: {error}") from None
        least_of = {
            "threads": 1,
            "max_running": 1,
            "prefill_chunk": 1,
            "kv_bytes": 1,
            "prefix_bytes": 0,
            "prefix_disk_bytes": 1,
        }
        for key, least in least_of.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, not {getattr(self, key)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Who drafts for a model; by default nobody."""

    ngram: bool = False
    recycle: bool = False
    draft: str | None = None
    """A path, a hub id, or `bundled/<name>`."""
    exit_layer: int | None = None


def read_speculation(how: str) -> Speculation:
    """What a value of `EngineConfig.speculation` says. Raises ValueError, with what may be said."""
    if how == "off":
        return Speculation()
    ngram = recycle = False
    draft: str | None = None
    exit_layer: int | None = None
    for part in how.split("+"):
        kind, _, detail = part.partition(":")
        slow = draft is not None or exit_layer is not None
        if part == "auto" and not (ngram or recycle):
            ngram = recycle = True
        elif part == "ngram" and not ngram:
            ngram = True
        elif part == "recycle" and not recycle:
            recycle = True
        elif kind == "draft" and detail and not slow:
            draft = detail
        elif kind == "exit" and detail.isdecimal() and int(detail) > 0 and not slow:
            exit_layer = int(detail)
        else:
            raise ValueError(
                f"{how!r} is neither off nor a sum of auto (or ngram, recycle), each once, and at most one of "
                "draft:SOURCE and exit:LAYER, joined by +"
            )
    return Speculation(ngram=ngram, recycle=recycle, draft=draft, exit_layer=exit_layer)


def configure_process(threads: int) -> None:
    """Bound and calm the maths threads of this process. Call before torch is imported anywhere in it."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep; the gateway shares these cores
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def locate(source: str) -> tuple[str, bool]:
    """(path or hub id, whether it is a local folder). Raises ModelLoadError for a folder that is not there."""
    if source.startswith("bundled/"):
        folder = _BUNDLED / source.removeprefix("bundled/")
        if not (folder / "config.json").is_file():
            names = sorted(path.parent.name for path in _BUNDLED.glob("*/config.json"))
            raise ModelLoadError(f"there is no model {source!r}; bundled are: {', '.join(names) or 'none'}")
        return str(folder), True
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path), True
    if source.startswith((".", "~", os.sep)):
        raise ModelLoadError(f"there is no folder {source!r}")
    return source, False
