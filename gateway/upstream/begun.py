"""An answer, or a thought, that has begun: how each server is told to write on from it, and how ours reads that.

The last message holds it. DeepSeek and Mistral take `prefix: true` in that message, DeepSeek a thought as its
`reasoning_content`; vLLM, SGLang and llama.cpp take `continue_final_message`, llama.cpp with the name of the field that
goes on and a thought in its own (its pull request 23089, of May 2026); Anthropic goes on from any last message of an
assistant. Where a thought has no field it stands in the content, between the tags that most models think in.
"""

from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.upstream.types import ChatCall
from local_engine.types import ThoughtSoFar
from routers.policy import PrefixStyle

OPEN, CLOSE = "<think>", "</think>"
_CONTINUE, _THOUGHT, _TEMPLATE = "continue_final_message", "reasoning_content", "chat_template_kwargs"
_encode = msgspec.json.Encoder().encode
_YES, _NO = msgspec.Raw(b"true"), msgspec.Raw(b"false")


def begun(call: ChatCall, style: PrefixStyle) -> dict[str, msgspec.Raw]:
    """The fields that say so, in place of the call's own."""
    last: dict[str, Any] = {"role": "assistant", "content": call.prefix}
    said = call.thought
    if style == "llamacpp" and said is not None and not (said.text.strip() or call.prefix):
        return _unthought(call) if said.over else {}  # it begins no answer by an empty message
    if style == "deepseek":
        last["prefix"] = True
    if said is not None:
        last |= _with_thought(said, call.prefix, style)
    messages = msgspec.json.decode(call.fields["messages"], type=list[msgspec.Raw])
    fields = {"messages": msgspec.Raw(_encode([*messages, last]))}
    if style in ("vllm", "leadline"):
        fields |= {_CONTINUE: _YES, "add_generation_prompt": _NO}
    elif style == "llamacpp":
        which = "content" if said is None or said.over else _THOUGHT
        fields |= {_CONTINUE: msgspec.Raw(_encode(which)), "add_generation_prompt": _NO}
        if said is None:  # servers from before that refuse an answer to a model that thinks
            fields |= _unthought(call)
    return fields


def _with_thought(said: ThoughtSoFar, answer: str, style: PrefixStyle) -> dict[str, str]:
    """The fields of the last message."""
    if style == "llamacpp":  # it writes the closing tag, on the line that it is given
        return {_THOUGHT: said.text.rstrip() + "\n" if said.over else said.text, "content": answer}
    if style == "deepseek":  # once content has begun, the thought is over
        return {_THOUGHT: said.text, "content": answer or ("\n" if said.over else "")}
    return {"content": in_tags(said, as_it_is=style == "leadline") + answer}


def _unthought(call: ChatCall) -> dict[str, msgspec.Raw]:
    """Answered at once, as its template has it."""
    given = call.fields.get(_TEMPLATE)
    kwargs = {} if given is None else msgspec.json.decode(given, type=dict[str, msgspec.Raw])
    return {_TEMPLATE: msgspec.Raw(_encode({**kwargs, "enable_thinking": False}))}


def in_tags(thought: ThoughtSoFar, *, as_it_is: bool = False) -> str:
    """Unless it goes out as it is, a thought that is over ends as chat templates write it: vLLM refuses a last message
    that its template changes."""
    text = f"{OPEN}\n{thought.text}"
    if not thought.over:
        return text
    if not as_it_is or not text.endswith("\n"):
        text = text.rstrip() + "\n"
    return f"{text}{CLOSE}\n\n"


def closing(text: str) -> int:
    """How many characters at the end of a text may be the beginning of the closing tag."""
    return next((size for size in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:size])), 0)


def goes_on(call: ChatCall) -> bool:
    """Whether the caller asks, in vLLM's or llama.cpp's style, that its last message be gone on with."""
    asked = msgspec.json.decode(call.fields.get(_CONTINUE, _NO))
    return call.endpoint == "chat.completions" and asked is not None and asked is not False


def read_begun(call: ChatCall) -> ChatCall:
    """A call of which `goes_on` says so, as the local engine takes it; any other as it is. Raises InvalidRequest."""
    if not goes_on(call):
        return call
    flag = msgspec.json.decode(call.fields[_CONTINUE])
    if flag is not True and flag not in ("content", _THOUGHT):
        raise InvalidRequest(
            f'{_CONTINUE}: {str(flag)[:40]!r} is none of true, false, "content" and "{_THOUGHT}".', param=_CONTINUE
        )
    messages = msgspec.json.decode(call.fields["messages"], type=list[dict[str, Any]])
    last = messages[-1]
    text = "" if (content := last.get("content")) is None else content
    inside = last.get("reasoning") if last.get(_THOUGHT) is None else last[_THOUGHT]
    if last.get("role") != "assistant" or not isinstance(text, str) or not isinstance(inside, str | None):
        raise InvalidRequest(
            f"{_CONTINUE}: the last message is not an assistant's text; send one to go on from.", param="messages"
        )
    over = flag == "content" or (flag is True and bool(text))
    if inside is None and flag != "content" and text.startswith(OPEN):
        inside, tag, text = text.removeprefix(OPEN).removeprefix("\n").partition(CLOSE)
        over, text = bool(tag), text.lstrip("\n")
    if flag == _THOUGHT:
        over, inside = False, inside or ""
        if text:
            raise InvalidRequest(
                f"{_CONTINUE}: an answer stands behind the thought that is to go on; leave its `content` empty, or send"
                ' "content".', param="messages",
            )  # fmt: skip
    fields = {name: raw for name, raw in call.fields.items() if name not in (_CONTINUE, "add_generation_prompt")}
    fields["messages"] = msgspec.Raw(_encode(messages[:-1]))
    thought = ThoughtSoFar(inside, over) if inside is not None else None
    return msgspec.structs.replace(call, fields=fields, prefix=text, thought=thought)
