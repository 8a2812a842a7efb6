"""From a request's `messages` to the tokens a model reads."""

from typing import Any

import jinja2
import msgspec

from local_engine.errors import ModelLoadError
from local_engine.types import Effort, Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Chat templates leave out what another role says, without a word."""
Tool = dict[str, Any]
"""One tool in OpenAI's shape: `{"type": "function", "function": {"name", "description", "parameters"}}`."""


class InvalidRequest(Exception):
    """The request cannot be served; the message names the field, what is wrong with it and what would be right."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


def parse_messages(messages_json: bytes) -> list[Message]:
    """Decode an OpenAI `messages` array into what chat templates expect: string contents, decoded tool arguments."""
    try:
        messages = msgspec.json.decode(messages_json, type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"messages is not a JSON array of objects: {error}") from error
    if not messages:
        raise InvalidRequest("messages is empty: send at least one message")
    return [_template_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def parse_tools(tools_json: bytes | None) -> list[Tool] | None:
    """Decode an OpenAI `tools` array; None when there is none."""
    if tools_json is None:
        return None
    try:
        tools = msgspec.json.decode(tools_json, type=list[Tool]) or None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"tools is not a JSON array of objects: {error}", "tools") from error
    for at, tool in enumerate(tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"tools[{at}].function.name must be a string", "tools")
        if not isinstance(function.get("parameters") or {}, dict):
            raise InvalidRequest(f"tools[{at}].function.parameters must be a JSON schema, an object", "tools")
    return tools


def check_tools(tokenizer: Any) -> None:
    """Raises InvalidRequest where the model's chat template would leave tools out of the prompt."""
    if "tools" not in tokenizer.chat_template:
        raise InvalidRequest(
            "tools: this model's chat template knows none; leave them out or ask another model", "tools"
        )


def check_calls(messages: list[Message]) -> None:
    """Raises InvalidRequest for tool calls of the history that are none: chat templates fail on them."""
    for at, message in enumerate(messages):
        calls = message.get("tool_calls")
        if message["role"] != "assistant" or calls is None:
            continue
        where, shape = f"messages[{at}].tool_calls", "function: {name, arguments}"
        if not isinstance(calls, list):
            raise InvalidRequest(f"{where}: {_brief(calls)} is no list; send one of calls with {shape}")
        for number, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            told = isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function
            if not told:
                raise InvalidRequest(f"{where}[{number}]: {_brief(call)} is no call; send one with {shape}")


def check_template(tokenizer: Any) -> None:
    """Raises ModelLoadError where the model's chat template makes no prompt of a single question: of none, then."""
    try:
        tokens = prompt_tokens(tokenizer, [{"role": "user", "content": "1 + 1"}])
    except Exception as error:  # a template is a program, and may raise anything
        why = " ".join(str(error.__cause__ or error).split())
        raise ModelLoadError(
            f"its chat template fails on a single question ({why}); correct chat_template.jinja, or chat_template in"
            " tokenizer_config.json"
        ) from error
    if not tokens:
        raise ModelLoadError(
            "its chat template and its tokenizer make no tokens of a question; bring the chat_template.jinja,"
            " tokenizer.json and tokenizer_config.json that belong to its weights"
        )


def prompt_tokens(
    tokenizer: Any,
    messages: list[Message],
    tools: list[Tool] | None = None,
    effort: Effort = "low",
    *,
    opened: bool = True,
) -> list[int]:
    """The prompt's tokens by the model's own chat template, ready for the assistant's turn where that is `opened`.

    Control tokens written by a user (`<|im_end|>` and such) are read as plain text, so nobody can forge a turn.
    Templates without effort modes ignore `effort`; Qwen3's know `enable_thinking`.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=opened,
            sanitize_control_tokens=True,
            effort=effort,
            enable_thinking=effort != "none",
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error
    tokens: list[int] = encoded["input_ids"]
    return tokens


def _template_message(message: dict[str, Any], where: str) -> Message:
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}; not {str(role)[:50]!r}")
    if message.get("content") is None and role != "assistant":
        raise InvalidRequest(f"{where}.content is missing: only an assistant's message may go without")
    text = _text(message.get("content"), where)
    if role == "assistant":
        text = text.rpartition("</think>")[2]  # earlier thinking is not part of the conversation
    plain = {**message, "content": text}
    if isinstance(message.get("tool_calls"), list):
        plain["tool_calls"] = [_decoded_call(call) for call in message["tool_calls"]]
    return plain


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content must be a string or a list of parts")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{where}.content may hold only text parts: local models read text only")
    return "".join(text for text in texts if isinstance(text, str))


def _brief(value: object) -> str:
    return repr(value)[:100]


def _decoded_call(call: Any) -> Any:
    """OpenAI sends a call's arguments as a JSON string; templates want the object."""
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": msgspec.json.decode(function["arguments"])}}
    except (KeyError, TypeError, msgspec.DecodeError):
        return call
