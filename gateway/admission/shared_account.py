"""What one request holds of budgets that many workers share, and the orders by which workers change what SQL holds.

What a request holds is what its settled attempts cost and its running ones may; SQL counts it until the request's row
is in the ledger, and gives it back in the same transaction (`gateway.admission.shared_budgets`).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gateway.admission.budgets import Budget, window_start_ms
from gateway.admission.limits import BudgetLimit
from gateway.admission.slices import Slice
from gateway.ledger.budget_rows import Key


class Desk(Protocol):
    """Where accounts take from and give back to."""

    async def take(self, account: "SharedAccount", amount_nanousd: int) -> None:
        """Hold more of all budgets of the account, or of none. Raises BudgetExceeded and Unavailable."""
        ...

    def give_back(self, slices: Sequence[Slice], amount_nanousd: int) -> None: ...


class SharedAccount:
    """The shared budgets that one request draws on."""

    def __init__(self, owner: Desk, request_id: str, limits: Sequence[BudgetLimit], now_ms: int) -> None:
        self.request_id = request_id
        self.limits = {(limit.scope, limit.window): limit for limit in limits}
        self.starts = {key: window_start_ms(key[1], now_ms) for key in self.limits}
        self.slices: tuple[Slice, ...] = ()
        """Of `limits`, those that bound something."""
        self.budgets: tuple[Budget, ...] = ()
        self.in_use = 0
        """What it holds of each of them: settled by the time that its row goes to the ledger."""
        self._owner = owner

    async def reserve(self, amount_nanousd: int) -> "SharedHold":
        """As `Account.reserve`. In memory where the worker has a slice; else waits for SQL, at most WAIT_S."""
        if amount_nanousd == 0 or not self.slices:
            return SharedHold(self, 0)
        await self._owner.take(self, amount_nanousd)
        self.in_use += amount_nanousd
        return SharedHold(self, amount_nanousd)

    def settle(self, amount_nanousd: int, cost_nanousd: int) -> None:
        self.in_use += cost_nanousd - amount_nanousd
        self._owner.give_back(self.slices, amount_nanousd - cost_nanousd)

    def abandon(self) -> None:
        """Its row will never be in the ledger."""
        self._owner.give_back(self.slices, self.in_use)
        self.in_use = 0


@dataclass(slots=True)
class SharedHold:
    """A reservation: a part of what SQL holds for this worker."""

    account: SharedAccount
    amount_nanousd: int
    settled: bool = False

    def settle(self, cost_nanousd: int) -> None:
        if self.settled:
            raise RuntimeError("a hold is settled once")
        self.settled = True
        if self.account.slices:
            self.account.settle(self.amount_nanousd, cost_nanousd)


@dataclass(slots=True, eq=False)
class Look:
    """Read an account's budgets as they are now, and give its run what its caller gives it."""

    account: SharedAccount
    done: "asyncio.Future[Key | None]"
    cancelled: bool = False
    """Whoever asked has left: it need not be done."""


@dataclass(slots=True, eq=False)
class Take:
    """Hold more of all budgets of an account, if it fits in all."""

    account: SharedAccount
    amount: int
    done: "asyncio.Future[Key | None]"
    own: dict[Key, int]
    """What the worker had unused, and puts in: SQL holds it already."""
    cancelled: bool = False
    fate: Literal["granted", "short", None] = None
    """`short`: SQL does not hold `own` any more. None: nothing was done."""
    short: Key | None = None
    delivered: bool = False
    """Whoever asked has it."""
    recall_until_s: float | None = None
    """It waits for other workers to give back what they do not use."""
    recalled: set[Key] = field(default_factory=set)
    """Of which budgets."""


@dataclass(slots=True, eq=False)
class Move:
    """Hold less of one budget in any case; or more, where a call was dearer than it could be."""

    slice: Slice
    amount: int
    """Positive: given back."""
    last: bool = False
    """Nothing unused stays with this worker."""


@dataclass(slots=True, eq=False)
class Fill:
    """Hold more of one budget for the next calls, as far as it may be."""

    slice: Slice


Order = Look | Take | Move | Fill
