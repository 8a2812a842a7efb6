"""What a status other than 200 says: whose fault it is, whether another try helps, and when.

Providers say the same thing in several ways; OpenAI's, Azure's, Anthropic's, vLLM's and OpenRouter's are known here.
"""

import contextlib
import email.utils
import math
import time

import msgspec

from gateway.upstream.http import HttpResponse
from gateway.upstream.http_errors import HttpError
from gateway.upstream.types import Cause, UpstreamError

MAX_RETRY_AFTER_S = 86_400.0
MAX_ERROR_BYTES = 1 << 16
_CONTEXT_CODES = {"context_length_exceeded", "context_window_exceeded"}
_CONTEXT_WORDS = (
    "context length", "context window", "prompt is too long", "too many tokens", "input is too long",
    "exceeds the maximum number of tokens",
)  # fmt: skip
_FILTER_CODES = {"content_filter", "content_policy_violation", "content_policy_violation_error", "content_filtered"}


async def body_of(response: HttpResponse) -> bytes:
    """As much of an error's body as can be had; the response is released."""
    body = b""
    try:
        with contextlib.suppress(HttpError):
            while len(body) < MAX_ERROR_BYTES and (part := await response.read_some()):
                body += part
    finally:
        response.release()
    return body


def refusal(provider: str, response: HttpResponse, body: bytes) -> UpstreamError:
    """The error that a status other than 200 stands for; `body` is what could be read of its words."""
    status = response.status
    error = error_object(body)
    words = str(error.get("message", ""))[:500] if error else ""
    message = f"{provider} answered {status}" + (f": {words}" if words else "")
    if status in (401, 403) and not _is_content_filter(error):
        message = f"{provider} refused the gateway's own credentials ({status})"
        return UpstreamError("auth", message, status=status, should_retry=_should_retry(response))
    if 300 <= status < 400:
        return UpstreamError("bad_answer", f"{message} (redirects are not followed)", status=status, words=words)
    return UpstreamError(
        _cause(status, error, words),
        message,
        status=status,
        error=error if 400 <= status < 500 else None,
        retry_after_s=retry_after_s(response),
        should_retry=_should_retry(response),
        words=words,
    )


def error_object(body: bytes) -> dict[str, object] | None:
    """The `error` of an OpenAI error body, which some send as a bare string."""
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(decoded, dict):
        return None
    error = decoded.get("error")
    if error is None and decoded.get("object") == "error":  # vLLM before 0.10: the error is the whole body
        error = decoded
    if isinstance(error, str):
        return {"message": error, "type": "invalid_request_error", "param": None, "code": None}
    return error if isinstance(error, dict) else None


def retry_after_s(response: HttpResponse) -> float | None:
    """`retry-after-ms`, or `Retry-After` in seconds or as a date; None when absent or unreadable."""
    milliseconds = response.header(b"retry-after-ms")
    value = response.header(b"retry-after")
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000
        elif value is None:
            return None
        elif value.replace(".", "", 1).isdecimal():
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None


def _should_retry(response: HttpResponse) -> bool | None:
    return {"true": True, "false": False}.get(response.header(b"x-should-retry") or "")


def _cause(status: int, error: dict[str, object] | None, words: str) -> Cause:
    if status == 429:
        return "rate_limit"
    if status in (408, 409) or status >= 500 or status < 400:
        return "status"
    if _is_content_filter(error):
        return "content_filter"
    if status in (400, 413, 422) and error is not None:
        lower = words.lower()
        if error.get("code") in _CONTEXT_CODES or error.get("type") in _CONTEXT_CODES:
            return "context_length"
        if any(phrase in lower for phrase in _CONTEXT_WORDS):
            return "context_length"
    return "refused"


def _is_content_filter(error: dict[str, object] | None) -> bool:
    return error is not None and (error.get("code") in _FILTER_CODES or error.get("type") in _FILTER_CODES)
