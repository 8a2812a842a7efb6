"""From a request's headers to what we read of them. None is ever forwarded, and all others are ignored, but for those
that begin with `x-leadline-`: a slip in one that should bound something must not pass for a bound."""

import re
from collections.abc import Iterable

from gateway.admission.limits import MAX_PATH, MAX_SEGMENTS, valid_run
from gateway.edge.hints import HINTS, dollars, read_hints
from gateway.errors import InvalidRequest, UnsupportedEncoding
from gateway.priority import check_priority
from gateway.upstream.types import CallHeaders

_SESSION_HEADERS = (b"x-session-id", b"x-claude-code-session-id", b"session-id", b"thread-id")
_PARENT_AGENT_HEADER = b"x-claude-code-parent-agent-id"
_READ = frozenset(
    {
        *_SESSION_HEADERS, _PARENT_AGENT_HEADER, b"authorization", b"traceparent", b"cache-control",
        b"content-encoding", b"idempotency-key", b"x-stainless-retry-count",
    }
)  # fmt: skip
"""Beside those of our own, `x-leadline-…`."""
_OURS = (
    "x-leadline-priority", "x-leadline-scope", "x-leadline-scope-budget", "x-leadline-tags", "x-leadline-timeout",
    *(h.decode() for h in HINTS),
)  # fmt: skip
_ONCE = frozenset(
    {b"authorization", b"idempotency-key", *(header.encode() for header in _OURS if header != "x-leadline-tags")}
)
"""What may come in one header only; tags in several add up."""

SECONDS_PATTERN = r"^([1-9][0-9]{0,5}(\.[0-9]{1,6})?|0\.[0-9]{0,5}[1-9][0-9]{0,5})$"
_SECONDS = re.compile(SECONDS_PATTERN)
PRIORITY_PATTERN = r"^(0|-?[1-9][0-9]?|-?100)$"
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,8}")


def read_headers(raw: Iterable[tuple[bytes, bytes]]) -> CallHeaders:
    """What the headers say of a call. Raises InvalidRequest, naming the header that cannot be used."""
    token = ""
    sessions: dict[bytes, str] = {}
    tags: frozenset[str] = frozenset()
    no_cache = no_store = False
    scope: str | None = None
    scope_budget: int | None = None
    idempotency_key: str | None = None
    retry_count = 0
    timeout_s: float | None = None
    parent_agent: str | None = None
    traceparent: str | None = None
    priority: int | None = None
    hints: dict[bytes, str] = {}
    seen: set[bytes] = set()
    for name, value in raw:
        if name not in _READ and not name.startswith(b"x-leadline-"):
            continue
        if name in _ONCE:
            if name in seen:
                raise InvalidRequest(f"{name.decode()}: was sent twice; send one.")
            seen.add(name)
        if name == b"authorization":
            scheme, _, rest = value.decode("latin-1").partition(" ")
            token = rest.strip() if scheme.lower() == "bearer" else ""
        elif name in _SESSION_HEADERS:
            sessions[name] = value.decode("latin-1")[:128]
        elif name == _PARENT_AGENT_HEADER:
            parent_agent = value.decode("latin-1")[:128] or None
        elif name == b"traceparent":
            traceparent = value.decode("latin-1")[:64]
        elif name == b"cache-control":
            directives = value.lower()
            no_cache = no_cache or b"no-cache" in directives or b"no-store" in directives
            no_store = no_store or b"no-store" in directives
        elif name == b"content-encoding":
            if value.strip().lower() not in (b"", b"identity"):
                raise UnsupportedEncoding("content-encoding: bodies are read as they are; send it uncompressed.")
        elif name == b"idempotency-key":
            idempotency_key = _idempotency_key(value.decode("latin-1").strip())
        elif name == b"x-stainless-retry-count":
            retry_count = int(value) if value.isdigit() and len(value) < 4 else 0
        else:
            text = value.decode("latin-1").strip()
            if name == b"x-leadline-tags":
                tags |= frozenset(tag.strip() for tag in text.split(",") if tag.strip())
            elif name == b"x-leadline-scope":
                scope = _scope(text)
            elif name == b"x-leadline-scope-budget":
                scope_budget = dollars("x-leadline-scope-budget", text)
            elif name == b"x-leadline-timeout":
                timeout_s = _seconds(text)
            elif name == b"x-leadline-priority":
                priority = _priority(text)
            elif name in HINTS:
                hints[name] = text
            else:
                known = ", ".join(sorted(_OURS))
                raise InvalidRequest(
                    f"{name.decode('latin-1')[:80]}: is no header that Leadline reads; those are {known}."
                )
    if scope_budget is not None and scope is None:
        raise InvalidRequest("x-leadline-scope-budget: needs x-leadline-scope, the name of the scope it limits.")
    session = next((sessions[name] for name in _SESSION_HEADERS if name in sessions), None) if sessions else None
    return CallHeaders(
        token, session, tags, no_cache, no_store, scope, scope_budget, idempotency_key, retry_count, timeout_s,
        parent_agent,
        traceparent,
        read_hints(hints) if hints else None,
        priority,
    )  # fmt: skip


def _scope(text: str) -> str:
    if not valid_run(text):
        raise InvalidRequest(
            f"x-leadline-scope: {text[:80]!r} is not a run such as `run42/research`: use up to {MAX_SEGMENTS} names of "
            f"1 to 64 letters, digits, '.', '_', ':' or '-', with '/' between them, {MAX_PATH} characters in all."
        )
    return text


def _idempotency_key(text: str) -> str:
    if not 0 < len(text) <= 255 or not text.isascii() or not text.isprintable():
        raise InvalidRequest("idempotency-key: use 1 to 255 printable ASCII characters.")
    return text


def _priority(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise InvalidRequest(f"x-leadline-priority: {text[:40]!r} is not a whole number such as 5 or -5.")
    return check_priority("x-leadline-priority", int(text))


def _seconds(text: str) -> float:
    if not _SECONDS.fullmatch(text):
        raise InvalidRequest(f"x-leadline-timeout: {text[:40]!r} is not a number of seconds such as 30 or 2.5.")
    return float(text)
