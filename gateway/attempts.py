"""The attempt engine: one way to an answer for streams and plain calls, local and remote.

    begin     hold the money, journal the attempt, ask the target's breaker
    run       up to the first byte: the last moment at which another attempt is still possible
    again     the same target, while its error passes by itself and the retry budget allows
    fall back by the cause of the failure, to what the decision holds in reserve, each target once
    hedge     where the route says so: a second attempt beside a slow first, the loser cancelled and billed
    resume    where the route says so: a target that continues a stream which broke after its first byte
    escalate  the next stages of a cascade, where the answers before them were not accepted (`gateway.cascade`)
    think     a thought that two models share, or that is left early, call by call (`gateway.stepping`)

Nothing is tried again after the first byte except by `resume`, which the caller can see.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from gateway.errors import (
    BudgetExceeded,
    ContextLengthExceeded,
    DeadlineExceeded,
    LeadlineError,
    Unavailable,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRefused,
    UpstreamTimeout,
)
from gateway.ledger.records import HEDGE_LOST, AttemptKind, AttemptRecord
from gateway.telemetry.metrics import Metrics
from gateway.ticket import Ticket, worst_cost
from gateway.told import told
from gateway.upstream.breaker import Breaker
from gateway.upstream.gather import Gathered, whole_of
from gateway.upstream.hedge import HedgeBudget
from gateway.upstream.retry import RetryBudget, wait_before_retry
from gateway.upstream.types import Answer, AnswerStream, Cause, ChatCall, Progress, Target, Upstream, UpstreamError
from routers.policy import FailureCause, Hedge
from routers.types import Decision
from routers.units import format_money

_T = TypeVar("_T", Answer, AnswerStream)
Run = Callable[[Upstream, Target, ChatCall, Progress], Awaitable[_T]]
Ask = Callable[[Ticket, str], ChatCall]
"""What goes out to a model: money is held for this call, and for no other."""

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

    async def first_answer(
        self,
        ticket: Ticket,
        run: Run[_T],
        errors: list[UpstreamError] | None = None,
        *,
        given_up: bool = False,
    ) -> tuple[_T, AttemptRecord]:
        """The first target that answers, with its attempt still open. Raises LeadlineError when none does.

        Of a cascade, from its last stage on: `errors` are those of the stages before it. `given_up`: they are those of
        the plan's model, so that its fallbacks are asked.
        """
        decision = ticket.decision
        assert decision is not None
        plan = decision.plan
        errors = [] if errors is None else errors
        earlier = plan.stages[:-1] if plan.kind == "cascade" else ()
        tried: list[str] = [stage.model for stage in earlier] if errors else []
        model: str | None = plan.stages[-1].model if plan.kind == "cascade" else plan.model
        if given_up:
            ticket.told_usage = None  # what the plan wrote is not told
            tried.append(plan.model)
            model = _next(ticket, decision, errors[-1], tried)
        while model is not None:
            if errors and tried:
                self._metrics.fell_back(tried[-1], errors[-1].cause)
            tried.append(model)
            found = await self.on_target(ticket, model, run, errors)
            if found is not None:
                return found
            model = _next(ticket, decision, errors[-1], tried)
        raise failed(errors, ticket, tried)

    async def on_target(
        self,
        ticket: Ticket,
        model: str,
        run: Run[_T],
        errors: list[UpstreamError],
        ask: Ask = told,
        *,
        kind: AttemptKind | None = None,
    ) -> tuple[_T, AttemptRecord] | None:
        """This target until it answers or is given up; what went wrong is appended to `errors`.

        `kind`: of its first attempt; None: as it follows from those before it.
        """
        world = ticket.world
        target, call = world.targets[model], ask(ticket, model)
        breaker = world.breakers[model]
        budget = self._retries.get(target.provider)
        if budget is None:
            budget = self._retries[target.provider] = RetryBudget()
        # A client that tries again by itself multiplies our own retries: one of the two is enough.
        retries = target.retries if ticket.call.headers.retry_count == 0 else 0
        if kind is None:
            kind = "fallback" if errors else "escalation" if ticket.attempts else "first"
        for retry in range(retries + 1):
            permit = breaker.acquire()
            if permit is None:
                if retry == 0:  # else the failure before says more
                    errors.append(_left_alone(target, breaker))
                return None
            try:
                attempt = await ticket.begin_attempt(target, kind, call)
            except BaseException as error:
                breaker.abandoned(permit)
                if isinstance(error, BudgetExceeded) and errors:
                    return None  # a fallback that cannot be paid for is no fallback
                raise
            if retry == 0:
                budget.deposit()
            hedge = ticket.route.hedge if ticket.route is not None and kind == "first" else None
            began_ns = time.perf_counter_ns()
            try:
                if hedge is not None:
                    answer, attempt = await self._race(ticket, hedge, target, attempt, permit, run, errors, call, ask)
                else:
                    answer = await self._run(ticket, target, attempt, permit, run, call)
            except UpstreamError as error:
                ticket.waited(time.perf_counter_ns() - began_ns)
                errors.append(error)
            except BaseException:
                ticket.waited(time.perf_counter_ns() - began_ns)
                raise
            else:
                ticket.waited(time.perf_counter_ns() - began_ns)
                ticket.first_byte(attempt)
                return answer, attempt
            wait = wait_before_retry(errors[-1], retry, self._random)
            if wait is None or retry == retries or ticket.remaining_s() < wait:
                break
            if (breaker.closed_in_s() or 0) > wait or not budget.withdraw():
                break
            began_ns = time.perf_counter_ns()
            try:
                await asyncio.sleep(wait)
            finally:
                ticket.waited(time.perf_counter_ns() - began_ns)
            kind = "retry"
            self._metrics.retried(model, errors[-1].cause)
        return None

    async def _run(
        self, ticket: Ticket, target: Target, attempt: AttemptRecord, permit: int, run: Run[_T], call: ChatCall
    ) -> _T:
        """One attempt up to its first byte, booked with its breaker and, if it fails, in the ledger."""
        breaker = ticket.world.breakers[target.model]
        try:
            answer = await run(ticket.world.upstreams[target.provider], target, call, ticket.progress(attempt))
        except UpstreamError as error:
            ticket.fail_attempt(attempt, error)
            self.failed(ticket, target.model, error, permit)
            raise
        except BaseException:
            breaker.abandoned(permit)
            raise
        if isinstance(answer, Answer):
            breaker.succeeded()
        else:
            breaker.answered()
        return answer

    async def alone(self, ticket: Ticket, model: str, kind: AttemptKind, call: ChatCall) -> Answer:
        """One attempt that nobody waits for: not tried again, not replaced, and none at a target that is in doubt.

        Raises UpstreamError, and what `Ticket.begin_attempt` does.
        """
        target, breaker = ticket.world.targets[model], ticket.world.breakers[model]
        permit = breaker.acquire() if breaker.closed else None
        if permit is None:
            raise _left_alone(target, breaker)
        try:
            attempt = await ticket.begin_attempt(target, kind, call)
        except BaseException:
            breaker.abandoned(permit)
            raise
        answer = await self._run(ticket, target, attempt, permit, complete, call)
        ticket.first_byte(attempt)
        ticket.end_attempt(attempt, "ok", answer.usage, delivered_bytes=answer.delivered_bytes, plan=answer.plan)
        return answer

    def succeeded(self, ticket: Ticket, model: str) -> None:
        """A stream has come to its end."""
        ticket.world.breakers[model].succeeded()

    def failed(self, ticket: Ticket, model: str, error: UpstreamError, permit: int = 0) -> None:
        """What an attempt's failure says of its target, before its first byte or after."""
        breaker = ticket.world.breakers[model]
        if error.cause in _HEALTHY:
            breaker.succeeded()
        elif error.cause == "rate_limit" and error.retry_after_s is not None:
            breaker.limited(error.retry_after_s, permit)
        elif error.cause == "engine_gone":  # its link says when it is back, sooner than any rule
            breaker.abandoned(permit)
        else:
            breaker.failed(permit, limited=error.cause == "rate_limit")

    # hedging --------------------------------------------------------------------------------------------------------

    async def _race(
        self,
        ticket: Ticket,
        hedge: Hedge,
        target: Target,
        attempt: AttemptRecord,
        permit: int,
        run: Run[_T],
        errors: list[UpstreamError],
        call: ChatCall,
        ask: Ask,
    ) -> tuple[_T, AttemptRecord]:
        """The attempt, and a second one beside it when its first byte is late: the first of them to answer.

        The loser is cancelled at once and billed as an estimate. When both fail, raises the first one's error; the
        second's is appended to `errors`.
        """
        budget = self._hedge_budget(ticket)
        first: _Runner[_T] = _Runner(attempt)
        first.task = asyncio.create_task(self._run(ticket, target, attempt, permit, run, call))
        second: _Runner[_T] | None = None
        winner: _Runner[_T] | None = None
        problem: UpstreamError | None = None
        held = 0
        try:
            running = [first]
            done, _ = await asyncio.wait((first.task,), timeout=hedge.after_ms / 1000)
            if not done:
                other = self._hedge_target(ticket, target)
                beside = ask(ticket, other.model)
                worst = _worst_loss((target, call), (other, beside))
                if worst is not None and budget.reserve(worst):
                    held, second = worst, _Runner()
                    second.task = asyncio.create_task(self._second(ticket, other, run, second, beside))
                    running.append(second)
            while running:
                await asyncio.wait([runner.task for runner in running], return_when=asyncio.FIRST_COMPLETED)
                for runner in [runner for runner in running if runner.task.done()]:
                    running.remove(runner)
                    try:
                        answer = runner.task.result()
                    except UpstreamError as error:
                        if runner is first:
                            problem = error
                        else:
                            errors.append(error)
                        continue
                    if answer is not None and runner.attempt is not None:
                        winner = runner
                        return answer, runner.attempt
            assert problem is not None
            raise problem
        finally:
            try:
                await self._end(ticket, [r for r in (first, second) if r is not None and r is not winner], winner)
            except BaseException:
                if winner is not None:  # nobody is left to take its answer
                    await _let_go(winner.task.result())
                raise
            finally:
                if second is not None:
                    lost = attempt if winner is second else second.attempt
                    budget.settle(held, (lost.cost_nanousd or 0) if lost is not None else 0)
                    if second.attempt is not None:
                        outcome: Literal["won", "lost", "failed"] = "failed"
                        if winner is not None:
                            outcome = "won" if winner is second else "lost"
                        self._metrics.hedged(second.attempt.model, outcome)

    def _hedge_target(self, ticket: Ticket, target: Target) -> Target:
        """The first fallback whose breaker is closed, else the same target once more."""
        decision, world = ticket.decision, ticket.world
        assert decision is not None
        for name in decision.on_cause.get("error", decision.fallbacks):
            if name != target.model and world.breakers[name].reason() is None:
                return world.targets[name]
        return target

    async def _second(
        self, ticket: Ticket, target: Target, run: Run[_T], runner: "_Runner[_T]", call: ChatCall
    ) -> _T | None:
        """The hedge, in its own task: the first attempt does not wait for its money. None: it did not go out."""
        breaker = ticket.world.breakers[target.model]
        permit = breaker.acquire()
        if permit is None:
            return None
        try:
            attempt = runner.attempt = await ticket.begin_attempt(target, "hedge", call)
        except BaseException as error:
            breaker.abandoned(permit)
            if isinstance(error, LeadlineError):
                return None
            raise
        return await self._run(ticket, target, attempt, permit, run, call)

    async def _end(self, ticket: Ticket, losers: list["_Runner[_T]"], winner: "_Runner[_T] | None") -> None:
        """Cancel them, wait until they have let go of what they hold, and bill them: whatever comes meanwhile."""
        pending = {runner.task for runner in losers}
        for task in pending:
            task.cancel()
        interrupted: asyncio.CancelledError | None = None
        while pending:
            try:
                _, pending = await asyncio.wait(pending)
            except asyncio.CancelledError as error:
                interrupted = error
        for runner in losers:
            outcome = HEDGE_LOST if winner is not None else ticket.interruption()
            answer = None if runner.task.cancelled() or runner.task.exception() else runner.task.result()
            if runner.attempt is None:
                continue
            if isinstance(answer, Answer):
                ticket.end_attempt(
                    runner.attempt, outcome, answer.usage, delivered_bytes=answer.delivered_bytes, plan=answer.plan
                )
                continue
            ticket.end_if_running(runner.attempt, outcome)
            await _let_go(answer)
        if interrupted is not None:
            raise interrupted

    def _hedge_budget(self, ticket: Ticket) -> HedgeBudget:
        """Of the ticket's route, which has a hedge."""
        assert ticket.route is not None
        assert ticket.route.hedge is not None
        budget = self._hedges.get(ticket.route.name)
        if budget is None:
            budget = self._hedges[ticket.route.name] = HedgeBudget(ticket.route.hedge.max_extra)
        budget.share = ticket.route.hedge.max_extra
        return budget

    def spent(self, ticket: Ticket) -> None:
        """A request has been settled: what it cost lets its route's hedges cost more."""
        if ticket.route is not None and ticket.route.hedge is not None:
            costs = [a.cost_nanousd or 0 for a in ticket.attempts if a.outcome != HEDGE_LOST]
            self._hedge_budget(ticket).spent(sum(costs))

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
            target, breaker = ticket.world.targets[model], ticket.world.breakers[model]
            permit = breaker.acquire()
            if permit is None:
                continue
            try:
                attempt = await ticket.begin_attempt(target, "resume", call)
            except BaseException as error:
                breaker.abandoned(permit)
                if isinstance(error, LeadlineError):
                    continue
                raise
            try:
                answer = await self._run(ticket, target, attempt, permit, stream, call)
            except UpstreamError:
                continue
            ticket.first_byte(attempt)
            return answer, attempt
        return None


@dataclass(slots=True)
class _Runner(Generic[_T]):
    """One of the two in a race."""

    attempt: AttemptRecord | None = None
    """None: it has not gone out, or not yet."""
    task: "asyncio.Task[_T | None]" = field(init=False)


def _next(ticket: Ticket, decision: Decision, error: UpstreamError, tried: list[str]) -> str | None:
    """Who is asked after this failure; None: nobody is left that could answer."""
    if error.cause == "refused":
        return None
    failure = _FAILURE.get(error.cause, "error")
    spare = decision.fallbacks if failure in ("error", "rate_limit") else ()
    reserve = decision.on_cause.get(failure, spare)
    hedged = [attempt.model for attempt in ticket.attempts if attempt.kind == "hedge"]
    return next((name for name in reserve if name not in tried and name not in hedged), None)


async def complete(upstream: Upstream, target: Target, call: ChatCall, progress: Progress) -> Answer:
    """The run of a whole answer."""
    return await upstream.complete(target, call, progress)


async def stream(upstream: Upstream, target: Target, call: ChatCall, progress: Progress) -> AnswerStream:
    """The run of a stream."""
    return await upstream.stream(target, call, progress)


async def followed(upstream: Upstream, target: Target, call: ChatCall, progress: Progress) -> Answer:
    """The run of a whole answer that is asked for as a stream: one that breaks off, or is stopped, is billed for what
    was written of it."""
    answer = await upstream.stream(target, call, progress)
    progress.state = answer.state
    return await whole_of(answer, Gathered())


async def _let_go(answer: Answer | AnswerStream | None) -> None:
    if answer is not None and not isinstance(answer, Answer):
        await answer.close()


def _worst_loss(*racing: tuple[Target, ChatCall]) -> int | None:
    """The most that the loser can cost, whichever it is. None: no bound is known, as one of them has no price."""
    costs = [worst_cost(target, call) for target, call in racing]
    return None if None in costs else max(cost or 0 for cost in costs)


def _left_alone(target: Target, breaker: Breaker) -> UpstreamError:
    cause: Cause = "rate_limit" if breaker.rate_limited else "breaker_open"
    wait_s = breaker.closed_in_s()
    return UpstreamError(cause, f"{target.model} is left alone ({breaker.reason()})", retry_after_s=wait_s)


def failed(errors: list[UpstreamError], ticket: Ticket, tried: list[str]) -> LeadlineError:
    """The error a caller sees when every attempt failed: the last one's kind, all of their words.

    A 429 stays one where nothing else could have answered. Whoever has tried several times already, and what no retry
    mends, tells the caller's client not to multiply that.
    """
    last = errors[-1]
    if last.cause in ("refused", "content_filter"):
        provider = ticket.world.targets[tried[-1]].provider
        before = "; then ".join(dict.fromkeys(error.message for error in errors[:-1]))
        return UpstreamRefused(
            last.message, upstream_status=last.status or 400, error=last.error, provider=provider, before=before
        )
    words = "; then ".join(dict.fromkeys(error.message.rstrip(".") for error in errors))
    if last.cause == "context_length":
        return ContextLengthExceeded(f"No target takes a prompt of this length: {words}.", param="messages")
    waits = [ticket.world.breakers[model].closed_in_s() for model in tried]
    soonest = None if None in waits else min(wait for wait in waits if wait is not None)
    if last.cause in ("engine_gone", "breaker_open"):
        limited = [e for e in errors if e.cause == "rate_limit"]
        if not limited:
            return Unavailable(f"No target could answer: {words}.", retry_after_s=soonest or last.retry_after_s or 2)
        last = limited[-1]
    kind = _KINDS.get(last.cause, UpstreamFailed)
    error = kind(f"No target could answer: {words}.")
    one = len(set(tried)) == 1
    error.retry_after_s = last.retry_after_s if one and last.retry_after_s is not None else soonest
    error.should_retry = last.retryable and (last.cause == "rate_limit" or len(ticket.attempts) <= 1)
    return error


_KINDS: dict[Cause, type[UpstreamFailed]] = {"timeout": UpstreamTimeout, "rate_limit": UpstreamRateLimited}


def stream_failed(error: UpstreamError, model: str) -> LeadlineError:
    """The event that ends a stream which broke after its first byte."""
    kind = UpstreamTimeout if error.cause == "timeout" else UpstreamFailed
    return kind(f"The answer of {model} broke off: {error.message.rstrip('.')}.")


def deadline_passed(ticket: Ticket) -> LeadlineError:
    """Call it when all attempts have ended: it says what they cost."""
    spent = format_money(sum(a.cost_nanousd or 0 for a in ticket.attempts))
    return DeadlineExceeded(
        f"The request's deadline of {ticket.deadline_s:g} s has passed after {len(ticket.attempts)} attempt(s), "
        f"which cost {spent}; allow more with the route's `deadline` or `x-leadline-timeout`."
    )
