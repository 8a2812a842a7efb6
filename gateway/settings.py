"""Settings of one process, read once from the environment, validated whole, passed in."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from local_engine.config import Device, Dtype

Durability = Literal["process", "full"]
"""What an acknowledged row survives: the death of any process, or power loss as well."""


class SettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message names it and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How engines use their host: what `EngineConfig` says of each, None being its default."""

    dtype: Dtype
    device: Device
    threads: int | None
    max_running: int | None
    prefill_chunk: int | None
    kv_bytes: int | None
    prefix_bytes: int | None
    prefix_disk: Path | None
    prefix_disk_bytes: int | None
    prefix_redis: str | None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "EngineSettings":
        """Raises SettingsError."""
        env = os.environ if env is None else env
        folder = env.get("LEADLINE_KV_DISK")
        return cls(
            dtype=cast(Dtype, _word(env, "LEADLINE_ENGINE_DTYPE", get_args(Dtype))),
            device=cast(Device, _word(env, "LEADLINE_ENGINE_DEVICE", get_args(Device))),
            threads=_count(env, "LEADLINE_ENGINE_THREADS", "threads"),
            max_running=_count(env, "LEADLINE_ENGINE_RUNNING", "sequences"),
            prefill_chunk=_count(env, "LEADLINE_ENGINE_CHUNK", "tokens"),
            kv_bytes=_bytes(env, "LEADLINE_KV_MIB"),
            prefix_bytes=_bytes(env, "LEADLINE_KV_PREFIX_MIB", least=0),
            prefix_disk=Path(folder).expanduser().absolute() if folder else None,
            prefix_disk_bytes=_bytes(env, "LEADLINE_KV_DISK_MIB"),
            prefix_redis=_redis_url(env.get("LEADLINE_KV_REDIS"), "LEADLINE_KV_REDIS"),
        )

    def given(self) -> dict[str, Any]:
        """The fields of `EngineConfig` that are not left to it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Settings:
    home: Path
    """State folder: ledger, journal, pepper, first key, engine socket."""
    database_url: str
    redis_url: str | None
    max_body_bytes: int
    cache_bytes: int
    durability: Durability = "process"
    engine: Path | None = None
    """The socket of an engine that somebody else keeps up (LEADLINE_ENGINE); None to start our own when needed."""
    worker: int = 0
    """Which of this host's workers this process is: each has a journal of its own."""
    peers: Path | None = None
    """Where this host's workers answer each other's scrapes; None for a worker that is alone."""

    @property
    def shared(self) -> bool:
        """Whether budgets and rates are kept where every worker and host sees them: it takes both servers."""
        return self.redis_url is not None and self.database_url.startswith("postgresql")

    @property
    def journal(self) -> Path:
        return self.home / "journal" / str(self.worker)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        env = os.environ if env is None else env
        home = Path(env.get("LEADLINE_HOME") or Path.home() / ".leadline").expanduser().absolute()
        settings = cls(
            home=home,
            database_url=_database_url(env.get("DATABASE_URL"), home),
            redis_url=_redis_url(env.get("REDIS_URL")),
            max_body_bytes=_bytes(env, "LEADLINE_MAX_BODY_MIB") or 16 << 20,
            cache_bytes=_bytes(env, "LEADLINE_CACHE_MIB") or 4 << 20,
            engine=Path(env["LEADLINE_ENGINE"]).absolute() if env.get("LEADLINE_ENGINE") else None,
            durability=_durability(env.get("LEADLINE_DURABILITY", "process")),
        )
        EngineSettings.from_env(env)  # an engine reads it; what is wrong with it is said here
        asked = env.get("LEADLINE_SHARED") or "0"
        if asked not in ("0", "1"):
            raise SettingsError(f"LEADLINE_SHARED: {asked!r} is neither 1 nor 0")
        if asked == "1":
            settings.require_shared("LEADLINE_SHARED=1")
        return settings

    def require_shared(self, who: str) -> None:
        """Raises SettingsError, on behalf of `who`, that says which of the two servers is missing and how to set it."""
        missing = []
        if self.redis_url is None:
            missing.append("REDIS_URL is not set (redis://HOST:PORT/DB), which counts rates for all workers")
        if not self.database_url.startswith("postgresql"):
            missing.append(
                "DATABASE_URL names no PostgreSQL (postgresql://USER:PASSWORD@HOST/DB), which holds budgets and the "
                "ledger of all workers"
            )
        if missing:
            raise SettingsError(f"{who}: workers that share limits need both servers; {'; '.join(missing)}")

    def prepare_home(self) -> None:
        """Create the state folder, readable by its owner alone. Raises SettingsError."""
        try:
            self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SettingsError(
                f"LEADLINE_HOME: {self.home} cannot be made ({error.strerror}); name a folder that can be written to"
            ) from error
        if not os.access(self.home, os.W_OK | os.X_OK):
            raise SettingsError(f"LEADLINE_HOME: {self.home} cannot be written to; name a folder that can")


def engine_socket(home: Path) -> Path:
    """In the state folder; a unix socket's path holds about 100 bytes, so a deep folder gets one elsewhere."""
    path = home / "engine.sock"
    if len(os.fsencode(path)) <= 96:
        return path
    return Path(tempfile.mkdtemp(prefix="leadline-")) / "engine.sock"


def _database_url(url: str | None, home: Path) -> str:
    if not url:
        return f"sqlite:///{home / 'ledger.db'}"
    for plain in ("postgresql://", "postgres://"):
        if url.startswith(plain):
            return "postgresql+psycopg://" + url.removeprefix(plain)
    if url.startswith(("postgresql+psycopg://", "sqlite:///")):
        return url
    raise SettingsError(
        f"DATABASE_URL: scheme {url.split(':', 1)[0]!r} is not supported; use postgresql://… or sqlite:///PATH"
    )


def _redis_url(url: str | None, name: str = "REDIS_URL") -> str | None:
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        raise SettingsError(f"{name}: scheme {url.split(':', 1)[0]!r} is not supported; use redis://HOST:PORT/DB")
    return url or None


def _durability(word: str) -> Durability:
    for mode in get_args(Durability):
        if word == mode:
            return cast(Durability, mode)
    raise SettingsError(
        f"LEADLINE_DURABILITY: {word!r} is no mode; use process (what is told survives kill -9) or full (power loss)"
    )


def _word(env: Mapping[str, str], name: str, words: tuple[str, ...]) -> str:
    word = env.get(name) or words[0]
    if word not in words:
        raise SettingsError(f"{name}: {word!r} is none of {', '.join(words)}")
    return word


def _count(env: Mapping[str, str], name: str, unit: str, *, least: int = 1) -> int | None:
    raw = env.get(name)
    if raw is None:
        return None
    if not (raw.isascii() and raw.isdecimal()) or int(raw) < least:
        raise SettingsError(f"{name}: {raw!r} is not a {'positive ' if least else ''}whole number of {unit}")
    return int(raw)


def _bytes(env: Mapping[str, str], name: str, *, least: int = 1) -> int | None:
    count = _count(env, name, "MiB", least=least)
    return count << 20 if count is not None else None
