"""From a request's fields to what the local engine is asked: those that only it understands here are read here.

Other providers get these fields as the caller's own bytes. Formats: OpenAI's `response_format`, and vLLM's
`structured_outputs` with one of `json`, `regex`, `choice`.
"""

import re
from typing import Any, Literal

import msgspec

from gateway.decode_errors import misread
from gateway.upstream.types import ChatCall, UpstreamError
from local_engine.types import Effort, SamplingParams, TextFormat

MAX_SEED = (1 << 62) - 1
DEFAULT_EFFORT = "low"
EFFORTS: dict[str, Effort] = {
    "none": "none", "minimal": "none", "low": "low", "medium": "high", "high": "high", "xhigh": "high",
}  # fmt: skip
_UNSERVED = {
    "guided_json": "send structured_outputs: {json}",
    "guided_regex": "send structured_outputs: {regex}",
    "guided_choice": "send structured_outputs: {choice}",
    "guided_grammar": "send structured_outputs: {regex}, or a schema",
    "bad_words": "send logit_bias",
    "ignore_eos": "send min_tokens",
    "include_stop_str_in_output": "add the string to the answer: finish_reason is stop",
    "prompt_logprobs": "an engine's own /score tells them",
    "best_of": "send n",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "allowed_token_ids": "send structured_outputs: {choice} or {regex}, or logit_bias",
    "truncate_prompt_tokens": "leave it out, and shorten the messages",
    "use_beam_search": "leave it out, or send n",
    "length_penalty": "leave it out: no beams are searched",
    "skip_special_tokens": "leave it out: an answer's text has none",
    "typical_p": "send top_p or min_p",
    "grammar": "send response_format, or structured_outputs: {regex}",
    "json_schema": "send response_format, or structured_outputs: {json}",
    "chat_template": "leave it out: the model's own is used",
    "thinking": "send reasoning_effort",
    "enable_thinking": "send chat_template_kwargs: {enable_thinking}, or reasoning_effort",
    "modalities": 'send ["text"]',
    "echo": "leave it out, and put the text before the answer",
    "add_generation_prompt": "leave it out, or send continue_final_message: true and what is to go on",
}
"""Fields of other servers that change an answer, and what does the same here."""
_NEUTRAL: dict[str, object] = {
    "guided_json": None, "best_of": 1, "function_call": "auto", "length_penalty": 1, "skip_special_tokens": True,
    "typical_p": 1, "json_schema": None, "enable_thinking": None, "modalities": ["text"], "add_generation_prompt": True,
}  # fmt: skip
"""What those fields ask for nothing by, beside null; the others by anything false or empty."""
_PUNCTUATION = re.compile(r"([\\.+*?()|\[\]{}^$#&~\-])")
_Mode = Literal["none", "auto", "required"]


class ToolChoice(msgspec.Struct, frozen=True):
    mode: _Mode = "auto"
    tool: str = ""
    """With `required`: the one to call; any where empty."""


class _JsonSchema(msgspec.Struct):
    schema: msgspec.Raw = msgspec.Raw(b'{"type":"object"}')


class _ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    json: msgspec.Raw = msgspec.Raw(b"null")
    regex: str | None = None
    choice: list[str] | None = None


class _Message(msgspec.Struct):
    prefix: Any = None
    """DeepSeek's word for an answer to go on with."""


class _Function(msgspec.Struct):
    name: str


class _NamedTool(msgspec.Struct):
    function: _Function


def sampling_params(call: ChatCall, seed: int) -> SamplingParams:
    """What the engine samples by; `seed` where the caller gave none. Raises UpstreamError naming a bad field."""
    asked = call.sampling
    _refuse_unserved(call)
    effort = asked.reasoning_effort or DEFAULT_EFFORT
    if effort not in EFFORTS:
        raise refused("reasoning_effort", f"{effort[:40]!r} is none of {', '.join(EFFORTS)}")
    return SamplingParams(
        max_tokens=asked.max_tokens,
        min_tokens=_read(call, "min_tokens", int, 0),
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=_read(call, "top_k", int, 0),
        min_p=_read(call, "min_p", float, 0.0),
        presence_penalty=_read(call, "presence_penalty", float, 0.0),
        frequency_penalty=_read(call, "frequency_penalty", float, 0.0),
        repetition_penalty=_read(call, "repetition_penalty", float, 1.0),
        logit_bias=_read(call, "logit_bias", dict[int, float], {}),
        seed=(asked.seed if asked.seed is not None else seed) & MAX_SEED,
        stop=asked.stop,
        stop_token_ids=_read(call, "stop_token_ids", tuple[int, ...], ()),
        logprobs=asked.logprobs,
        top_logprobs=asked.top_logprobs,
        response_format=_text_format(call),
        effort=EFFORTS[effort],
    )


def _refuse_unserved(call: ChatCall) -> None:
    """What would change the answer, and is not done here, is not passed over in silence."""
    for field, fix in _UNSERVED.items():
        if _asks(call, field):
            raise refused(field, f"local models do not know it; {fix}")
    for word in _read(call, "chat_template_kwargs", dict[str, Any], {}):
        if word != "enable_thinking":
            raise refused(f"chat_template_kwargs.{word[:40]}", "local models know enable_thinking alone; leave it out")
    if b'"prefix"' in bytes(call.fields["messages"]):
        messages = _read(call, "messages", list[_Message], [])
        if messages and messages[-1].prefix:
            field = f"messages[{len(messages) - 1}].prefix"
            raise refused(field, "local models do not know it; send continue_final_message: true")


def _asks(call: ChatCall, field: str) -> bool:
    """Whether a field that is not served here would change the answer."""
    asked = _read(call, field, Any, None)
    if field == "add_generation_prompt" and (call.prefix or call.thought is not None):
        return False  # there is an answer to go on with
    return asked not in (None, _NEUTRAL[field]) if field in _NEUTRAL else bool(asked)


def tool_choice(call: ChatCall) -> ToolChoice:
    """Raises UpstreamError for one of another shape."""
    asked: _Mode | _NamedTool = _read(call, "tool_choice", _Mode | _NamedTool, "auto")
    return ToolChoice("required", asked.function.name) if isinstance(asked, _NamedTool) else ToolChoice(asked)


def refused(field: str, problem: str) -> UpstreamError:
    """A request that no other try of this target would serve."""
    message = f"{field}: {problem}"
    error: dict[str, object] = {
        "message": message, "type": "invalid_request_error", "param": field, "code": "invalid_request",
    }  # fmt: skip
    return UpstreamError("refused", message, status=400, error=error)


def _text_format(call: ChatCall) -> TextFormat | None:
    asked = _read(call, "response_format", _ResponseFormat, None)
    structured = _read(call, "structured_outputs", _StructuredOutputs, None)
    if structured is not None:
        field = "structured_outputs"
        if structured.choice == []:
            raise refused("structured_outputs.choice", "is empty; name the texts to choose from")
        given = [form for form in _structured(structured) if form is not None]
        if len(given) != 1 or (asked is not None and asked.type != "text"):
            raise refused(field, "send one of json, regex and choice, and no response_format beside it")
        return given[0]
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return TextFormat("json_object")
    if asked.json_schema is None:
        raise refused("response_format.json_schema", "is missing; send {name, schema}")
    return TextFormat("json_schema", bytes(asked.json_schema.schema).decode(), "response_format.json_schema.schema")


def _structured(asked: _StructuredOutputs) -> list[TextFormat | None]:
    """Each of the fields as a format. A schema may come as JSON or as a text of JSON."""
    schema = pattern = choice = None
    if (raw := bytes(asked.json)) != b"null":
        text = msgspec.json.decode(raw, type=str) if raw[:1] == b'"' else raw.decode()
        schema = TextFormat("json_schema", text, "structured_outputs.json")
    if asked.regex is not None:
        pattern = TextFormat("regex", asked.regex, "structured_outputs.regex")
    if asked.choice is not None:
        words = "|".join(_PUNCTUATION.sub(r"\\\1", word) for word in asked.choice)
        choice = TextFormat("regex", words, "structured_outputs.choice")
    return [schema, pattern, choice]


def _read(call: ChatCall, field: str, type: Any, default: Any) -> Any:
    raw = call.fields.get(field)
    if raw is None or bytes(raw) == b"null":
        return default
    try:
        return msgspec.json.decode(raw, type=type)
    except msgspec.DecodeError as error:
        path, problem = misread(error, type, field)
        raise refused(path or field, f"{problem[0].lower()}{problem[1:]}") from error
