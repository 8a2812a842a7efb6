"""How many tokens to draft: as many as make the most tokens per second, and none where plain decoding is faster.

SmartSpec's goodput (Liu et al. 2024, arXiv 2406.14066), E[accepted + 1] / t(rows), with two changes. Lengths are set
for each sequence: drafted tokens join the step in the order of their chance to be kept, for as long as they raise the
goodput. And what speculation may lose is bounded, not hoped for: every speculative step is charged what it took longer
than plain decoding of the same tokens, or credited; where the losses outrun a small share of the time, speculation
pauses until time has paid for them. Wrong estimates can then cost that share and no more.
"""

from collections.abc import Sequence
from itertools import accumulate

from local_engine.spec.steptime import StepTime

LOSS_SHARE = 0.015
"""Most that speculation may lose, as a share of all time."""
_LOSS_STEPS = 6.0  # and what it may be in debt at any moment, in plain steps of the running batch


class Goodput:
    """Lengths of drafts for one model. Pure arithmetic: times come in as numbers."""

    def __init__(self, step_time: StepTime) -> None:
        self._step_time = step_time
        self._loss_s = 0.0

    def paused(self, sequences: int) -> bool:
        """Whether speculation has lost more than it may, beside so many running sequences."""
        return self._loss_s > _LOSS_STEPS * self._step_time(sequences)

    def lengths(self, chances: Sequence[Sequence[float]], other_rows: int = 0) -> list[int]:
        """How much of each draft to verify, given each token's chance to be kept; `other_rows` are prompt chunks.

        Optimal for any t(rows): chances fall within a draft, so the best n tokens of all are a prefix of each draft.
        """
        plain = len(chances)
        lengths = [0] * plain
        order = sorted(((chance, at) for at, draft in enumerate(chances) for chance in draft), reverse=True)
        kept = list(accumulate((chance for chance, _ in order), initial=float(plain)))
        rows = range(plain, plain + len(order) + 1)
        for _, at in order[: self._best(kept, rows, other_rows)]:
            lengths[at] += 1
        return lengths

    def depth(self, rate: float, sequences: int, pass_s: float, most: int, other_rows: int = 0) -> int:
        """How many passes of a drafting model to make, `pass_s` seconds each for all sequences together, where a
        drafted token is right at `rate` after right ones. 0: not worth it."""
        kept = [sequences * sum(rate**at for at in range(depth + 1)) for depth in range(most + 1)]
        return self._best(kept, range(sequences, sequences * (most + 1) + 1, sequences), other_rows, pass_s)

    def _best(self, kept: Sequence[float], rows: Sequence[int], other_rows: int, each_s: float = 0.0) -> int:
        """Which of several steps to take: the one with the most tokens per second.

        Beside prompts the time of a token is what it would be without them: their time has to be spent in any case, and
        a long step is no reason to verify what is hardly ever right.
        """
        pure = [self._step_time(count) + each_s * at for at, count in enumerate(rows)]
        best = max(range(len(kept)), key=lambda at: kept[at] / pure[at])
        if not other_rows:
            return best
        token_s = pure[best] / kept[best]
        mixed = [self._step_time(other_rows + count) + each_s * at for at, count in enumerate(rows)]
        return max(range(len(kept)), key=lambda at: kept[at] * token_s - mixed[at])

    def settle(self, seconds: float, sequences: int, emitted: int, other_rows: int = 0, *, drafted: bool) -> None:
        """Account for a step of `seconds`, drafting included, in which `sequences` got `emitted` tokens together."""
        self._loss_s = max(0.0, self._loss_s - LOSS_SHARE * seconds)
        if drafted and sequences:
            prompts_s = self._step_time(other_rows) if other_rows else 0.0
            plain_s = self._step_time(other_rows + sequences) - prompts_s
            self._loss_s = max(0.0, self._loss_s + (seconds - prompts_s) - plain_s * emitted / sequences)
