"""Which requests have their thought shared or left over calls, and how that is told to who runs them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import msgspec

from gateway.attempts import AttemptEngine
from gateway.stepping.calls import Calls
from gateway.stepping.leave import Leaving
from gateway.stepping.speculate import Speculation
from gateway.ticket import Ticket
from gateway.upstream.gather import Gathered
from gateway.upstream.local_plans import planned_among
from gateway.upstream.types import Answer, ChatCall, Event, PlanReport, UpstreamError
from local_engine.plan_types import Exit, SpeculateSteps
from routers.types import Single


class Run(Protocol):
    """One plan at work."""

    def events(self) -> AsyncGenerator[list[Event]]: ...

    @property
    def report(self) -> PlanReport: ...


class Thinking:
    """The answer of one plan, streamed or whole, and what its ticket keeps of it."""

    def __init__(self, ticket: Ticket, calls: Calls, run: Run) -> None:
        self.model = calls.base
        self._ticket, self._calls, self._run = ticket, calls, run

    async def events(self) -> AsyncGenerator[list[Event]]:
        """Raises Gone where the model cannot be had any more, and UpstreamError where its answer broke off."""
        try:
            async with aclosing(self._run.events()) as groups:
                async for events in groups:
                    yield events
        finally:
            self._calls.end_running()  # of a caller that left
            self._ticket.plan = self._run.report
            self._ticket.told_usage = self._calls.teller.usage

    async def whole(self) -> Answer:
        gathered = Gathered()
        async with aclosing(self.events()) as groups:
            async for events in groups:
                for event in events:
                    gathered.add(event.data)
        return Answer(gathered.body(), self._calls.teller.usage)


def thinking_of(engine: AttemptEngine, ticket: Ticket, errors: list[UpstreamError]) -> Thinking | None:
    """The plan that this request's model has for it; None: it answers by itself, or its own engine runs the plan.

    What goes wrong with the model is appended to `errors`.
    """
    decision = ticket.decision
    if decision is None or not isinstance(decision.plan, Single) or ticket.call.endpoint != "chat.completions":
        return None
    target = ticket.world.targets[decision.plan.model]
    if not target.steps:
        return None
    calls = Calls(engine, ticket, target, errors)
    planned = planned_among(target.steps, calls.call)
    if planned is None or _answer_begun(calls.call):
        return None
    if isinstance(planned.plan, Exit):
        return Thinking(ticket, calls, Leaving(calls, planned.plan))
    if not isinstance(planned.plan, SpeculateSteps) or planned.draft is None:
        return None
    return Thinking(ticket, calls, Speculation(calls, planned.plan, planned.draft.model))


class _Message(msgspec.Struct):
    role: str = ""


_messages = msgspec.json.Decoder(list[_Message])


def _answer_begun(call: ChatCall) -> bool:
    """Its caller has written the start of the answer: there is no thought before it."""
    return _messages.decode(call.fields["messages"])[-1].role == "assistant"
