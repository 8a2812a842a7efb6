"""`leadline replay` over the ledger of a real gateway: decisions made again, estimates that hold the truth."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import astuple
from sqlalchemy import Engine
from typer.testing import CliRunner

from gateway import facts
from gateway.cli import app
from gateway.ledger import browse, outcomes, prices, report
from gateway.ledger.outcomes import decision_of
from gateway.ledger.settle import Usage
from gateway.policies import checked_policy
from gateway.replay.command import lines
from gateway.replay.history import REFUSED, Replay, Span, Turn, estimates, replay, repriced
from routers.decide import decide
from routers.load import parse
from routers.policy import Policy
from routers.types import Arm, Candidate, Decision, Load, Query, Signals, Single, State
from tests.gateway.conftest import POLICY, Gateway, ask, running
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = pytest.mark.anyio

ROUTES = """routes:
  - name: explored
    when: {{model: explored, not: {{tag: plain}}}}
    candidates: [cheap, dear]
    explore: {{share: 40%, method: uniform}}
    cache: off
  - {{name: plain, when: {{model: explored}}, use: [cheap], cache: off}}
"""
ALWAYS = """routes:
  - {{name: all, when: {{model: explored}}, use: [MODEL]}}
"""
EVER = Span(0, 1 << 60)


def policy(url: str, routes: str, limits: str = "") -> str:
    text = POLICY.replace("routes:\n", routes, 1)
    return text.format(url=url, limits=limits)


def always(url: str, model: str) -> Policy:
    return parse(policy(url, ALWAYS.replace("MODEL", model)), prices=prices.lookup)


async def traffic(gateway: Gateway, n: int, **headers: str) -> None:
    gate = asyncio.Semaphore(8)

    async def one(i: int) -> None:
        async with gate:
            status, _, _ = await gateway.chat(ask(f"question {i} " + "word " * (i % 40), model="explored"), **headers)
            assert status == 200

    await asyncio.gather(*[one(i) for i in range(n)])


def rated(engine: Engine) -> list[dict[str, Any]]:
    """Says of each request that dear is right on nine of ten questions, and cheap on the even ones; its rows."""
    rows = [row for row in browse.page(engine, browse.Slice(), limit=10_000) if row["parent"] is None]
    for row in rows:
        length = row["input_tokens"] + row["cached_input_tokens"]
        right = length % 10 != 3 if row["model_served"] == "dear" else length % 2 == 0
        outcomes.caller_says(engine, row["id"], float(right), tenant=None, source="caller", comment=None, now_ms=1)
    return rows


def turn(
    target: dict[str, float],
    expected: dict[str, tuple[float | None, float | None]],
    *,
    cost: float = 100.0,
    score: float = 1.0,
) -> Turn:
    """A request that `dear` answered, for sure and with P(success) of 0.9 by the probe."""
    dear = Candidate("dear", 0.9, None, None, None, None)
    decision = Decision(Single("dear"), "all", "", (dear,), (), "", None, 0)
    return Turn(decision, cost, 7.0, score, Usage(10, 0, 0, 5, 0), 10, target, expected)


async def test_a_policy_is_estimated_where_the_old_one_explored(
    upstream: FakeUpstream, tmp_path: Path, database_url: str
) -> None:
    async with running(policy(upstream.url, ROUTES), tmp_path / "home", database_url=database_url) as gateway:
        await traffic(gateway, 300)
        await gateway.rows()
        engine = gateway.app.state.lifecycle.ledger.engine
        rows = rated(engine)
        found = replay(engine, always(upstream.url, "dear"), EVER)
        again = replay(engine, gateway.app.policy, EVER)
    assert (found.rows, found.supported, found.same, found.skipped) == (300, 300, 0, {})
    assert found.repriced is None
    # The fake upstream bills words: what dear costs on each prompt is known, and so is where it is right.
    sizes = [row["input_tokens"] + row["cached_input_tokens"] for row in rows]
    truth = sum((size - size // 3) * 2.5 + size // 3 * 1.25 + 12 * 10 for size in sizes) / 300 * 1000
    cost, quality = found.estimates["cost"], found.estimates["quality"]
    assert cost is not None
    assert cost.after.value == pytest.approx(truth, rel=0.1)
    assert cost.before.value < cost.after.value
    assert cost.change.low > 0
    assert quality is not None
    right = sum(size % 10 != 3 for size in sizes) / 300
    slack = (quality.after.high - quality.after.low) / 2
    # 1.96 errors hold it in 92 of 100 runs, as the weights are worth some 115 rows (`ROUGH`); thrice that in all.
    assert abs(quality.after.value - right) < 3 * slack
    assert quality.effective_n < 200
    kept = again.estimates["quality"]
    assert kept is not None
    assert kept.largest_weight == pytest.approx(1.0)
    assert kept.after.value == pytest.approx(kept.before.value, abs=0.05)


async def test_what_was_never_tried_is_repriced_and_says_so(upstream: FakeUpstream, tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with running(policy(upstream.url, ROUTES), home) as gateway:
        await traffic(gateway, 40, **{"X-Leadline-Tags": "plain"})
        rows = await gateway.rows()
        engine = gateway.app.state.lifecycle.ledger.engine
        same = replay(engine, always(upstream.url, "cheap"), EVER)
        found = replay(engine, always(upstream.url, "dear"), EVER)
        other = replay(engine, always(upstream.url, "dear"), Span(0, 1 << 60, "nobody"))
    assert (same.same, same.supported, same.repriced) == (40, 40, None)
    cost = same.estimates["cost"]
    assert cost is not None
    assert (cost.after.value, cost.change.value) == pytest.approx((cost.before.value, 0.0))
    assert (found.supported, other.rows) == (0, 0)
    assert found.repriced is not None
    assert (found.repriced.n, found.repriced.predicted_after) == (40, None)
    assert found.repriced.cost_before == pytest.approx(sum(row["cost_nanousd"] for row in rows) / 40)
    by_hand = [r["input_tokens"] * 2.5 + r["cached_input_tokens"] * 1.25 + r["output_tokens"] * 10 for r in rows]
    assert found.repriced.cost_after == pytest.approx(sum(by_hand) / 40 * 1000)
    file, out = tmp_path / "dear.yaml", tmp_path / "out.json"
    file.write_text(policy(upstream.url, ALWAYS.replace("MODEL", "dear")))
    done = await asyncio.to_thread(
        CliRunner().invoke, app, ["replay", str(file), "--json", str(out)], env={"LEADLINE_HOME": str(home)}
    )
    assert done.exit_code == 0, done.output
    assert "Repriced on the other 40, where the new policy does what was not tried: arithmetic" in done.output
    assert "Estimated" not in done.output
    assert json.loads(out.read_text())["repriced"]["n"] == 40


@pytest.mark.parametrize("how", ["some", "all"])
async def test_what_the_new_policy_refuses_costs_nothing_and_answers_nothing(
    upstream: FakeUpstream, tmp_path: Path, how: str
) -> None:
    home, file = tmp_path / "home", tmp_path / "short.yaml"
    text = policy(upstream.url, ALWAYS.replace("MODEL", "cheap")).replace("max_output: 1000", "max_output: 400")
    file.write_text(text if how == "some" else text.replace("model: explored", "model: renamed"))
    async with running(policy(upstream.url, ROUTES), home) as gateway:
        await traffic(gateway, 12, **{"X-Leadline-Tags": "plain"})
        status, _, _ = await gateway.chat(ask(model="explored", max_tokens=500), **{"X-Leadline-Tags": "plain"})
        assert status == 200
        rows = await gateway.rows()
        found = replay(gateway.app.state.lifecycle.ledger.engine, checked_policy(file, secrets=False)[0], EVER)
    refused = 1 if how == "some" else 13
    assert (found.rows, found.same, found.refused) == (13, 13 - refused, refused)
    assert found.repriced is not None
    assert (found.repriced.n, found.repriced.unpriced, found.repriced.cost_after) == (refused, 0, 0.0)
    last = [row["cost_nanousd"] for row in rows][:refused]
    assert found.repriced.cost_before == pytest.approx(sum(last) / refused)
    done = await asyncio.to_thread(CliRunner().invoke, app, ["replay", str(file)], env={"LEADLINE_HOME": str(home)})
    assert done.exit_code == 0, done.output
    assert f"refused: {refused}, which cost nothing and answer nothing" in done.output


def test_a_refused_request_counts_as_one_that_would_fail() -> None:
    """Beside what it saves: else a policy that refuses all that is hard would look better for it."""
    answered, refused = turn({"cheap": 1.0}, {"cheap": (0.8, 100)}), turn({REFUSED: 1.0}, {REFUSED: (0.0, 0.0)})
    new = always("http://127.0.0.1:9/v1", "cheap")
    found = repriced([answered, refused], new)
    assert (found.predicted, found.predicted_before, found.predicted_after) == (2, 0.9, 0.4)
    unknown = turn({"cheap": 1.0}, {"cheap": (None, 100)})
    found = repriced([unknown, unknown, refused], new)
    assert (found.predicted, found.predicted_after) == (1, 0.0)
    told = lines(Replay(3, 0, 0, 1, {}, {}, found))
    assert "  P(success) as the probe predicts it, not as measured (of 1 of them): 0.900 then, 0.000 now" in told


def test_requests_without_a_price_are_not_said_to_have_cost_nothing() -> None:
    one, free = (turn({"cheap": 1.0}, {"cheap": (0.8, 100)}, cost=cost) for cost in (float("nan"), 0.0))
    new = always("http://127.0.0.1:9/v1", "cheap")
    told = lines(Replay(2, 0, 0, 0, {}, {}, repriced([one, one], new)))
    assert "  cost per 1,000: not known, none of them has a price" in told
    assert not any("$" in line for line in told)
    told = lines(Replay(2, 0, 0, 0, {}, {}, repriced([one, free], new)))
    assert any(line.startswith("  cost per 1,000: $0 then, ") for line in told)
    assert "  1 of them have no price, and are in neither sum" in told


def test_few_requests_are_not_said_to_lack_a_price() -> None:
    def told(n: int, **known: float) -> list[str]:
        turns = [turn({"dear": 1.0}, {}, **known)] * n
        return lines(Replay(n, n, n, 0, {}, estimates(turns)))[2:]

    few = "not known, 29 requests are too few: it takes 30"
    assert told(29) == [f"  cost: {few}", f"  quality: {few}", f"  latency: {few}"]
    cost, quality, latency = told(30, cost=float("nan"), score=float("nan"))
    assert cost == "  cost: not known, too few of them have a price"
    assert quality == "  quality: not known, too few of these requests were rated"
    assert latency.startswith("  latency: 7 ms then")


async def test_the_same_inputs_and_seed_make_the_same_decision(upstream: FakeUpstream, tmp_path: Path) -> None:
    limits = 'limits: [{key: "*", budget: $1/day, at: {1%: cheaper}}]'
    async with running(policy(upstream.url, ROUTES, limits), tmp_path / "home") as gateway:
        await traffic(gateway, 20)
        await traffic(
            gateway, 3, **{"X-Leadline-Tags": "plain,other", "X-Session-Id": "s1", "X-Leadline-Scope": "run1"}
        )
        await gateway.chat({**ask(model="explored"), "max_tokens": 7, "response_format": {"type": "json_object"}})
        await gateway.chat(ask(model="explored"), **{"X-Leadline-Max-Cost": "0.01"})
        await gateway.chat(ask(model="cheap"))
        rows = await gateway.rows()
        engine = gateway.app.state.lifecycle.ledger.engine
        again = 0
        for listed in rows:
            found = report.request(engine, listed["id"])
            assert found is not None
            decision = decision_of(found[0]["decision"])
            asked = facts.read(found[0], "probe")
            assert decision is not None
            if decision.route == "named":
                assert asked is None
                continue
            assert asked is not None
            assert decide(*asked[:2], gateway.app.policy, asked[2], decision.seed) == decision
            again += 1
        assert again == len(rows) - 1
        assert len({decision_of(row["decision"]).seed for row in rows}) > 20  # type: ignore[union-attr]


def test_all_that_a_decision_reads_of_the_state_is_kept() -> None:
    state = State(
        {"dear": "not available then"}, 5, "local", "it is spent", 7, {"cheap": Load(1, 2)}, "cheap", {"cheap": 0.5},
        "far", {(3, "cheap"): Arm(2.0, 1.0)},
    )  # fmt: skip
    assert all(told != nothing for told, nothing in zip(astuple(state), astuple(State()), strict=True))
    row = dict.fromkeys(("model_requested", "tenant", "endpoint", "session", "scope", "team", "id"), "")
    written = facts.written(Query("auto", "t", 3, None), Signals(), state)
    found = facts.read(row | {"facts": written, "created_at_ms": 7}, "probe")
    assert found is not None
    assert found[2] == state


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--since", "yesterday"], "such as 7d"), (["--since", "1d", "--until", "2d"], "not before --until")],
)
def test_a_span_that_is_none_is_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(policy("http://127.0.0.1:9/v1", ALWAYS.replace("MODEL", "dear")))
    done = CliRunner().invoke(app, ["replay", str(file), *arguments], env={"LEADLINE_HOME": str(tmp_path)})
    assert done.exit_code == 2
    assert words in done.output
