"""From the bytes of a chat request to a ChatCall: read what we need, touch nothing else.

The caller's fields stay the caller's own bytes (`msgspec.Raw`) all the way to the provider, so that provider prompt
caches see stable prefixes and fields that we do not know pass through. A field that stands twice in a body has one
meaning only, its last: what goes out is written anew from the fields that were read here.
"""

from typing import TypeVar

import msgspec

from gateway.decode_errors import misread
from gateway.edge.surrogates import half_character_in
from gateway.errors import InvalidRequest
from gateway.priority import check_priority
from gateway.upstream.types import CallHeaders, ChatCall, Sampling

MAX_CHOICES = 128
MAX_STOPS = 16


# No struct of a body can be part of a cycle (`gc=False`): the cycle collector does not count, nor walk, a long
# conversation's hundreds.
class _Part(msgspec.Struct, gc=False):
    type: str


class _Message(msgspec.Struct, gc=False):
    role: str
    content: str | list[_Part] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _ResponseFormat(msgspec.Struct):
    type: str


class _Object(msgspec.Struct, gc=False):
    """Any object, whatever is in it."""


class _TemplateWords(msgspec.Struct):
    """Of what callers say to a chat template: the switch that open models have for thinking."""

    enable_thinking: bool | None = None


class _ChatRequest(msgspec.Struct):
    model: str
    messages: list[_Message]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[_Object] | None = None
    functions: list[_Object] | None = None
    response_format: _ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: _TemplateWords | None = None
    service_tier: str | None = None
    priority: int | None = None


_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_request_decoder = msgspec.json.Decoder(_ChatRequest)
_TEXT_PARTS = frozenset({"text", "refusal"})
_FORMATS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""vLLM's words for `response_format`, of today and before."""
MAX_TOKENS = 1 << 31
MAX_MESSAGES = 100_000
SEEDS = range(-(1 << 63), 1 << 63)
FOREIGN_FIELDS = frozenset(
    {"api_base", "api_key", "api_url", "api_version", "azure_endpoint", "base_url", "extra_headers", "proxy"}
)
"""Where a call goes, and with whose credentials, is the policy's to say: a body that says so is refused."""

_Request = TypeVar("_Request")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[_Request]) -> tuple[dict[str, msgspec.Raw], _Request]:
    """Every field as it came, and those that we read. Raises InvalidRequest."""
    try:
        if not body.isascii():
            body.decode()  # fields that nobody reads here must not carry what is no text
        fields = _fields_decoder.decode(body)
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        path, sentence = misread(error, decoder.type)
        raise InvalidRequest(f"{path}: {sentence}." if path else f"{sentence}.", param=path) from error
    except msgspec.DecodeError as error:
        if not body.strip():
            raise InvalidRequest("The body is empty; send a JSON object.") from error
        raise half_character_in(body) or InvalidRequest(f"The body is not valid JSON: {error}.") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The body is not valid JSON: it is not UTF-8.") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply; flatten it.") from error
    if not FOREIGN_FIELDS.isdisjoint(fields):
        name = min(FOREIGN_FIELDS & fields.keys())
        raise InvalidRequest(
            f"{name}: a request cannot say where it goes or with which key; the policy does. Leave it out.", param=name
        )
    return fields, request


def read_chat(body: bytes, headers: CallHeaders) -> ChatCall:
    """Raises InvalidRequest, naming the field, what is wrong with it and what would be right."""
    # Known before anything is built of them; fewer bytes cannot hold so many.
    if len(body) > 8 * MAX_MESSAGES and body.count(b'"role"') > MAX_MESSAGES:
        raise InvalidRequest(f"messages: more than {MAX_MESSAGES} of them; send fewer.", param="messages")
    fields, request = decode_body(body, _request_decoder)
    choices = 1 if request.n is None else request.n
    # Both go out as they came, and providers differ in which they honour: the larger one is what may be spent.
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        max_tokens = max(max_tokens or 0, request.max_completion_tokens)
    _check(request, choices)
    return ChatCall(
        fields=fields,
        body_bytes=len(body),
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        choices=choices,
        has_tools=bool(request.tools or request.functions),
        has_format=(request.response_format is not None and request.response_format.type != "text")
        or any(bytes(fields.get(name, b"null")) != b"null" for name in _FORMATS),
        text_only=_is_text([m.content for m in request.messages if type(m.content) is list]),
        sampling=Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=stops(request.stop),
            logprobs=bool(request.logprobs),
            top_logprobs=request.top_logprobs or 0,
            reasoning_effort=_effort(request),
        ),
        headers=headers,
        priority=read_priority(fields, request.priority, headers),
    )


def _effort(request: _ChatRequest) -> str | None:
    words = request.chat_template_kwargs
    unthinking = words is not None and words.enable_thinking is False
    return "none" if unthinking and request.reasoning_effort is None else request.reasoning_effort


def read_priority(fields: dict[str, msgspec.Raw], given: int | None, headers: CallHeaders) -> int | None:
    """What the caller asks for; taken out of the fields, as each target is told in its own way."""
    fields.pop("priority", None)
    if given is not None:
        check_priority("priority", given)
    return given if headers.priority is None else headers.priority


def _is_text(contents: list[list[_Part]]) -> bool:
    return all(part.type in _TEXT_PARTS for parts in contents for part in parts)


def _check(request: _ChatRequest, choices: int) -> None:
    if not request.messages:
        raise InvalidRequest("messages: [] is empty; send at least one message.", param="messages")
    check_model(request.model)
    check_choices("n", choices)
    check_tokens("max_tokens", request.max_tokens)
    check_tokens("max_completion_tokens", request.max_completion_tokens)
    check_sampling(request.seed, request.temperature, request.top_p)
    if request.top_logprobs is not None:
        if not 0 <= request.top_logprobs <= 20:
            raise InvalidRequest(
                f"top_logprobs: {brief(request.top_logprobs)} is not between 0 and 20.", param="top_logprobs"
            )
        if not request.logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs: true.", param="top_logprobs")
    if request.service_tier not in (None, "auto", "default"):
        raise InvalidRequest(
            f"service_tier: {request.service_tier[:40]!r} has prices of its own, which are not known here; "
            "leave it out.",
            param="service_tier",
        )


def brief(number: int) -> str:
    """A number from a body, as far as a message has room for it."""
    text = str(number)
    return text if len(text) <= 20 else f"{text[:20]}…"


def check_model(model: str) -> None:
    if not 0 < len(model) <= 256 or not model.isprintable():
        raise InvalidRequest(
            "model: must be 1 to 256 printable characters; `auto` lets the gateway choose.", param="model"
        )


def check_choices(name: str, choices: int) -> None:
    if not 1 <= choices <= MAX_CHOICES:
        raise InvalidRequest(f"{name}: {brief(choices)} is not between 1 and {MAX_CHOICES}.", param=name)


def check_tokens(name: str, cap: int | None) -> None:
    if cap is not None and not 1 <= cap <= MAX_TOKENS:
        raise InvalidRequest(f"{name}: {brief(cap)} is not between 1 and {MAX_TOKENS}.", param=name)


def check_sampling(seed: int | None, temperature: float | None, top_p: float | None) -> None:
    if seed is not None and seed not in SEEDS:
        raise InvalidRequest("seed: must fit into 64 bits, signed.", param="seed")
    if temperature is not None and not 0 <= temperature <= 2:
        raise InvalidRequest(f"temperature: {temperature:g} is not between 0 and 2.", param="temperature")
    if top_p is not None and not 0 < top_p <= 1:
        raise InvalidRequest(f"top_p: {top_p:g} is not above 0 and at most 1.", param="top_p")


def stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    found = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not s for s in found) or len(found) > MAX_STOPS:
        raise InvalidRequest(f"stop: send 1 to {MAX_STOPS} strings, none of them empty.", param="stop")
    return found
