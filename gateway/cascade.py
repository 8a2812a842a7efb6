"""A cascade while it runs: each stage but the last answers whole, and is judged before a byte of its answer goes out.

An answer that is accepted is the request's, streamed if the caller asked for that; of one that is not, nothing shows
but its bill. Stages that stand beside each other are asked at the same time, each with its own attempts; where the rule
is agreement, their final answers are compared (`gateway.agreement`), with those of the rounds before as well. A stage
that fails is passed over and agrees with nobody. Where the last stage cannot answer, or no money or time is left for
it, the best answer so far is sent, marked as `not_accepted`, unless the policy would rather fail.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from gateway.agreement import agreed, said, undecided
from gateway.attempts import Ask, AttemptEngine, complete, followed
from gateway.errors import BudgetExceeded
from gateway.ledger.records import AGREED, NOT_ACCEPTED, NOT_NEEDED, AttemptKind, AttemptRecord
from gateway.ticket import Ticket, Unaccepted
from gateway.told import to_be_judged, to_be_stopped, told, whole
from gateway.upstream.gather import as_stream
from gateway.upstream.types import Answer, ChatCall, PlanReport, UpstreamError
from routers.cascade import p_correct
from routers.types import Accept, Cascade, Single


class Heard(NamedTuple):
    """What one stage has answered."""

    answer: Answer
    attempt: AttemptRecord
    sendable: Answer | None
    """As its caller asked for it; None: nobody could be sent that."""
    comes_to: str | None
    """See `gateway.agreement.said`; None, too, where nobody compares."""
    p: float | None
    """P(correct); None: it cannot be judged, or nobody does."""


async def climb(engine: AttemptEngine, ticket: Ticket, plan: Cascade, errors: list[UpstreamError]) -> Answer | None:
    """Ask the stages before the last, round by round; the answer that is accepted, or None.

    What went wrong is appended to `errors`; the best answer so far lies with the ticket.
    """
    rule, best, asked, before = plan.accept, -1.0, 0, list[Heard]()
    rounds = plan.rounds[:-1]
    for at, stages in enumerate(rounds):
        later = sum(len(others) for others in rounds[at + 1 :])
        if _decided(ticket, rule, before, len(stages) + later):
            break
        try:
            came = await _ask(engine, ticket, rule, stages, errors, before, later)
        except BudgetExceeded:
            if ticket.unaccepted is None:
                raise
            break
        asked += len(stages)
        taken = _taken(rule, before, came)
        winner = next((one for one in came if one.attempt.id in taken), None)
        for one in came:
            answer, attempt = one.answer, one.attempt
            outcome = "ok" if one is winner else AGREED if attempt.id in taken else NOT_ACCEPTED
            ticket.end_attempt(attempt, outcome, answer.usage, delivered_bytes=answer.delivered_bytes, plan=answer.plan)
            if one.sendable is not None and (p := one.p or 0.0) > best:
                best = p
                _hold(ticket, rule, one.sendable, attempt.model)
        for one in before:  # it takes two to agree: the second may have come only now
            one.attempt.outcome = AGREED if one.attempt.id in taken else NOT_ACCEPTED
        before += came
        if ticket.plan is None or ticket.plan.kind == "cascade":
            counts = {"stages": len(plan.stages), "asked": asked, "agreed" if rule.agree else "accepted": len(taken)}
            stopped = sum(attempt.outcome == NOT_NEEDED for attempt in ticket.attempts)
            ticket.plan = PlanReport("cascade", counts | ({NOT_NEEDED: stopped} if stopped else {}))
        if winner is not None:
            ticket.accept(winner.attempt)
            return winner.sendable
    return None


async def _ask(
    engine: AttemptEngine,
    ticket: Ticket,
    rule: Accept,
    stages: Sequence[Single],
    errors: list[UpstreamError],
    before: Sequence[Heard],
    later: int,
) -> list[Heard]:
    """The answers of a round, in the order of its stages, with their attempts still open. Where they are to agree, who
    can change nothing any more is stopped; `later`: so many stages may still be asked after this round.

    Raises BudgetExceeded where nobody could be asked for want of money.
    """
    kind: AttemptKind = "fallback" if errors else "escalation" if ticket.attempts else "first"
    stoppable = rule.agree > 0 and len(stages) > 1 and ticket.call.endpoint == "chat.completions"
    make = to_be_stopped if stoppable else whole if rule.agree else to_be_judged

    def call_of(stage: Single) -> Ask:
        return lambda ticket, model: make(told(ticket, model, stage if model == stage.model else None))

    async def ask(stage: Single, kind: AttemptKind, failures: list[UpstreamError]) -> Heard | None:
        run = followed if stoppable else complete
        asked = await engine.on_target(ticket, stage.model, run, failures, call_of(stage), kind=kind)
        if asked is None:
            return None
        answer, attempt = asked
        ticket.came(attempt, answer)
        sendable = _as_asked(answer, ticket.call)
        if ticket.unaccepted is None and sendable is not None:
            _hold(ticket, rule, sendable, attempt.model)  # the others may be too late
        if sendable is None:
            return Heard(answer, attempt, None, None, None)
        if rule.agree:
            return Heard(answer, attempt, sendable, said(answer.body), None)
        return Heard(answer, attempt, sendable, None, judged(rule, answer.body))

    with ticket.together():
        if len(stages) == 1:
            found = await ask(stages[0], kind, errors)
            return [] if found is None else [found]
        failures: list[list[UpstreamError]] = [[] for _ in stages]
        tasks = [
            asyncio.create_task(ask(stage, kind if stage is stages[0] else "beside", own), name="stage")
            for stage, own in zip(stages, failures, strict=True)
        ]
        waiting, came = set(tasks), list[Heard]()
        try:
            while waiting and not _decided(ticket, rule, [*before, *came], len(waiting) + later):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                ended = [task for task in done if not task.cancelled() and task.exception() is None]
                came += [found for task in ended if (found := task.result()) is not None]
            stopped = bool(waiting)
        finally:
            for task in waiting:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if stopped:
            ticket.end_unanswered(NOT_NEEDED)
    errors.extend(error for own in failures for error in own)
    came = [result for result in results if isinstance(result, Heard)]
    for problem in results:
        if isinstance(problem, asyncio.CancelledError) and stopped:
            continue
        if isinstance(problem, BaseException) and not (isinstance(problem, BudgetExceeded) and came):
            raise problem
    return came


def _decided(ticket: Ticket, rule: Accept, heard: Sequence[Heard], to_come: int) -> bool:
    """Whether no answer that is still to come changes what is sent. Where nobody agrees any more, one that could be
    sent if all else failed has to be there."""
    if not rule.agree:
        return False
    answers = [one.comes_to for one in heard]
    if undecided(answers, to_come, rule.agree):
        return False
    return bool(agreed(answers, rule.agree)) or rule.unaccepted == "fail" or ticket.unaccepted is not None


def _hold(ticket: Ticket, rule: Accept, answer: Answer, model: str) -> None:
    """The best so far, in case that nobody does better."""
    if rule.unaccepted == "send":
        ticket.unaccepted = Unaccepted(answer, model)


def _taken(rule: Accept, before: Sequence[Heard], came: Sequence[Heard]) -> set[str]:
    """The attempts whose answers are good enough: enough give the same by now, or P(correct) is high enough."""
    if rule.agree:
        heard = [*before, *came]
        return {heard[at].attempt.id for at in agreed([one.comes_to for one in heard], rule.agree)}
    return {one.attempt.id for one in came if one.p is not None and one.p >= rule.at_least}


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
