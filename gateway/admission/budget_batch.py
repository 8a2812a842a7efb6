"""One transaction over shared budgets: the orders that go in together, and what each of them changes of the rows.

No database here: the rows are locked, read and written by `gateway.admission.budget_writer`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gateway.admission.shared_account import Fill, Look, Move, Order, Take
from gateway.admission.slices import Slice
from gateway.ledger import budget_rows
from gateway.ledger.budget_rows import HoldRow, Key, Row


@dataclass(slots=True)
class Batch:
    """Orders that go to SQL together, and what came of them."""

    number: int
    orders: list[Order]
    rows: dict[Key, Row] = field(default_factory=dict)
    read_at_s: float = 0.0
    filled: dict[Key, tuple[int, int, int]] = field(default_factory=dict)
    """(added, size, limit that allowed it) of the slices that were filled; size 0: it must be exact."""
    waiting: list[Take] = field(default_factory=list)
    """Of its orders, those that wait for a recall: they are neither done nor refused."""
    in_sql: bool = False
    in_doubt: bool = False
    """Its commit was not answered, and its requests were told so."""
    recalled: set[Key] = field(default_factory=set)

    @property
    def scopes(self) -> set[str]:
        return {scope for order in self.orders for scope, _ in keys_of(order)}


def keys_of(order: Order) -> Iterable[Key]:
    if isinstance(order, Move | Fill):
        return (order.slice.key,)
    return order.account.limits


class Changes:
    """Locked budgets, and this worker's holds on them, as a transaction changes them."""

    def __init__(self, budgets: dict[Key, Row], holds: dict[Key, HoldRow], life: str, batch: int) -> None:
        self.budgets = budgets
        self._holds = holds
        self._life, self._batch = life, batch
        self._changed: set[Key] = set()
        self._held: set[Key] = set()

    @property
    def rows(self) -> list[Row]:
        return [self.budgets[key] for key in sorted(self._changed)]

    @property
    def holds(self) -> list[HoldRow]:
        return [self._holds[key] for key in sorted(self._held)]

    def move(self, order: Move) -> None:
        row, hold = self._both(order.slice.key)
        if order.amount > 0:
            budget_rows.release(row, hold, order.amount)
        else:
            row.reserved_nanousd -= order.amount
            hold.amount_nanousd -= order.amount
        if order.last:
            budget_rows.set_spare(row, hold, 0)

    def take(self, order: Take) -> None:
        for one in order.account.slices:
            self._hold(one.key, order.amount - order.own.get(one.key, 0))
        order.fate = "granted"

    def put_back(self, order: Take) -> None:
        """It does not fit, or not yet: what the worker has put in is for whoever comes next."""
        for key, amount in order.own.items():
            budget_rows.release(*self._both(key), amount)
        order.fate = "short"

    def fill(self, key: Key, added: int, spare: int) -> None:
        self._hold(key, added)
        budget_rows.set_spare(*self._both(key), max(1, spare))

    def give(self, look: Look) -> None:
        for key, limit in look.account.limits.items():
            if limit.given_nanousd is not None:
                self.budgets[key].given_nanousd = limit.given_nanousd
                self._changed.add(key)

    def recall(self, key: Key) -> None:
        self.budgets[key].recalls += 1
        self._changed.add(key)

    def _hold(self, key: Key, amount: int) -> None:
        row, hold = self._both(key)
        row.reserved_nanousd += amount
        hold.amount_nanousd += amount

    def _both(self, key: Key) -> tuple[Row, HoldRow]:
        hold = self._holds.setdefault(key, HoldRow(self._life, *key))
        hold.batch = self._batch
        self._changed.add(key)
        self._held.add(key)
        return self.budgets[key], hold


def slices_of(order: Order) -> Sequence[Slice]:
    return (order.slice,) if isinstance(order, Move | Fill) else order.account.slices


def moves_first(order: Order) -> tuple[bool, bool]:
    """What is given back comes before what is asked: nobody is refused what another one frees in the same batch."""
    return not isinstance(order, Move), isinstance(order, Move) and order.amount < 0


def short_of(rows: dict[Key, Row], take: Take) -> list[Key]:
    """The budgets that have not enough left."""
    short = []
    for one in take.account.slices:
        row, limit = rows[one.key], take.account.limits[one.key]
        bounds = [b for b in (limit.nanousd, row.given_nanousd) if b is not None]
        need = take.amount - take.own.get(one.key, 0)
        if need > 0 and need > min(bounds) - row.spent_nanousd - row.reserved_nanousd:
            short.append(one.key)
    return short


def late_of(rows: dict[Key, Row], orders: Sequence[Order]) -> dict[Key, int]:
    """Budgets to be made, or moved to a new window, before these orders can be done."""
    late: dict[Key, int] = {}
    for order in orders:
        if not isinstance(order, Look | Take):
            continue
        for key, limit in order.account.limits.items():
            row = rows.get(key)
            begins = order.account.starts[key]
            if row is None and limit.nanousd is None and limit.given_nanousd is None:
                continue  # a run that nobody has given a budget
            if (row is None or row.started_ms < begins) and begins >= late.get(key, 0):
                late[key] = begins
    return late


def gives(rows: dict[Key, Row], look: Look) -> bool:
    """Whether a request gives its run another budget than it has."""
    return any(
        limit.given_nanousd is not None and limit.given_nanousd != rows[key].given_nanousd
        for key, limit in look.account.limits.items()
    )
