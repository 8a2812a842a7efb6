"""The attempt engine: one way to an answer for streams and plain calls, local and remote.

    begin     hold the money, journal the attempt, ask the target's breaker
    run       up to the first byte: the last moment at which another attempt is still possible
    again     the same target, while its error passes by itself and the retry budget allows
    fall back by the cause of the failure, to what the decision holds in reserve, each target once
    hedge     where the route says so: a second attempt beside a slow first, the loser cancelled and billed
    resume    where the route says so: a target that continues a stream which broke after its first byte

Nothing is tried again after the first byte except by `resume`, which the caller can see.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from gateway.errors import (
    BudgetExceeded,
    ContextLengthExceeded,
    LeadlineError,
    Unavailable,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRefused,
    UpstreamTimeout,
)
from gateway.ledger.records import AttemptKind, AttemptRecord
from gateway.telemetry.metrics import Metrics
from gateway.ticket import Ticket
from gateway.upstream.hedge import HedgeBudget
from gateway.upstream.retry import RetryBudget, wait_before_retry
from gateway.upstream.types import Answer, AnswerStream, Cause, ChatCall, Target, Upstream, UpstreamError
from routers.policy import FailureCause, Hedge
from routers.units import format_money

_T = TypeVar("_T", Answer, AnswerStream)
Run = Callable[[Upstream, Target], Awaitable[_T]]

_FAILURE: dict[Cause, FailureCause] = {
    "rate_limit": "rate_limit",
    "context_length": "context_length",
    "content_filter": "content_filter",
}
"""Causes with fallbacks of their own; all others are `error`."""
_HEALTHY: frozenset[Cause] = frozenset({"refused", "context_length", "content_filter"})
"""The target works: it is the request that it refuses."""


class AttemptEngine:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._random = random.Random()
        self._retries: dict[str, RetryBudget] = {}
        self._hedges: dict[str, HedgeBudget] = {}

    async def first_answer(self, ticket: Ticket, run: Run[_T]) -> tuple[_T, AttemptRecord]:
        """The first target that answers, with its attempt still open. Raises LeadlineError when none does."""
        decision = ticket.decision
        assert decision is not None
        errors: list[UpstreamError] = []
        tried: list[str] = []
        model: str | None = decision.plan.model
        while model is not None:
            tried.append(model)
            found = await self._on_target(ticket, model, run, errors)
            if found is not None:
                return found
            cause = errors[-1].cause
            if cause == "refused":
                break
            failure = _FAILURE.get(cause, "error")
            reserve = decision.on_cause.get(failure)
            if reserve is None:
                reserve = decision.fallbacks if failure in ("error", "rate_limit") else ()
            model = next((name for name in reserve if name not in tried), None)
        raise failed(errors, ticket)

    async def _on_target(
        self, ticket: Ticket, model: str, run: Run[_T], errors: list[UpstreamError]
    ) -> tuple[_T, AttemptRecord] | None:
        """This target until it answers or is given up; what went wrong is appended to `errors`."""
        world = ticket.world
        target = world.targets[model]
        breaker = world.breakers[model]
        budget = self._retries.get(target.provider)
        if budget is None:
            budget = self._retries[target.provider] = RetryBudget()
        budget.deposit()
        # A client that tries again by itself multiplies our own retries: one of the two is enough.
        retries = target.retries if ticket.call.headers.retry_count == 0 else 0
        kind: AttemptKind = "first" if not errors else "fallback"
        if errors:
            self._metrics.fell_back(ticket.attempts[-1].model if ticket.attempts else model, errors[-1].cause)
        for retry in range(retries + 1):
            if not breaker.acquire():
                errors.append(_breaker_open(target, breaker.reason(), breaker.closed_in_s()))
                return None
            try:
                attempt = await ticket.begin_attempt(target, kind)
            except BaseException as error:
                breaker.abandoned()
                if isinstance(error, BudgetExceeded) and errors:
                    return None  # a fallback that cannot be paid for is no fallback
                raise
            hedge = ticket.route.hedge if ticket.route is not None and kind == "first" else None
            try:
                if hedge is not None:
                    return await self._race(ticket, hedge, target, attempt, run)
                return await self._run(ticket, target, attempt, run), attempt
            except UpstreamError as error:
                errors.append(error)
            wait = wait_before_retry(errors[-1], retry, self._random)
            if wait is None or retry == retries or ticket.remaining_s() < wait or not budget.withdraw():
                break
            await asyncio.sleep(wait)
            ticket.waited(int(wait * 1e9))
            kind = "retry"
            self._metrics.retried(model, errors[-1].cause)
        return None

    async def _run(self, ticket: Ticket, target: Target, attempt: AttemptRecord, run: Run[_T]) -> _T:
        """One attempt up to its first byte, booked with its breaker and, if it fails, in the ledger."""
        breaker = ticket.world.breakers[target.model]
        began_ns = time.perf_counter_ns()
        try:
            answer = await run(ticket.world.upstreams[target.provider], target)
        except UpstreamError as error:
            ticket.waited(time.perf_counter_ns() - began_ns)
            ticket.fail_attempt(attempt, error)
            self.failed(ticket, target.model, error)
            raise
        except BaseException:
            breaker.abandoned()
            raise
        ticket.waited(time.perf_counter_ns() - began_ns)
        breaker.succeeded()
        ticket.first_byte(attempt)
        return answer

    def failed(self, ticket: Ticket, model: str, error: UpstreamError) -> None:
        """What an attempt's failure says of its target, before its first byte or after."""
        breaker = ticket.world.breakers[model]
        if error.cause in _HEALTHY:
            breaker.succeeded()
        elif error.cause == "rate_limit" and error.retry_after_s is not None:
            breaker.limited(error.retry_after_s)
        else:
            breaker.failed()

    # hedging --------------------------------------------------------------------------------------------------------

    async def _race(
        self, ticket: Ticket, hedge: Hedge, target: Target, attempt: AttemptRecord, run: Run[_T]
    ) -> tuple[_T, AttemptRecord]:
        """The attempt, and a second one beside it when its first byte is late: the first of them to answer.

        The loser is cancelled at once and billed as an estimate. Raises the last error when both fail.
        """
        assert ticket.route is not None
        budget = self._hedges.get(ticket.route.name)
        if budget is None:
            budget = self._hedges[ticket.route.name] = HedgeBudget(hedge.max_extra)
        running = {asyncio.create_task(self._run(ticket, target, attempt, run)): attempt}
        held = 0
        second: AttemptRecord | None = None
        error: UpstreamError | None = None
        winner: AttemptRecord | None = None
        try:
            done, _ = await asyncio.wait(running, timeout=hedge.after_ms / 1000)
            if not done:
                other = self._hedge_target(ticket, target)
                held = ticket.worst_cost(other) or 0
                if budget.reserve(held):
                    second = await self._begin_hedge(ticket, other)
                    if second is not None:
                        running[asyncio.create_task(self._run(ticket, other, second, run))] = second
                    else:
                        budget.settle(held, 0)
            while running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    ended = running.pop(task)
                    try:
                        answer = task.result()
                    except UpstreamError as problem:
                        error = problem
                        continue
                    winner = ended
                    return answer, ended
            assert error is not None
            raise error
        finally:
            await self._end_losers(ticket, running, "hedge_lost" if winner is not None else "cancelled")
            if second is not None:
                loser = attempt if winner is second else second
                budget.settle(held, loser.cost_nanousd or 0)
                outcome: Literal["won", "lost", "failed"] = "failed"
                if winner is not None:
                    outcome = "won" if winner is second else "lost"
                self._metrics.hedged(second.model, outcome)

    def _hedge_target(self, ticket: Ticket, target: Target) -> Target:
        """The first fallback whose breaker is closed, else the same target once more."""
        decision, world = ticket.decision, ticket.world
        assert decision is not None
        for name in decision.on_cause.get("error", decision.fallbacks):
            if name != target.model and world.breakers[name].reason() is None:
                return world.targets[name]
        return target

    async def _begin_hedge(self, ticket: Ticket, target: Target) -> AttemptRecord | None:
        breaker = ticket.world.breakers[target.model]
        if not breaker.acquire():
            return None
        try:
            return await ticket.begin_attempt(target, "hedge")
        except BaseException as error:
            breaker.abandoned()
            if isinstance(error, BudgetExceeded):
                return None
            raise

    async def _end_losers(self, ticket: Ticket, running: dict["asyncio.Task[_T]", AttemptRecord], outcome: str) -> None:
        for task in running:
            task.cancel()
        for task, attempt in running.items():
            await asyncio.wait((task,))
            if task.cancelled() or task.exception() is not None:
                ticket.end_if_running(attempt, outcome)
                continue
            late = task.result()
            if isinstance(late, Answer):
                ticket.end_attempt(attempt, outcome, late.usage, delivered_bytes=late.delivered_bytes)
            else:
                ticket.end_attempt(attempt, outcome, late.state.usage if late.state.done else None)
                await late.close()

    def spent(self, ticket: Ticket) -> None:
        """A request has been settled: what it cost lets its route's hedges cost more."""
        if ticket.route is not None and ticket.route.hedge is not None:
            budget = self._hedges.setdefault(ticket.route.name, HedgeBudget(ticket.route.hedge.max_extra))
            budget.spent(sum(a.cost_nanousd or 0 for a in ticket.attempts if a.outcome != "hedge_lost"))

    # resuming -------------------------------------------------------------------------------------------------------

    async def resume(self, ticket: Ticket, call: ChatCall) -> tuple[AnswerStream, AttemptRecord] | None:
        """A stream that continues one which broke, from the next of the decision's targets that take a prefix.

        `call` ends in the assistant's words so far (`gateway.resume`). Each target is asked once; None: nobody can.
        """
        assert ticket.decision is not None
        asked = {attempt.model for attempt in ticket.attempts if attempt.kind == "resume"}
        away = ticket.world.unavailable()
        for model in ticket.decision.resume:
            if model in asked or model in away:
                continue
            target = ticket.world.targets[model]
            if not ticket.world.breakers[model].acquire():
                continue
            try:
                attempt = await ticket.begin_attempt(target, "resume", call)
            except BudgetExceeded:
                ticket.world.breakers[model].abandoned()
                continue
            try:
                return await self._run(ticket, target, attempt, lambda u, t: u.stream(t, call)), attempt
            except UpstreamError:
                continue
        return None


def _breaker_open(target: Target, reason: str | None, wait_s: float | None) -> UpstreamError:
    return UpstreamError("breaker_open", f"{target.model} is left alone ({reason})", retry_after_s=wait_s)


def failed(errors: list[UpstreamError], ticket: Ticket) -> LeadlineError:
    """The error a caller sees when every attempt failed: the last one's kind, all of their words.

    Whoever has tried several times already tells the caller's client not to multiply that.
    """
    last = errors[-1]
    provider = ticket.attempts[-1].provider if ticket.attempts else ""
    if last.cause in ("refused", "content_filter"):
        return UpstreamRefused(last.message, upstream_status=last.status or 400, error=last.error, provider=provider)
    words = "; then ".join(dict.fromkeys(error.message for error in errors))
    if last.cause == "context_length":
        return ContextLengthExceeded(f"No target takes a prompt of this length: {words}.", param="messages")
    if last.cause in ("engine_gone", "breaker_open"):
        limited = [e for e in errors if e.cause == "rate_limit"]
        if not limited:
            return Unavailable(f"No target could answer: {words}.", retry_after_s=last.retry_after_s or 2)
        last = limited[-1]
    kind = (
        UpstreamTimeout
        if last.cause == "timeout"
        else UpstreamRateLimited
        if last.cause == "rate_limit"
        else UpstreamFailed
    )
    error = kind(f"No target could answer: {words}.")
    error.retry_after_s = last.retry_after_s
    error.should_retry = last.cause == "rate_limit" or len(ticket.attempts) <= 1
    return error


def stream_failed(error: UpstreamError, model: str) -> LeadlineError:
    """The event that ends a stream which broke after its first byte."""
    kind = UpstreamTimeout if error.cause == "timeout" else UpstreamFailed
    return kind(f"The answer of {model} broke off: {error.message}.")


def deadline_passed(ticket: Ticket) -> LeadlineError:
    spent = format_money(sum(a.cost_nanousd or 0 for a in ticket.attempts))
    error = UpstreamTimeout(
        f"The request's deadline of {ticket.deadline_s:g} s has passed after {len(ticket.attempts)} attempt(s), "
        f"which cost {spent}; allow more with the route's `deadline` or `x-leadline-timeout`."
    )
    error.should_retry = False
    return error
