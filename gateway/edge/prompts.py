"""From the bytes of a completion or an embedding request to a ChatCall, as strict as `read_chat`.

A `prompt` or `input` is one text, a list of texts, one list of token ids, or a list of such lists. Each of its texts
has a context window of its own, so the call says how many there are.
"""

from typing import Annotated, Any, Literal

import msgspec

from gateway.edge.wire import (
    StreamOptions,
    brief,
    check_choices,
    check_model,
    check_sampling,
    check_tokens,
    decode_body,
    read_priority,
    stops,
)
from gateway.errors import InvalidRequest
from gateway.upstream.types import CallHeaders, ChatCall, Sampling

MAX_INPUTS = 2048
MAX_TOKEN_IDS = 1 << 20
"""Of all token lists of one request."""
MAX_DIMENSIONS = 1 << 16

_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _CompletionRequest(msgspec.Struct):
    model: str
    prompt: msgspec.Raw
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    best_of: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: int | None = None
    service_tier: str | None = None
    priority: int | None = None


class _EmbeddingRequest(msgspec.Struct):
    model: str
    input: msgspec.Raw
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    stream: bool | None = False
    priority: int | None = None


_completion_decoder = msgspec.json.Decoder(_CompletionRequest)
_embedding_decoder = msgspec.json.Decoder(_EmbeddingRequest)
_text = msgspec.json.Decoder(str)
_texts = msgspec.json.Decoder(list[str])
_tokens = msgspec.json.Decoder(list[_TokenId])
_token_lists = msgspec.json.Decoder(list[list[_TokenId]])


def read_completion(body: bytes, headers: CallHeaders) -> ChatCall:
    """Raises InvalidRequest, naming the field, what is wrong with it and what would be right."""
    fields, request = decode_body(body, _completion_decoder)
    prompts = count_texts("prompt", bytes(request.prompt))
    check_model(request.model)
    choices = 1 if request.n is None else request.n
    tried = choices if request.best_of is None else request.best_of
    check_choices("n", choices)
    check_choices("best_of", tried)
    if tried < choices:
        raise InvalidRequest(f"best_of: {brief(tried)} is less than n, {choices}.", param="best_of")
    check_tokens("max_tokens", request.max_tokens)
    check_sampling(request.seed, request.temperature, request.top_p)
    if request.logprobs is not None and not 0 <= request.logprobs <= 20:
        raise InvalidRequest(f"logprobs: {brief(request.logprobs)} is not between 0 and 20.", param="logprobs")
    if request.service_tier not in (None, "auto", "default"):
        raise InvalidRequest(
            "service_tier: other tiers have prices that the ledger does not know.", param="service_tier"
        )
    return _call(
        fields,
        body,
        request.model,
        headers,
        Sampling(
            max_tokens=request.max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=stops(request.stop),
            logprobs=request.logprobs is not None,
            top_logprobs=request.logprobs or 0,
            reasoning_effort=None,
        ),
        endpoint="completions",
        inputs=prompts,
        choices=tried * prompts,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        priority=read_priority(fields, request.priority, headers),
    )


def read_embedding(body: bytes, headers: CallHeaders) -> ChatCall:
    """Raises InvalidRequest, naming the field, what is wrong with it and what would be right."""
    fields, request = decode_body(body, _embedding_decoder)
    inputs = count_texts("input", bytes(request.input))
    check_model(request.model)
    if request.dimensions is not None and not 1 <= request.dimensions <= MAX_DIMENSIONS:
        raise InvalidRequest(
            f"dimensions: {brief(request.dimensions)} is not between 1 and {MAX_DIMENSIONS}.", param="dimensions"
        )
    if request.stream:
        raise InvalidRequest("stream: embeddings come whole; leave it out.", param="stream")
    no_output = Sampling(
        max_tokens=0, temperature=1.0, top_p=1.0, seed=None, stop=(), logprobs=False, top_logprobs=0,
        reasoning_effort=None,
    )  # fmt: skip
    asked = read_priority(fields, request.priority, headers)
    return _call(fields, body, request.model, headers, no_output, endpoint="embeddings", inputs=inputs, priority=asked)


def count_texts(name: Literal["prompt", "input"], raw: bytes) -> int:
    """How many texts a field holds, 1 to MAX_INPUTS. Raises InvalidRequest."""
    first = raw[1:].lstrip(b" \t\r\n")[:1] if raw[:1] == b"[" else b""
    try:
        if not first:
            _text.decode(raw)
            return 1
        if first == b'"':
            found = len(_texts.decode(raw))
        elif raw.count(b",") >= MAX_TOKEN_IDS:
            raise InvalidRequest(f"{name}: more than {MAX_TOKEN_IDS} token ids; send fewer.", param=name)
        elif first == b"[":
            lists = _token_lists.decode(raw)
            found = len(lists) if all(lists) else 0
        else:
            found = 1 if _tokens.decode(raw) else 0
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"{name}: send a text, a list of texts, a list of token ids, or a list of such lists "
            f"({str(error).partition(' - at ')[0]}).",
            param=name,
        ) from error
    if not 1 <= found <= MAX_INPUTS:
        problem = f"{found} texts" if found else "empty"
        raise InvalidRequest(f"{name}: {problem}; send 1 to {MAX_INPUTS} texts, none without a token.", param=name)
    return found


def _call(
    fields: dict[str, msgspec.Raw], body: bytes, model: str, headers: CallHeaders, sampling: Sampling, **more: Any
) -> ChatCall:
    return ChatCall(
        fields=fields,
        body_bytes=len(body),
        model=model,
        has_tools=False,
        has_format=False,
        text_only=True,
        sampling=sampling,
        headers=headers,
        **{"stream": False, "include_usage": False, "choices": 1, **more},
    )
