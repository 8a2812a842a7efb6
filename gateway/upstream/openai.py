"""Any OpenAI-compatible server, over aiohttp (measured: five times httpx's requests per core; docs/decisions.md)."""

import contextlib
import email.utils
import math
import time
from collections.abc import AsyncIterator

import aiohttp
import msgspec

from gateway.ledger.settle import WireUsage
from gateway.upstream.sse import SseReader, error_message, read_chunk
from gateway.upstream.types import Answer, ChatCall, Event, StreamState, Target, UpstreamError
from routers.types import Endpoint

MAX_ANSWER_BYTES = 64 << 20
MAX_ERROR_BYTES = 1 << 16
MAX_RETRY_AFTER_S = 86_400.0
CONNECT_TIMEOUT_S = 10.0
_INCLUDE_USAGE = msgspec.Raw(b'{"include_usage":true}')


class _Head(msgspec.Struct):
    usage: WireUsage | None = None
    error: msgspec.Raw | None = None


_head_decoder = msgspec.json.Decoder(_Head)
_encode = msgspec.json.Encoder().encode


def open_session() -> aiohttp.ClientSession:
    """One session for the life of the process; no redirects are followed with it, no cookies kept, no proxy read."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=75, ttl_dns_cache=60),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
        auto_decompress=False,
    )


class OpenAIUpstream:
    """One provider: a base URL and the key that is only ever sent there."""

    def __init__(self, session: aiohttp.ClientSession, provider: str, base_url: str, api_key: str | None) -> None:
        self._session = session
        self._provider = provider
        base = base_url.rstrip("/")
        self._urls: dict[Endpoint, str] = {
            "chat.completions": f"{base}/chat/completions",
            "completions": f"{base}/completions",
            "embeddings": f"{base}/embeddings",
        }
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def unavailable(self, target: Target) -> str | None:
        return None

    async def complete(self, target: Target, call: ChatCall) -> Answer:
        response = await self._post(target, call)
        try:
            body = await self._read(response)
        finally:
            response.release()
        try:
            head = _head_decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError(
                "bad_answer",
                f"{self._provider} answered 200 with something that is no JSON object: {error}",
                status=200,
                may_be_billed=True,
            ) from error
        if head.error is not None and bytes(head.error) != b"null":
            raise UpstreamError(
                "bad_answer",
                f"{self._provider} answered 200 with an error: {error_message(bytes(head.error))}",
                status=200,
                may_be_billed=True,
            )
        return Answer(body, head.usage.split() if head.usage is not None else None, delivered_bytes=len(body))

    async def stream(self, target: Target, call: ChatCall) -> "OpenAIStream":
        response = await self._post(target, call)
        stream = OpenAIStream(response, self._provider, call.choices)
        try:
            await stream.read_first()
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _post(self, target: Target, call: ChatCall) -> aiohttp.ClientResponse:
        fields = dict(call.fields)
        fields["model"] = msgspec.Raw(_encode(target.wire_model))
        fields.pop("leadline", None)
        if call.stream:
            fields["stream_options"] = _INCLUDE_USAGE
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=target.timeout_s)
        try:
            response = await self._session.post(
                self._urls[call.endpoint],
                data=_encode(fields),
                headers=self._headers,
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
            raise UpstreamError("connect", f"{self._provider} cannot be reached: {_reason(error)}") from error
        except TimeoutError as error:
            raise UpstreamError(
                "timeout", f"{self._provider} did not answer within {target.timeout_s:g} s", may_be_billed=True
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(
                "cut", f"{self._provider} broke the connection: {_reason(error)}", may_be_billed=True
            ) from error
        if response.status == 200:
            return response
        try:
            raise await self._refusal(response)
        finally:
            response.release()

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            parts: list[bytes] = []
            size = 0
            while size <= MAX_ANSWER_BYTES and (part := await response.content.readany()):
                parts.append(part)
                size += len(part)
        except TimeoutError as error:
            raise UpstreamError(
                "timeout", f"{self._provider} stopped in the middle of its answer", may_be_billed=True
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(
                "cut", f"{self._provider} cut its answer short: {_reason(error)}", may_be_billed=True
            ) from error
        if size > MAX_ANSWER_BYTES:
            raise UpstreamError(
                "bad_answer", f"{self._provider} sent an answer beyond {MAX_ANSWER_BYTES} bytes", may_be_billed=True
            )
        return b"".join(parts)

    async def _refusal(self, response: aiohttp.ClientResponse) -> UpstreamError:
        """The error that a status other than 200 stands for."""
        body = b""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            while len(body) < MAX_ERROR_BYTES and (part := await response.content.readany()):
                body += part
        status = response.status
        error = _error_object(body)
        words = str(error.get("message", ""))[:500] if error else ""
        message = f"{self._provider} answered {status}" + (f": {words}" if words else "")
        if status in (401, 403):
            return UpstreamError(
                "auth", f"{self._provider} refused the gateway's own credentials ({status})", status=status
            )
        if 400 <= status < 500 and status not in (408, 409, 429):
            return UpstreamError("refused", message, status=status, error=error)
        if 300 <= status < 400:
            return UpstreamError("bad_answer", f"{message} (redirects are not followed)", status=status)
        return UpstreamError("status", message, status=status, retry_after_s=_retry_after(response))


class OpenAIStream:
    def __init__(self, response: aiohttp.ClientResponse, provider: str, choices: int) -> None:
        self.state = StreamState()
        self._response = response
        self._provider = provider
        self._choices = choices
        self._reader = SseReader()
        self._first: list[Event] = []
        self._ended = False

    async def read_first(self) -> None:
        while not self._first and not self._ended:
            self._first = await self._read_group()
        if not self._first:
            raise UpstreamError("cut", f"{self._provider} ended the stream before its first event", may_be_billed=True)

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        yield self._first
        while not self._ended:
            events = await self._read_group()
            if events:
                yield events
        if not self.state.done:
            raise UpstreamError(
                "cut", f"{self._provider} ended the stream before its answer was complete", may_be_billed=True
            )

    async def close(self) -> None:
        self._response.close()

    async def _read_group(self) -> list[Event]:
        try:
            chunk = await self._response.content.readany()
        except TimeoutError as error:
            raise UpstreamError(
                "timeout", f"{self._provider} stalled in the middle of its stream", may_be_billed=True
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(
                "cut", f"{self._provider} cut the stream: {_reason(error)}", may_be_billed=True
            ) from error
        payloads = self._reader.feed(chunk) if chunk else self._reader.close()
        self._ended = not chunk
        events = []
        for payload in payloads:
            event = read_chunk(payload, self.state, self._choices)
            if event is None:
                self._ended = True
                break
            events.append(event)
        return events


def _error_object(body: bytes) -> dict[str, object] | None:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    error = decoded.get("error") if isinstance(decoded, dict) else None
    if isinstance(error, str):
        return {"message": error, "type": "invalid_request_error", "param": None, "code": None}
    return error if isinstance(error, dict) else None


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """`retry-after-ms`, or `Retry-After` in seconds or as a date; None when absent or unreadable."""
    milliseconds = response.headers.get("retry-after-ms")
    value = response.headers.get("retry-after")
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


def _reason(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__
