"""One admitted request: what is known of it, what it holds, what it has cost so far.

The journal hears of an attempt before it goes out, budgets hold the most it can cost while it runs, and `settle`
closes the row exactly once. Only `begin_attempt` awaits: nothing can come in between an end and its bill.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from gateway.admission.budgets import Account, Reservation, tightest
from gateway.admission.rates import Grant
from gateway.errors import Unavailable
from gateway.header_lines import checked, lines_of
from gateway.ledger.records import NOT_ACCEPTED, AttemptKind, AttemptRecord, RequestRecord
from gateway.ledger.settle import NO_USAGE, Usage, cost_nanousd, estimated_usage, worst_case_usage
from gateway.ledger.store import LedgerStore
from gateway.sessions import Conversation
from gateway.telemetry.metrics import Metrics
from gateway.upstream.local_plans import most_written, planned_for, unplanned
from gateway.upstream.types import Answer, ChatCall, PlanReport, Progress, Target, UpstreamError
from gateway.world import World
from routers.policy import Price, Route
from routers.types import Decision, Query
from routers.units import format_money

MAX_REASON = 200
"""Characters of a rule that a header carries; the receipt has all of it."""


class Unaccepted(NamedTuple):
    """The answer of a cascade's stage that was not good enough, and who wrote it."""

    answer: Answer
    model: str


class _Running(msgspec.Struct, frozen=True):
    """An attempt under way: what it holds, and since when."""

    call: ChatCall
    hold: Reservation
    worst: Usage
    worst_cost: int | None
    """Of all that `worst` stands for, a plan's smaller model included."""
    started_ns: int
    progress: Progress
    came: tuple[int, Answer] | None = None
    """When its whole answer was there, which nobody has judged yet."""


class Ticket:
    def __init__(
        self,
        call: ChatCall,
        query: Query,
        world: World,
        account: Account,
        grant: Grant,
        record: RequestRecord,
        ledger: LedgerStore,
        metrics: Metrics,
    ) -> None:
        self.call = call
        self.query = query
        self.world = world
        world.under_way += 1
        self.account = account
        self.grant = grant
        self.record = record
        self.decision: Decision | None = None
        self.baseline_price: Price | None = None
        """What repricing compares with; None where nothing was chosen."""
        self.served: bytes | None = None
        """The whole answer, where the decision casts shadows and it can be compared."""
        self.cache_key: bytes | None = None
        self.cache_ttl_s = 0.0
        self.resumed = False
        """Another target went on with a stream that broke."""
        self.conversation: Conversation | None = None
        """What is remembered of the conversation, where its route has affinity."""
        self.conversation_key: bytes | None = None
        self.unaccepted: Unaccepted | None = None
        """The best answer of a cascade so far, which was not accepted."""
        self.not_accepted = False
        """It was sent, as the stages after it could not answer."""
        self.attempts: list[AttemptRecord] = []
        self.plan: PlanReport | None = None
        """What a plan did for the answer."""
        self._unplanned: dict[str, str] = {}
        """Models that have a plan which did not run, and why."""
        self.told_usage: Usage | None = None
        """Of the text that the caller got, where several calls wrote it."""
        self._ledger = ledger
        self._metrics = metrics
        self.route: Route | None = None
        """What the policy's first matching route says of this call; None: the caller named a model."""
        self.deadline_s: float | None = None
        """From admission to the end of the answer; None: no bound but the attempts' own."""
        self._running: dict[str, _Running] = {}
        self._started_ns = time.perf_counter_ns()
        self._upstream_ns = 0
        self._settled = False

    # attempts -------------------------------------------------------------------------------------------------------

    async def begin_attempt(self, target: Target, kind: AttemptKind, call: ChatCall | None = None) -> AttemptRecord:
        """Hold the most this attempt can cost, then journal it: only then may it go out.

        `call`: what goes out, where it is not the caller's own. Raises BudgetExceeded, and Unavailable when the
        journal does not take it.
        """
        record, call = self.record, call or self.call
        worst, most = _worst(call, target)
        hold = await self.account.reserve(most or 0)  # what is unpriced runs only where no budget holds
        seq = len(self.attempts)
        attempt = AttemptRecord(
            id=f"{record.id}-{seq}",
            request_id=record.id,
            seq=seq,
            model=target.model,
            provider=target.provider,
            started_at_ms=time.time_ns() // 1_000_000,
            kind=kind,
        )
        attempt.bill(worst, most)  # what the journal believes until the end is known
        try:
            self._ledger.journal.dispatched(attempt)
        except OSError as error:
            hold.settle(0)
            raise Unavailable(
                "The ledger cannot be written; nothing goes out until it can.", retry_after_s=1
            ) from error
        self.attempts.append(attempt)
        if (target.plans or target.steps) and (why := unplanned(target, call, kind)):
            self._unplanned[target.model] = why
        self._running[attempt.id] = _Running(call, hold, worst, most, time.perf_counter_ns(), Progress())
        if self.world.loads is not None:
            self.world.loads.began(target.model)
        record.model_served, record.provider = target.model, target.provider
        record.reserved_nanousd += most or 0
        if self._ledger.full:
            try:
                await self._ledger.durable()
            except BaseException:
                self.end_attempt(attempt, "not_sent", NO_USAGE)
                raise
        return attempt

    def first_byte(self, attempt: AttemptRecord) -> None:
        """This attempt answers. What comes before the request's first byte, and of no upstream, is our overhead."""
        record, now_ns = self.record, time.perf_counter_ns()
        attempt.first_byte_us = (now_ns - self._running[attempt.id].started_ns) // 1000
        record.model_served, record.provider = attempt.model, attempt.provider
        if record.first_byte_us is None:  # a stream that is resumed has had its own
            self._answers(now_ns)

    def _answers(self, now_ns: int) -> None:
        self.record.first_byte_us = (now_ns - self._started_ns) // 1000
        self.record.overhead_us = (now_ns - self._started_ns - self._upstream_ns) // 1000

    def progress(self, attempt: AttemptRecord) -> Progress:
        """Where whoever runs this attempt tells how far its answer has come."""
        return self._running[attempt.id].progress

    def came(self, attempt: AttemptRecord, answer: Answer) -> None:
        """Its whole answer is here and will be judged: its clock stops, its bill waits for the outcome."""
        running = self._running[attempt.id]
        self._running[attempt.id] = msgspec.structs.replace(running, came=(time.perf_counter_ns(), answer))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Attempts that run at the same time: what they are waited for counts once, and nobody has seen a byte yet."""
        before, began_ns = self._upstream_ns, time.perf_counter_ns()
        try:
            yield
        finally:
            waited = self._upstream_ns - before
            self._upstream_ns = before + min(waited, time.perf_counter_ns() - began_ns)
            self.record.first_byte_us = None

    def told(self, attempt: AttemptRecord) -> None:
        """An attempt has ended that wrote a part of what the caller got, beside other calls. The prompt is the first
        one's: of those that go on, the words so far are a part of theirs."""
        usage, before = _usage(attempt), self.told_usage
        if before is not None:
            usage = msgspec.structs.replace(
                before, output=before.output + usage.output, reasoning=before.reasoning + usage.reasoning
            )
        self.told_usage = usage

    def accept(self, attempt: AttemptRecord) -> None:
        """This attempt's answer is the request's."""
        self.record.model_served, self.record.provider = attempt.model, attempt.provider
        self._answers(time.perf_counter_ns())

    def settle_for_less(self) -> Answer | None:
        """The best answer so far, to be sent though it was not accepted: nothing better came. None: there is none."""
        if (less := self.unaccepted) is None:
            return None
        self.not_accepted = True
        self.record.model_served, self.record.provider = less.model, self.world.targets[less.model].provider
        if self.record.first_byte_us is None:
            self._answers(time.perf_counter_ns())
        return less.answer

    def waited(self, nanoseconds: int) -> None:
        """Time spent on an upstream, or between two attempts, is not the gateway's own."""
        self._upstream_ns += nanoseconds

    def remaining_s(self) -> float:
        """Until the request's deadline; infinite without one."""
        if self.deadline_s is None:
            return math.inf
        return self.deadline_s - (time.perf_counter_ns() - self._started_ns) / 1e9

    def fail_attempt(self, attempt: AttemptRecord, error: UpstreamError) -> None:
        """One that nobody has seen a word of. It costs nothing, unless its target may have worked on it."""
        attempt.upstream_status = error.status
        attempt.error = error.kept
        state = self.progress(attempt).state
        worked = error.may_be_billed or (state is not None and state.deltas > 0)
        usage = None if worked else NO_USAGE
        self.end_attempt(attempt, error.cause, usage, delivered_bytes=error.delivered_bytes)

    def end_attempt(
        self,
        attempt: AttemptRecord,
        outcome: str,
        usage: Usage | None,
        *,
        delivered_bytes: int = 0,
        deltas: int = 0,
        plan: PlanReport | None = None,
    ) -> None:
        """Bill one attempt and give its hold back. `usage` None: the provider did not say, so it is estimated.

        The estimate is of what was written, where that was seen; an engine's own count is none. A whole answer that
        nobody has seen anything of may have been written to its end: it is billed at the most it can have cost.
        `plan`: of an engine's plan, whose smaller model gets a row of its own.
        """
        running = self._running.pop(attempt.id)
        target = self.world.targets[attempt.model]
        state = running.progress.state
        if usage is None and state is not None:
            usage, delivered_bytes, deltas = state.so_far(), state.delivered_bytes, state.deltas
        if usage is None and running.progress.unsent:
            usage = NO_USAGE
        if usage is None:
            usage = running.worst
            if running.call.stream or delivered_bytes or state is not None:
                usage = estimated_usage(
                    body_bytes=running.call.body_bytes,
                    context=target.context * running.call.inputs,
                    delivered_bytes=delivered_bytes,
                    delivered_deltas=deltas,
                )
        cost = running.worst_cost if usage is running.worst else cost_nanousd(target.price, usage)
        if cost is not None and usage.estimated:
            cost = min(cost, running.hold.amount_nanousd)  # an estimate never exceeds what was held for it
        attempt.bill(usage, cost)
        attempt.outcome = outcome
        attempt.duration_us = (
            (running.came[0] if running.came else time.perf_counter_ns()) - running.started_ns
        ) // 1000
        drafted = 0
        if plan is not None:
            self.plan = plan
            planned = planned_for(target, running.call)
            if plan.draft is not None and planned is not None and planned.draft is not None:
                drafted = self._bill_draft(attempt, planned.draft, plan.draft)
        running.hold.settle((cost or 0) + drafted)
        if self.world.loads is not None:
            self.world.loads.ended(attempt, stream=running.call.stream and running.progress.state is None)

    def _bill_draft(self, attempt: AttemptRecord, draft: Target, usage: Usage) -> int:
        """A row for what the smaller model of a plan did within `attempt`; its cost."""
        seq = len(self.attempts)
        row = AttemptRecord(
            id=f"{self.record.id}-{seq}",
            request_id=self.record.id,
            seq=seq,
            model=draft.model,
            provider=draft.provider,
            started_at_ms=attempt.started_at_ms,
            duration_us=attempt.duration_us,
            outcome=attempt.outcome,
            kind="draft",
        )
        cost = cost_nanousd(draft.price, usage)
        row.bill(usage, cost)
        self.attempts.append(row)
        return cost or 0

    def interruption(self) -> str:
        """Why an attempt was cancelled: `deadline`, the request's own, or `cancelled`, as its caller left."""
        return "deadline" if self.remaining_s() <= 0 else "cancelled"

    def end_running(self, outcome: str) -> None:
        """Bill whatever is still under way."""
        for attempt in self.attempts:
            self.end_if_running(attempt, outcome)

    def end_unanswered(self, outcome: str) -> None:
        """Bill whatever is under way without an answer that waits to be judged."""
        for attempt in self.attempts:
            running = self._running.get(attempt.id)
            if running is not None and running.came is None:
                self.end_attempt(attempt, outcome, None)

    def end_if_running(self, attempt: AttemptRecord, outcome: str) -> None:
        """Bill an attempt that was cancelled from here, unless it has ended by itself."""
        running = self._running.get(attempt.id)
        if running is None:
            return
        if running.came is None:
            self.end_attempt(attempt, outcome, None)
            return
        _, answer = running.came
        self.end_attempt(attempt, NOT_ACCEPTED, answer.usage, delivered_bytes=answer.delivered_bytes, plan=answer.plan)

    # the end --------------------------------------------------------------------------------------------------------

    def settle(self, outcome: str, status: int, error_code: str | None = None) -> None:
        """Close the row: once, by this code alone, however the request ended. Later calls do nothing."""
        if self._settled:
            return
        self._settled = True
        self.world.under_way -= 1
        if self._running:  # its caller left, or something of ours broke
            self.end_running("cancelled" if outcome == "cancelled" else "error")
        record = self.record
        record.outcome, record.http_status, record.error_code = outcome, status, error_code
        record.total(self.attempts)
        record.degraded = self._degraded()
        if (plan := self._told_plan()) is not None:
            record.plan = msgspec.json.encode({"kind": plan.kind, **plan.counts}).decode()
        if record.degraded is not None:
            self._metrics.degraded(record.degraded)
        if self.baseline_price is not None and self.attempts:
            served = self.attempts[-1]
            if served.outcome != "ok" or served.kind == "draft":
                served = next((attempt for attempt in self.attempts if attempt.outcome == "ok"), served)
            record.baseline_nanousd = cost_nanousd(self.baseline_price, self.told_usage or _usage(served))
        record.duration_us = (time.perf_counter_ns() - self._started_ns) // 1000
        if record.first_byte_us is None:
            record.overhead_us = record.duration_us - self._upstream_ns // 1000
        self.grant.release(
            record.input_tokens
            + record.cached_input_tokens
            + record.cache_write_tokens
            + record.output_tokens
            + record.reasoning_tokens
        )
        self._ledger.close_request(record, self.attempts)
        for attempt in self.attempts:  # their outcomes stand now: what was taken may not have been accepted
            self._metrics.attempt(attempt)
        self._metrics.request(record, self.attempts, self.call.headers.traceparent)

    def headers(self, *, final: bool) -> bytes:
        """What every answer says of itself, in lines. `final`: the cost is known (a stream learns it at its end)."""
        record = self.record
        if not final:
            count, cost = 9, "x-leadline-cost-nanousd: in-last-event\r\n"
        elif record.cost_nanousd is None:
            count, cost = 9, "x-leadline-cost-nanousd: unpriced\r\n"
        else:  # dashboards made for LiteLLM read the last one
            usd = format_money(record.cost_nanousd).removeprefix("$")
            count, cost = (
                11,
                (
                    f"x-leadline-cost-nanousd: {record.cost_nanousd}\r\n"
                    f"x-leadline-cost: {usd}\r\n"
                    f"x-litellm-response-cost: {usd}\r\n"
                ),
            )
        budget = tightest(self.account.budgets)
        left = ""
        if budget is not None:
            count += 2
            left = (
                f"x-leadline-budget-remaining-nanousd: {budget.remaining_nanousd}\r\n"
                f"x-leadline-budget-scope: {budget.label}\r\n"
            )
        if (report := self._told_plan()) is not None:
            count += 1
            told = "".join(f"; {name}={value}" for name, value in report.counts.items())
            left += f"x-leadline-plan: {report.kind}{told}\r\n"
        degraded = self._degraded()
        if degraded:
            count += 1
            left += f"x-leadline-degraded: {degraded}\r\n"
        decision = self.decision
        if decision is not None:
            count += 1
            rule = decision.rule if decision.rule.isascii() else decision.rule.encode("ascii", "replace").decode()
            left += f"x-leadline-reason: {rule[:MAX_REASON]}\r\n"
            plan = decision.plan
            if plan.kind == "single" and plan.effort is not None and plan.model == record.model_served:
                count += 1
                left += f"x-leadline-effort: {plan.effort}\r\n"
        lines = (
            f"x-request-id: {record.id}\r\n"
            f"x-leadline-decision: dec{record.id[3:]}\r\n"
            f"x-leadline-model: {record.model_served or ''}\r\n"
            f"x-leadline-provider: {record.provider or ''}\r\n"
            f"x-leadline-route: {record.route}\r\n"
            f"x-leadline-cache: {record.cache}\r\n"
            f"x-leadline-attempts: {len(self.attempts)}\r\n"
            f"x-leadline-overhead-ms: {record.overhead_us / 1000:.3f}\r\n"
            f"{cost}{left}"
        )
        return checked(lines.encode(), count) + lines_of(self.grant.headers())

    def _degraded(self) -> str | None:
        """Why this request got less than the policy wanted; None: it did not."""
        decided = self.decision.degraded if self.decision is not None else ""
        if not (decided or self.grant.degraded or self.resumed or self.not_accepted):
            return None
        resumed, less = "resumed" if self.resumed else "", "not_accepted" if self.not_accepted else ""
        return ", ".join(filter(None, (decided, self.grant.degraded, resumed, less)))

    def _told_plan(self) -> PlanReport | None:
        """What a plan did, or why the one of the model that answers did not run; None: it has none."""
        if self.plan is None and (why := self._unplanned.get(self.record.model_served or "")):
            return PlanReport("none", {"reason": why})
        return self.plan

    def receipt(self) -> dict[str, object]:
        """The extension that a stream's last usage chunk carries."""
        record = self.record
        told = self._told_plan()
        plan: dict[str, object] = {} if told is None else {"plan": {"kind": told.kind, **told.counts}}
        return plan | {
            "request_id": record.id,
            "model": record.model_served,
            "provider": record.provider,
            "route": record.route,
            "cost_nanousd": record.cost_nanousd,
            "cost_estimated": record.cost_estimated,
            "cache": record.cache,
            "attempts": len(self.attempts),
            "resumed": self.resumed,
        }


def worst_cost(target: Target, call: ChatCall) -> int | None:
    """The most that one attempt at `target` can cost, in nano-dollars; None: unpriced. `call`: what goes out."""
    return _worst(call, target)[1]


def _worst(call: ChatCall, target: Target) -> tuple[Usage, int | None]:
    """The dearest usage that one attempt at `target` can have, and its cost: of a plan's smaller model too, and of all
    that a plan may write or read to throw it away. None: one of them is unpriced."""
    usage = _worst_usage(call, target)
    if not target.plans or (planned := planned_for(target, call)) is None:
        return usage, cost_nanousd(target.price, usage)
    written, times = usage.output + usage.reasoning, most_written(planned.plan)
    usage = msgspec.structs.replace(
        usage,
        input=usage.input + times * written,
        output=times * usage.output,
        reasoning=times * usage.reasoning,
    )
    cost = cost_nanousd(target.price, usage)
    if planned.draft is None or cost is None:
        return usage, cost
    # Which class is the dearer one is each price's own.
    answers = msgspec.structs.replace(usage, output=usage.output + usage.reasoning, reasoning=0)
    thoughts = msgspec.structs.replace(answers, output=0, reasoning=answers.output)
    drafts = [cost_nanousd(planned.draft.price, written) for written in (answers, thoughts)]
    return usage, None if None in drafts else cost + max(dear for dear in drafts if dear is not None)


def _worst_usage(call: ChatCall, target: Target) -> Usage:
    """The dearest usage that one attempt at `target` can have."""
    asked = call.sampling.max_tokens
    return worst_case_usage(
        target.price,
        body_bytes=call.body_bytes,
        context=target.context * call.inputs,
        max_output=min(asked, target.max_output) if asked is not None else target.max_output,
        choices=call.choices,
        text_only=call.text_only,
    )


def _usage(attempt: AttemptRecord) -> Usage:
    return Usage(
        attempt.input_tokens,
        attempt.cached_input_tokens,
        attempt.cache_write_tokens,
        attempt.output_tokens,
        attempt.reasoning_tokens,
    )
