"""A call as one target gets it: told how much to think and, where its answer will be judged, asked for what that takes.

What the caller's own body says of thinking stands.
"""

from typing import Any

import msgspec

from gateway.sessions import is_bound, unbound
from gateway.ticket import Ticket
from gateway.upstream.types import ChatCall
from routers.aims import Thinking
from routers.policy import Policy
from routers.types import Decision, Effort, Single

_encode = msgspec.json.Encoder().encode
_TEMPLATE = "chat_template_kwargs"
_OWN_WORDS = ("reasoning_effort", _TEMPLATE, "enable_thinking", "thinking_budget")


def told(ticket: Ticket, model: str, stage: Single | None = None) -> ChatCall:
    """The caller's call for this model: with the effort that was decided for it, and without what its provider cannot
    read of a conversation that comes from another one. `stage`: of a cascade, which may ask one model several times;
    None: its last."""
    call, before, policy, decision = ticket.call, ticket.conversation, ticket.world.policy, ticket.decision
    assert decision is not None
    if before is not None and policy.models[model].provider != before.provider and is_bound(call):
        call = unbound(call)
    if policy.models[model].concise and call.endpoint == "chat.completions":
        call = _concise(call)
    return _with_effort(call, decision, policy, model, stage)


CONCISE = "Think step by step, but keep only a minimum draft of each thinking step, five words at most."
"""Chain of Draft's instruction (Xu et al. 2025, arXiv 2502.18600): as accurate at a fraction of the tokens, there."""


def _concise(call: ChatCall) -> ChatCall:
    """With the hint at the end of the system's words, which come first: a prefix that stays the same stays cached."""
    messages = msgspec.json.decode(call.fields["messages"], type=list[msgspec.Raw])
    first: dict[str, Any] = msgspec.json.decode(messages[0])
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        first["content"] = f"{first['content']}\n\n{CONCISE}"
        messages = messages[1:]
    else:
        first = {"role": "system", "content": CONCISE}
    fields = {**call.fields, "messages": msgspec.Raw(_encode([first, *messages]))}
    return msgspec.structs.replace(call, fields=fields, body_bytes=call.body_bytes + len(CONCISE) + 64)


def _with_effort(call: ChatCall, decision: Decision, policy: Policy, model: str, stage: Single | None) -> ChatCall:
    plan = decision.plan
    if plan.kind == "cascade":
        stages = reversed(plan.stages) if stage is None else (stage,)
        effort = next((one.effort for one in stages if one.model == model), None)
    else:
        effort = plan.effort
    if effort is None or call.endpoint != "chat.completions":
        return call
    thinking = policy.models[model].thinking
    if thinking is None or any(field in call.fields for field in _OWN_WORDS):
        return call
    tokens = None if plan.kind == "cascade" else plan.max_thinking_tokens
    return _thinking(call, effort, thinking, tokens)


def _thinking(call: ChatCall, effort: Effort, thinking: Thinking, tokens: int | None) -> ChatCall:
    if thinking.field == "reasoning_effort":
        word = thinking.off if effort == "none" else effort
        fields = {**call.fields, "reasoning_effort": msgspec.Raw(_encode(word))}
        return msgspec.structs.replace(
            call, fields=fields, sampling=msgspec.structs.replace(call.sampling, reasoning_effort=word)
        )
    if thinking.field == "enable_thinking":
        template = msgspec.Raw(_encode({"enable_thinking": effort != "none"}))
        return msgspec.structs.replace(call, fields={**call.fields, _TEMPLATE: template})
    asked = {"enable_thinking": msgspec.Raw(_encode(effort != "none"))}
    if effort != "none" and tokens is not None:
        asked["thinking_budget"] = msgspec.Raw(b"%d" % tokens)
    return msgspec.structs.replace(call, fields={**call.fields, **asked})


def whole(call: ChatCall) -> ChatCall:
    """The same call for an answer that comes whole."""
    fields = {key: value for key, value in call.fields.items() if key not in ("stream", "stream_options")}
    return msgspec.structs.replace(call, fields=fields, stream=False, include_usage=False)


def to_be_judged(call: ChatCall) -> ChatCall:
    """The same call for an answer that comes whole, with the log probabilities of its tokens."""
    call = whole(call)
    fields = {**call.fields, "logprobs": msgspec.Raw(b"true")}
    return msgspec.structs.replace(call, fields=fields, sampling=msgspec.structs.replace(call.sampling, logprobs=True))


def to_be_stopped(call: ChatCall) -> ChatCall:
    """The same call as a stream, for `gateway.attempts.followed`: it may be stopped, and is paid as far as it came."""
    call = whole(call)
    return msgspec.structs.replace(call, fields={**call.fields, "stream": msgspec.Raw(b"true")}, stream=True)
