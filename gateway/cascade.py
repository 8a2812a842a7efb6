"""A cascade while it runs: each stage but the last answers whole, and is judged before a byte of its answer goes out.

An answer that is accepted is the request's, streamed if the caller asked for that; of one that is not, nothing shows
but its bill. Stages that stand beside each other are asked at the same time, each with its own attempts; where the rule
is agreement, their final answers are compared (`gateway.agreement`), with those of the rounds before as well. A stage
that fails is passed over and agrees with nobody. Where the last stage cannot answer, or no money or time is left for
it, the best answer so far is sent, marked as `not_accepted`, unless the policy would rather fail.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.agreement import agreed, said
from gateway.attempts import Ask, AttemptEngine, complete
from gateway.errors import BudgetExceeded
from gateway.ledger.records import AttemptKind, AttemptRecord
from gateway.ticket import Ticket, Unaccepted
from gateway.told import to_be_judged, told, whole
from gateway.upstream.gather import as_stream
from gateway.upstream.types import Answer, ChatCall, PlanReport, UpstreamError
from routers.cascade import p_correct
from routers.types import Accept, Cascade, Single

NOT_ACCEPTED = "not_accepted"
"""The outcome of an attempt whose answer was not good enough."""
AGREED = "agreed"
"""The outcome of an attempt that gave the answer which another one was sent for."""

_Asked = tuple[Answer, AttemptRecord]


async def climb(engine: AttemptEngine, ticket: Ticket, plan: Cascade, errors: list[UpstreamError]) -> Answer | None:
    """Ask the stages before the last, round by round; the answer that is accepted, or None.

    What went wrong is appended to `errors`; the best answer so far lies with the ticket.
    """
    rule, best, asked, before = plan.accept, -1.0, 0, list[str | None]()
    for stages in plan.rounds[:-1]:
        try:
            came = await _ask(engine, ticket, rule, stages, errors)
        except BudgetExceeded:
            if ticket.unaccepted is None:
                raise
            break
        asked += len(stages)
        kept = [_as_asked(answer, ticket.call) for answer, _ in came]
        bodies = [None if found is None else answer.body for found, (answer, _) in zip(kept, came, strict=True)]
        accepted, p = _agreeing(rule, bodies, before) if rule.agree else _probable(rule, bodies)
        for at, (answer, attempt) in enumerate(came):
            outcome = NOT_ACCEPTED if at not in accepted else "ok" if at == accepted[0] else AGREED
            ticket.end_attempt(attempt, outcome, answer.usage, delivered_bytes=answer.delivered_bytes, plan=answer.plan)
            if (found := kept[at]) is not None and p[at] > best:
                best = p[at]
                _hold(ticket, rule, found, attempt.model)
        if ticket.plan is None or ticket.plan.kind == "cascade":
            counts = {"stages": len(plan.stages), "asked": asked, "agreed" if rule.agree else "accepted": len(accepted)}
            ticket.plan = PlanReport("cascade", counts)
        if accepted:
            ticket.accept(came[accepted[0]][1])
            return kept[accepted[0]]
    return None


async def _ask(
    engine: AttemptEngine, ticket: Ticket, rule: Accept, stages: Sequence[Single], errors: list[UpstreamError]
) -> list[_Asked]:
    """The answers of a round, in the order of its stages, with their attempts still open. Raises BudgetExceeded where
    nobody could be asked for want of money."""
    kind: AttemptKind = "fallback" if errors else "escalation" if ticket.attempts else "first"

    async def ask(stage: Single, kind: AttemptKind, failures: list[UpstreamError]) -> _Asked | None:
        asked = await engine.on_target(ticket, stage.model, complete, failures, _call(rule, stage), kind=kind)
        if asked is not None:
            answer, attempt = asked
            ticket.came(attempt, answer)
            if ticket.unaccepted is None and (kept := _as_asked(answer, ticket.call)) is not None:
                _hold(ticket, rule, kept, attempt.model)  # the others may be too late
        return asked

    with ticket.together():
        if len(stages) == 1:
            found = await ask(stages[0], kind, errors)
            return [] if found is None else [found]
        failures: list[list[UpstreamError]] = [[] for _ in stages]
        kinds: list[AttemptKind] = [kind if stage is stages[0] else "beside" for stage in stages]
        asking = map(ask, stages, kinds, failures)
        results = await asyncio.gather(*asking, return_exceptions=True)  # cancelled, it ends when all of them have
    errors.extend(error for own in failures for error in own)
    came = [result for result in results if isinstance(result, tuple)]
    wrong = [result for result in results if isinstance(result, BaseException)]
    for problem in wrong:
        if not isinstance(problem, BudgetExceeded) or not came:
            raise problem
    return came


def _call(rule: Accept, stage: Single) -> Ask:
    ask = whole if rule.agree else to_be_judged
    return lambda ticket, model: ask(told(ticket, model, stage if model == stage.model else None))


def _hold(ticket: Ticket, rule: Accept, answer: Answer, model: str) -> None:
    """The best so far, in case that nobody does better."""
    if rule.unaccepted == "send":
        ticket.unaccepted = Unaccepted(answer, model)


def _agreeing(
    rule: Accept, bodies: Sequence[bytes | None], before: list[str | None]
) -> tuple[list[int], Sequence[float]]:
    """The places of those who give the answer that enough have given by now, those `before` included; and that all of
    them are worth the same. The round's answers are added to `before`."""
    own = [None if body is None else said(body) for body in bodies]
    earlier = len(before)
    before += own
    return [at - earlier for at in agreed(before, rule.agree) if at >= earlier], [0.0] * len(bodies)


def _probable(rule: Accept, bodies: Sequence[bytes | None]) -> tuple[list[int], Sequence[float]]:
    """The places of those whose P(correct) is high enough; and P(correct) of each, 0 where it cannot be judged."""
    p = [None if body is None else judged(rule, body) for body in bodies]
    return [at for at, value in enumerate(p) if value is not None and value >= rule.at_least], [one or 0.0 for one in p]


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
        body: dict[str, Any] = msgspec.json.decode(answer.body)
        for choice in body["choices"]:
            choice["logprobs"] = None
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return None
    return msgspec.structs.replace(answer, body=msgspec.json.encode(body))
