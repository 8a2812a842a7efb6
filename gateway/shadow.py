"""What happens beside a request that nobody waits for: its shadow models are asked the same, and a judge compares.

    cast     after the answer is out, in memory: a task, or nothing where too many are under way
    ask      each shadow model once, in a ledger row of its own (`parent` names the request), attempts of kind `shadow`
    judge    the served and the shadow's answer, twice with places swapped, attempts of kind `judge`
    keep     the verdicts as outcomes; prompt and answers only where the route says so

Nothing here delays or fails a request. The money is the caller's: held before each call, by the same hard budgets, and
no more than a tenth of what is left of any of them. What is dropped is counted, and never tried again.
"""

import asyncio
import contextlib
import time
from typing import Literal

import msgspec
from msgspec.structs import replace
from sqlalchemy.exc import SQLAlchemyError

from gateway.admission.budgets import Account, BudgetKeeper
from gateway.admission.keys import KeyStore
from gateway.admission.limits import BudgetLimits
from gateway.admission.rates import NO_LIMIT
from gateway.attempts import AttemptEngine
from gateway.errors import LeadlineError
from gateway.judge import MAX_JUDGED_BYTES, Better, agreed, question, text_of, verdict_of, verdicts
from gateway.ledger import outcomes, report
from gateway.ledger.records import AttemptKind, RequestRecord
from gateway.ledger.store import LedgerStore
from gateway.ledger.tables import SampleRow, insert_into
from gateway.priority import beside
from gateway.telemetry.logs import get_logger
from gateway.telemetry.metrics import Metrics
from gateway.ticket import Ticket, worst_cost
from gateway.upstream.types import ChatCall, UpstreamError
from gateway.world import World
from routers.aims import Shadow

log = get_logger(__name__)

MAX_RUNNING = 4
"""Shadows under way in one worker; one more is dropped."""
BUDGET_SHARE = 10
"""All calls of one shadow may together hold at most one part in so many of what is left of each budget."""
_NOT_SENT = ("stream", "stream_options", "n", "user", "metadata", "store")
Fate = Literal["judged", "unjudged", "failed", "dropped"]


class Shadows:
    """The shadows of one worker."""

    def __init__(
        self,
        keys: KeyStore,
        budgets: BudgetKeeper,
        limits: BudgetLimits,
        ledger: LedgerStore,
        attempts: AttemptEngine,
        metrics: Metrics,
    ) -> None:
        self._keys = keys
        self._budgets = budgets
        self._limits = limits
        self._ledger = ledger
        self._attempts = attempts
        self._metrics = metrics
        self._running: set[asyncio.Task[None]] = set()
        self._draining = False

    def cast(self, ticket: Ticket, served: bytes, request_id: str, *, in_force: bool) -> None:
        """Ask the shadow models of a request that was answered with `served`, a whole completion; returns at once.

        `request_id`: of the shadow's own row. `in_force`: the request's policy still is; the limits of another are not
        to be written into budgets again.
        """
        if self._draining or len(self._running) >= MAX_RUNNING or not (in_force and self._ledger.accepts):
            self._metrics.shadow("dropped")
            return
        task = asyncio.create_task(self._run(ticket, served, request_id), name=f"shadow of {ticket.record.id}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def drain(self) -> None:
        """Cast no more; what is under way goes on until `close`."""
        self._draining = True

    async def close(self) -> None:
        """Cancel what is under way; each is billed as far as it came."""
        self.drain()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def statistics(self) -> dict[str, int]:
        return {"running": len(self._running)}

    async def _run(self, asked: Ticket, served: bytes, request_id: str) -> None:
        try:
            fate = await self._cast(asked, served, request_id)
        except LeadlineError as error:  # no budget, no ledger: nothing was spent that is not booked
            log.info("shadow.dropped", request_id=asked.record.id, reason=error.code)
            fate = "dropped"
        except Exception:
            log.exception("shadow.failed", request_id=asked.record.id)
            fate = "failed"
        self._metrics.shadow(fate)

    async def _cast(self, asked: Ticket, served: bytes, request_id: str) -> Fate:
        route, decision, text = asked.route, asked.decision, text_of(served)
        principal = self._keys.find(asked.record.key_id)
        if route is None or route.shadow is None or decision is None or principal is None or text is None:
            return "dropped"
        rule, world, record = route.shadow, asked.world, asked.record
        wanted = [*decision.shadow, *([rule.judge] if rule.judge is not None else [])]
        if any(not world.breakers[model].closed for model in wanted):
            return "dropped"
        now_ms = time.time_ns() // 1_000_000
        headers = replace(asked.call.headers, token="", scope_budget_nanousd=None, traceparent=None)
        call = replace(
            asked.call,
            fields={name: value for name, value in asked.call.fields.items() if name not in _NOT_SENT},
            stream=False,
            include_usage=False,
            choices=1,
            headers=headers,
            priority=beside(asked.call),
        )
        account = await self._budgets.find(
            self._limits.budgets(world.policy, principal, asked.call.headers), now_ms, request_id
        )
        own = RequestRecord(
            id=request_id,
            created_at_ms=now_ms,
            tenant=record.tenant,
            key_id=record.key_id,
            endpoint="shadow",
            stream=False,
            model_requested=record.model_requested,
            session=record.session,
            scope=record.scope,
            route="shadow",
            policy_version=record.policy_version,
            team=record.team,
            parent=record.id,
        )
        if not _affordable(call, world, account, rule, decision.shadow):
            return "dropped"
        self._ledger.journal.opened(own)
        ticket = Ticket(call, asked.query, world, account, NO_LIMIT, own, self._ledger, self._metrics)
        try:
            fate = await self._compare(ticket, asked, rule, text, decision.shadow)
        except asyncio.CancelledError:
            ticket.settle("cancelled", 499, "draining")
            raise
        except LeadlineError as error:
            ticket.settle("refused", error.http_status, error.code)
            raise
        finally:
            ticket.settle("error", 500, "internal_error")
        return fate

    async def _compare(self, ticket: Ticket, asked: Ticket, rule: Shadow, served: str, models: tuple[str, ...]) -> Fate:
        messages = bytes(asked.call.fields["messages"])
        served_by = asked.record.model_served or ""
        answers: dict[str, str] = {}
        found: list[tuple[outcomes.Verdict, ...]] = []
        told: list[str] = []
        for model in models:
            if model == served_by:  # a fallback had answered
                continue
            answer = await self._ask(ticket, model, "shadow", ticket.call)
            if answer is None:
                continue
            answers[model] = answer
            if rule.judge is None:
                continue
            verdict = await self._judge(ticket, rule.judge, messages, served, answer)
            if verdict is not None:
                found.append(tuple(verdicts(verdict, served_by, model)))
                told.append(f"against {model}: {verdict}")
        first = next(iter(answers), None)
        ticket.record.model_served = first
        ticket.record.provider = ticket.world.targets[first].provider if first is not None else None
        ticket.settle("ok" if answers else "error", 200 if answers else 502, None if answers else "shadow_failed")
        if found or (rule.keep and answers):
            kept = {served_by: served, **answers} if rule.keep else None
            await self._keep(asked, found, told, messages.decode(), kept)
        return "judged" if found else "unjudged" if answers else "failed"

    async def _ask(self, ticket: Ticket, model: str, kind: AttemptKind, call: ChatCall) -> str | None:
        """One call's words; None where it failed, or answered something else."""
        try:
            answer = await self._attempts.alone(ticket, model, kind, call)
        except UpstreamError:
            return None
        return text_of(answer.body)

    async def _judge(
        self, ticket: Ticket, judge: str, messages: bytes, served: str, shadow: str
    ) -> Literal["served", "shadow", "tie"] | None:
        """What the judge says in both orders; None where it does not keep to its form, or cannot be asked."""
        found: list[Better] = []
        for a, b in ((served, shadow), (shadow, served)):
            call = question(messages, a, b, ticket.call)
            if call.body_bytes > MAX_JUDGED_BYTES:  # as it goes out: JSON in JSON can be several times as long
                return None
            try:
                answer = await self._attempts.alone(ticket, judge, "judge", call)
            except UpstreamError:
                return None
            verdict = verdict_of(answer.body)
            if verdict is None:
                return None
            found.append(verdict)
        return agreed(found[0], found[1])

    async def _keep(
        self,
        asked: Ticket,
        found: list[tuple[outcomes.Verdict, ...]],
        told: list[str],
        prompt: str,
        answers: dict[str, str] | None,
    ) -> None:
        await self._ledger.flush()
        engine, request_id = self._ledger.engine, asked.record.id

        def write() -> None:
            row = report.request(engine, request_id)
            if row is None:
                return
            now_ms = time.time_ns() // 1_000_000
            with engine.begin() as connection:
                for verdict, words in zip(found, told, strict=True):
                    outcomes.judge_says(connection, row[0], verdict, words, now_ms)
                if answers is not None:
                    insert = insert_into(SampleRow.__table__, engine.dialect.name)  # type: ignore[attr-defined]
                    sample = {
                        "request_id": request_id,
                        "created_at_ms": now_ms,
                        "prompt": prompt.replace("\x00", "\N{REPLACEMENT CHARACTER}"),
                        "answers": msgspec.json.encode(answers).decode(),
                    }
                    connection.execute(insert.on_conflict_do_nothing(), [sample])

        with contextlib.suppress(SQLAlchemyError):  # the database is away: the labels of one shadow are lost
            await asyncio.to_thread(write)


def _affordable(call: ChatCall, world: World, account: Account, rule: Shadow, models: tuple[str, ...]) -> bool:
    """Whether all that this shadow can cost is a small part of what is left of each budget."""
    if not account.budgets:
        return True
    costs = [worst_cost(world.targets[model], call) for model in models]
    if rule.judge is not None:
        ask = question(b"x" * MAX_JUDGED_BYTES, "", "", call)
        costs += [worst_cost(world.targets[rule.judge], ask)] * (2 * len(models))
    if any(cost is None for cost in costs):
        return False
    whole = sum(cost for cost in costs if cost is not None)
    return all(whole * BUDGET_SHARE <= budget.remaining_nanousd for budget in account.budgets)
