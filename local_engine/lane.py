"""One model's lane through the engine: its KV, its runner, its prefix store, its line of sequences. One thread only.

A step: plan (`scheduler.py`), one packed forward pass over everything planned (`runner.py`), one sampling over all rows
that write (`sampler.py`), and a `Turn` for each sequence that has something to tell its owner.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Sized
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from local_engine.greedy import Greedy
from local_engine.held import MOST_HELD, Held, HeldPrompts
from local_engine.kv import KVCache, KVFull
from local_engine.means import Means
from local_engine.model import LocalModel
from local_engine.outputs import reveal, score, sum_up, summed
from local_engine.pace import Pace
from local_engine.prefix import PrefixStore
from local_engine.runner import Segment, StepOutput
from local_engine.sampler import Choice
from local_engine.scheduler import Scheduler
from local_engine.segments import may_write_on, segment_of, window_of
from local_engine.sequence import Sequence, common_prefix
from local_engine.spec.draft import NOTHING
from local_engine.spec.speculator import Speculator
from local_engine.spec.verify import Window, verify
from local_engine.turns import Turn

WORTH_WAITING: Final = 32
"""Tokens that are worth waiting for while another sequence computes them."""
HEADROOM: Final = 32
"""Tokens beyond its text for which a sequence gets room when it is let in, so that it comes forward before it asks."""

_MOST_AT_ONCE: Final = 64
_AT_ONCE_S: Final = 0.005
"""How many tokens of one sequence a step may bring, and for how long others may wait for that."""
_IDLE_S: Final = 0.002
"""How long a lane without work waits at once for what is fetched: other lanes and cancels wait as long."""

logger = logging.getLogger(__name__)


class Runs(Protocol):
    """What a lane needs of a `Runner`."""

    def run(self, segments: Sized[Segment], *, tap_layers: Sized[int] = ()) -> StepOutput: ...

    def logits(self, states: Tensor) -> Tensor: ...

    def greedy(self, slot: int, room: int) -> Greedy | None: ...


class Lane:
    """Computes the sequences of one model, step by step."""

    def __init__(
        self,
        model: LocalModel,
        kv: KVCache,
        runner: Runs,
        store: PrefixStore | None = None,
        speculator: Speculator | None = None,
        *,
        max_running: int = 8,
        prefill_chunk: int = 256,
        step_s: float = 0.05,
        mean_layers: Sized[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.kv = kv
        self.store = store
        self.speculator = speculator
        self.scheduler = Scheduler(max_running)
        self.held = HeldPrompts()
        self.mean_layers = tuple(mean_layers)
        """Whose states are summed over prompts that a probe hears whole; the store keeps them with its blocks."""
        self.most_tokens = min(model.card.context_window, kv.most_tokens)
        """Of one sequence: the window, or what the KV budget holds."""
        self.steps = 0
        self.computed_tokens = 0
        self.written_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self._drafting: Speculator | None = None
        """Who has a part in this step: the speculator, unless it rests."""
        self._runner = runner
        self._pace = Pace(prefill_chunk, step_s)
        self._clock = clock

    # ---- sequences come, change and go --------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Compute it from the next step on, or from when a slower tier has brought what it has of its prefix."""
        if self.store is not None and sequence.slot is None and self._held_for(sequence) is None:
            try:
                sequence.arriving = self.store.prefetch(sequence.salt, sequence.ids[: sequence.scored_from])
            except Exception:
                logger.exception("fetching a prefix failed")
        self.scheduler.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Free all that it has; what it computed stays in the prefix store."""
        self.scheduler.remove(sequence)
        if self.speculator is not None:
            self.speculator.forget(sequence)
        if sequence.slot is not None:
            self.publish(sequence)
            self.kv.close(sequence.slot)
            sequence.forget()

    def branch(self, parent: Sequence, child: Sequence) -> None:
        """Add `child`, whose text begins as `parent`'s, with as much of the parent's KV as it can use."""
        shared = min(parent.computed, child.computed)
        child.computed = 0
        if parent.slot is not None and shared:
            try:
                child.slot = self.kv.fork(parent.slot, shared, child.limit)
                child.computed = shared
            except (KVFull, torch.OutOfMemoryError):
                logger.debug("no room for a fork: it will read its text again")
                self.publish(parent, needed=True)
        self.add(child)

    def keep(self, sequence: Sequence, logits: Tensor, until: float) -> None:
        """Drop it, but keep its slot for who goes on with its text before `until`."""
        if sequence.slot is None or sequence.computed < len(sequence.ids):  # its KV was taken away meanwhile
            return self.drop(sequence)
        self.scheduler.remove(sequence)
        self.held.add(Held(sequence.ids, sequence.salt, sequence.slot, logits, until))
        sequence.forget()
        if len(self.held) > MOST_HELD:
            self._let_go(self.held.oldest())

    def expire(self, now: float) -> None:
        """Give back what has been kept for long enough."""
        for held in self.held.ended(now):
            self._let_go(held)

    def logits(self, states: Tensor) -> Tensor:
        """float32 [rows, vocabulary] of hidden states [rows, width]."""
        return self._runner.logits(states)

    def means(self, tokens: int) -> Means:
        """For a prompt of so many tokens."""
        block_tokens = self.store.block_tokens if self.store is not None else tokens
        return Means(self.mean_layers, int(self.model.network.config.hidden_size), tokens, block_tokens)

    def _let_go(self, held: Held | None) -> bool:
        if held is not None:
            self.kv.close(held.slot)
        return held is not None

    def _held_for(self, sequence: Sequence) -> tuple[Held, int] | None:
        if sequence.scored_from is not None or sequence.means is not None:  # its states are not held with it
            return None
        return self.held.find(sequence.salt, sequence.ids)

    def cut(self, sequence: Sequence, length: int) -> None:
        """Its text has `length` tokens or fewer left, or is about to: forget the KV after them."""
        if self.speculator is not None:
            self.speculator.forget(sequence)
        self.rewind(sequence, length)

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Forget the KV after the first `length` tokens."""
        sequence.undraft()
        sequence.tapped = min(sequence.tapped, length)
        if sequence.slot is not None and sequence.computed > length:
            self.kv.truncate(sequence.slot, length)
            sequence.computed = length

    def publish(self, sequence: Sequence, *, needed: bool = False) -> None:
        """Give what is computed of its text to the prefix store. A store that fails costs its hits and no request.

        `needed`: it is sure to be read again.
        """
        if self.store is None or sequence.slot is None or sequence.scored_from is not None:
            return
        try:
            tokens = sequence.ids[: sequence.computed]  # no drafts: they are not part of `ids`
            sums = sequence.means.blocks if sequence.means is not None else None
            self.store.commit(sequence.salt, tokens, partial(self.kv.export_into, sequence.slot), sums, needed=needed)
        except Exception:
            logger.exception("storing a prefix failed")

    # ---- room, as the scheduler asks for it -----------------------------------------------------------------------

    def take(self, sequence: Sequence, length: int) -> bool:
        while True:
            try:
                if sequence.slot is not None:
                    self.kv.reserve(sequence.slot, min(length, sequence.limit))
                elif (found := self._held_for(sequence)) is not None:
                    self._go_on_from(*found, sequence, min(length + HEADROOM, sequence.limit))
                else:
                    sequence.slot = self.kv.open(min(length + HEADROOM, sequence.limit), sequence.limit)
                    self._recall(sequence, sequence.slot)
                return True
            except (KVFull, torch.OutOfMemoryError):
                if not self._let_go(self.held.oldest()):
                    return False

    def give(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "only those with a slot are asked to give it"
        self.publish(sequence, needed=True)
        self.kv.close(sequence.slot)

    def soon(self, sequence: Sequence, running: list[Sequence]) -> bool:
        """Prompts that come together and begin alike are read once: the others wait for the first, and find it stored.

        They wait only for who is before them in line, so for somebody who comes forward.
        """
        if self.store is None or sequence.means is not None or self._held_for(sequence) is not None:
            return False
        if sequence.awaited is None:
            sequence.awaited = self._reader(sequence, running)
        if sequence.awaited is None:
            return False
        reader, shared = sequence.awaited
        if reader in running and reader.computed < shared and not reader.at_rest:
            return True
        sequence.awaited = None
        self.publish(reader, needed=True)
        return False

    def _reader(self, sequence: Sequence, running: list[Sequence]) -> tuple[Sequence, int] | None:
        """Who before it is computing the most of its prefix, and how much, where that is more than is stored."""
        assert self.store is not None, "asked only where there is one"
        text = sequence.ids[: sequence.scored_from]
        best: tuple[Sequence, int] | None = None
        least = self.store.peek(sequence.salt, text) + WORTH_WAITING
        for other in running:
            if other.at_rest or other.scored_from is not None:  # it comes forward for nobody, or is not stored
                continue
            if other.rank < sequence.rank and other.salt == sequence.salt:
                shared = min(common_prefix(other.ids, text), len(text) - 1)
                shared -= shared % self.store.block_tokens
                if shared > max(least, other.computed + WORTH_WAITING):
                    best, least = (other, shared), shared
        return best

    def _go_on_from(self, held: Held, shared: int, sequence: Sequence, capacity: int) -> None:
        """Give a sequence the slot of a held prompt; its logits too, where the text is the same and it only writes."""
        self.kv.reserve(held.slot, capacity)
        self.held.take(held)
        same = shared == len(held.ids) == len(sequence.ids) and sequence.sampler is not None and sequence.taps is None
        kept = shared if same else min(shared, len(sequence.ids) - 1)
        if kept < len(held.ids):
            self.kv.truncate(held.slot, kept)
        sequence.slot, sequence.computed = held.slot, kept
        sequence.kept_logits = held.logits if same else None
        if sequence.cached is None:
            sequence.cached = kept

    def _recall(self, sequence: Sequence, slot: int) -> None:
        """Load the longest stored prefix; the last token, and what is to be scored, is left to compute."""
        means = sequence.means
        if means is not None:
            means.restart(None)
        if self.store is not None:
            try:
                text = sequence.ids[: sequence.scored_from]
                with self.store.lookup(sequence.salt, text, taps=means is not None) as match:
                    if match.tokens:
                        match.load(self.kv, slot)
                    if means is not None:
                        means.restart(match)
                    sequence.computed = match.tokens
            except Exception:
                logger.exception("loading a prefix failed")
                self.kv.truncate(slot, 0)
        if sequence.cached is None:
            sequence.cached = sequence.computed

    # ---- a step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Turn]:
        """Compute what is due; nothing where nothing is."""
        alone = self._write_on()
        if alone is not None:
            return [alone]
        self._draft()
        plan = self.scheduler.plan(self, self._pace.tokens)
        turns = [Turn(sequence, out_of_room=True) for sequence in plan.stuck]
        for sequence in plan.stuck:
            sequence.at_rest = True
        turns += self._begin_from_kept([s for s in self.scheduler.running if s.kept_logits is not None])
        if plan.work:
            began = self._clock()
            turns += self._compute(plan.work)
            took = self._now() - began
            self.steps += 1
            self.computed_tokens += plan.tokens
            if plan.tokens > len(plan.work):
                self._pace.observe(plan.tokens, took)
                if self.store is not None:
                    self.store.observe_prefill(plan.tokens, took)
            if self.speculator is not None and self.speculator.timed:
                self.speculator.settle(plan.tokens, len(plan.work))
        else:
            self._await_arrival()
        return turns

    def _now(self) -> float:
        """The time when all that was asked of the device is computed: CUDA goes on after a call for it returns."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self._clock()

    def _write_on(self) -> Turn | None:
        """Several tokens of a sequence that has the lane to itself, where its owner wants so; None where not."""
        active = self.scheduler.active
        if len(active) != 1 or self.scheduler.waiting or not may_write_on(active[0]):
            return None
        turn = Turn(active[0])
        try:
            return turn if self._write_all(turn) else None
        except KVFull:
            return None
        except Exception as error:
            logger.exception("writing on failed")
            turn.error = error
            return turn

    def _write_all(self, turn: Turn) -> bool:
        """Read what is pending, then write until the owner says no, or it was much, or took long; whether it can."""
        sequence, until = turn.sequence, self._clock() + _AT_ONCE_S
        limit = min(len(sequence.ids) + _MOST_AT_ONCE, sequence.limit)
        greedy = self._runner.greedy(sequence.slot, limit) if sequence.slot is not None else None
        writes_on = sequence.writes_on
        if greedy is None or writes_on is None:
            return False
        for token in sequence.ids[sequence.computed :]:
            choice = greedy.after(token)
        while True:
            turn.choices.append(choice)
            sequence.ids.append(choice.token)
            if not writes_on(choice) or len(sequence.ids) >= limit or self._clock() > until:
                break
            choice = greedy.after(choice.token)
        greedy.commit()
        computed = len(sequence.ids) - 1 - sequence.computed
        sequence.computed += computed
        sequence.rows += computed
        sequence.at_rest = len(sequence.ids) >= sequence.limit
        self.steps += 1
        self.computed_tokens += computed
        self.written_tokens += len(turn.choices)
        return True

    def _begin_from_kept(self, sequences: list[Sequence]) -> list[Turn]:
        """The first tokens of those that were given the logits for them."""
        if not sequences:
            return []
        logits = torch.stack([sequence.kept_logits for sequence in sequences if sequence.kept_logits is not None])
        for sequence in sequences:
            sequence.kept_logits = None
        turns = [Turn(sequence) for sequence in sequences]
        self._write(turns, logits)
        return turns

    def _await_arrival(self) -> None:
        """With nothing to compute: give the thread that fetches for the first in line some time."""
        arriving = next((s.arriving for s in self.scheduler.waiting if s.arriving and not s.arriving.ready), None)
        if arriving is not None:
            arriving.wait(_IDLE_S)

    def _draft(self) -> None:
        """Let guesses be made of what comes next in the sequences that write."""
        self._drafting = None
        if self.speculator is None or self.speculator.rests(len(self.scheduler.running)):
            return
        self._drafting = self.speculator
        active = self.scheduler.active
        writing = [s for s in active if s.pending == 1 and s.sampler is not None and s.floor is None]
        reading = sum(s.pending + len(s.draft) for s in (*active, *self.scheduler.waiting)) - len(writing)
        drafted = [s for s in writing if s.draftable]
        try:
            drafts = self.speculator.propose(drafted, min(reading, self._pace.tokens))
        except Exception:
            logger.exception("drafting failed; what %s writes now goes on without", self.model.card.name)
            self._drafting = None
            drafts = [NOTHING for _ in drafted]
            for sequence in drafted:
                sequence.draftable = False
                self.speculator.forget(sequence)
        for sequence, draft in zip(drafted, drafts, strict=True):
            sequence.draft[:], sequence.drawn_from = draft.tokens, draft.distributions

    def _compute(self, work: list[tuple[Sequence, int]]) -> list[Turn]:
        """One forward pass; where it fails, one for each, so that a failure ends nothing but what caused it."""
        segments = [segment_of(sequence, count) for sequence, count in work]
        tapped = [sequence for (sequence, _), segment in zip(work, segments, strict=True) if segment.taps]
        layers = sorted({layer for s in tapped if s.taps is not None for layer in s.taps.layers} | summed(tapped))
        try:
            output = self._runner.run(segments, tap_layers=layers)
        except Exception as error:
            for segment in segments:
                self.kv.truncate(segment.slot, segment.start)
            if len(work) > 1 and isinstance(error, torch.OutOfMemoryError):
                self.scheduler.preempt(work[-1][0], self)
                return self._compute(work[:-1])
            if len(work) > 1:
                return [turn for one in work for turn in self._compute([one])]
            logger.exception("a step of one sequence failed")
            return [Turn(work[0][0], error=error)]
        return self._told([sequence for sequence, _ in work], segments, output)

    def _told(self, sequences: list[Sequence], segments: list[Segment], output: StepOutput) -> list[Turn]:
        if output.hidden:
            sum_up(sequences, segments, output)  # before anything is stored
        turns = [Turn(sequence) for sequence in sequences]
        writers: list[Turn] = []
        rows: list[int] = []
        row = 0
        for turn, segment in zip(turns, segments, strict=True):
            sequence = turn.sequence
            sequence.computed += len(segment.tokens)
            sequence.rows += len(segment.tokens)
            these = range(row, row + segment.logits)
            row += segment.logits
            if sequence.scores is not None:
                score(sequence, output.logits[these.start : these.stop], sequence.scores)
                turn.scores = None if sequence.pending else sequence.scores
            elif segment.logits:
                writers.append(turn)
                rows += these
            elif not sequence.pending:
                sequence.at_rest = turn.rested = True
                self.publish(sequence, needed=sequence.pinned)
        if writers:
            self._write(writers, output.logits if len(rows) == len(output.logits) else output.logits[rows])
        if output.hidden:
            reveal(turns, segments, output)
        return [turn for turn in turns if turn.choices or turn.hidden or turn.scores or turn.rested or turn.error]

    def _write(self, turns: list[Turn], logits: Tensor) -> None:
        """What comes next in every sequence that writes, all at once: what is kept of its draft, and one token more."""
        windows = [window_of(turn.sequence) for turn in turns]
        learns = self._drafting is not None and self._drafting.learns
        predictions = logits.argmax(-1).tolist() if learns else []
        row = 0
        for turn, window, choices in zip(turns, windows, self._choices(turns, windows, logits), strict=True):
            sequence, turn.choices = turn.sequence, choices
            self.written_tokens += len(choices)
            if len(sequence.ids) == sequence.prompt_len:
                self.publish(sequence)
            sequence.ids.extend(choice.token for choice in choices)
            self.rewind(sequence, len(sequence.ids) - 1)
            sequence.at_rest = len(sequence.ids) >= sequence.limit
            if choices:
                self._count(sequence, window, choices, predictions[row : row + window.rows])
            row += window.rows

    def _count(self, sequence: Sequence, window: Window, choices: list[Choice], predictions: list[int]) -> None:
        """What became of a draft, and what is to be learned from it."""
        if window.floor is not None:
            sequence.given += len(window.drafted)
            return
        drafted, accepted = len(window.drafted), len(choices) - 1
        sequence.drafted += drafted
        sequence.accepted += accepted
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        if self._drafting is not None:
            self._drafting.learn(sequence, drafted, [choice.token for choice in choices], predictions)

    def _choices(self, turns: list[Turn], windows: list[Window], logits: Tensor) -> list[list[Choice]]:
        """The choices of every window; none where choosing failed, which its turn then says."""
        try:
            return verify(logits, windows)
        except Exception as error:
            if len(turns) == 1:
                logger.exception("choosing a token failed")
                turns[0].error = error
                return [[]]
        found: list[list[Choice]] = []
        row = 0
        for turn, window in zip(turns, windows, strict=True):
            found += self._choices([turn], [window], logits[row : row + window.rows])
            row += window.rows
        return found
