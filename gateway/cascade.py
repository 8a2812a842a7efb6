"""A cascade while it runs: each stage but the last answers whole, and is judged before a byte of its answer goes out.

An answer that is accepted is the request's, streamed if the caller asked for that; of one that is not, nothing shows
but its bill. A stage that fails is passed over. Where the last stage cannot answer, or no money is left for it, the
best answer so far is sent, marked as `not_accepted`.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.attempts import AttemptEngine, complete
from gateway.errors import BudgetExceeded
from gateway.ledger.records import AttemptRecord
from gateway.ticket import Ticket
from gateway.told import to_be_judged, told
from gateway.upstream.gather import as_stream
from gateway.upstream.types import Answer, ChatCall, UpstreamError
from routers.cascade import p_correct
from routers.types import Accept, Cascade

NOT_ACCEPTED = "not_accepted"
"""The outcome of an attempt whose answer was not good enough."""


@dataclass(frozen=True, slots=True)
class Climbed:
    """Where a cascade has come to before its last stage."""

    answer: Answer | None = None
    """The best so far."""
    model: str = ""
    """Who wrote it."""
    accepted: bool = False


NOT_CLIMBED = Climbed()


async def climb(engine: AttemptEngine, ticket: Ticket, plan: Cascade, errors: list[UpstreamError]) -> Climbed:
    """Ask the stages before the last in turn, until one is accepted. What went wrong is appended to `errors`."""
    found, best = Climbed(), -1.0
    for stage in plan.stages[:-1]:
        try:
            asked = await _ask(engine, ticket, stage.model, errors)
        except BudgetExceeded:
            if found.answer is None:
                raise
            break
        if asked is None:
            continue
        answer, attempt = asked
        kept = _as_asked(answer, ticket.call)
        p = judged(plan.accept, answer.body) if kept is not None else None
        accepted = p is not None and p >= plan.accept.at_least
        outcome = "ok" if accepted else NOT_ACCEPTED
        ticket.end_attempt(attempt, outcome, answer.usage, delivered_bytes=answer.delivered_bytes, plan=answer.plan)
        if kept is not None and (accepted or (p or 0.0) > best):
            found, best = Climbed(kept, stage.model, accepted), p or 0.0
        if accepted:
            break
        ticket.record.first_byte_us = None  # nobody has seen it
    return found


async def _ask(
    engine: AttemptEngine, ticket: Ticket, model: str, errors: list[UpstreamError]
) -> tuple[Answer, AttemptRecord] | None:
    return await engine.on_target(ticket, model, complete, errors, lambda *to: to_be_judged(told(*to)))


def judged(accept: Accept, body: bytes) -> float | None:
    """P(correct) of a whole answer; None: it cannot be judged, as it has no log probabilities or was filtered."""
    try:
        choice = msgspec.json.decode(body)["choices"][0]
        if choice.get("finish_reason") == "content_filter":
            return None
        return p_correct(accept, [token["logprob"] for token in choice["logprobs"]["content"]])
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return None


def _as_asked(answer: Answer, call: ChatCall) -> Answer | None:
    """Without the log probabilities, where the caller asked for none. None: it is no answer that could be sent."""
    try:
        if len(as_stream(answer.body)) == 1:  # no choice
            return None
        if call.sampling.logprobs:
            return answer
        whole: dict[str, Any] = msgspec.json.decode(answer.body)
        for choice in whole["choices"]:
            choice["logprobs"] = None
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return None
    return msgspec.structs.replace(answer, body=msgspec.json.encode(whole))
