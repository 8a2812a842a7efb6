"""Hard budgets: reserve the most a call can cost before it runs, settle to what it did cost after.

In one process check and reservation are one step on the event loop, without an await between them: reserved plus
spent never exceeds a limit, at any concurrency. Workers that share budgets reserve in SQL instead
(`gateway.admission.shared_budgets`), through the same two words: `find` the budgets of a request, `reserve` for each of
its attempts. Windows are calendar windows in UTC.
"""

import asyncio
import datetime as dt
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol
from weakref import WeakValueDictionary

from gateway.admission.limits import BudgetLimit
from gateway.errors import BudgetExceeded
from routers.policy import Degrade, Threshold
from routers.units import Window, format_money

MAX_LOADED = 20_000

SpentSince = Callable[[str, int], Awaitable[int]]
"""(scope, milliseconds since the epoch) -> nano-dollars spent by that scope since then, from the ledger."""


def window_start_ms(window: Window, now_ms: int) -> int:
    """Start of the calendar window (UTC; weeks start on Monday) that contains `now_ms`."""
    return 0 if window == "total" else _window_start_ms(window, now_ms // 3_600_000)


@lru_cache(maxsize=64)
def _window_start_ms(window: Window, hour: int) -> int:
    """`hour` since the epoch: every window begins with one."""
    start = dt.datetime.fromtimestamp(hour * 3600, dt.UTC)
    if window != "hour":
        start = start.replace(hour=0)
    if window == "week":
        start -= dt.timedelta(days=start.weekday())
    if window == "month":
        start = start.replace(day=1)
    return int(start.timestamp() * 1000)


@dataclass(slots=True, weakref_slot=True)
class Budget:
    """One limit over one scope, in its current window."""

    scope: str
    limit_nanousd: int
    window: Window
    started_ms: int
    spent_nanousd: int
    reserved_nanousd: int = 0
    label: str = ""
    at: tuple[Threshold, ...] = ()
    given_nanousd: int | None = None
    """What callers have given this run."""

    @property
    def remaining_nanousd(self) -> int:
        return max(0, self.limit_nanousd - self.spent_nanousd - self.reserved_nanousd)

    def follow(self, limit: BudgetLimit) -> bool:
        """Take over what holds now: a policy, a key or a caller may have changed it. False when nothing bounds it."""
        if limit.given_nanousd is not None:
            self.given_nanousd = limit.given_nanousd
        self.label, self.at = limit.label, limit.at
        if limit.nanousd is None or self.given_nanousd is None:
            bound = limit.nanousd if self.given_nanousd is None else self.given_nanousd
        else:
            bound = min(limit.nanousd, self.given_nanousd)
        self.limit_nanousd = bound or 0
        return bound is not None


class Reservation(Protocol):
    """What one attempt holds of its caller's budgets. `settle` it exactly once, whatever happened."""

    @property
    def amount_nanousd(self) -> int: ...

    def settle(self, cost_nanousd: int) -> None:
        """Give the hold back and book what was spent."""
        ...


class Account(Protocol):
    """The budgets that one request draws on."""

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """As they stand now, or stood when this worker last looked."""
        ...

    async def reserve(self, amount_nanousd: int) -> Reservation:
        """Hold `amount_nanousd` of all budgets, or of none. Raises BudgetExceeded, naming the budget that is short,
        and Unavailable where the budgets are kept elsewhere and cannot be reached."""
        ...


class BudgetKeeper(Protocol):
    """Where the accounts of requests come from."""

    async def find(self, limits: Sequence[BudgetLimit], now_ms: int, request_id: str) -> Account:
        """What bounds one request, in the windows of `now_ms`. Raises Unavailable."""
        ...

    def all(self) -> list[Budget]:
        """The budgets in use, as last seen."""
        ...


@dataclass(slots=True)
class Hold:
    """A reservation in this process."""

    budgets: tuple[Budget, ...]
    amount_nanousd: int
    settled: bool = False

    def settle(self, cost_nanousd: int) -> None:
        if self.settled:
            raise RuntimeError("a hold is settled once")
        self.settled = True
        for budget in self.budgets:
            budget.reserved_nanousd -= self.amount_nanousd
            budget.spent_nanousd += cost_nanousd


@dataclass(slots=True)
class LocalAccount:
    budgets: tuple[Budget, ...]

    async def reserve(self, amount_nanousd: int) -> Hold:
        """Without a turn of the event loop."""
        return reserve(self.budgets, amount_nanousd)


def reserve(budgets: tuple[Budget, ...], amount_nanousd: int) -> Hold:
    """Hold `amount_nanousd` of all `budgets`, or of none. Raises BudgetExceeded.

    A call that can cost nothing is always let through: a spent budget does not close a free local model.
    """
    for budget in budgets:
        if amount_nanousd > budget.remaining_nanousd and amount_nanousd > 0:
            raise exceeded(budget, amount_nanousd)
    for budget in budgets:
        budget.reserved_nanousd += amount_nanousd
    return Hold(budgets, amount_nanousd)


def exceeded(budget: Budget, amount_nanousd: int) -> BudgetExceeded:
    return BudgetExceeded(
        f"Budget of {budget.label or budget.scope} ({format_money(budget.limit_nanousd)}/{budget.window}): "
        f"{format_money(budget.remaining_nanousd)} left, and this request may cost up to "
        f"{format_money(amount_nanousd)}. Lower max_tokens, choose a cheaper model, or raise the budget."
    )


def refusal(budget: Budget, why: str) -> str:
    """What a caller is told whose request no model can run within `budget`, the tightest of its budgets."""
    return (
        f"Budget of {budget.label or budget.scope} ({format_money(budget.limit_nanousd)}/{budget.window}): {why}. "
        "Lower max_tokens, choose a cheaper model, or raise the budget."
    )


def tightest(budgets: Sequence[Budget]) -> Budget | None:
    """The budget with the least left; None without budgets."""
    if len(budgets) < 2:
        return budgets[0] if budgets else None
    return min(budgets, key=_remaining)


def _remaining(budget: Budget) -> int:
    return budget.remaining_nanousd


def degrade(budgets: Sequence[Budget]) -> tuple[Degrade, str] | None:
    """What the thresholds that these budgets have passed turn routing to, and which one says so.

    Of several, `local` goes before `cheaper`, then the fuller budget. Reserved money counts as used.
    """
    worst: tuple[bool, int, Degrade, str] | None = None
    for budget in budgets:
        if not budget.at:
            continue
        used = budget.spent_nanousd + budget.reserved_nanousd
        percent = used * 100 // budget.limit_nanousd if budget.limit_nanousd else 100
        passed = [threshold for threshold in budget.at if percent >= threshold.percent]
        if passed:
            last = passed[-1]
            limit = f"{format_money(budget.limit_nanousd)}/{budget.window}"
            reason = f"budget of {budget.label} ({limit}) is {percent}% used, {last.action} from {last.percent}%"
            found = (last.action == "local", percent, last.action, reason)
            worst = found if worst is None else max(worst, found)
    return None if worst is None else worst[2:]


class Budgets:
    """All budgets of the process, each loaded from the ledger when first met."""

    def __init__(self, spent_since: SpentSince) -> None:
        self._spent_since = spent_since
        self._budgets: OrderedDict[tuple[str, Window], Budget] = OrderedDict()
        # Whoever has found a budget keeps it alive, and then nobody may load a second one of the same scope.
        self._alive: WeakValueDictionary[tuple[str, Window], Budget] = WeakValueDictionary()
        self._loading = asyncio.Lock()

    async def find(self, limits: Sequence[BudgetLimit], now_ms: int, request_id: str) -> LocalAccount:
        """The account of one request: what bounds it, in the windows of `now_ms`."""
        if not limits:
            return _UNBOUNDED
        found = []
        for limit in limits:
            key = (limit.scope, limit.window)
            budget = self._alive.get(key)
            if budget is None:
                if limit.nanousd is None and limit.given_nanousd is None:
                    continue
                budget = await self._load(limit, now_ms)
            self._budgets[key] = budget
            self._budgets.move_to_end(key)
            start = window_start_ms(limit.window, now_ms)
            if start > budget.started_ms:
                # What is in flight across the boundary stays reserved and settles into the new window.
                budget.started_ms = start
                budget.spent_nanousd = 0
            if budget.follow(limit):
                found.append(budget)
        return LocalAccount(tuple(found))

    def all(self) -> list[Budget]:
        return list(self._budgets.values())

    async def _load(self, limit: BudgetLimit, now_ms: int) -> Budget:
        async with self._loading:
            budget = self._alive.get((limit.scope, limit.window))
            if budget is None:
                start = window_start_ms(limit.window, now_ms)
                spent = await self._spent_since(limit.scope, start)
                budget = self._alive[limit.scope, limit.window] = Budget(limit.scope, 0, limit.window, start, spent)
                if len(self._budgets) >= MAX_LOADED:
                    self._forget_idle()
        return budget

    def _forget_idle(self) -> None:
        """Drop the budgets longest unused that hold no reservation; the ledger knows what they had spent."""
        for key in [key for key, budget in self._budgets.items() if budget.reserved_nanousd == 0][: MAX_LOADED // 10]:
            del self._budgets[key]


_UNBOUNDED = LocalAccount(())
