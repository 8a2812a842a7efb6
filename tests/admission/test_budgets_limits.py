"""Which budgets apply to a call, from its policy, its key and its headers."""

from dataclasses import replace

import pytest
from msgspec import structs

from gateway.admission.keys import Principal
from gateway.admission.limits import MAX_PATH, BudgetLimit, BudgetLimits, valid_run
from gateway.edge.headers import read_headers
from gateway.errors import InvalidRequest
from gateway.upstream.types import CallHeaders
from routers.policy import Limit, LimitScope, Policy, Threshold
from routers.units import Budget, Window

ALICE = Principal("k1", "alice", "acme", "user", team="red")


def limit(
    scope: LimitScope, name: str, nanousd: int, window: Window = "month", at: tuple[Threshold, ...] = ()
) -> Limit:
    return Limit(scope, name, Budget(nanousd, window), None, at=at)


def policy(*limits: Limit) -> Policy:
    return Policy({}, {}, None, (), limits, "version")


def found(given: Policy, principal: Principal = ALICE, headers: CallHeaders | None = None) -> dict[str, BudgetLimit]:
    limits = BudgetLimits().budgets(given, principal, headers or CallHeaders(""))
    assert len({(one.scope, one.window) for one in limits}) == len(limits)
    return {f"{one.scope}/{one.window}": one for one in limits}


def test_key_team_and_tenant_each_bound_a_call() -> None:
    limits = found(
        policy(limit("key", "*", 1), limit("team", "red", 2), limit("tenant", "*", 3), limit("key", "bob", 4))
    )
    assert {scope: (one.nanousd, one.label) for scope, one in limits.items()} == {
        "key:k1/month": (1, "key:alice"),
        "team:red/month": (2, "team:red"),
        "tenant:acme/month": (3, "tenant:acme"),
    }
    assert found(policy(limit("team", "*", 2)), replace(ALICE, team=None)) == {}


def test_a_keys_own_budget_and_the_policys_are_one_the_lower_with_its_thresholds() -> None:
    at = (Threshold(80, "cheaper"),)
    given = policy(limit("key", "*", 10, at=at), limit("key", "*", 7, "day"))
    own = replace(ALICE, budget_nanousd=5, budget_window="month")
    assert {scope: (one.nanousd, one.at) for scope, one in found(given, own).items()} == {
        "key:k1/month": (5, at),
        "key:k1/day": (7, ()),
    }
    assert found(given, replace(own, budget_nanousd=50))["key:k1/month"].nanousd == 10


def test_what_is_given_for_a_name_replaces_what_is_given_for_all() -> None:
    given = policy(limit("team", "*", 1), limit("team", "red", 9), limit("team", "blue", 5))
    assert [one.nanousd for one in found(given).values()] == [9]


def test_every_prefix_of_a_path_is_a_run_of_its_own() -> None:
    headers = CallHeaders("", scope="run/a/b", scope_budget_nanousd=3)
    limits = found(policy(limit("run", "*", 10, "total"), limit("run", "*", 4, "day")), headers=headers)
    assert {scope: (one.nanousd, one.given_nanousd, one.label) for scope, one in limits.items()} == {
        "scope:k1:run/day": (4, None, "run:run"),
        "scope:k1:run/total": (10, None, "run:run"),
        "scope:k1:run/a/total": (None, None, "run:run/a"),
        "scope:k1:run/a/b/total": (None, 3, "run:run/a/b"),
    }


def test_a_session_is_a_root_run_where_the_policy_bounds_runs() -> None:
    limits = BudgetLimits()
    bounded, unbounded = policy(limit("run", "*", 10, "total")), policy(limit("key", "*", 10))
    headers = CallHeaders("", session="s1", parent_agent="planner")
    assert limits.run_path(bounded, headers) == "s1/planner"
    assert [one.scope for one in limits.budgets(bounded, ALICE, headers)] == ["scope:k1:s1", "scope:k1:s1/planner"]
    assert limits.run_path(unbounded, headers) is None
    assert limits.run_path(unbounded, structs.replace(headers, scope="run")) == "run"
    assert limits.run_path(bounded, structs.replace(headers, scope="run")) == "run"
    odd = limits.run_path(bounded, structs.replace(headers, session="a b/../c", parent_agent=None))
    assert odd is not None
    assert odd.startswith("s-")
    assert valid_run(odd)


def test_a_new_policy_or_key_counts_from_the_next_call_on() -> None:
    limits, headers = BudgetLimits(), CallHeaders("")
    assert [one.nanousd for one in limits.budgets(policy(limit("key", "*", 1)), ALICE, headers)] == [1]
    later = policy(limit("key", "*", 2))
    assert [one.nanousd for one in limits.budgets(later, ALICE, headers)] == [2]
    assert [one.nanousd for one in limits.budgets(later, replace(ALICE, key_id="k2"), headers)] == [2]
    poorer = replace(ALICE, budget_nanousd=1, budget_window="month")
    assert [one.nanousd for one in limits.budgets(later, poorer, headers)] == [1]


@pytest.mark.parametrize(
    "text", ["", "/", "a/", "/a", "a//b", "a b", "a/" * 8 + "a", "x" * 65, "ü", "a\nb", "a/" + "x" * MAX_PATH]
)
def test_a_path_that_is_no_run_is_refused_with_the_rule(text: str) -> None:
    assert not valid_run(text)
    with pytest.raises(InvalidRequest, match="x-leadline-scope"):
        read_headers([(b"x-leadline-scope", text.encode())])


def test_the_headers_of_a_run_are_read() -> None:
    headers = read_headers(
        [
            (b"x-leadline-scope", b"run42/research/fetch"),
            (b"x-leadline-scope-budget", b"0.50"),
            (b"x-claude-code-parent-agent-id", b"a1"),
        ]
    )
    assert (headers.scope, headers.scope_budget_nanousd, headers.parent_agent) == (
        "run42/research/fetch",
        500_000_000,
        "a1",
    )
