"""From the bytes of a chat request to a ChatCall: read what we need, touch nothing else.

The caller's fields stay the caller's own bytes (`msgspec.Raw`) all the way to the provider, so that provider prompt
caches see stable prefixes and fields that we do not know pass through.
"""

import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation

import msgspec

from gateway.errors import InvalidRequest
from gateway.upstream.types import CallHeaders, ChatCall, Sampling

_MAX_CHOICES = 128


class _Part(msgspec.Struct):
    type: str


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _ResponseFormat(msgspec.Struct):
    type: str


class _ChatRequest(msgspec.Struct):
    model: str
    messages: list[_Message]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None
    response_format: _ResponseFormat | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_request_decoder = msgspec.json.Decoder(_ChatRequest)
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_TEXT_PARTS = frozenset({"text", "refusal"})
MAX_TOKENS = 1 << 31
SEEDS = range(-(1 << 63), 1 << 63)


def read_chat(body: bytes, headers: CallHeaders) -> ChatCall:
    """Raises InvalidRequest, naming the field, what is wrong with it and what would be right."""
    try:
        fields = _fields_decoder.decode(body)
        request = _request_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The body is not valid JSON: it is not UTF-8.") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply; flatten it.") from error
    choices = 1 if request.n is None else request.n
    # Both go out as they came, and providers differ in which they honour: the larger one is what may be spent.
    max_tokens = max(
        (cap for cap in (request.max_tokens, request.max_completion_tokens) if cap is not None), default=None
    )
    _check(request, choices)
    return ChatCall(
        fields=fields,
        body_bytes=len(body),
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        choices=choices,
        has_tools=bool(request.tools or request.functions),
        has_format=request.response_format is not None and request.response_format.type != "text",
        text_only=all(_is_text(message) for message in request.messages),
        sampling=Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=_stops(request.stop),
            logprobs=bool(request.logprobs),
            top_logprobs=request.top_logprobs or 0,
            reasoning_effort=request.reasoning_effort,
        ),
        headers=headers,
    )


def _is_text(message: _Message) -> bool:
    return not isinstance(message.content, list) or all(part.type in _TEXT_PARTS for part in message.content)


def _check(request: _ChatRequest, choices: int) -> None:
    if not request.messages:
        raise InvalidRequest("messages: [] is empty; send at least one message.", param="messages")
    if not 0 < len(request.model) <= 256 or not request.model.isprintable():
        raise InvalidRequest(
            "model: must be 1 to 256 printable characters; `auto` lets the gateway choose.", param="model"
        )
    if not 1 <= choices <= _MAX_CHOICES:
        raise InvalidRequest(f"n: {choices} is not between 1 and {_MAX_CHOICES}.", param="n")
    for name, cap in (("max_tokens", request.max_tokens), ("max_completion_tokens", request.max_completion_tokens)):
        if cap is not None and not 1 <= cap <= MAX_TOKENS:
            raise InvalidRequest(f"{name}: {cap} is not between 1 and {MAX_TOKENS}.", param=name)
    if request.seed is not None and request.seed not in SEEDS:
        raise InvalidRequest("seed: must fit into 64 bits, signed.", param="seed")
    if request.temperature is not None and not 0 <= request.temperature <= 2:
        raise InvalidRequest(f"temperature: {request.temperature:g} is not between 0 and 2.", param="temperature")
    if request.top_p is not None and not 0 < request.top_p <= 1:
        raise InvalidRequest(f"top_p: {request.top_p:g} is not above 0 and at most 1.", param="top_p")
    if request.top_logprobs is not None:
        if not 0 <= request.top_logprobs <= 20:
            raise InvalidRequest(f"top_logprobs: {request.top_logprobs} is not between 0 and 20.", param="top_logprobs")
        if not request.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs: true.", param="top_logprobs")
    if request.service_tier not in (None, "auto", "default"):
        raise InvalidRequest(
            f"service_tier: {request.service_tier[:40]!r} has prices of its own, which the ledger does not know; "
            "leave it out.",
            param="service_tier",
        )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not s for s in stops) or len(stops) > 16:
        raise InvalidRequest("stop: send 1 to 16 strings, none of them empty.", param="stop")
    return stops


def _invalid(message: str) -> InvalidRequest:
    """msgspec's sentence, with the field in front."""
    found = _PATH.search(message)
    path = found["path"] if found else None
    sentence = message[: found.start()] if found else message
    return InvalidRequest(f"{path}: {sentence}." if path else f"{sentence}.", param=path)


_SESSION_HEADERS = (b"x-session-id", b"x-claude-code-session-id", b"session-id", b"thread-id")


def read_headers(raw: Iterable[tuple[bytes, bytes]]) -> CallHeaders:
    """The headers we read; all others are ignored, and none is forwarded. Raises InvalidRequest."""
    token = ""
    sessions: dict[bytes, str] = {}
    tags: frozenset[str] = frozenset()
    no_cache = no_store = False
    scope: str | None = None
    scope_budget: int | None = None
    for name, value in raw:
        if name == b"authorization":
            scheme, _, rest = value.decode("latin-1").partition(" ")
            token = rest.strip() if scheme.lower() == "bearer" else ""
        elif name in _SESSION_HEADERS:
            sessions[name] = value.decode("latin-1")[:128]
        elif name == b"cache-control":
            no_cache = no_cache or b"no-cache" in value or b"no-store" in value
            no_store = no_store or b"no-store" in value
        elif name.startswith(b"x-leadline-"):
            text = value.decode("latin-1").strip()
            if name == b"x-leadline-tags":
                tags = frozenset(tag.strip() for tag in text.split(",") if tag.strip())
            elif name == b"x-leadline-scope":
                scope = _scope(text)
            elif name == b"x-leadline-scope-budget":
                scope_budget = _dollars(text)
    if scope_budget is not None and scope is None:
        raise InvalidRequest("x-leadline-scope-budget: needs x-leadline-scope, the name of the scope it limits.")
    session = next((sessions[name] for name in _SESSION_HEADERS if name in sessions), None)
    return CallHeaders(token, session, tags, no_cache, no_store, scope, scope_budget)


def _scope(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", text):
        raise InvalidRequest("x-leadline-scope: use 1 to 64 letters, digits, '.', '_', ':' or '-'.")
    return text


def _dollars(text: str) -> int:
    try:
        nanousd = Decimal(text.removeprefix("$")) * 10**9
        whole = int(nanousd)
    except (InvalidOperation, ValueError, OverflowError):
        whole, nanousd = -1, Decimal(0)
    if whole < 0 or whole != nanousd or whole >= 2**63:
        raise InvalidRequest(f"x-leadline-scope-budget: {text[:40]!r} is not an amount of dollars such as 0.50.")
    return whole
