"""Decisions as people read them, and as they are kept."""

import json

import msgspec
import pytest

from probes.types import Estimate
from routers.explain import from_dict, to_dict, to_lines
from routers.types import Accept, Cascade, Plan, Single, Speculate, Vote
from routers.units import format_money
from tests.routers.deciding import MIDDLING, P90, policy, run


def test_told_to_a_person() -> None:
    decision = run(policy(subject_to=P90, on_failure="[local]"), signals=MIDDLING, seed=3)
    assert to_lines(decision) == [
        "weak, by route auto: cheapest with p_success >= 0.9",
        "  local   P(success) 0.50 (0.25 to 1.00) by a@1  $0 expected, $0 at most  in reserve, number 1",
        "  weak    P(success) 0.92 (0.46 to 1.00) by a@1  $0.0009 expected, $0.0041 at most  chosen",
        "  strong  P(success) 0.98 (0.49 to 1.00) by a@1  $0.009 expected, $2.001 at most  costs $0.009, weak $0.0009",
        f"policy {decision.policy_version}, probe a@1, seed 3",
    ]
    short = msgspec.structs.replace(MIDDLING, out_tokens={"weak": Estimate(100, "a@1/weak.tokens", 50, 300)})
    told = next(one for one in run(policy(subject_to=P90), signals=short).candidates if one.model == "weak")
    assert told.measured_by == "a@1/weak"
    assert told.cost_low_nanousd is not None
    assert told.expected_cost_nanousd is not None
    written = told.expected_cost_nanousd - told.cost_low_nanousd
    assert told.cost_high_nanousd == told.expected_cost_nanousd + 4 * written, "200 tokens more, where it was 50 less"
    assert (
        f"expected ({format_money(told.cost_low_nanousd)} to" in to_lines(run(policy(subject_to=P90), signals=short))[2]
    )
    degraded = to_lines(run(policy(subject_to=P90)))
    assert degraded[1] == "degraded: probe_unavailable"
    assert "P(success) not known" in degraded[2]


def test_a_plan_of_another_version_is_refused() -> None:
    data = to_dict(run(policy())) | {"plan": {"kind": "oracle"}}
    with pytest.raises(ValueError, match="'oracle' - at"):
        from_dict(data)


LOCAL = Single("local", "high", 512)
PLANS: dict[str, Plan] = {
    "local+high": LOCAL,
    "weak>local+high": Cascade(
        (Single("weak"), LOCAL), Accept((("mean_logprob", 2.5), ("log_tokens", -0.3)), 1.0, 0.9)
    ),
    "draft~local": Speculate("draft", "local", "spec_reason", "high"),
    "local*5": Vote("local", 5, "majority"),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_plan_is_kept_whole_under_its_name_and_its_first_model(name: str) -> None:
    decision = msgspec.structs.replace(
        run(policy()), plan=PLANS[name], propensity=0.25, explored=True, shadow=("strong",)
    )
    kept = json.loads(json.dumps(to_dict(decision)))
    assert from_dict(kept) == decision
    assert from_dict(json.loads(msgspec.json.encode(decision))) == decision, "as the gateway keeps it in the ledger"
    assert (decision.plan.name, kept["plan"]["model"]) == (name, "weak" if ">" in name else "local")
    assert decision.effort == (None if name in ("weak>local+high", "local*5") else "high")
