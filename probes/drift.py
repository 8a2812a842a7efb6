"""Does a probe still mean what it says? A sequential test on (probability, outcome) pairs, as they come. Pure Python.

The null hypothesis: whatever came before, an answer of probability p is right with a chance within `tolerance` of p.
Testing by betting (Waudby-Smith and Ramdas, arXiv 2010.09686): each bettor stakes on "right more often than that" or
"less often", in one band of p, with one size of stake, so that its wealth cannot be expected to grow while the null
holds. As calibration may break at any time, a bettor's money is not staked at once: the part 1/(t (t + 1)) joins at
observation t, so that what was lost in good times is not missed later. The mean wealth of all exceeds 1 / delta with a
chance of at most delta over the whole life of the test (Ville, 1939), however often one looks.

The same test watches inputs without labels: with the share of a certificate that goes to the weak model as p, and
whether a query did as the outcome.
"""

from dataclasses import dataclass
from itertools import product

BANDS = ((0.0, 1.0), (0.0, 0.5), (0.5, 0.8), (0.8, 1.0))
"""Of p; the first holds all. The upper end belongs to the band above, 1.0 to the last."""
STAKES = (0.3, 1.0)
"""Of what may be won or lost per unit of surprise; at most 1, so that no wealth is below zero."""
_CEILING = 1e100


@dataclass(frozen=True, slots=True)
class _Bettor:
    band: tuple[float, float]
    direction: int
    """1: right more often than p says; -1: less often."""
    stake: float

    def factor(self, p: float, outcome: float, tolerance: float) -> float:
        """What its wealth is multiplied by; 1 where p is not in its band."""
        low, high = self.band
        if not (low <= p < high or p == high == 1.0):
            return 1.0
        bound = min(1.0, max(0.0, p + self.direction * tolerance))
        return 1.0 + self.stake * self.direction * (outcome - bound)


BETTORS = tuple(_Bettor(*each) for each in product(BANDS, (1, -1), STAKES))


class DriftAlarm:
    """Watches one head. After a restart it is shown again what the ledger holds."""

    def __init__(self, delta: float = 0.01, tolerance: float = 0.05) -> None:
        """`delta`: the chance of ever raising a false alarm; `tolerance`: how far off calibration may be."""
        if not 0 < delta < 1:
            raise ValueError(f"delta {delta!r} is no chance of a false alarm: give a number between 0 and 1")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance {tolerance!r} is no difference of probabilities: give 0 to 1, such as 0.05")
        self.delta, self.tolerance = delta, tolerance
        self.n = 0
        self.alarmed_at: int | None = None
        """The observation that raised the alarm; it stays raised, until the artifact is another."""
        self._wealth = [0.0] * len(BETTORS)
        self._cause = ""

    def see(self, p: float, outcome: float) -> bool:
        """Take in one pair, both in [0, 1]; True where this very pair raises the alarm."""
        if not (0 <= p <= 1 and 0 <= outcome <= 1):
            raise ValueError(f"p {p!r} and outcome {outcome!r} must lie in [0, 1]")
        self.n += 1
        joins = 1.0 / (self.n * (self.n + 1))
        for i, bettor in enumerate(BETTORS):
            grown = (self._wealth[i] + joins) * bettor.factor(p, outcome, self.tolerance)
            self._wealth[i] = min(grown, _CEILING)
        if self.alarmed_at is not None or self.evidence < 1 / self.delta:
            return False
        self.alarmed_at, self._cause = self.n, self._richest()
        return True

    @property
    def evidence(self) -> float:
        """An e-value: how many times its money a fair game would have returned to who bet on drift."""
        waiting = 1.0 / (self.n + 1)
        return sum(self._wealth) / len(BETTORS) + waiting

    @property
    def cause(self) -> str:
        """What is wrong, in words; empty while nothing is."""
        return self._cause

    def _richest(self) -> str:
        bettor = BETTORS[max(range(len(BETTORS)), key=self._wealth.__getitem__)]
        often = "more" if bettor.direction > 0 else "less"
        low, high = bettor.band
        return f"answers of P {low:g} to {high:g} are right {often} often than {self.tolerance:g} around what it says"
