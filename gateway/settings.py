"""Settings of one process, read once from the environment, validated whole, passed in."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


class SettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message names it and the fix."""


@dataclass(frozen=True, slots=True)
class Settings:
    home: Path
    """State folder: ledger, journal, pepper, first key, engine socket."""
    database_url: str
    redis_url: str | None
    max_body_bytes: int
    cache_bytes: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        env = os.environ if env is None else env
        home = Path(env.get("LEADLINE_HOME") or Path.home() / ".leadline").expanduser().absolute()
        return cls(
            home=home,
            database_url=_database_url(env.get("DATABASE_URL"), home),
            redis_url=_redis_url(env.get("REDIS_URL")),
            max_body_bytes=_mebibytes(env, "LEADLINE_MAX_BODY_MIB", 16),
            cache_bytes=_mebibytes(env, "LEADLINE_CACHE_MIB", 64),
        )

    def prepare_home(self) -> None:
        """Create the state folder, readable by its owner alone."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)


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


def _redis_url(url: str | None) -> str | None:
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        raise SettingsError(f"REDIS_URL: scheme {url.split(':', 1)[0]!r} is not supported; use redis://HOST:PORT/DB")
    return url or None


def _mebibytes(env: Mapping[str, str], name: str, default: int) -> int:
    raw = env.get(name)
    if raw is None:
        return default << 20
    if not raw.isdecimal() or int(raw) == 0:
        raise SettingsError(f"{name}: {raw!r} is not a positive whole number of MiB")
    return int(raw) << 20
