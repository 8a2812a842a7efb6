"""Plans of the local engine: which requests they are for, and what of them is billed and told."""

from collections.abc import Mapping

from gateway.ledger.settle import Usage
from gateway.upstream.local_params import DEFAULT_EFFORT, EFFORTS
from gateway.upstream.types import ChatCall, Planned, PlanReport, Target
from local_engine.plan_types import Cascade, Exit, ModelUse, Plan, PlanUse, Vote
from local_engine.types import Finished
from routers.types import Effort

_Count = int | float | str


def planned_for(target: Target, call: ChatCall) -> Planned | None:
    """The plan that runs for this call: of its effort, and for one choice of plain text from its beginning alone."""
    planned = planned_among(target.plans, call)
    alike = call.sampling.temperature == 0
    return None if planned is not None and alike and isinstance(planned.plan, Vote) else planned


def planned_among(plans: Mapping[Effort, Planned], call: ChatCall) -> Planned | None:
    """Of the call's effort, where it is for one choice of plain text from its beginning."""
    if not plans or call.choices > 1 or call.has_tools or call.has_format or call.sampling.logprobs:
        return None
    effort = EFFORTS.get(call.sampling.reasoning_effort or DEFAULT_EFFORT)
    return plans.get(effort) if effort is not None and not call.prefix and call.thought is None else None


def most_written(plan: Plan) -> int:
    """How often every token may be written: of a vote once for each sample; else twice, once to be thrown away."""
    return max(2, plan.most) if isinstance(plan, Vote) else 2


def report_of(plan: Plan, end: Finished, usage: Usage) -> tuple[PlanReport, Usage]:
    """What the plan did, and what its own model is billed; `usage` is what the caller is told."""
    use = end.plan or PlanUse([])
    counts: dict[str, _Count | None]
    if isinstance(plan, Exit):
        counts = {"by": use.closed_by, "p": use.exit_p, "discarded_tokens": use.discarded_tokens}
        return PlanReport("exit", _stated(counts)), usage
    if isinstance(plan, Vote):
        counts = {"samples": len(use.samples), "agree": agreeing(use), "discarded_tokens": use.discarded_tokens}
        return PlanReport("vote", _stated(counts)), usage
    report: dict[str, _Count | None] = {
        "drafted_steps": use.drafted_steps,
        "accepted_steps": use.accepted_steps,
        "drafted_tokens": use.drafted_tokens,
        "accepted_tokens": use.accepted_tokens,
        "discarded_tokens": use.discarded_tokens,
        "closed_by": use.closed_by,
        "degraded": use.degraded,
        "escalated": int(use.escalated),
        "abandoned": int(use.abandoned),
        "p_correct": use.p_correct,
    }
    kind = "cascade" if isinstance(plan, Cascade) else "speculate"
    if not use.models:
        return PlanReport(kind, _stated(report)), usage
    own, draft = use.models
    return PlanReport(kind, _stated(report), _billed(draft)), _billed(own)


def _billed(use: ModelUse) -> Usage:
    """What a model read and wrote; its tokens by what they were written for, thought or answer."""
    answer = use.output_tokens - use.reasoning_tokens
    return Usage(use.read_tokens, use.cached_tokens, output=answer, reasoning=use.reasoning_tokens)


def agreeing(use: PlanUse) -> int:
    """How many samples say what the one that is shown says."""
    return 0 if use.shown is None else sum(s.answer == use.samples[use.shown].answer for s in use.samples if s.over)


def _stated(counts: Mapping[str, _Count | None]) -> dict[str, _Count]:
    return {name: value for name, value in counts.items() if value}
