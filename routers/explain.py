"""A decision told: as lines for a person, and as plain data for the ledger and the dashboard."""

from collections.abc import Mapping
from typing import Any

import msgspec

from probes.types import Estimate
from routers.cost import worst_case_nanousd
from routers.plans import models_of, no_plan_for
from routers.policy import Policy
from routers.types import Candidate, Decision, Plan, Query, Signals, Single
from routers.units import format_money

Asked = tuple[Policy, Query]
"""What a decision was made from, where it is told before anything is sent: it adds the most that can be spent."""


def to_lines(decision: Decision, asked: Asked | None = None) -> list[str]:
    """What was decided and why, one fact per line, without colours or wrapping."""
    width = max(len(candidate.model) for candidate in decision.candidates)
    lines = [f"{decision.plan.name}, by route {decision.route}: {decision.rule}"]
    if decision.degraded:
        lines.append(f"degraded: {decision.degraded}")
    if decision.among and not decision.explored:
        others = ", ".join(name for name in decision.among if name != decision.plan.name)
        lines.append(f"explores: {100 * (1 - decision.propensity):g}% of such requests are answered by {others}")
    if isinstance(decision.plan, Single) and decision.plan.max_thinking_tokens is not None:
        lines.append(f"thinks at most {decision.plan.max_thinking_tokens} tokens (effort {decision.plan.effort})")
    lines += [
        f"  {candidate.model:<{width}}  {_p(candidate)}  {_cost(candidate)}  {verdict(candidate, decision)}"
        for candidate in decision.candidates
    ]
    if asked is not None:
        models, query = asked[0].models, asked[1]
        why = no_plan_for(
            choices=query.choices, tools=query.needs_tools, json=query.needs_format, logprobs=query.needs_logprobs
        )
        for name in models_of(c.model for c in decision.candidates):
            lines += [f"plan of {name} at effort {effort}: {plan}" for effort, plan in models[name].plans]
            if why and models[name].plans:
                lines.append(f"plan of {name}: does not run for this request, which has {why}")
        worst = worst_case_nanousd(asked[0], decision, asked[1])
        most = "not known, as a model that may answer is unpriced" if worst is None else format_money(worst)
        lines.append(f"worst case: {most}, with every retry, fallback and hedge that the policy allows")
    probe = decision.probe_version or "none"
    lines.append(f"policy {decision.policy_version}, probe {probe}, seed {decision.seed}")
    return lines


def signal_lines(signals: Signals) -> list[str]:
    """What was measured of the query beside each candidate's P(success), one fact per line."""
    lines = []
    if signals.domain:
        likeliest = sorted(signals.domain.items(), key=lambda one: -one[1])[:3]
        lines.append("domain: " + ", ".join(f"{name} {p:.2f}" for name, p in likeliest))
    for what, found in (("thinking pays", signals.needs_reasoning), ("difficulty", signals.difficulty)):
        if found is not None:
            lines.append(f"{what}: {found.value:.2f}{_spread(found, '.2f')}")
    for name, tokens in signals.out_tokens.items():
        lines.append(f"answer of {name}: about {tokens.value:.0f} tokens{_spread(tokens, '.0f')}")
    return lines


def _spread(found: Estimate, how: str) -> str:
    return "" if found.low is None or found.high is None else f" ({found.low:{how}} to {found.high:{how}})"


def to_dict(decision: Decision, asked: Asked | None = None) -> dict[str, Any]:
    """JSON-able, with stable keys: the fields of a `Decision` and of what it holds. `from_dict` reads it back. With
    `asked`, also `worst_case_nanousd`, which is null where a model that may answer is unpriced."""
    bound = {} if asked is None else {"worst_case_nanousd": worst_case_nanousd(asked[0], decision, asked[1])}
    told: dict[str, Any] = _plain(decision)
    return bound | told


def from_dict(data: Mapping[str, Any]) -> Decision:
    """The decision that `to_dict` wrote, or that was encoded, in this version or one before. Raises ValueError for
    anything else."""
    return msgspec.convert(data, Decision)


def _plain(node: Any) -> Any:
    """As JSON has it, with all fields."""
    if isinstance(node, msgspec.Struct):
        kind = {"kind": node.kind} if isinstance(node, Plan) else {}
        return kind | {name: _plain(value) for name, value in msgspec.structs.asdict(node).items()}
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list | tuple) else node


def _p(candidate: Candidate) -> str:
    if candidate.p_success is None:
        return "P(success) not known"
    interval = "" if candidate.p_low is None else f" ({candidate.p_low:.2f} to {candidate.p_high:.2f})"
    by = candidate.measured_by.rpartition("/")[0]
    return f"P(success) {candidate.p_success:.2f}{interval}" + (f" by {by}" if by else "")


def _cost(candidate: Candidate) -> str:
    expected, worst = candidate.expected_cost_nanousd, candidate.worst_cost_nanousd
    if expected is None or worst is None:
        return "unpriced"
    low, high = candidate.cost_low_nanousd, candidate.cost_high_nanousd
    interval = "" if low is None or high is None else f" ({format_money(low)} to {format_money(high)})"
    return f"{format_money(expected)} expected{interval}, {format_money(worst)} at most"


def verdict(candidate: Candidate, decision: Decision) -> str:
    """What became of the candidate: `chosen`, its place in reserve, or why it was rejected."""
    if candidate.model in decision.fallbacks:
        return f"in reserve, number {decision.fallbacks.index(candidate.model) + 1}"
    causes = [cause for cause, names in decision.on_cause.items() if candidate.model in names]
    return f"in reserve for {' and '.join(causes)}" if causes else candidate.rejected or "chosen"
