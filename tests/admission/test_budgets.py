"""Budgets in one process: reservations over a tree of runs, thresholds, windows."""

import asyncio
import datetime as dt
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.admission.budgets import Account, Budget, Budgets, Reservation, degrade, tightest
from gateway.admission.limits import BudgetLimit
from gateway.errors import BudgetExceeded
from routers.policy import Threshold

anyio = pytest.mark.anyio

DAY_MS = 86_400_000
NOON = int(dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC).timestamp() * 1000)
RUNS = ("r", "r/a", "r/a/b", "r/c", "q")


class Plain:
    """What one (scope, window) should hold, in plain arithmetic."""

    def __init__(self) -> None:
        self.policy: int | None = None
        self.given: int | None = None
        self.spent = self.reserved = self.day = 0

    @property
    def bound(self) -> int | None:
        return min((b for b in (self.policy, self.given) if b is not None), default=None)


class BudgetMachine(RuleBasedStateMachine):
    """Random calls of one key through its day's budget and its runs, against the plain arithmetic."""

    @initialize(key=st.integers(0, 300), root=st.none() | st.integers(0, 200))
    def start(self, key: int, root: int | None) -> None:
        self.now, self.key, self.root = NOON, key, root
        self.plain: dict[str, Plain] = {}
        self.open: list[tuple[Account, list[Plain]]] = []
        self.running: list[tuple[Reservation, list[Plain]]] = []
        self.serial = 0

        async def nothing_spent(scope: str, start_ms: int) -> int:
            return 0

        self.budgets = Budgets(nothing_spent)

    def run_now(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """To its end without an event loop: none of this may wait."""
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("it waited")

    @rule(run=st.none() | st.sampled_from(RUNS), given=st.none() | st.integers(0, 150))
    def admit(self, run: str | None, given: int | None) -> None:
        limits = [BudgetLimit("key:k", "day", self.key, "key:k")]
        for end in [i for i, c in enumerate(run or "") if c == "/"] + ([len(run)] if run else []):
            assert run is not None
            limits.append(
                BudgetLimit(
                    f"scope:k:{run[:end]}",
                    "total",
                    self.root if "/" not in run[:end] else None,
                    f"run:{run[:end]}",
                    (),
                    given if end == len(run) else None,
                )
            )
        self.serial += 1
        account = self.run_now(self.budgets.find(limits, self.now, f"req_{self.serial}"))
        expected = []
        for limit in limits:
            plain = self.plain.setdefault(limit.scope, Plain())
            plain.policy = limit.nanousd
            plain.given = limit.given_nanousd if limit.given_nanousd is not None else plain.given
            if limit.window == "day" and self.now // DAY_MS > plain.day:
                plain.day, plain.spent = self.now // DAY_MS, 0
            if plain.bound is not None:
                expected.append(plain)
        assert [budget.scope for budget in account.budgets] == [
            limit.scope for limit in limits if self.plain[limit.scope].bound is not None
        ]
        self.open.append((account, expected))

    @rule(at=st.integers(0), amount=st.integers(0, 120))
    def reserve(self, at: int, amount: int) -> None:
        if not self.open:
            return
        account, plains = self.open[at % len(self.open)]
        fits = amount == 0 or all(amount <= max(0, (p.bound or 0) - p.spent - p.reserved) for p in plains)
        try:
            hold = self.run_now(account.reserve(amount))
        except BudgetExceeded:
            assert not fits, "refused although it fitted"
            return
        assert fits, "let through although it did not fit"
        for plain in plains:
            plain.reserved += amount
        self.running.append((hold, plains))

    @rule(at=st.integers(0), share=st.floats(0, 1))
    def settle(self, at: int, share: float) -> None:
        if not self.running:
            return
        hold, plains = self.running.pop(at % len(self.running))
        amount, cost = hold.amount_nanousd, int(hold.amount_nanousd * share)
        hold.settle(cost)
        with pytest.raises(RuntimeError, match="once"):
            hold.settle(cost)
        for plain in plains:
            plain.reserved -= amount
            plain.spent += cost

    @rule(key=st.integers(0, 300), root=st.none() | st.integers(0, 200))
    def policy_changes(self, key: int, root: int | None) -> None:
        self.key, self.root = key, root

    @rule(days=st.integers(0, 2))
    def time_passes(self, days: int) -> None:
        self.now += days * DAY_MS

    @invariant()
    def books_agree(self) -> None:
        for budget in self.budgets.all():
            plain = self.plain[budget.scope]
            assert (budget.spent_nanousd, budget.reserved_nanousd) == (plain.spent, plain.reserved)


TestBudgets = BudgetMachine.TestCase
TestBudgets.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@anyio
async def test_a_budget_starts_from_the_ledger_once_however_many_ask() -> None:
    asked: list[str] = []

    async def spent_since(scope: str, start_ms: int) -> int:
        asked.append(scope)
        await asyncio.sleep(0)
        return 40

    budgets = Budgets(spent_since)
    limit = BudgetLimit("key:k", "total", 100, "key:k")
    accounts = await asyncio.gather(*(budgets.find([limit], 0, f"req_{i}") for i in range(20)))
    assert asked == ["key:k"]
    assert len({id(account.budgets[0]) for account in accounts}) == 1
    await accounts[0].reserve(60)
    with pytest.raises(BudgetExceeded, match=r"key:k \(\$0.0000001/total\): \$0 left"):
        await accounts[1].reserve(1)


def budget(limit: int, used: int, at: tuple[Threshold, ...] = (), label: str = "key:k") -> Budget:
    return Budget("key:k", limit, "month", 0, used // 2, used - used // 2, label, at)


AT = (Threshold(50, "cheaper"), Threshold(80, "local"))


@pytest.mark.parametrize(
    ("used", "action"), [(0, None), (49, None), (50, "cheaper"), (79, "cheaper"), (80, "local"), (100, "local")]
)
def test_thresholds_degrade_by_what_is_spent_or_held(used: int, action: str | None) -> None:
    found = degrade([budget(100, used, AT), budget(1000, used)])
    assert (found and found[0]) == action
    assert found is None or f"is {used}% used" in found[1]


def test_the_harshest_threshold_wins_then_the_fullest_budget() -> None:
    cheaper = (Threshold(10, "cheaper"),)
    found = degrade([budget(100, 99, cheaper, "a"), budget(100, 80, AT, "b"), budget(100, 60, AT, "c")])
    assert found == ("local", "budget of b ($0.0000001/month) is 80% used, local from 80%")
    found = degrade([budget(100, 20, cheaper, "a"), budget(100, 60, AT, "b")])
    assert found is not None
    assert found[1].startswith("budget of b ")
    assert degrade([budget(0, 0, AT)]) == ("local", "budget of key:k ($0/month) is 100% used, local from 80%")


def test_the_tightest_budget_is_the_one_with_the_least_left() -> None:
    wide, narrow = budget(1000, 10), budget(50, 0)
    assert tightest([wide, narrow]) is narrow
    assert tightest([]) is None
