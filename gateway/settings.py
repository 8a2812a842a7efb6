"""Settings of one process, read once from the environment, validated whole, passed in."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

Durability = Literal["process", "full"]
"""What an acknowledged row survives: the death of any process, or power loss as well."""


class SettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message names it and the fix."""


@dataclass(frozen=True, slots=True)
class KVSettings:
    """Where engines keep what they computed of prompts, beyond their memory. As confidential as the prompts."""

    disk: Path | None = None
    disk_bytes: int = 4 << 30
    redis_url: str | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "KVSettings":
        """Raises SettingsError."""
        env = os.environ if env is None else env
        folder = env.get("LEADLINE_KV_DISK")
        return cls(
            disk=Path(folder).expanduser().absolute() if folder else None,
            disk_bytes=_mebibytes(env, "LEADLINE_KV_DISK_MIB", 4096),
            redis_url=_redis_url(env.get("LEADLINE_KV_REDIS"), "LEADLINE_KV_REDIS"),
        )


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
            max_body_bytes=_mebibytes(env, "LEADLINE_MAX_BODY_MIB", 16),
            cache_bytes=_mebibytes(env, "LEADLINE_CACHE_MIB", 4),
            engine=Path(env["LEADLINE_ENGINE"]).absolute() if env.get("LEADLINE_ENGINE") else None,
            durability=_durability(env.get("LEADLINE_DURABILITY", "process")),
        )
        KVSettings.from_env(env)  # an engine reads it; what is wrong with it is said here
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


def _mebibytes(env: Mapping[str, str], name: str, default: int) -> int:
    raw = env.get(name)
    if raw is None:
        return default << 20
    if not raw.isdecimal() or int(raw) == 0:
        raise SettingsError(f"{name}: {raw!r} is not a positive whole number of MiB")
    return int(raw) << 20
