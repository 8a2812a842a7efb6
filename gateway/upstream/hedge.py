"""How much a route's second attempts may cost: a share of what it spends anyway."""


class HedgeBudget:
    """Exact in nano-dollars: what hedges hold or have cost never exceeds `share` of what the route has spent."""

    def __init__(self, share: float) -> None:
        self.share = share
        """As the policy in force has it."""
        self._spent = 0
        self._extra = 0

    def reserve(self, worst_nanousd: int) -> bool:
        """Whether a hedge that may cost this much may go out now. Hedges that cost nothing always may."""
        if worst_nanousd and self._extra + worst_nanousd > self._spent * self.share:
            return False
        self._extra += worst_nanousd
        return True

    def settle(self, worst_nanousd: int, cost_nanousd: int) -> None:
        """A reserved hedge has ended, and this is what the losing attempt cost."""
        self._extra += cost_nanousd - worst_nanousd

    def spent(self, cost_nanousd: int) -> None:
        """What a request of the route cost, apart from its losing attempt."""
        self._spent += cost_nanousd
