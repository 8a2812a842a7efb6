"""Plans of the local engine: which requests they are for, and what of them is billed and told."""

from collections.abc import Mapping

from gateway.ledger.records import AttemptKind
from gateway.ledger.settle import Usage
from gateway.upstream.begun import goes_on
from gateway.upstream.local_params import DEFAULT_EFFORT, EFFORTS
from gateway.upstream.types import ChatCall, Planned, PlanReport, Target
from local_engine.plan_types import Cascade, Exit, ModelUse, Plan, PlanUse, Vote
from local_engine.types import Finished
from routers.plans import no_plan_for
from routers.types import Effort

_Count = int | float | str
_PARTS = frozenset[AttemptKind]({"draft", "verify", "step", "think", "answer", "resume", "shadow", "judge"})
"""Attempts that are part of a plan, or of something else."""


def planned_for(target: Target, call: ChatCall) -> Planned | None:
    """The plan that runs for this call: of its effort, and for one choice of plain text from its beginning alone."""
    planned = planned_among(target.plans, call)
    alike = call.sampling.temperature == 0
    return None if planned is not None and alike and isinstance(planned.plan, Vote) else planned


def planned_among(plans: Mapping[Effort, Planned], call: ChatCall) -> Planned | None:
    """Of the call's effort, where it is for one choice of plain text from its beginning."""
    return None if not plans or _not_for(call) else _of_effort(plans, call)


def unplanned(target: Target, call: ChatCall, kind: AttemptKind) -> str:
    """Why none of the target's plans runs within this attempt, in a word; "": one does, or it has none for the effort.

    A plan over calls makes attempts of kinds of its own: one of another kind runs without.
    """
    if kind in _PARTS:
        return ""
    if (planned := _of_effort(target.plans, call)) is not None:
        alike = isinstance(planned.plan, Vote) and call.sampling.temperature == 0
        return _not_for(call) or ("temperature" if alike else "")
    if _of_effort(target.steps, call) is None:
        return ""
    return _not_for(call) or ("prefix" if kind in ("first", "retry") else kind)


def _of_effort(plans: Mapping[Effort, Planned], call: ChatCall) -> Planned | None:
    effort = EFFORTS.get(call.sampling.reasoning_effort or DEFAULT_EFFORT) if plans else None
    return None if effort is None else plans.get(effort)


def _not_for(call: ChatCall) -> str:
    if call.prefix or call.thought is not None or goes_on(call):
        return "prefix"
    return no_plan_for(
        choices=call.choices, tools=call.has_tools, json=call.has_format, logprobs=call.sampling.logprobs
    )


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
