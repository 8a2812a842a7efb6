"""One request, from admission to receipt. Read this page first; it reads like the line

    admit → recall → route → run → meter → settle → reply

Everything a call may cost is held before it goes out and settled after (`gateway.ticket`), by the same code whether
the answer is streamed or whole, served, failed, or abandoned by its caller.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec

from gateway.admission.budgets import Budget, BudgetKeeper, degrade, refusal, tightest
from gateway.admission.keys import KeyStore, Principal
from gateway.admission.limits import BudgetLimits
from gateway.admission.rates import Rates, tokens_estimate
from gateway.attempts import AttemptEngine, complete, deadline_passed, stream, stream_failed
from gateway.cache.exact import CachedAnswer, ExactCache, cache_key, cache_secret, cacheable
from gateway.cascade import climb
from gateway.errors import (
    BudgetExceeded,
    ContextLengthExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    LeadlineError,
    Unavailable,
    UnknownModel,
    UpstreamRateLimited,
)
from gateway.facts import hash_secret, prompt_hash, written
from gateway.ids import new_ledger_id, new_seed
from gateway.learned import Learned
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.ledger.settle import NO_USAGE, cost_nanousd
from gateway.ledger.store import LedgerStore
from gateway.priority import priority_of
from gateway.query import must_know, query_of
from gateway.relay import Relay, Reply, casts_shadows, cost_comment, last_events
from gateway.sessions import Conversation, Store, after, conversation_key, is_bound
from gateway.shadow import Shadows
from gateway.signals import SignalReader
from gateway.stepping.calls import Gone
from gateway.stepping.thinking import thinking_of
from gateway.telemetry.logs import get_logger
from gateway.telemetry.metrics import Metrics
from gateway.ticket import Ticket
from gateway.upstream.gather import gather, replay, usage_of
from gateway.upstream.sse import write_event
from gateway.upstream.types import Answer, AnswerStream, ChatCall, Event, UpstreamError
from gateway.world import World
from routers.bandit import context_of
from routers.cost import least_input_tokens
from routers.decide import decide
from routers.errors import NoCandidate
from routers.plans import models_of
from routers.policy import DEFAULT_CACHE_TTL_MS
from routers.seeds import UNEXPLORED
from routers.types import Cascade, Decision, Load, Query, Signals, State

log = get_logger(__name__)

_T = TypeVar("_T")
_encode = msgspec.json.Encoder().encode


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
        learned: Learned,
        sessions: Store,
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
        self._cache_secret = cache_secret(pepper)
        self._learned = learned
        self._sessions = sessions
        self._hash_secret = hash_secret(pepper)
        self._attempts = AttemptEngine(metrics)
        self.shadows = Shadows(keys, budgets, self._limits, ledger, self._attempts, metrics)

    def put_in_force(self, world: World) -> None:
        """Requests admitted from here on are in this world; those under way stay in theirs."""
        self.world = world

    async def chat(self, call: ChatCall, caller: Principal, reply: Reply) -> None:
        """Answer one chat request. Raises LeadlineError only for what was not admitted."""
        ticket = await self._admit(call, caller)
        self.metrics.in_flight.value += 1
        try:
            if not await self._recall(ticket, reply):
                await self._route(ticket)
                await self._run(ticket, reply)
                if ticket.conversation_key is not None:
                    await self._went_on(ticket, ticket.conversation_key)
                if ticket.served is not None:
                    own_id, in_force = new_ledger_id(time.time_ns() // 1_000_000), ticket.world is self.world
                    self.shadows.cast(ticket, ticket.served, own_id, in_force=in_force)
        except asyncio.CancelledError:
            ticket.settle("cancelled", 499, "client_closed_request")
            raise
        except Exception as error:
            known = _known(error, ticket.record.id)
            refused = isinstance(known, BudgetExceeded)
            await self._settle(ticket, "refused" if refused else "error", known.http_status, known.code)
            await reply.fail(known, ticket.headers(final=True), cost_comment(ticket))
        finally:
            ticket.settle("error", 500, "internal_error")
            self._attempts.spent(ticket)
            self.metrics.in_flight.value -= 1

    # admit ----------------------------------------------------------------------------------------------------------

    async def _admit(self, call: ChatCall, caller: Principal) -> Ticket:
        """Key, rate, budgets, and the first mark in the ledger's journal: from here on the request has its row."""
        principal = self.keys.still(caller)
        principal.must_run()
        world = self.world
        must_know(world.policy, call.headers.hints)
        now_ms = time.time_ns() // 1_000_000
        request_id = call.request_id or new_ledger_id(now_ms)
        budgets = self._limits.budgets(world.policy, principal, call.headers)
        account = await self.budgets.find(budgets, now_ms, request_id)
        if not self.ledger.accepts:
            raise Unavailable(self.ledger.refuses, retry_after_s=1)
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
        call.tenant = principal.tenant
        query = query_of(call, principal, at_ms=now_ms, request_id=request_id)
        ticket = Ticket(call, query, world, account, grant, record, self.ledger, self.metrics)
        route = ticket.route = world.policy.route_for(query)
        call.priority = priority_of(call.priority, route)
        ticket.deadline_s = call.headers.timeout_s
        if route is not None and route.deadline_ms is not None:
            allowed = route.deadline_ms / 1000
            ticket.deadline_s = min(allowed, ticket.deadline_s or allowed)
        return ticket

    async def _settle(self, ticket: Ticket, outcome: str, status: int, error_code: str | None = None) -> None:
        """Close the row before its answer ends; in durability mode `full`, on disk."""
        ticket.settle(outcome, status, error_code)
        if self.ledger.full:
            await self.ledger.durable()

    # recall ---------------------------------------------------------------------------------------------------------

    async def _recall(self, ticket: Ticket, reply: Reply) -> bool:
        """Answer from the exact cache, if the policy, the caller and the request allow it and the answer is there."""
        call, record, route = ticket.call, ticket.record, ticket.route
        ttl_ms = route.cache_ttl_ms if route is not None else DEFAULT_CACHE_TTL_MS
        if ttl_ms is None or call.headers.no_store or not cacheable(call.fields):
            return False
        if call.endpoint == "completions" and call.stream:  # what is stored is replayed in chat's chunks
            return False
        route_name = route.name if route is not None else "named"
        ticket.cache_ttl_s = ttl_ms / 1000
        ticket.cache_key = cache_key(
            self._cache_secret,
            tenant=record.tenant,
            policy_version=ticket.world.policy.version_hash,
            route=route_name,
            fields=call.fields,
            endpoint=call.endpoint,
            hints=call.headers.hints,
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
        await self._settle(ticket, "ok", 200)
        if call.stream:
            await reply.start_stream(ticket.headers(final=True))
            await reply.send(b"".join(map(write_event, events[:-1])) + last_events(ticket, Event(events[-1], True)))
            await reply.end()
        else:
            await reply.whole(200, ticket.headers(final=True), answer.body)
        return True

    async def _remember(self, ticket: Ticket, body: bytes | None) -> None:
        record = ticket.record
        if ticket.cache_key is None or record.degraded is not None or not record.model_served or not record.provider:
            return
        if body is not None:
            answer = CachedAnswer(body, record.model_served, record.provider)
            await self._cache.put(ticket.cache_key, answer, ticket.cache_ttl_s)

    # route ----------------------------------------------------------------------------------------------------------

    async def _route(self, ticket: Ticket) -> None:
        """Measure what the policy wants measured, then decide. The decision goes into the ledger whole."""
        messages = ticket.call.fields.get("messages", b"")
        call = ticket.call
        asked = call.fields.get("tools"), call.sampling.reasoning_effort
        if ticket.route is not None and ticket.route.affinity is not None:
            ticket.conversation_key = key = conversation_key(self._cache_secret, ticket.record.tenant, call)
            ticket.conversation = await self._sessions.get(key) if key is not None else None
        decision, facts = await self._decide(ticket.query, ticket.world, messages, new_seed(), ticket, *asked)
        ticket.decision = decision
        ticket.record.facts = facts
        if facts is not None:
            ticket.record.prompt_hash = prompt_hash(self._hash_secret, ticket.record.tenant, messages)
        ticket.record.route = decision.route
        ticket.record.decision = _encode(decision).decode()  # `routers.explain.from_dict` reads it
        ticket.baseline_price = ticket.world.dearest(tuple(candidate.model for candidate in decision.candidates))

    async def _decide(
        self,
        query: Query,
        world: World,
        messages: bytes | msgspec.Raw,
        seed: int,
        ticket: Ticket | None,
        tools: msgspec.Raw | None = None,
        effort: str | None = None,
    ) -> tuple[Decision, str | None]:
        """The decision, and what its row keeps of what it was made from; None where the caller named a model."""
        signals = await self._signals.read(query, messages, world, tools, effort)
        if world.explores and signals.domain and not signals.clusters:
            signals = msgspec.structs.replace(signals, clusters=context_of(signals.domain))
        budgets = ticket.account.budgets if ticket is not None else ()
        budget, degraded = tightest(budgets), degrade(budgets)
        state = State(
            unavailable=world.unavailable(),
            budget_remaining_nanousd=budget.remaining_nanousd if budget is not None else None,
            degrade=degraded[0] if degraded is not None else None,
            degrade_reason=degraded[1] if degraded is not None else "",
            now_ms=query.at_ms,
            load=self._load(query, world),
            arms=self._learned.arms(query.tenant, signals.clusters) if world.explores else {},
        )
        if ticket is not None and ticket.conversation is not None:
            signals, state = _going_on(ticket, ticket.conversation, signals, state)
        try:
            decision = decide(query, signals, world.policy, state, seed)
        except NoCandidate as error:
            raise _no_candidate(error, query, world, budget) from error
        return decision, written(query, signals, state) if decision.route != "named" else None

    def _load(self, query: Query, world: World) -> Mapping[str, Load]:
        """What the targets are doing, where the query's route decides by it."""
        if world.loads is None:
            return {}
        route = world.policy.route_for(query)
        return world.loads.of(models_of(route.targets)) if route is not None and route.timed else {}

    async def _went_on(self, ticket: Ticket, key: bytes) -> None:
        """Remember who has answered, and what its provider holds now."""
        decision = ticket.decision
        answered = (a for a in reversed(ticket.attempts) if a.outcome == "ok" and a.kind != "draft")
        served = next(answered, None)
        if decision is None or served is None:
            return
        tokens = served.input_tokens + served.cached_input_tokens + served.cache_write_tokens + served.output_tokens
        at_ms = served.started_at_ms + served.duration_us // 1000
        now = after(ticket.conversation, decision, served.model, served.provider, tokens, at_ms)
        await self._sessions.put(key, now)

    async def explain(self, query: Query, messages: bytes) -> Decision:
        """The decision that this query would get now, unexplored. Nothing runs or is written. Raises LeadlineError."""
        must_know(self.world.policy, query.hints)
        return (await self._decide(query, self.world, messages, UNEXPLORED, None))[0]

    # run ------------------------------------------------------------------------------------------------------------

    async def _run(self, ticket: Ticket, reply: Reply) -> None:
        """Once the row is settled as a success, no deadline turns the answer into an error."""
        if ticket.call.stream:
            relay = Relay(ticket, reply)
            try:
                await self._within_deadline(ticket, self._stream(ticket, relay))
            except LeadlineError:
                less = None if relay.started else ticket.settle_for_less()
                if less is None:
                    raise
                await relay.replay(less)
            await self._settle(ticket, "ok", 200)
            if relay.complete:
                whole = gather(relay.kept.chunks())
                await self._remember(ticket, whole)
                if casts_shadows(ticket):
                    ticket.served = whole
            await reply.send(last_events(ticket, relay.usage_event))
            await reply.end()
        else:
            try:
                answer = await self._within_deadline(ticket, self._complete(ticket))
            except LeadlineError:
                less = ticket.settle_for_less()
                if less is None:
                    raise
                answer = less
            await self._settle(ticket, "ok", 200)
            if answer.usage is not None:
                await self._remember(ticket, answer.body)
            await reply.whole(200, ticket.headers(final=True), answer.body)
            if casts_shadows(ticket):
                ticket.served = answer.body

    async def _within_deadline(self, ticket: Ticket, work: Coroutine[Any, Any, _T]) -> _T:
        if ticket.deadline_s is None:
            return await work
        try:
            async with asyncio.timeout(ticket.remaining_s()) as deadline:
                return await work
        except TimeoutError as error:
            if not deadline.expired():
                raise
            ticket.end_running("deadline")
            raise deadline_passed(ticket) from error

    async def _complete(self, ticket: Ticket) -> Answer:
        accepted, errors = await self._climb(ticket)
        if accepted is not None:
            return accepted
        thinking = thinking_of(self._attempts, ticket, errors)
        if thinking is not None:
            try:
                return await thinking.whole()
            except Gone:
                pass  # nothing has been told: its fallbacks are asked
            except UpstreamError as error:
                errors.append(error)
        answer, attempt = await self._attempts.first_answer(ticket, complete, errors, given_up=thinking is not None)
        ticket.end_attempt(attempt, "ok", answer.usage, delivered_bytes=answer.delivered_bytes, plan=answer.plan)
        return answer

    async def _climb(self, ticket: Ticket) -> tuple[Answer | None, list[UpstreamError]]:
        """The stages of a cascade before its last, which is then asked like any other plan's model."""
        plan = ticket.decision.plan if ticket.decision is not None else None
        errors: list[UpstreamError] = []
        if not isinstance(plan, Cascade):
            return None, errors
        return await climb(self._attempts, ticket, plan, errors), errors

    async def _stream(self, ticket: Ticket, relay: Relay) -> None:
        accepted, errors = await self._climb(ticket)
        if accepted is not None:
            await relay.replay(accepted)
            return
        thinking = thinking_of(self._attempts, ticket, errors)
        if thinking is not None:
            try:
                await relay.tell(thinking.events())
            except (Gone, UpstreamError) as error:
                failure = error if isinstance(error, UpstreamError) else errors[-1]
                if failure not in errors:
                    errors.append(failure)
            else:
                return
        if thinking is not None and relay.started:
            answer, attempt = await self._resumed(ticket, relay, errors[-1], thinking.model)
        else:
            answer, attempt = await self._attempts.first_answer(ticket, stream, errors, given_up=thinking is not None)
        while True:
            try:
                await relay.run(answer, attempt)
            except UpstreamError as error:
                self._attempts.failed(ticket, attempt.model, error)
                answer, attempt = await self._resumed(ticket, relay, error, attempt.model)
            else:
                self._attempts.succeeded(ticket, attempt.model)
                return

    async def _resumed(
        self, ticket: Ticket, relay: Relay, error: UpstreamError, model: str
    ) -> tuple[AnswerStream, AttemptRecord]:
        """A stream that goes on where the one of `model` broke; raises LeadlineError where none can."""
        continued = relay.continued()
        found = await self._attempts.resume(ticket, continued) if continued is not None else None
        if found is None:
            raise stream_failed(error, model) from error
        relay.resumes()
        return found


def _going_on(ticket: Ticket, before: Conversation, signals: Signals, state: State) -> tuple[Signals, State]:
    """With what is remembered of the conversation, for a route that has affinity."""
    assert ticket.route is not None
    affinity = ticket.route.affinity
    assert affinity is not None
    bound = before.provider if affinity.bound == "keep" and is_bound(ticket.call) else None
    return (
        msgspec.structs.replace(signals, cached_tokens=before.cached_tokens(state.now_ms, affinity.ttl_ms)),
        msgspec.structs.replace(state, session_model=before.model, session_p=before.p_success, bound_to=bound),
    )


def _known(error: Exception, request_id: str) -> LeadlineError:
    if isinstance(error, LeadlineError):
        return error
    log.exception("request.failed", request_id=request_id)
    return InternalError(f"The gateway failed on this request; its log has the cause under {request_id}.")


def _no_candidate(error: NoCandidate, query: Query, world: World, budget: Budget | None) -> LeadlineError:
    policy, model = world.policy, query.model
    if error.kind == "unknown_model":
        known = ", ".join((*policy.aliases, *policy.models))
        return UnknownModel(f"model: {model[:100]!r} is not in the policy; it knows {known}.", param="model")
    if error.kind == "context_length":
        named = [policy.models[name] for name, _ in error.reasons if name in policy.models]
        least = least_input_tokens(query)
        fits = any(one.context is None or least < one.context for one in named)
        too_much_asked = query.max_output_tokens is not None and fits
        return ContextLengthExceeded(str(error), param="max_tokens" if too_much_asked else "messages")
    if error.kind == "budget":
        return BudgetExceeded(str(error) if budget is None else refusal(budget, str(error)))
    if error.kind == "unavailable":
        breakers = [world.breakers[name] for name in error.away if name in world.breakers]
        waits = [wait for breaker in breakers if (wait := breaker.closed_in_s()) is not None]
        soonest = min(waits, default=2.0)
        if breakers and all(breaker.rate_limited for breaker in breakers):
            limited = UpstreamRateLimited(str(error))
            limited.retry_after_s = soonest
            return limited
        return Unavailable(str(error), retry_after_s=soonest)
    if error.kind == "not_allowed":
        return Forbidden(str(error), param="model")
    return InvalidRequest(str(error), param="model")
