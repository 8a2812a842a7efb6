"""Decides, for each step of a model, who drafts how much, and learns from what came of it."""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass, field

from local_engine.sequence import Sequence
from local_engine.spec.acceptance import Acceptance
from local_engine.spec.draft import NOTHING, UNWEIGHED, Draft, Proposer, Weigh
from local_engine.spec.goodput import Goodput, Offer, expected
from local_engine.spec.rests import MOST_REST, Rests
from local_engine.spec.steptime import StepTime
from local_engine.spec.weigh import Watched, Weigher

_LONGEST = 8  # tokens of a draft
_MOST_ROWS = 96  # drafted tokens in a step; more sequences than this get none
_SAMPLE = 4  # sequences that are looked at first, where looks did not pay: those of a large batch cost more than a step
_LEAST_GAIN = 0.1  # where drafts that are always right would save a smaller share of the time, nobody looks
_TRIAL_STEPS = 256  # a drafting model that does not pay is tried again after so many looks, then twice as many, …
_MOST_TRIAL_STEPS = 4096
_TRIAL_LENGTH = 3
_FIRST_TRIALS = 8  # of a drafter, in a row: its first passes are slow, and the least of them counts
_PASS_RATE = 0.2  # how fast the measured time of a drafting pass is followed, and what free drafts promise
_FREE_LOOKS = 16  # where the drafting model promises more than free drafts use to, they are looked at once in so many

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Look:
    """What was proposed for one sequence in this step: every free draft, for all of them teach."""

    drafts: list[tuple[str, Draft]] = field(default_factory=list)
    verified: Draft = NOTHING


@dataclass(slots=True)
class _Step:
    began: float
    count: int
    """Sequences that write."""
    looked: bool = False
    timed: bool = True
    propose_s: float = 0.0
    """What looking for drafts and learning from them took."""
    drafts: bool = False
    """Whether any were found."""
    writing: int = 0
    """Sequences that a draft was thought of for."""
    written: int = 0
    """Tokens that they wrote."""
    verified: int = 0
    """Drafted tokens of theirs."""


_UNTIMED = _Step(0.0, 0, timed=False)


class Speculator:
    """Drafts for one model. A step is `propose`, verification, `learn` for each sequence, `settle`. One thread only.

    Of the free proposers, whose drafts cost microseconds, every sequence takes the one that promises most; the drafter,
    whose every token costs a forward pass, is asked where that promises more for all of them together. While it does
    so by more than they promised lately, they are hardly looked at: a look costs as much as a pass of a small model.
    """

    def __init__(
        self,
        free: Sized[Proposer] = (),
        drafter: Proposer | None = None,
        *,
        step_time: StepTime | None = None,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`clock`: what a step costs. The processor time of the engine's thread, by default: what else a machine runs
        tells nothing of what a longer draft costs. Where another device computes, time that passes is meant."""
        self._free = list(free)
        self._drafter = drafter
        self._step_time = step_time or StepTime()
        self._goodput = Goodput(self._step_time)
        self._acceptance = Acceptance()
        self._clock = clock
        self._looks: dict[Sequence, _Look | None] = {}
        self._step = _UNTIMED
        self._rests = Rests()
        self._pass_s: dict[int, float] = {}  # seconds of a drafting pass, by doublings of the sequences
        self._free_s: dict[int, float] = {}  # seconds per token that free drafts promised lately, likewise
        self._unfree = 0  # looks since the free proposers were last asked
        self._trials: dict[int, int] = {}  # how often passes were timed, likewise
        self._untried = 0  # looks since the drafter was last asked
        self._trial_steps = _TRIAL_STEPS

    def rests(self, running: int) -> bool:
        """Whether the next step, of so many sequences, is one that speculation has no part in: it is plain decoding."""
        if not self._rests.rests(running):
            return False
        self._step = _Step(self._clock(), running) if self._rests.timed else _UNTIMED
        return True

    def propose(self, sequences: Sized[Sequence], other_rows: int = 0) -> list[Draft]:
        """The draft to verify for each sequence that writes, in a step that does not rest; none where that pays.

        `other_rows`: what else the step computes, prompt chunks above all.
        """
        count = len(sequences)
        self._step = _UNTIMED
        if not 0 < count <= _MOST_ROWS:
            return [NOTHING for _ in sequences]
        self._goodput.rest(self._rests.taken() * self._step_time(count, count), count)
        if not other_rows and not self._step_time.fresh(count):
            self._rests.pause()
            return [NOTHING for _ in sequences]
        if not self._may_look(count):
            return [NOTHING for _ in sequences]
        began = self._clock()
        self._looks = dict.fromkeys(sequences)
        best = self._best(sequences, other_rows)
        drafts = [draft.cut(sequence.room) for sequence, draft in zip(sequences, best, strict=True)]
        for sequence, draft in zip(sequences, drafts, strict=True):
            if draft.tokens:
                self._look(sequence).verified = draft
        asked = self._drafter is not None and not self._untried  # it may have read only, or doubted
        found = asked or any(draft.tokens for draft in drafts)
        self._step = _Step(began, count, looked=True, propose_s=self._clock() - began, drafts=found)
        return drafts

    def _may_look(self, count: int) -> bool:
        """Whether drafts are worth thinking of, told before anybody thinks."""
        plain_s = self._step_time(count, count)
        owed_s = self._goodput.owed_s(count)
        if owed_s > 0:
            self._rests.rest(owed_s / plain_s)
            return False
        if not self._rests.pay:
            most = self._most(count)
            ideal = self._goodput.best([float(count * (1 + length)) for length in range(most + 1)], count)
            if ideal.token_s > (1 - _LEAST_GAIN) * plain_s / count:
                self._rests.rest(MOST_REST)
                return False
        return True

    @staticmethod
    def _most(count: int) -> int:
        """Tokens of a draft, beside so many sequences."""
        return max(1, min(_LONGEST, _MOST_ROWS // count))

    def learn(self, sequence: Sequence, verified: int, written: Sized[int], predictions: Sized[int]) -> None:
        """A sequence was given `written`, now the end of its ids, with `verified` tokens of its draft in the step.

        `predictions[i]`: what the model holds most likely after the first i of them.
        """
        if not self._step.looked or sequence not in self._looks:
            return
        look = self._looks.pop(sequence)
        self._step.writing += 1
        self._step.written += len(written)
        self._step.verified += verified
        if look is None:
            return
        began = self._clock()
        for name, draft in look.drafts:
            # Also drafts that were not verified are judged by the tokens that came, unless they were drawn.
            known = min(len(draft.tokens), len(written) if draft.distributions is None else verified)
            right = next((at for at in range(known) if draft.tokens[at] != written[at]), known)
            self._acceptance.learn(sequence, name, draft.cut(min(known, right + 1)), right)
        start = len(sequence.ids) - len(written)
        if predictions:
            for proposer in self.proposers:
                proposer.observe(sequence, start, look.verified.tokens[:verified], predictions)
        self._step.propose_s += self._clock() - began

    @property
    def learns(self) -> bool:
        """Whether `learn` wants predictions of this step."""
        return self._step.looked and bool(self._free) and not self._unfree

    @property
    def timed(self) -> bool:
        """Whether this step is one to `settle`."""
        return self._step.timed

    def settle(self, rows: int, sequences: int) -> None:
        """The step of `rows` rows of so many sequences, which began with `rests`, is over."""
        step, self._step = self._step, _UNTIMED
        seconds = self._clock() - step.began
        if not step.looked:
            if rows == sequences:
                self._step_time.observe_plain(sequences, seconds)
            return
        others = rows - step.writing - step.verified
        if step.writing:
            spent = max(seconds - step.propose_s, 1e-9)
            self._step_time.observe(rows, spent, step.writing, mixed=others > 0)
        drafting = step.writing, step.written, step.verified
        lost_s = self._goodput.settle(seconds, *drafting, others, step.propose_s, running=step.count)
        cost_steps = step.propose_s / self._step_time(step.count, step.count)
        self._rests.looked(cost_steps, found=step.drafts, gained=lost_s < 0)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended, or was changed by another hand than `propose` and verification."""
        self._looks.pop(sequence, None)
        self._acceptance.forget(sequence)
        for proposer in self.proposers:
            proposer.forget(sequence)

    @property
    def proposers(self) -> list[Proposer]:
        return self._free if self._drafter is None else [*self._free, self._drafter]

    def _look(self, sequence: Sequence) -> _Look:
        look = self._looks[sequence]
        if look is None:
            look = self._looks[sequence] = _Look()
        return look

    def _best(self, sequences: Sized[Sequence], other_rows: int) -> list[Draft]:
        count = len(sequences)
        most = self._most(count)
        rival = Offer(0, self._step_time(count, count) / count)
        drafts = [NOTHING for _ in sequences]
        promised = self._offered(sequences, most, other_rows) if self._drafter is not None else None
        if self._free and not self._leads(promised, count):
            self._unfree = 0
            drafts, rival = self._free_drafts(sequences, most, other_rows)
            self._follow(self._free_s, count, rival.token_s)
        else:
            self._unfree += 1
        if self._drafter is not None:
            by_drafter = self._asked(self._drafter, sequences, most, promised, rival, other_rows)
            if by_drafter is not None:
                return by_drafter
        return drafts

    def _leads(self, promised: Offer | None, count: int) -> bool:
        """Whether the drafter promises more than free drafts did lately, and it is not their turn."""
        usual_s = self._free_s.get(count.bit_length())
        if promised is None or usual_s is None or self._unfree >= _FREE_LOOKS:
            return False
        return bool(promised.length) and promised.token_s < usual_s

    def _offered(self, sequences: Sized[Sequence], most: int, other_rows: int) -> Offer | None:
        """What the drafter promises by how often it was right; None before its pass was timed."""
        count = len(sequences)
        pass_s = self._pass_s.get(count.bit_length())
        if pass_s is None or self._drafter is None:
            return None
        rate = sum(self._acceptance.rate(sequence, self._drafter.name) for sequence in sequences) / count
        chances = [rate**length for length in range(1, most + 1)]
        return self._goodput.best(expected([chances] * count, most), count, other_rows, pass_s)

    def _free_drafts(self, sequences: Sized[Sequence], most: int, other_rows: int) -> tuple[list[Draft], Offer]:
        """The most promising draft for each sequence, and what they promise together.

        Where looks did not pay, some sequences stand for all of them; the others are looked at if those promise much.
        """
        count = len(sequences)
        first = count if self._rests.pay else min(count, _SAMPLE)
        drafts = self._looked_up(sequences[:first], most)
        offer = self._promise(sequences, drafts, most, other_rows)
        if first < count:
            if not offer.length:
                return [NOTHING for _ in sequences], offer
            drafts += self._looked_up(sequences[first:], most)
            offer = self._promise(sequences, drafts, most, other_rows)
        return [draft.cut(offer.length) for _, draft in drafts], offer

    def _promise(
        self, sequences: Sized[Sequence], drafts: Sized[tuple[str, Draft]], most: int, other_rows: int
    ) -> Offer:
        """What drafts for the first of the sequences promise for all of them."""
        pairs = zip(sequences, drafts, strict=False)
        chances = [self._acceptance.chances(sequence, name, draft.grades) for sequence, (name, draft) in pairs]
        scale = len(sequences) / len(drafts)
        kept = [scale * tokens for tokens in expected(chances, most)]
        return self._goodput.best(kept, len(sequences), other_rows)

    def _looked_up(self, sequences: Sized[Sequence], most: int) -> list[tuple[str, Draft]]:
        """The most promising draft for each sequence, and whose it is."""
        for proposer in self._free:
            for sequence, draft in zip(sequences, proposer.propose(sequences, most, UNWEIGHED), strict=True):
                self._look(sequence).drafts.append((proposer.name, draft))
        return [self._most_promising(sequence) for sequence in sequences]

    def _most_promising(self, sequence: Sequence) -> tuple[str, Draft]:
        def promise(named: tuple[str, Draft]) -> float:
            name, draft = named
            return sum(self._acceptance.chances(sequence, name, draft.grades))

        drafts = self._look(sequence).drafts
        if len(drafts) == 1:
            return drafts[0]
        return max(drafts, key=promise, default=("", NOTHING))

    def _asked(
        self,
        drafter: Proposer,
        sequences: Sized[Sequence],
        most: int,
        offer: Offer | None,
        rival: Offer,
        other_rows: int,
    ) -> list[Draft] | None:
        """The drafter's drafts where its `offer` is better than `rival`, or where it is time to try it; else None."""
        count = len(sequences)
        pass_s = self._pass_s.get(count.bit_length())
        self._untried += 1
        trials = self._trials.get(count.bit_length(), 0)
        if pass_s is None or offer is None or trials < _FIRST_TRIALS or self._untried >= self._trial_steps:
            length = min(most, _TRIAL_LENGTH)
            weigh: Weigh = UNWEIGHED
            if trials >= _FIRST_TRIALS:
                self._trial_steps = min(_MOST_TRIAL_STEPS, 2 * self._trial_steps)
        elif offer.length and offer.token_s < rival.token_s:
            length = most
            self._trial_steps = _TRIAL_STEPS
            token_s = min(offer.token_s, rival.token_s)
            weigh = Weigher(drafter.name, self._acceptance, self._step_time, token_s, pass_s, count, other_rows)
        else:
            return None
        self._untried = 0
        watched = Watched(weigh, self._clock, self._clock())
        drafts = drafter.propose(sequences, length, watched)
        self._goodput.read(watched.read_s, count)
        spent_s = watched.pass_s(drafts, length)
        if spent_s is not None:
            if trials < _FIRST_TRIALS:
                self._pass_s[count.bit_length()] = spent_s if pass_s is None else min(pass_s, spent_s)
            else:
                self._follow(self._pass_s, count, spent_s)
            self._trials[count.bit_length()] = trials + 1
        for sequence, draft in zip(sequences, drafts, strict=True):
            self._look(sequence).drafts.append((drafter.name, draft))
        if weigh is UNWEIGHED or any(draft.distributions is not None for draft in drafts):
            return drafts
        pairs = zip(sequences, drafts, strict=True)
        chances = [self._acceptance.chances(sequence, drafter.name, draft.grades) for sequence, draft in pairs]
        worth = self._goodput.best(expected(chances, most), count, other_rows).length
        return [draft.cut(worth) for draft in drafts]

    @staticmethod
    def _follow(known: dict[int, float], count: int, seconds: float) -> None:
        bucket = count.bit_length()
        before = known.get(bucket, seconds)
        known[bucket] = before + _PASS_RATE * (min(seconds, 2 * before) - before)
