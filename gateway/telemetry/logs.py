"""Structured logs on standard error, one JSON object a line; whatever looks like a key is struck out last."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_SECRET = re.compile(r"(sk-[A-Za-z0-9_-]{4})[A-Za-z0-9_-]{6,}|(Bearer )\S+")


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Strike out keys and bearer tokens in every string of a log event."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _SECRET.sub(lambda match: f"{match[1] or match[2]}…", value)
    return event


def configure_logs(level: int = logging.INFO, *, worker: int | None = None) -> None:
    """`worker`: which of several this process is; each of its lines says so."""

    def sign(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["worker"] = worker
        return event

    structlog.configure(
        processors=[
            *([sign] if worker is not None else ()),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
