"""Structured logs on standard error, one JSON object a line; whatever looks like a key is struck out last.

What libraries log comes the same way, from warnings on.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """As if the package `name` was not installed."""
    modules: dict[str, Any] = sys.modules
    before = {name: modules[name]} if name in modules else {}
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]
        modules.update(before)


with _without("rich"):  # structlog's console would take it, and pygments: 5 MB that no worker has a use for
    import structlog

get_logger = structlog.get_logger

_SECRET = re.compile(
    r"(sk-[A-Za-z0-9_-]{4})[A-Za-z0-9_-]{6,}(?:[A-Za-z0-9._%+-]{0,64}+@[A-Za-z0-9.-]+)?"
    r"|((?i:bearer) )[^\s\"']+"
    r"|((?i:api[_-]?key|authorization|password|secret|token)[\"']?\s*[:=]\s*[\"']?)(?i:bearer\s+)?[^\s\"',}]{6,}"
    r"|(://[^\s/:@]*:)[^\s/@]+(?=@)"
    r"|()(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]++@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
)
"""Keys by their usual prefix, bearer tokens, named secrets, passwords in addresses, e-mail addresses.

An address is looked for where a word begins alone, so that a word of any length takes time in proportion to it."""


def strike(text: str) -> str:
    """`text` without what looks like a secret or an e-mail address; how it began stays readable."""
    return _SECRET.sub(lambda match: f"{next((group for group in match.groups() if group), '')}…", text)


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Strike out secrets in every string of a log event, however deep it lies."""
    for name, value in event.items():
        event[name] = _struck(value)
    return event


def _struck(value: Any) -> Any:
    if isinstance(value, str):
        return strike(value)
    if isinstance(value, Mapping):
        return {name: _struck(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_struck(inner) for inner in value]
    return value


class _OfLibraries(logging.Handler):
    """Python's own log records as events."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            get_logger().log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)
        except Exception:
            self.handleError(record)


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
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),  # a line in one call: `print` takes two
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    if not any(isinstance(handler, _OfLibraries) for handler in root.handlers):
        root.addHandler(_OfLibraries())
