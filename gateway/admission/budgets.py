"""Hard budgets: reserve the most a call can cost before it runs, settle to what it did cost after.

`reserve` runs on the event loop without an await, so check and reservation are one step: reserved plus
spent never exceeds a limit, at any concurrency. Windows are calendar windows in UTC.
"""

import asyncio
import datetime as dt
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from gateway.errors import BudgetExceeded
from routers.units import Window, format_money

MAX_LOADED = 20_000

SpentSince = Callable[[str, int], Awaitable[int]]
"""(scope, milliseconds since the epoch) -> nano-dollars spent by that scope since then, from the ledger."""


def window_start_ms(window: Window, now_ms: int) -> int:
    """Start of the calendar window (UTC; weeks start on Monday) that contains `now_ms`."""
    if window == "total":
        return 0
    now = dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
    start = now.replace(minute=0, second=0, microsecond=0)
    if window != "hour":
        start = start.replace(hour=0)
    if window == "week":
        start -= dt.timedelta(days=start.weekday())
    if window == "month":
        start = start.replace(day=1)
    return int(start.timestamp() * 1000)


@dataclass(slots=True, weakref_slot=True)
class Budget:
    """One limit over one scope (`key:<id>`, `tenant:<name>` or `scope:<name>`)."""

    scope: str
    limit_nanousd: int
    window: Window
    started_ms: int
    spent_nanousd: int
    reserved_nanousd: int = 0

    @property
    def remaining_nanousd(self) -> int:
        return max(0, self.limit_nanousd - self.spent_nanousd - self.reserved_nanousd)


@dataclass(slots=True)
class Hold:
    """What one attempt holds of its caller's budgets. `settle` it exactly once, whatever happened."""

    budgets: tuple[Budget, ...]
    amount_nanousd: int
    settled: bool = False

    def settle(self, cost_nanousd: int) -> None:
        """Give the hold back and book what was spent."""
        if self.settled:
            raise RuntimeError("a hold is settled once")
        self.settled = True
        for budget in self.budgets:
            budget.reserved_nanousd -= self.amount_nanousd
            budget.spent_nanousd += cost_nanousd


def reserve(budgets: tuple[Budget, ...], amount_nanousd: int) -> Hold:
    """Hold `amount_nanousd` of all `budgets`, or of none. Raises BudgetExceeded, naming the budget that is short.

    A call that can cost nothing is always let through: a spent budget does not close a free local model.
    """
    for budget in budgets:
        if amount_nanousd > budget.remaining_nanousd and amount_nanousd > 0:
            raise BudgetExceeded(
                f"Budget of {budget.scope} ({format_money(budget.limit_nanousd)}/{budget.window}): "
                f"{format_money(budget.remaining_nanousd)} left, and this request may cost up to "
                f"{format_money(amount_nanousd)}. Lower max_tokens, choose a cheaper model, or raise the budget."
            )
    for budget in budgets:
        budget.reserved_nanousd += amount_nanousd
    return Hold(budgets, amount_nanousd)


class Budgets:
    """All budgets of the process, each loaded from the ledger when first met."""

    def __init__(self, spent_since: SpentSince) -> None:
        self._spent_since = spent_since
        self._budgets: OrderedDict[tuple[str, Window], Budget] = OrderedDict()
        # Whoever has found a budget keeps it alive, and then nobody may load a second one of the same scope.
        self._alive: WeakValueDictionary[tuple[str, Window], Budget] = WeakValueDictionary()
        self._loading = asyncio.Lock()

    async def find(self, limits: Iterable[tuple[str, int, Window]], now_ms: int) -> tuple[Budget, ...]:
        """The budgets for (scope, limit in nano-dollars, window) triples, in their current windows."""
        found = []
        for scope, limit, window in limits:
            budget = self._alive.get((scope, window))
            if budget is None:
                budget = await self._load(scope, limit, window, now_ms)
            self._budgets[scope, window] = budget
            self._budgets.move_to_end((scope, window))
            budget.limit_nanousd = limit
            start = window_start_ms(window, now_ms)
            if start > budget.started_ms:
                # What is in flight across the boundary stays reserved and settles into the new window.
                budget.started_ms = start
                budget.spent_nanousd = 0
            found.append(budget)
        return tuple(found)

    def limit_of(self, scope: str, window: Window) -> int | None:
        """The limit in nano-dollars that a scope has been given lately; None when it has none."""
        budget = self._alive.get((scope, window))
        return budget.limit_nanousd if budget is not None else None

    def all(self) -> list[Budget]:
        return list(self._budgets.values())

    async def _load(self, scope: str, limit: int, window: Window, now_ms: int) -> Budget:
        async with self._loading:
            budget = self._alive.get((scope, window))
            if budget is None:
                start = window_start_ms(window, now_ms)
                spent = await self._spent_since(scope, start)
                budget = self._alive[scope, window] = Budget(scope, limit, window, start, spent)
                if len(self._budgets) >= MAX_LOADED:
                    self._forget_idle()
        return budget

    def _forget_idle(self) -> None:
        """Drop the budgets longest unused that hold no reservation; the ledger knows what they had spent."""
        for key in [key for key, budget in self._budgets.items() if budget.reserved_nanousd == 0][: MAX_LOADED // 10]:
            del self._budgets[key]
