"""What one request holds of budgets that many workers share, and what it asks of the thread that reserves them.

What a request holds in SQL is what its settled attempts cost and its running ones may; it is given back when its row is
in the ledger, in the same transaction (`gateway.admission.shared_budgets`).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.admission.budgets import Budget, exceeded, window_start_ms
from gateway.admission.limits import BudgetLimit
from gateway.ledger.budget_rows import Key


class Desk(Protocol):
    """Takes claims to SQL, in batches."""

    async def reserve(self, claim: "Claim") -> Key | None:
        """The budget that was short, or None: held. Raises Unavailable."""
        ...

    def put(self, claim: "Claim") -> None:
        """For the next batch, without waiting."""
        ...


class SharedAccount:
    """The shared budgets that one request draws on."""

    def __init__(self, owner: "Desk", request_id: str, limits: Sequence[BudgetLimit], now_ms: int) -> None:
        self.request_id = request_id
        self.limits = {(limit.scope, limit.window): limit for limit in limits}
        self.starts = {key: window_start_ms(key[1], now_ms) for key in self.limits}
        self.budgets: tuple[Budget, ...] = ()
        self.keys: tuple[Key, ...] = ()
        """Of `limits`, those that bound something."""
        self.held_nanousd = 0
        """What SQL holds for this request, of each budget: changed under the owner's lock only."""
        self.closed = False
        """Its row is in the ledger, and nothing is held any more."""
        self._owner = owner
        self._in_use = 0
        self._asked = 0

    async def reserve(self, amount_nanousd: int) -> "SharedHold":
        """As `Account.reserve`: waits for one batch of this worker, at most WAIT_S."""
        if amount_nanousd == 0 or not self.keys:
            return SharedHold(self, 0)
        self._in_use += amount_nanousd
        need = self._in_use - self._asked
        if need > 0:
            self._asked += need
            claim = Claim(self, need)
            try:
                short = await self._owner.reserve(claim)
                if short is not None:
                    raise exceeded(next(b for b in self.budgets if (b.scope, b.window) == short), amount_nanousd)
            except BaseException:
                self._in_use -= amount_nanousd
                if claim.answered:
                    self.rebalance()
                raise
        return SharedHold(self, amount_nanousd)

    def settle(self, amount_nanousd: int, cost_nanousd: int) -> None:
        self._in_use += cost_nanousd - amount_nanousd
        for budget in self.budgets:  # until SQL is read again
            budget.reserved_nanousd -= amount_nanousd
            budget.spent_nanousd += cost_nanousd
        self.rebalance()

    def rebalance(self) -> None:
        """Have SQL hold what is in use: no more, and no less."""
        delta = self._in_use - self._asked
        if delta and not self.closed:
            self._asked += delta
            self._owner.put(Claim(self, delta, checked=False))

    def answered(self, amount_nanousd: int, *, granted: bool) -> None:
        """A reservation's batch is through. Whoever asked may be gone by now."""
        if granted:
            self.rebalance()
        else:
            self._asked -= amount_nanousd

    def granted_late(self, amount_nanousd: int) -> None:
        """A batch that was thought lost is in."""
        self._asked += amount_nanousd
        self.rebalance()

    def abandon(self) -> None:
        self._in_use = 0
        self.rebalance()


@dataclass(slots=True)
class SharedHold:
    """A reservation in SQL."""

    account: SharedAccount
    amount_nanousd: int
    settled: bool = False

    def settle(self, cost_nanousd: int) -> None:
        if self.settled:
            raise RuntimeError("a hold is settled once")
        self.settled = True
        if self.account.keys:
            self.account.settle(self.amount_nanousd, cost_nanousd)


class Claim:
    """One thing to do in the next batch: hold more, if it fits; hold more or less in any case; or only look."""

    __slots__ = ("account", "amount", "answered", "cancelled", "checked", "done", "granted", "short")

    def __init__(self, account: SharedAccount, amount: int = 0, *, checked: bool = True) -> None:
        self.account = account
        self.amount = amount
        """0: look."""
        self.checked = checked
        self.cancelled = False
        self.answered = False
        self.granted = False
        self.short: Key | None = None
        self.done: asyncio.Future[Key | None] | None = None
