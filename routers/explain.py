"""A decision told: as lines for a person, and as plain data for the ledger and the dashboard."""

from collections.abc import Mapping
from typing import Any

from routers.types import Candidate, Decision, Single
from routers.units import format_money


def to_lines(decision: Decision) -> list[str]:
    """What was decided and why, one fact per line, without colours or wrapping."""
    width = max(len(candidate.model) for candidate in decision.candidates)
    lines = [f"{decision.plan.model}, by route {decision.route}: {decision.rule}"]
    if decision.degraded:
        lines.append(f"degraded: {decision.degraded}")
    for candidate in decision.candidates:
        cost = f"{format_money(candidate.expected_cost_nanousd)} expected"
        worst = f"{format_money(candidate.worst_cost_nanousd)} at most"
        lines.append(f"  {candidate.model:<{width}}  {_p(candidate)}  {cost}, {worst}  {_verdict(candidate, decision)}")
    probe = decision.probe_version or "none"
    lines.append(f"policy {decision.policy_version}, probe {probe}, seed {decision.seed}")
    return lines


def to_dict(decision: Decision) -> dict[str, Any]:
    """JSON-able, with stable keys. `from_dict` reads it back."""
    return {
        "plan": {"kind": "single", "model": decision.plan.model, "effort": decision.plan.effort},
        "route": decision.route,
        "rule": decision.rule,
        "candidates": [
            {
                "model": candidate.model,
                "p_success": candidate.p_success,
                "p_low": candidate.p_low,
                "p_high": candidate.p_high,
                "expected_cost_nanousd": candidate.expected_cost_nanousd,
                "worst_cost_nanousd": candidate.worst_cost_nanousd,
                "rejected": candidate.rejected,
            }
            for candidate in decision.candidates
        ],
        "fallbacks": list(decision.fallbacks),
        "policy_version": decision.policy_version,
        "probe_version": decision.probe_version,
        "seed": decision.seed,
        "degraded": decision.degraded,
    }


def from_dict(data: Mapping[str, Any]) -> Decision:
    """The decision that `to_dict` wrote. Raises KeyError or ValueError for anything else."""
    plan = data["plan"]
    if plan["kind"] != "single":
        raise ValueError(f"a plan of kind {plan['kind']!r} cannot be read by this version")
    return Decision(
        plan=Single(plan["model"], plan["effort"]),
        route=data["route"],
        rule=data["rule"],
        candidates=tuple(Candidate(**candidate) for candidate in data["candidates"]),
        fallbacks=tuple(data["fallbacks"]),
        policy_version=data["policy_version"],
        probe_version=data["probe_version"],
        seed=data["seed"],
        degraded=data["degraded"],
    )


def _p(candidate: Candidate) -> str:
    if candidate.p_success is None:
        return "P(success) not known"
    interval = "" if candidate.p_low is None else f" ({candidate.p_low:.2f} to {candidate.p_high:.2f})"
    return f"P(success) {candidate.p_success:.2f}{interval}"


def _verdict(candidate: Candidate, decision: Decision) -> str:
    if candidate.model == decision.plan.model:
        return "chosen"
    if candidate.model in decision.fallbacks:
        return f"in reserve, number {decision.fallbacks.index(candidate.model) + 1}"
    return candidate.rejected
