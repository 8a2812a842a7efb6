"""Price lists: what was vendored, what the operator says instead, and what is said of a file that is wrong."""

import datetime as dt
from itertools import pairwise
from pathlib import Path

import pytest

from gateway.ledger import prices
from gateway.ledger.settle import Usage, cost_nanousd
from gateway.policies import load_policy
from routers.errors import PolicyError
from routers.policy import Price, Provider, Tier

OPENAI = Provider("openai", None, "https://api.openai.com/v1", None, 60_000, 0)
ANTHROPIC = Provider("anthropic", None, "https://api.anthropic.com/v1", None, 60_000, 0)
DOLLAR = 10**9

OWN = """
version: 1
prices:
  api.openai.com:
    gpt-5: {input: $1/Mtok, output: $8/Mtok, context: 1000}
    changing:
      - {input: $2/Mtok, output: $9/Mtok}
      - {from: 2027-01-01, input: $1.50/Mtok, output: $9/Mtok}
    long:
      input: $1/Mtok
      output: $2/Mtok
      tiers:
        - {above: 200000, input: $2/Mtok, output: $3/Mtok}
"""


def own(tmp_path: Path, text: str = OWN) -> prices.PriceList:
    (tmp_path / "prices.yaml").write_text(text)
    return prices.price_list({"LEADLINE_PRICES": str(tmp_path / "prices.yaml")})


def test_the_vendored_list_bills_a_long_prompt_as_its_vendor_does() -> None:
    listing = prices.lookup(ANTHROPIC, "claude-sonnet-4-5")
    assert listing is not None
    assert cost_nanousd(listing.price, Usage(input=200_000)) == 200_000 * 3000
    assert cost_nanousd(listing.price, Usage(input=1, cached_input=200_000, output=1)) == 6000 + 200_000 * 600 + 22_500


def test_every_vendored_price_can_be_held_against_a_budget() -> None:
    """No tier is cheaper than the one below it: a reservation for the longest prompt bounds all shorter ones."""
    entries = prices.vendored().listing()
    assert len(entries) > 400
    tiered = 0
    for entry in entries:
        levels = [entry["price"], *(tier["price"] for tier in entry["price"]["tiers"])]
        tiered += len(levels) > 1
        for lower, upper in pairwise(levels):
            assert all(upper[n] >= lower[n] for n in ("input", "cached_input", "cache_write", "output", "reasoning"))
    assert tiered > 20


def test_prices_have_a_history(tmp_path: Path) -> None:
    listed = own(tmp_path)
    before = listed.lookup(OPENAI, "changing", at=dt.date(2026, 12, 31))
    after = listed.lookup(OPENAI, "changing", at=dt.date(2027, 1, 1))
    assert before is not None
    assert after is not None
    assert (before.price.input, after.price.input) == (2 * DOLLAR, 1_500_000_000)
    changed = {(e["host"], e["model"]) for e in prices.vendored().listing() if e["from"] is not None}
    assert changed, "the vendored list has history too"


def test_the_operators_file_comes_before_the_vendored_list(tmp_path: Path) -> None:
    listed = own(tmp_path)
    found = listed.lookup(OPENAI, "gpt-5")
    assert found is not None
    assert found.price == Price(DOLLAR, DOLLAR, DOLLAR, 8 * DOLLAR, 8 * DOLLAR)
    assert found.context == 1000
    assert prices.lookup(OPENAI, "gpt-4o") is not None
    assert listed.lookup(OPENAI, "gpt-4o") == prices.lookup(OPENAI, "gpt-4o")
    assert listed.lookup(OPENAI, "unheard-of") is None
    assert str(tmp_path / "prices.yaml") in listed.source
    assert prices.vendored().source in listed.source
    ours = [entry for entry in listed.listing() if entry["model"] == "gpt-5" and entry["host"] == "api.openai.com"]
    assert [entry["price"]["input"] for entry in ours] == [DOLLAR]
    long = listed.lookup(OPENAI, "long")
    assert long is not None
    assert long.price.tiers == (Tier(200_000, Price(*(2 * DOLLAR,) * 3, *(3 * DOLLAR,) * 2)),)


def test_a_policy_takes_its_prices_from_the_list_in_force(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nproviders: {p: {base_url: 'https://api.openai.com/v1'}}\n"
        "models: {m: {provider: p, model: gpt-5}, n: {provider: p, model: gpt-5, price: {input: $5/Mtok, "
        "output: $6/Mtok, tiers: [{above: 10, input: $7/Mtok, output: $8/Mtok}]}}}\n"
        "routes: [{name: r, when: {model: auto}, use: [m]}]\n"
    )
    (tmp_path / "prices.yaml").write_text(OWN)
    loaded = load_policy(policy, {"LEADLINE_PRICES": str(tmp_path / "prices.yaml")})
    listed, own = loaded.models["m"].price, loaded.models["n"].price
    assert listed is not None
    assert own is not None
    assert listed.input == DOLLAR
    assert own.at(10).output == 6 * DOLLAR
    assert own.at(11).output == 8 * DOLLAR


@pytest.mark.parametrize(
    ("wrong", "line", "field", "said"),
    [
        ("gpt-5: {input: 1, output: $8/Mtok}", 5, "prices.api.openai.com.gpt-5.input", "$0.25/Mtok"),
        ("gpt-5: {input: $1/Mtok}", 5, "prices.api.openai.com.gpt-5", "add `output:"),
        ("gpt-5: {inptu: $1/Mtok, input: $1/Mtok, output: $8/Mtok}", 5, "gpt-5.inptu", "did you mean"),
        ("gpt-5: {from: tomorrow, input: $1/Mtok, output: $8/Mtok}", 5, "gpt-5.from", "2027-01-31"),
        (
            "gpt-5: [{from: 2027-01-01, input: $1/Mtok, output: $8/Mtok}, {input: $1/Mtok, output: $8/Mtok}]",
            5, "gpt-5[1]", "rising `from:`",
        ),
        (
            "gpt-5: {input: $2/Mtok, output: $8/Mtok, tiers: [{above: 5, input: $1/Mtok, output: $8/Mtok}]}",
            5, "gpt-5.tiers[0]", "cheaper than the tier before it in input",
        ),
        (
            "gpt-5: {input: $1/Mtok, output: $8/Mtok, tiers: [{above: 5, input: $1/Mtok, output: $8/Mtok}, "
            "{above: 5, input: $1/Mtok, output: $8/Mtok}]}",
            5, "gpt-5.tiers[1].above", "rising `above`",
        ),
    ],
)  # fmt: skip
def test_a_price_file_that_is_wrong_is_named_by_line_field_and_fix(
    tmp_path: Path, wrong: str, line: int, field: str, said: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        own(tmp_path, f"version: 1\n\nprices:\n  api.openai.com:\n    {wrong}\n")
    (problem,) = caught.value.problems
    assert (problem.line, problem.file) == (line, str(tmp_path / "prices.yaml"))
    assert field in problem.field
    assert said in str(problem)


def test_a_price_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"cannot be read.*LEADLINE_PRICES"):
        prices.price_list({"LEADLINE_PRICES": str(tmp_path / "none.yaml")})
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="not UTF-8"):
        prices.price_list({"LEADLINE_PRICES": str(tmp_path / "bytes.yaml")})
    with pytest.raises(PolicyError, match="write `version: 1`"):
        own(tmp_path, "prices: {}\nother: 1\n")
