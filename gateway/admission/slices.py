"""What one worker holds of one shared budget: what its requests use, and a slice beside that for the next ones.

A worker that keeps a slice reserves in memory; SQL counts the slice as reserved, so no other worker can spend it. One
that keeps none is *exact*: what its requests use is what SQL holds, up to corrections that are under way. It is exact
while little is left of the budget, and for a while after another worker has recalled what is unused.
"""

from dataclasses import dataclass

from gateway.admission.budgets import Budget
from gateway.admission.limits import BudgetLimit
from gateway.ledger.budget_rows import Key, Row

SHARE = 16
"""All slices of a budget together are at most one part in so many of what is left of it."""
LEAST_CALLS = 8
"""No slice is kept that could not hold so many of the dearest calls: near its end a budget is exact."""
PEAKS = 4
"""A slice holds so many times what the worker's requests have lately used at once."""
EXACT_S = 2.0
"""How long a worker keeps no slice of a budget after a recall."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Slice:
    """Owned by the event loop, but for the last four, which the writers of SQL change under their lock."""

    key: Key
    budget: Budget
    """As last seen in SQL, and what this worker has done since."""
    free: int = 0
    """Held in SQL, used by no request, and in no order to the writer."""
    in_use: int = 0
    """Held by requests that are not yet in the ledger."""
    keeps: bool = False
    """Whether what calls give back stays here: not while it is exact."""
    asked: int = 0
    """Orders under way that may add to it."""
    size: int = 0
    """What was held to be right for it when it was last filled."""
    peak: int = 0
    """The most in use at once, lately."""
    largest: int = 0
    """The dearest call, lately."""
    limit_nanousd: int = 0
    """The lowest limit that this worker's newest requests know."""
    seen_s: float = -1e9
    """When `budget` was read."""
    used_s: float = 0.0
    told: int = 0
    """What SQL says is unused of it: not 0 while it is kept."""
    recalls: int = 0
    """Those that it knows of. Whoever meets a budget that has ever been recalled is exact: it may be so just now."""
    exact_until_s: float = 0.0
    given_up: int = -1
    """What all workers together had unused when a recall was last given up."""

    @property
    def divisible(self) -> bool:
        """Runs are many and short: they are exact."""
        return not self.key[0].startswith("scope:")

    @property
    def want(self) -> int:
        return max(LEAST_CALLS * self.largest, PEAKS * self.peak)

    def show(self, row: Row, read_at_s: float) -> None:
        """What others keep unused does not count as reserved: it can be recalled."""
        budget = self.budget
        others = max(0, row.spare_nanousd - self.told)
        budget.started_ms, budget.spent_nanousd, budget.given_nanousd = (
            row.started_ms, row.spent_nanousd, row.given_nanousd,
        )  # fmt: skip
        budget.reserved_nanousd = max(0, row.reserved_nanousd - others - max(0, self.free))
        self.seen_s = read_at_s

    def follow(self, limit: BudgetLimit) -> bool:
        """As `Budget.follow`."""
        if not self.budget.follow(limit):
            return False
        self.limit_nanousd = self.budget.limit_nanousd
        return True

    def take(self, amount_nanousd: int) -> None:
        """For one call, out of what is free."""
        self.free -= amount_nanousd
        self.budget.reserved_nanousd += amount_nanousd
        self.use(amount_nanousd)

    def use(self, amount_nanousd: int) -> None:
        self.in_use += amount_nanousd
        self.peak = max(self.peak, self.in_use)
        self.largest = max(self.largest, amount_nanousd)

    def give_back(self, amount_nanousd: int) -> None:
        """Of what a call has held."""
        self.in_use -= amount_nanousd
        self.free += amount_nanousd
        self.budget.reserved_nanousd -= amount_nanousd

    def fits(self, row: Row, limit_nanousd: int, workers: int) -> int:
        """How much of it may be unused, as the budget stands; 0: it must be exact."""
        left = limit_nanousd - row.spent_nanousd - row.reserved_nanousd
        share = left // (SHARE * max(1, workers))
        return min(self.want, share) if share >= LEAST_CALLS * self.largest > 0 else 0

    def tight(self, row: Row, workers: int) -> bool:
        """Whether so little is left that what is unused must go back."""
        left = self.limit_nanousd - row.spent_nanousd - row.reserved_nanousd
        return left // (SHARE * max(1, workers)) < LEAST_CALLS * self.largest // 2

    def decay(self) -> None:
        """Lately ends: called at each heartbeat."""
        self.peak = max(self.in_use, self.peak * 3 // 4)
        self.largest = self.largest * 3 // 4

    def heard(self, row: Row, now_s: float) -> None:
        """For the writers: a recall that this worker has not heard of makes it exact."""
        if row.recalls > self.recalls:
            self.exact_until_s = now_s + EXACT_S
        self.recalls = row.recalls
        if row.spare_nanousd != self.given_up:
            self.given_up = -1
