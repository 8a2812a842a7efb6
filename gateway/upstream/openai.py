"""Any OpenAI-compatible server, over our own HTTP client (measured against others in docs/decisions.md)."""

import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache

import msgspec

from gateway.ledger.settle import Usage, WireUsage, estimated_usage
from gateway.upstream import raw_thought
from gateway.upstream.begun import begun
from gateway.upstream.chunks import ABSENT, Timings, error_message, read_chunk, read_usage, said_bytes
from gateway.upstream.connection import Timeouts
from gateway.upstream.engines import CAPABILITIES, LOAD_HEADER, Load, load_of_header, tenant_salt
from gateway.upstream.http import HttpClient, HttpResponse, RequestHead
from gateway.upstream.http_errors import BadResponse, ConnectError, ExchangeTimeout, FirstByteTimeout, HttpError
from gateway.upstream.prompts import Prompts
from gateway.upstream.refusals import body_of, error_object, refusal
from gateway.upstream.sse import SseReader
from gateway.upstream.types import Answer, ChatCall, Event, Hear, Progress, StreamState, Target, UpstreamError
from routers.policy import PREFIX_STYLES, Server
from routers.types import Endpoint

MAX_ANSWER_BYTES = 64 << 20
LINGER_S = 1.0
"""How long the end of a stream's HTTP body may come after its `[DONE]` for its connection to be used again."""
PATHS: dict[Endpoint, str] = {
    "chat.completions": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
}
_INCLUDE_USAGE = msgspec.Raw(b'{"include_usage":true}')


class _Head(msgspec.Struct):
    usage: WireUsage | None = None
    timings: Timings | None = None
    error: msgspec.Raw = ABSENT


class _RawHead(msgspec.Struct):
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


_head_decoder = msgspec.json.Decoder(_Head)
_raw_head_decoder = msgspec.json.Decoder(_RawHead)
_encode = msgspec.json.Encoder().encode


class OpenAIUpstream:
    """One server: a base URL and the key that is only ever sent there. Raises ValueError for a URL that is none.

    `salt`: keeps tenants' prefixes apart at engines that share them; no tenant can guess another's.
    `priority_scheduling`: a vLLM was started to take priorities.
    """

    def __init__(
        self,
        client: HttpClient,
        provider: str,
        base_url: str,
        api_key: str | None,
        *,
        server: Server = "openai",
        salt: bytes = b"",
        priority_scheduling: bool = False,
    ) -> None:
        offers = CAPABILITIES[server]
        self._salt = salt if offers.salt else None
        self._priority = offers.priority if priority_scheduling or not offers.priority_if_told else 0
        self.on_load: Callable[[Load], None] | None = None
        """Hears the load of the server, where answers tell."""
        self._client = client
        self._provider = provider
        self._secret = api_key
        headers = [("Content-Type", "application/json")]
        if api_key is not None:
            headers.append(("Authorization", f"Bearer {api_key}"))
        if offers.load_header:
            headers.append(("endpoint-load-metrics-format", "JSON"))
        base = base_url.rstrip("/")
        self._heads = {endpoint: RequestHead("POST", base + path, headers) for endpoint, path in PATHS.items()}
        self._clips = server == "leadline"
        """It takes a longest answer that its model has no room for."""
        self._prompts = Prompts(client, provider, base.removesuffix("/v1"), headers) if server == "vllm" else None

    def unavailable(self, target: Target) -> str | None:
        return None

    async def complete(self, target: Target, call: ChatCall, progress: Progress | None = None) -> Answer:
        try:
            return await self._complete(target, call, progress)
        except UpstreamError as error:
            raise self._discreet(error) from None

    async def stream(self, target: Target, call: ChatCall, progress: Progress | None = None) -> "OpenAIStream":
        try:
            return await self._stream(target, call, progress)
        except UpstreamError as error:
            raise self._discreet(error) from None

    def _discreet(self, error: UpstreamError) -> UpstreamError:
        return error.hide(self._secret) if self._secret else error

    async def _complete(self, target: Target, call: ChatCall, progress: Progress | None) -> Answer:
        response = await self._post(target, call, progress)
        try:
            body = await response.read(MAX_ANSWER_BYTES)
        except HttpError as error:
            raise _broken(
                self._provider, error, "stopped in the middle of its answer", "cut its answer short"
            ) from error
        finally:
            response.release()
        try:
            usage, failure = _read_head(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError(
                "bad_answer",
                f"{self._provider} answered 200 with something that is no JSON object: {error}",
                status=200,
                may_be_billed=True,
                delivered_bytes=len(body),
            ) from error
        if failure is not None:
            raise UpstreamError(
                "bad_answer",
                f"{self._provider} answered 200 with an error: {(words := error_message(failure))}",
                status=200,
                may_be_billed=True,
                words=words,
                delivered_bytes=len(body),
            )
        if usage is not None:
            return Answer(body, usage)
        if call.endpoint == "embeddings":
            vectors = estimated_usage(
                body_bytes=call.body_bytes,
                context=target.context * call.inputs,
                delivered_bytes=0,
                delivered_deltas=0,
            )
            return Answer(body, vectors)
        return Answer(body, None, delivered_bytes=max(1, said_bytes(body)))

    async def _stream(self, target: Target, call: ChatCall, progress: Progress | None) -> "OpenAIStream":
        if progress is not None:
            progress.unsent = True
        began = time.monotonic()
        raw = await self._prompts.as_text(target, call) if self._prompts is not None else None
        response = await self._post(target, raw or call, progress, time.monotonic() - began)
        kind = response.header(b"content-type")
        if kind is not None and not kind.startswith("text/event-stream"):
            raise await self._no_stream(response, kind)
        as_chat = (
            raw_thought.RawThought(over=call.thought.over).as_chat
            if raw is not None and call.thought is not None
            else None
        )
        stream = OpenAIStream(response, self._provider, call.choices, self._secret, as_chat)
        try:
            await stream.read_first()
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _post(
        self, target: Target, call: ChatCall, progress: Progress | None, spent_s: float = 0.0
    ) -> HttpResponse:
        """`spent_s`: how much of the attempt's time has passed."""
        fields = dict(call.fields)
        fields["model"] = _as_json(target.wire_model)
        fields.pop("leadline", None)
        if call.prefix or call.thought is not None:
            fields |= begun(call, target.prefix or PREFIX_STYLES["openai"])
        bounded = target.max_output < target.context
        if self._clips and bounded and call.endpoint != "embeddings" and call.sampling.max_tokens is None:
            fields["max_tokens"] = msgspec.Raw(b"%d" % target.max_output)  # no more than was held for it
        if call.stream:
            fields["stream_options"] = _with_usage(fields.get("stream_options"))
        if self._salt is not None:
            fields["cache_salt"] = msgspec.Raw(_encode(tenant_salt(self._salt, call.tenant)))
        if call.priority and self._priority:
            fields["priority"] = msgspec.Raw(b"%d" % (self._priority * call.priority))
        timeouts = Timeouts(
            target.connect_timeout_s, target.first_byte_timeout_s - spent_s, target.idle_timeout_s,
            target.timeout_s - spent_s,
        )  # fmt: skip
        response = await self._send(self._heads[call.endpoint], _encode(fields), target, timeouts, progress)
        if response.status == 200:
            if self.on_load is not None and (told := response.header(LOAD_HEADER)) is not None:
                load = load_of_header(told)
                if load is not None:
                    self.on_load(load)
            return response
        raise refusal(self._provider, response, await body_of(response))

    async def _send(
        self, head: RequestHead, body: bytes, target: Target, timeouts: Timeouts, progress: Progress | None
    ) -> HttpResponse:
        on_sent = None
        if progress is not None:
            progress.unsent, on_sent = True, progress.goes_out
        try:
            response = await self._client.request(head, body, timeouts, on_sent)
        except ConnectError as error:
            raise UpstreamError("connect", f"{self._provider} cannot be reached: {error}") from error
        except ExchangeTimeout as error:
            limit_s = target.first_byte_timeout_s if isinstance(error, FirstByteTimeout) else target.timeout_s
            raise UpstreamError(
                "timeout", f"{self._provider} did not answer within {limit_s:g} s", may_be_billed=error.may_be_billed
            ) from error
        except HttpError as error:
            raise _broken(self._provider, error, "did not answer", "broke the connection") from error
        return response

    async def _no_stream(self, response: HttpResponse, kind: str) -> UpstreamError:
        """The error that something other than an event stream stands for."""
        failure = error_object(await body_of(response))
        words = f"{kind[:100]}: {str(failure.get('message'))[:300]}" if failure else kind[:100]
        return UpstreamError(
            "bad_answer",
            f"{self._provider} answered a stream with {words}",
            status=200,
            may_be_billed=True,
            words=words,
        )


class OpenAIStream:
    def __init__(
        self,
        response: HttpResponse,
        provider: str,
        choices: int,
        secret: str | None = None,
        as_chat: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """`as_chat` makes a chat's chunks of those of another kind."""
        self._as_chat = as_chat
        self.state = StreamState()
        self._response = response
        self._provider = provider
        self._choices = choices
        self._secret = secret
        self._reader = SseReader()
        self._first: list[Event] = []
        self._hear: Hear | None = None
        self._unheard: list[Event] = []
        self._ended = False

    async def read_first(self) -> None:
        while not self._first and not self._ended:
            self._first = await self._read_group()
        if not self._first:
            raise UpstreamError("cut", f"{self._provider} ended the stream before its first event", may_be_billed=True)

    def listen(self, hear: Hear) -> None:
        self._hear = hear

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        yield self._first
        while not self._ended:
            if self._hear is not None:
                await self._response.hand_over(self._heard)
                events, self._unheard = self._unheard, []
            else:
                events = []
            if not events and not self._ended:
                events = await self._read_group()
            if events:
                yield events
        if not self.state.done:
            raise UpstreamError(
                "cut", f"{self._provider} ended the stream before its answer was complete", may_be_billed=True
            )

    async def close(self) -> None:
        """At the stream's own end its connection is kept for the next call; before it, closed at once."""
        if self._ended and self.state.done:
            self._response.release(LINGER_S)
        else:
            self._response.abort()

    async def _read_group(self) -> list[Event]:
        try:
            chunk = await self._response.read_some()
        except HttpError as error:
            raise _broken(self._provider, error, "stalled in the middle of its stream", "cut the stream") from error
        self._ended = not chunk
        return self._events(self._reader.feed(chunk) if chunk else self._reader.close())

    def _heard(self, chunk: bytes) -> bool:
        """Whether it may be given more at once."""
        events = self._events(self._reader.feed(chunk))
        if events and self._hear is not None and not self._hear(events):
            self._unheard = events
            return False
        return not self._ended

    def _events(self, payloads: list[bytes]) -> list[Event]:
        events = []
        for payload in payloads:
            try:
                data = payload if self._as_chat is None else self._as_chat(payload)
                event = read_chunk(data, self.state, self._choices)
            except UpstreamError as error:
                if self._secret:
                    error.hide(self._secret)
                raise
            if event is None:
                self._ended = True
                break
            events.append(event)
        return events


@lru_cache(maxsize=1024)
def _as_json(name: str) -> msgspec.Raw:
    return msgspec.Raw(_encode(name))


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    """A stream's options as the caller gave them, and that its usage is told."""
    if options is None or options == ABSENT:
        return _INCLUDE_USAGE
    given = msgspec.json.decode(options, type=dict[str, msgspec.Raw])
    return msgspec.Raw(_encode({**given, "include_usage": True}))


def _broken(provider: str, error: HttpError, late: str, cut: str) -> UpstreamError:
    """An exchange that broke off: `late` says it of a timeout, `cut` of a closed connection."""
    if isinstance(error, ExchangeTimeout):
        return UpstreamError("timeout", f"{provider} {late}", may_be_billed=True)
    if isinstance(error, BadResponse):
        return UpstreamError("bad_answer", f"{provider} sent what cannot be read: {error}", may_be_billed=True)
    return UpstreamError("cut", f"{provider} {cut}: {error}", may_be_billed=True)


def _read_head(body: bytes) -> tuple[Usage | None, bytes | None]:
    """The usage and the error of a whole answer. A usage of a shape we do not know is as good as none given."""
    if not body.isascii():
        body.decode()  # the decoder looks into the strings of the fields it knows alone
    try:
        head = _head_decoder.decode(body)
        usage = head.usage.split(head.timings.cache_n if head.timings else None) if head.usage is not None else None
        error = head.error
    except msgspec.ValidationError:
        raw = _raw_head_decoder.decode(body)
        usage, error = read_usage(raw.usage), raw.error
    return usage, bytes(error) if error != ABSENT else None
