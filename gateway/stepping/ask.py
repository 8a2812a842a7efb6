"""The calls of a plan: each goes on from the thought so far."""

from typing import Any

import msgspec

from gateway.stepping.said import STEP_END
from gateway.upstream.begun import CLOSE
from gateway.upstream.types import ChatCall
from local_engine.reason.specreason import RATINGS
from local_engine.types import ThoughtSoFar

_encode = msgspec.json.Encoder().encode
_OWN = frozenset(
    {"stream", "stream_options", "stop", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "n"}
)


def step(call: ChatCall, thought: str, *, tokens: int, top: int) -> ChatCall:
    """The next step of a thought, at most so many tokens of it, each with its `top` likeliest ones."""
    return _call(call, thought, tokens=tokens, stop=(STEP_END, CLOSE), top=top)


def rating(call: ChatCall, thought: str, cue: str) -> ChatCall:
    """One token after the cue, that says how good the last step is."""
    return _call(call, thought + cue, tokens=1, stop=(), top=RATINGS, temperature=0.0)


def forced_answer(call: ChatCall, thought: str, *, tokens: int) -> ChatCall:
    """What would be answered if the thought ended here."""
    asked = _call(call, thought, tokens=tokens, stop=call.sampling.stop, top=0, temperature=0.0)
    return msgspec.structs.replace(asked, thought=ThoughtSoFar(thought, over=True))


def rest(call: ChatCall, thought: str, *, over: bool, tokens: int | None, top: int = 0) -> ChatCall:
    """All that is still to come, as a stream: of the thought, unless it is over, and the answer."""
    fields = {name: raw for name, raw in call.fields.items() if name not in _OWN or name == "stop"}
    sampling = msgspec.structs.replace(call.sampling, max_tokens=tokens, logprobs=top > 0, top_logprobs=top)
    fields |= _as_fields({"stream": True} | _cap(call, tokens) | _alternatives(top))
    begun = ThoughtSoFar(thought, over) if thought or over else None
    return _with_thought(msgspec.structs.replace(call, fields=fields, sampling=sampling, stream=True), begun)


def _call(
    call: ChatCall, thought: str, *, tokens: int, stop: tuple[str, ...], top: int, temperature: float | None = None
) -> ChatCall:
    fields = {name: raw for name, raw in call.fields.items() if name not in _OWN}
    stated = {"stream": True} | _cap(call, tokens) | _alternatives(top) | ({"stop": list(stop)} if stop else {})
    if temperature is not None:
        stated["temperature"] = temperature
    sampling = msgspec.structs.replace(
        call.sampling,
        max_tokens=tokens,
        temperature=call.sampling.temperature if temperature is None else temperature,
        stop=stop,
        logprobs=top > 0,
        top_logprobs=top,
    )
    asked = msgspec.structs.replace(
        call, fields=fields | _as_fields(stated), sampling=sampling, stream=True, include_usage=False
    )
    return _with_thought(asked, ThoughtSoFar(thought))


def _with_thought(call: ChatCall, thought: ThoughtSoFar | None) -> ChatCall:
    more = len(_encode(thought.text)) if thought is not None else 0
    return msgspec.structs.replace(call, thought=thought, body_bytes=call.body_bytes + more)


def _cap(call: ChatCall, tokens: int | None) -> dict[str, Any]:
    """By the name that the caller uses: some providers know one of the two alone."""
    name = "max_completion_tokens" if "max_completion_tokens" in call.fields else "max_tokens"
    return {} if tokens is None else {name: tokens}


def _alternatives(top: int) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": top} if top else {}


def _as_fields(stated: dict[str, Any]) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(_encode(value)) for name, value in stated.items()}
