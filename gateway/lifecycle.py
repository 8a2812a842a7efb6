"""One request, from admission to receipt. Read this page first; it reads like the line

    admit → recall → route → run → meter → settle → reply

Everything a call may cost is held before it goes out and settled after (`gateway.ticket`), by the same code whether
the answer is streamed or whole, served, failed, or abandoned by its caller.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import msgspec
import structlog

from gateway.admission.budgets import Account, BudgetKeeper, degrade, tightest
from gateway.admission.keys import KeyStore
from gateway.admission.limits import BudgetLimits
from gateway.admission.rates import Rates, tokens_estimate
from gateway.cache.exact import CachedAnswer, ExactCache, cache_key, cacheable
from gateway.errors import (
    BudgetExceeded,
    ContextLengthExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    LeadlineError,
    Unavailable,
    UnknownModel,
    UpstreamFailed,
    UpstreamRateLimited,
    UpstreamRefused,
    UpstreamTimeout,
)
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.settle import NO_USAGE, cost_nanousd
from gateway.ledger.store import LedgerStore
from gateway.query import query_of
from gateway.signals import SignalReader
from gateway.telemetry.metrics import Metrics
from gateway.ticket import Headers, Ticket
from gateway.upstream.gather import gather, replay, usage_of
from gateway.upstream.sse import DONE, write_event
from gateway.upstream.types import ChatCall, Event, Target, Upstream, UpstreamError
from gateway.world import World
from routers.decide import decide
from routers.errors import NoCandidate
from routers.explain import to_dict
from routers.policy import Policy
from routers.types import Decision, Query, State

log = structlog.get_logger(__name__)

"""For expected (not worst-case) prompt tokens, before anything has counted them."""
BACKOFF_S = 0.2
MAX_RETRY_AFTER_S = 5.0
"""A provider that asks for a longer wait is left for the next fallback."""
MAX_KEPT_BYTES = 2 << 20
"""A longer stream is not kept for the cache."""

_T = TypeVar("_T")
_encode = msgspec.json.Encoder().encode


class Reply(Protocol):
    """The caller's end of the request."""

    async def whole(self, status: int, headers: Headers, body: bytes) -> None: ...

    async def start_stream(self, headers: Headers) -> None: ...

    async def send(self, data: bytes) -> None: ...

    async def end(self) -> None: ...

    async def fail(self, error: LeadlineError, headers: Headers) -> None:
        """An error body, or an error event when a stream has begun: never a success terminator."""
        ...


class Lifecycle:
    """All requests of one worker pass through one of these."""

    def __init__(
        self,
        *,
        world: World,
        keys: KeyStore,
        rates: Rates,
        budgets: BudgetKeeper,
        cache: ExactCache,
        ledger: LedgerStore,
        signals: SignalReader,
        metrics: Metrics,
        pepper: bytes,
    ) -> None:
        self.world = world
        self.keys = keys
        self.ledger = ledger
        self.budgets = budgets
        self.metrics = metrics
        self._limits = BudgetLimits()
        self._rates = rates
        self._cache = cache
        self._signals = signals
        self._pepper = pepper
        self._random = random.Random()

    async def chat(self, call: ChatCall, reply: Reply) -> None:
        """Answer one chat request. Raises LeadlineError only for what was not admitted."""
        ticket = await self._admit(call)
        self.metrics.in_flight.inc()
        try:
            if not await self._recall(ticket, reply):
                await self._route(ticket)
                if call.stream:
                    await self._stream(ticket, reply)
                else:
                    await self._complete(ticket, reply)
        except asyncio.CancelledError:
            ticket.settle("cancelled", 499, "client_closed_request")
            raise
        except Exception as error:
            known = _known(error, ticket.record.id)
            ticket.settle("refused" if isinstance(known, BudgetExceeded) else "error", known.http_status, known.code)
            await reply.fail(known, ticket.headers(final=True))
        finally:
            ticket.settle("error", 500, "internal_error")
            self.metrics.in_flight.dec()

    # admit ----------------------------------------------------------------------------------------------------------

    async def _admit(self, call: ChatCall) -> Ticket:
        """Key, rate, budgets, and the first mark in the ledger's journal: from here on the request has its row."""
        principal = self.keys.authenticate(call.headers.token)
        principal.must_run()
        world = self.world
        now_ms = time.time_ns() // 1_000_000
        request_id = call.request_id or new_ledger_id(now_ms)
        budgets = self._limits.budgets(world.policy, principal, call.headers)
        account = await self.budgets.find(budgets, now_ms, request_id)
        if not self.ledger.accepts:
            raise Unavailable("The ledger is too far behind to admit more; retry shortly.", retry_after_s=1)
        record = RequestRecord(
            id=request_id,
            created_at_ms=now_ms,
            tenant=principal.tenant,
            key_id=principal.key_id,
            endpoint=call.endpoint,
            stream=call.stream,
            model_requested=call.model,
            session=call.headers.session,
            scope=self._limits.run_path(world.policy, call.headers),
            policy_version=world.policy.version_hash,
            team=principal.team,
            idempotency_key=call.headers.idempotency_key,
        )
        limits = self._rates.book.of(world.policy, principal, record.scope)
        grant = await self._rates.admit(limits, record.id, tokens_estimate(call) if limits else 0)
        try:
            self.ledger.journal.opened(record)
        except OSError as error:
            grant.release(0)
            log.error("journal.write_failed", error=str(error))
            raise Unavailable(
                "The ledger cannot be written; nothing is admitted until it can.", retry_after_s=1
            ) from error
        query = query_of(call, principal.tenant)
        return Ticket(call, query, world, account, grant, record, self.ledger, self.metrics)

    # recall ---------------------------------------------------------------------------------------------------------

    async def _recall(self, ticket: Ticket, reply: Reply) -> bool:
        """Answer from the exact cache, if the policy, the caller and the request allow it and the answer is there."""
        call, record, policy = ticket.call, ticket.record, ticket.world.policy
        ttl_ms = policy.cache_ttl_ms_for(ticket.query)
        if ttl_ms is None or call.headers.no_store or not cacheable(call.fields):
            return False
        if call.endpoint == "completions" and call.stream:  # what is stored is replayed in chat's chunks
            return False
        route = policy.route_for(ticket.query)
        route_name = route.name if route is not None else "named"
        ticket.cache_ttl_s = ttl_ms / 1000
        ticket.cache_key = cache_key(
            self._pepper,
            tenant=record.tenant,
            policy_version=policy.version_hash,
            route=route_name,
            fields=call.fields,
            endpoint=call.endpoint,
        )
        record.cache = "miss"
        answer = None if call.headers.no_cache else await self._cache.get(ticket.cache_key)
        events = replay(answer.body, stream=call.stream) if answer is not None else None
        if answer is None or events is None:
            return False
        record.cache, record.route = "hit", route_name
        record.model_served, record.provider = answer.model, answer.provider
        dearest = ticket.world.dearest(route.targets if route is not None else (answer.model,))
        record.baseline_nanousd = cost_nanousd(dearest, usage_of(answer.body) or NO_USAGE)
        ticket.settle("ok", 200)
        if call.stream:
            await reply.start_stream(ticket.headers(final=True))
            await reply.send(b"".join(map(write_event, events[:-1])) + _last_events(ticket, Event(events[-1], True)))
            await reply.end()
        else:
            await reply.whole(200, ticket.headers(final=True), answer.body)
        return True

    async def _remember(self, ticket: Ticket, body: bytes | None) -> None:
        record = ticket.record
        if ticket.cache_key is None or not record.model_served or not record.provider:
            return
        if body is not None:
            answer = CachedAnswer(body, record.model_served, record.provider)
            await self._cache.put(ticket.cache_key, answer, ticket.cache_ttl_s)

    # route ----------------------------------------------------------------------------------------------------------

    async def _route(self, ticket: Ticket) -> None:
        """Measure what the policy wants measured, then decide. The decision goes into the ledger whole."""
        messages = ticket.call.fields["messages"] if ticket.query.endpoint == "chat.completions" else b""
        decision = await self._decide(ticket.query, ticket.world, bytes(messages), ticket.account)
        ticket.decision = decision
        ticket.record.route = decision.route
        ticket.record.decision = _encode(to_dict(decision)).decode()
        ticket.baseline_price = ticket.world.dearest(tuple(candidate.model for candidate in decision.candidates))

    async def _decide(self, query: Query, world: World, messages: bytes, account: Account | None) -> Decision:
        signals = await self._signals.read(query, messages, world)
        budgets = account.budgets if account is not None else ()
        budget, degraded = tightest(budgets), degrade(budgets)
        state = State(
            unavailable=world.unavailable(),
            budget_remaining_nanousd=budget.remaining_nanousd if budget is not None else None,
            degrade=degraded[0] if degraded is not None else None,
            degrade_reason=degraded[1] if degraded is not None else "",
        )
        try:
            return decide(query, signals, world.policy, state, seed=0)
        except NoCandidate as error:
            raise _no_candidate(error, query.model, world.policy) from error

    async def explain(self, query: Query, messages: bytes) -> Decision:
        """The decision that this query would get now. Nothing runs, nothing is written. Raises LeadlineError."""
        return await self._decide(query, self.world, messages, None)

    # run ------------------------------------------------------------------------------------------------------------

    async def _complete(self, ticket: Ticket, reply: Reply) -> None:
        answer, attempt = await self._attempt(ticket, lambda upstream, target: upstream.complete(target, ticket.call))
        ticket.end_attempt(attempt, "ok", answer.usage, delivered_bytes=answer.delivered_bytes)
        ticket.settle("ok", 200)
        if answer.usage is not None:
            await self._remember(ticket, answer.body)
        await reply.whole(200, ticket.headers(final=True), answer.body)

    async def _stream(self, ticket: Ticket, reply: Reply) -> None:
        stream, attempt = await self._attempt(ticket, lambda upstream, target: upstream.stream(target, ticket.call))
        state = stream.state
        kept: list[bytes] = []
        kept_bytes = 0
        usage_event: Event | None = None
        outcome = "cancelled"
        try:
            await reply.start_stream(ticket.headers(final=False))
            async for events in stream:
                out = b""
                for event in events:
                    kept_bytes += len(event.data)
                    if ticket.cache_key is not None and kept_bytes <= MAX_KEPT_BYTES:
                        kept.append(event.data)
                    if event.usage_only:
                        usage_event = event
                    else:
                        out += write_event(event.data)
                if out:
                    await reply.send(out)
            outcome = "ok"
        except UpstreamError as error:
            outcome = error.cause
            attempt.error = error.kept
            raise _failed([error], attempt.provider) from error
        except Exception:
            outcome = "error"
            raise
        finally:
            # Billed before anything is awaited: a second cancel must not find the attempt open. A count that came
            # before the end of the stream is not the whole count.
            try:
                usage = state.usage if state.done else None
                ticket.end_attempt(attempt, outcome, usage, delivered_bytes=state.delivered_bytes, deltas=state.deltas)
            finally:
                await stream.close()
        ticket.settle("ok", 200)
        if kept_bytes <= MAX_KEPT_BYTES and state.usage is not None and ticket.cache_key is not None:
            await self._remember(ticket, gather(kept))
        await reply.send(_last_events(ticket, usage_event))
        await reply.end()

    async def _attempt(
        self, ticket: Ticket, run: Callable[[Upstream, Target], Awaitable[_T]]
    ) -> tuple[_T, AttemptRecord]:
        """The first answer of the targets, tried in order: each with its hold taken and its dispatch journalled.

        The same target again while its error is worth a retry and its provider allows one; then the fallbacks. It is
        over when one answers, when a provider refuses the request itself, or when nothing is left.
        """
        decision = ticket.decision
        assert decision is not None
        errors: list[UpstreamError] = []
        for model in (decision.plan.model, *decision.fallbacks):
            target = ticket.world.targets[model]
            for retry in range(target.retries + 1):
                try:
                    attempt = await ticket.begin_attempt(target)
                except BudgetExceeded:
                    if not errors:
                        raise
                    break  # a fallback that cannot be paid for is no fallback
                try:
                    answer = await run(ticket.world.upstreams[target.provider], target)
                except UpstreamError as error:
                    ticket.fail_attempt(attempt, error)
                    errors.append(error)
                else:
                    ticket.first_byte(attempt)
                    return answer, attempt
                last = errors[-1]
                if last.cause == "refused":
                    raise _failed(errors, target.provider)
                wait = last.retry_after_s
                if wait is None:
                    wait = BACKOFF_S * 2**retry * self._random.uniform(0.5, 1)
                if not last.retryable or wait > MAX_RETRY_AFTER_S or retry == target.retries:
                    break
                await asyncio.sleep(wait)
                ticket.paused(wait)
        raise _failed(errors, ticket.attempts[-1].provider)


def _last_events(ticket: Ticket, usage_event: Event | None) -> bytes:
    """The receipt, to those who asked for usage; the cost as a comment, which every client ignores; the end."""
    out = b""
    if ticket.call.include_usage and usage_event is not None:
        fields = msgspec.json.decode(usage_event.data, type=dict[str, msgspec.Raw])
        fields["leadline"] = msgspec.Raw(_encode(ticket.receipt()))
        out = write_event(_encode(fields))
    cost = ticket.record.cost_nanousd
    return out + b": leadline-cost-nanousd " + (b"unpriced" if cost is None else b"%d" % cost) + b"\n\n" + DONE


def new_ledger_id(now_ms: int) -> str:
    """Sorts by time."""
    return f"req_{now_ms:011x}{os.urandom(8).hex()}"


def _known(error: Exception, request_id: str) -> LeadlineError:
    if isinstance(error, LeadlineError):
        return error
    log.exception("request.failed", request_id=request_id)
    return InternalError(f"The gateway failed on this request; its log has the cause under {request_id}.")


def _failed(errors: list[UpstreamError], provider: str) -> LeadlineError:
    """The error a caller sees when every attempt failed: the last one's kind, all of their words."""
    last = errors[-1]
    if last.cause in ("refused", "context_length", "content_filter"):
        return UpstreamRefused(last.message, upstream_status=last.status or 400, error=last.error, provider=provider)
    words = "; then ".join(dict.fromkeys(error.message for error in errors))
    if last.cause == "engine_gone":
        return Unavailable(f"No target could answer: {words}.", retry_after_s=2)
    kind = UpstreamTimeout if last.cause == "timeout" else UpstreamRateLimited if last.status == 429 else UpstreamFailed
    failed = kind(f"No target could answer: {words}.")
    failed.retry_after_s = last.retry_after_s
    return failed


def _no_candidate(error: NoCandidate, model: str, policy: Policy) -> LeadlineError:
    if error.kind == "unknown_model":
        known = ", ".join((*policy.aliases, *policy.models))
        return UnknownModel(f"model: {model[:100]!r} is not in the policy; it knows {known}.", param="model")
    if error.kind == "context_length":
        return ContextLengthExceeded(str(error), param="messages")
    if error.kind == "budget":
        return BudgetExceeded(str(error))
    if error.kind == "unavailable":
        return Unavailable(str(error), retry_after_s=2)
    if error.kind == "not_allowed":
        return Forbidden(str(error), param="model")
    return InvalidRequest(str(error), param="model")
