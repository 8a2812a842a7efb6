"""A plan is written into a policy as one field of one model, and nothing else moves."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gateway.tune.write import CannotWrite, with_field

BLOCK = """\
version: 1
models:                  # by name
  local:
    provider: home       # here
    model: bundled/base

  other: {provider: home, model: bundled/draft}   # small
routes: []
"""
Plan = dict[str, dict[str, object]]
EXIT: Plan = {"exit": {"rule": "probe", "delta": "5%"}}
DRAFT: Plan = {"speculate": {"draft": "other", "threshold": -4.0}}


def content(text: str) -> object:
    return yaml.safe_load(text)


@pytest.mark.parametrize("model", ["local", "other"])
def test_only_the_plan_of_that_model_changes(model: str) -> None:
    first = with_field(BLOCK, model, "plan", EXIT, "measured")
    expected = yaml.safe_load(BLOCK)
    expected["models"][model]["plan"] = EXIT
    assert content(first) == expected
    second = with_field(first, model, "plan", DRAFT)
    expected["models"][model]["plan"] = DRAFT
    assert content(second) == expected
    assert content(with_field(second, model, "plan", None)) == content(BLOCK)
    for comment in ("# by name", "# here", "# small"):
        assert comment in second


def test_a_plan_over_several_lines_is_replaced_whole() -> None:
    long = BLOCK.replace(
        "    model: bundled/base\n", "    plan:\n      exit:\n        rule: probe  # mine\n    model: bundled/base\n"
    )
    again = with_field(long, "local", "plan", DRAFT)
    expected = yaml.safe_load(BLOCK)
    expected["models"]["local"]["plan"] = DRAFT
    assert content(again) == expected


@given(
    st.permutations(["provider: home", "model: m", "plan: {exit: {rule: probe}}", "price: free"]),
    st.sampled_from(["{%s}", "{ %s }", "{%s,}", "{\n      %s\n    }"]),
    st.sampled_from([EXIT, DRAFT, None]),
)
def test_wherever_the_plan_stood_on_one_line(fields: list[str], form: str, plan: Plan | None) -> None:
    text = f"version: 1\nmodels:\n  a: {form % ', '.join(fields)}  # one\n  b: {{provider: home, model: n}}\n"
    expected = yaml.safe_load(text)
    del expected["models"]["a"]["plan"]
    if plan is not None:
        expected["models"]["a"]["plan"] = plan
    written = with_field(text, "a", "plan", plan)
    assert content(written) == expected
    assert "# one" in written


@pytest.mark.parametrize("text", ["version: 1\n", "version: 1\nmodels: {a: x}\n", "version: 1\nmodels:\n  b: {c: d}\n"])
def test_a_model_that_is_not_there_is_named(text: str) -> None:
    with pytest.raises(CannotWrite, match=r"models\.a"):
        with_field(text, "a", "plan", EXIT)
