"""What can go wrong at the engine's border.

EngineError
├── EngineGone       the link is closed: everything in flight ended here; connect again, then retry
│   └── EngineSilent … or not, but the engine says nothing: it hangs
├── EngineFailure    the engine answered `Failed`: one command, a code and a reason; the link is fine
├── ModelLoadError   a configured model cannot be served: fix the configuration
└── ConfigError      a setting cannot be used on this machine: fix the configuration
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from local_engine.types import FailureCode


class EngineError(Exception):
    """Root of every error this package raises on purpose."""


class EngineGone(EngineError):
    """The engine process or its socket is gone."""


class EngineSilent(EngineGone):
    """The engine process is there, and does not answer."""


class EngineFailure(EngineError):
    """One command failed; `code` says what the caller can do about it."""

    def __init__(self, code: "FailureCode", message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.code: FailureCode = code
        self.message = message
        self.param = param


class ModelLoadError(EngineError):
    """A model cannot be loaded or is of a kind this engine does not run."""


class ConfigError(EngineError):
    """A setting cannot be used on this machine."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        """Of EngineConfig."""
        self.why = why
