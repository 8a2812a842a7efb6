"""Decides, for each step of a model, who drafts how much, and learns from what came of it."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from local_engine.spec.acceptance import Acceptance
from local_engine.spec.draft import NOTHING, Context, Draft, Proposer, Weigh, Worth, unweighed
from local_engine.spec.goodput import Goodput, Offer, expected
from local_engine.spec.steptime import StepTime

_LONGEST = 8  # tokens of a draft
_MOST_ROWS = 96  # drafted tokens in a step; more sequences than this get none
_IDLE_LOOKS = 4  # looks that find nothing worth drafting, after which one in so many steps looks
_IDLE_STEPS = 8
_TRIAL_STEPS = 256  # a drafting model that does not pay is tried again that often
_TRIAL_LENGTH = 3
_PASS_RATE = 0.2  # how fast the measured time of a drafting pass is followed

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SpeculationStats:
    """Since the start."""

    drafted: int = 0
    """Tokens verified."""
    accepted: int = 0
    """Of them, those kept."""


@dataclass(slots=True)
class _Look:
    """What was proposed for one sequence in this step: every free draft, for all of them teach."""

    drafts: list[tuple[str, Draft]] = field(default_factory=list)
    verified: Draft = NOTHING


class Speculator:
    """Drafts for one model. A step is `propose`, verification, `learn` for each sequence, `settle`. One thread only.

    Of the free proposers, whose drafts cost microseconds, every sequence takes the one that promises most; the drafter,
    whose every token costs a forward pass, is asked where that promises more for all of them together.
    """

    def __init__(
        self,
        free: Sequence[Proposer] = (),
        drafter: Proposer | None = None,
        *,
        step_time: StepTime | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.stats = SpeculationStats()
        self._free = list(free)
        self._drafter = drafter
        self._step_time = step_time or StepTime()
        self._goodput = Goodput(self._step_time)
        self._acceptance = Acceptance()
        self._clock = clock
        self._looks: dict[Context, _Look] = {}
        self._looked = False  # in this step
        self._propose_s = 0.0  # that it took
        self._verified = 0  # drafted tokens in this step
        self._rest = 0  # steps left without a look
        self._fruitless = 0  # looks in a row that found nothing worth drafting
        self._pass_s: dict[int, float] = {}  # seconds of a drafting pass, by doublings of the sequences
        self._untried = 0  # steps since the drafter was last asked

    def propose(self, contexts: Sequence[Context], rooms: Sequence[int], other_rows: int = 0) -> list[Draft]:
        """The draft to verify for each context; at most as many tokens as its `room`, none where that pays.

        `other_rows`: what else the step computes, prompt chunks above all.
        """
        self._looks.clear()
        if self._rest or not contexts or len(contexts) > _MOST_ROWS:
            self._rest = max(0, self._rest - 1)
            return [NOTHING for _ in contexts]
        began = self._clock()
        self._looked = True
        drafts = [draft.cut(room) for draft, room in zip(self._best(contexts, other_rows), rooms, strict=True)]
        for context, draft in zip(contexts, drafts, strict=True):
            self._looks[context].verified = draft
        self._fruitless = 0 if any(draft.tokens for draft in drafts) else self._fruitless + 1
        if self._fruitless >= _IDLE_LOOKS:
            self._rest = _IDLE_STEPS - 1
        self._propose_s = self._clock() - began
        return drafts

    def learn(self, context: Context, verified: int, written: Sequence[int], predictions: Sequence[int]) -> None:
        """A context was given `written`, with `verified` tokens of its draft in the step.

        `predictions[i]`: what the model holds most likely after the first i of them.
        """
        look = self._looks.pop(context, None)
        if look is None:
            return
        start = len(context.ids) - len(written)
        self._verified += verified
        self.stats.drafted += verified
        self.stats.accepted += len(written) - 1
        for name, draft in look.drafts:
            # Also drafts that were not verified are judged by the tokens that came, unless they were drawn.
            known = min(len(draft.tokens), len(written) if draft.distributions is None else verified)
            right = next((at for at in range(known) if draft.tokens[at] != written[at]), known)
            self._acceptance.learn(context, name, draft.cut(min(known, right + 1)), right)
        for proposer in self._proposers:
            proposer.observe(context, start, look.verified.tokens[:verified], predictions)

    def settle(self, seconds: float, rows: int, writing: int, written: int) -> None:
        """A step of `rows` rows took `seconds`, `propose` included; `writing` sequences wrote `written` tokens."""
        others = rows - writing - self._verified
        self._step_time.observe(rows, max(seconds - self._propose_s, 1e-9), max(1, writing))
        self._goodput.settle(seconds, writing, written, others, drafted=self._looked)
        self._looked, self._propose_s, self._verified = False, 0.0, 0

    def forget(self, context: Context) -> None:
        """The sequence ended, or was changed by another hand than `propose` and verification."""
        self._looks.pop(context, None)
        self._acceptance.forget(context)
        for proposer in self._proposers:
            proposer.forget(context)

    @property
    def _proposers(self) -> list[Proposer]:
        return self._free if self._drafter is None else [*self._free, self._drafter]

    def _best(self, contexts: Sequence[Context], other_rows: int) -> list[Draft]:
        count = len(contexts)
        most = max(1, min(_LONGEST, _MOST_ROWS // count))
        drafts = self._free_drafts(contexts, most)
        pairs = zip(contexts, drafts, strict=True)
        chances = [self._acceptance.chances(context, name, draft.grades) for context, (name, draft) in pairs]
        offer = self._goodput.best(expected(chances, most), count, other_rows)
        if self._goodput.paused(count) or not (other_rows or self._step_time.fresh(count, count)):
            return [NOTHING for _ in contexts]
        if self._drafter is not None:
            by_drafter = self._asked(self._drafter, contexts, most, offer, other_rows)
            if by_drafter is not None:
                return by_drafter
        return [draft.cut(offer.length) for _, draft in drafts]

    def _free_drafts(self, contexts: Sequence[Context], most: int) -> list[tuple[str, Draft]]:
        """The most promising draft for each context."""
        for context in contexts:
            self._looks[context] = _Look()
        for proposer in self._free:
            for context, draft in zip(contexts, proposer.propose(contexts, most, unweighed), strict=True):
                self._looks[context].drafts.append((proposer.name, draft))
        return [self._most_promising(context) for context in contexts]

    def _most_promising(self, context: Context) -> tuple[str, Draft]:
        def promise(named: tuple[str, Draft]) -> float:
            name, draft = named
            return sum(self._acceptance.chances(context, name, draft.grades))

        drafts = self._looks[context].drafts
        if len(drafts) == 1:
            return drafts[0]
        return max(drafts, key=promise, default=("", NOTHING))

    def _asked(
        self, drafter: Proposer, contexts: Sequence[Context], most: int, rival: Offer, other_rows: int
    ) -> list[Draft] | None:
        """The drafter's drafts where they promise more than `rival`, or where it is time to try it; else None."""
        count = len(contexts)
        pass_s = self._pass_s.get(count.bit_length())
        rate = sum(self._acceptance.rate(context, drafter.name) for context in contexts) / count
        chances = [rate**length for length in range(1, most + 1)]
        offer = self._goodput.best(expected([chances] * count, most), count, other_rows, pass_s or 0.0)
        self._untried += 1
        if pass_s is None or self._untried >= _TRIAL_STEPS:
            length = min(most, _TRIAL_LENGTH)
            weigh: Weigh = unweighed
        elif offer.length and offer.token_s < rival.token_s:
            length = most
            weigh = self._weigher(drafter, min(offer.token_s, rival.token_s), pass_s, other_rows)
        else:
            return None
        self._untried = 0
        began = self._clock()
        drafts = drafter.propose(contexts, length, weigh)
        passes = min(length, 1 + max(len(draft.tokens) for draft in drafts))
        self._time_pass(count, (self._clock() - began) / passes)
        for context, draft in zip(contexts, drafts, strict=True):
            self._looks[context].drafts.append((drafter.name, draft))
        return drafts

    def _weigher(self, drafter: Proposer, token_s: float, pass_s: float, other_rows: int) -> Weigh:
        """Tokens are drafted while their rows are worth verifying, and passes made while they pay for themselves."""

        def weigh(contexts: Sequence[Context], grades: Sequence[Sequence[int]]) -> Worth:
            pairs = zip(contexts, grades, strict=True)
            kept = sum(self._acceptance.chances(context, drafter.name, chain)[-1] for context, chain in pairs)
            count = len(contexts)
            rows = other_rows + count * len(grades[0])
            gain_s = kept * token_s - (self._step_time(rows + count, count) - self._step_time(rows, count))
            if gain_s <= 0:
                return Worth.LEAVE
            return Worth.GO_ON if gain_s > pass_s else Worth.LAST

        return weigh

    def _time_pass(self, count: int, seconds: float) -> None:
        bucket = count.bit_length()
        known = self._pass_s.get(bucket, seconds)
        self._pass_s[bucket] = known + _PASS_RATE * (min(seconds, 2 * known) - known)
