"""How many tokens to draft: as many as make the most tokens per second, and none where plain decoding is faster.

SmartSpec's goodput (Liu et al. 2024, arXiv 2406.14066): E[accepted + 1] / t(rows). One length serves all sequences of a
step: windows of one length are attended to together, and on CPU a step over windows of two lengths in turn took longer
than one in which all had the longer (batch 8, drafts of 0 and 4: 4.6 ms; all of 4: 4.3 ms).

What speculation may lose is bounded, not hoped for. Every speculative step is charged what it took longer than plain
decoding of the same tokens, or credited; where the losses outrun a small share of the time, speculation pauses until
time has paid for them. Wrong estimates can then cost that share and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from local_engine.spec.steptime import StepTime

LOSS_SHARE = 0.0075
"""Most that speculation may lose, as a share of all time."""
_LOSS_STEPS = 24.0  # and what it may be in debt at any moment, in plain steps of the running batch
_READ_STEPS = 12.0  # and beyond that, for what a drafter that begins had to read: it has not drafted yet
_PAID_STEPS = 8.0  # once it owes more, speculation pauses until it owes no more than this
_BANKED_STEPS = 16.0  # of what it gained, this pays for later losses: above all, when a drafter reads the next prompt
_LEAST_GAIN = 0.05  # a draft that promises less is not made: what it promises is known no better than that


@dataclass(frozen=True, slots=True)
class Offer:
    """A draft length, and what it is expected to bring."""

    length: int
    token_s: float
    """Seconds per token of the whole batch."""


class Goodput:
    """Draft lengths for one model. Pure arithmetic: times come in as numbers."""

    def __init__(self, step_time: StepTime) -> None:
        self._step_time = step_time
        self._loss_s: dict[int, float] = {}  # by doublings of the running sequences
        self._read_s: dict[int, float] = {}  # by drafters since the last pause, likewise
        self._pausing: set[int] = set()  # likewise

    def owed_s(self, sequences: int) -> float:
        """For how long speculation has to pause, beside so many running sequences; zero while it need not."""
        bucket, plain_s = sequences.bit_length(), self._step_time(sequences, sequences)
        loss_s = self._loss_s.get(bucket, 0.0)
        if loss_s > _LOSS_STEPS * plain_s + min(self._read_s.get(bucket, 0.0), _READ_STEPS * plain_s):
            self._pausing.add(bucket)
            self._read_s[bucket] = 0.0
        elif loss_s <= _PAID_STEPS * plain_s:
            self._pausing.discard(bucket)
        return (loss_s - _PAID_STEPS * plain_s) / LOSS_SHARE if bucket in self._pausing else 0.0

    def best(self, kept: Sequence[float], sequences: int, other_rows: int = 0, pass_s: float = 0.0) -> Offer:
        """The length with the most tokens per second, where `kept[n]` tokens are expected of all sequences together
        with drafts of n tokens, and drafting one token for each of them takes `pass_s`.

        `other_rows` are prompt chunks in the same step. Beside them a token is worth the time it takes without them,
        no more: that of the prompts is spent in any case.
        """
        rows = [sequences * (1 + length) for length in range(len(kept))]
        alone = [self._step_time(count, sequences) + pass_s * at for at, count in enumerate(rows)]
        best = max(range(len(kept)), key=lambda at: kept[at] / alone[at])
        if kept[best] / alone[best] < (1 + _LEAST_GAIN) * kept[0] / alone[0]:
            best = 0
        token_s = alone[best] / kept[best]
        if other_rows:
            mixed = [self._step_time(other_rows + count, sequences) + pass_s * at for at, count in enumerate(rows)]
            best = max(range(len(kept)), key=lambda at: kept[at] * token_s - mixed[at])
        return Offer(best, token_s)

    def read(self, seconds: float, sequences: int) -> None:
        """Of what speculation spends, so much went into reading texts."""
        bucket = sequences.bit_length()
        self._read_s[bucket] = self._read_s.get(bucket, 0.0) + seconds

    def rest(self, seconds: float, sequences: int) -> None:
        """Account for so much time, in which nobody drafted: it pays for losses."""
        loss_s = self._loss_s.get(sequences.bit_length(), 0.0)
        self._loss_s[sequences.bit_length()] = max(min(loss_s, 0.0), loss_s - LOSS_SHARE * seconds)

    def settle(
        self,
        seconds: float,
        sequences: int,
        emitted: int,
        verified: int,
        other_rows: int = 0,
        drafting_s: float = 0.0,
        *,
        running: int | None = None,
    ) -> float:
        """Account for a step of `seconds` in which `sequences` got `emitted` tokens together, `verified` drafted ones
        among its rows, after `drafting_s` of looking for drafts: the seconds it lost, negative where it gained.

        Steps are charged by what they usually take, not by this one's seconds: a busy machine is no loss. `running`:
        the sequences that drafts were thought of for, where some of them got nothing.
        """
        running = running or sequences
        self.rest(seconds, running)
        if not sequences:
            return 0.0
        prompts_s = self._step_time(other_rows, sequences) if other_rows else 0.0
        plain_s = self._step_time(other_rows + sequences, sequences) - prompts_s
        step_s = self._step_time(other_rows + sequences + verified, sequences) - prompts_s
        lost_s = drafting_s + step_s - plain_s * emitted / sequences
        loss_s = self._loss_s[running.bit_length()]
        self._loss_s[running.bit_length()] = max(-_BANKED_STEPS * plain_s, loss_s + lost_s)
        return lost_s


def expected(chances: Sequence[Sequence[float]], most: int) -> list[float]:
    """Tokens of all sequences together with drafts of 0, 1, … `most` tokens, by each token's chance to be kept."""
    gains = [sum(draft[at] for draft in chances if len(draft) > at) for at in range(most)]
    kept = [float(len(chances))]
    for gain in gains:
        kept.append(kept[-1] + gain)
    return kept
