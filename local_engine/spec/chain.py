"""Drafting with forward passes: another, smaller model, or the first layers of the model itself."""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor

from local_engine.errors import ModelLoadError
from local_engine.greedy import Greedy
from local_engine.kv import KVFull
from local_engine.model import LocalModel
from local_engine.runner import Runner, Segment
from local_engine.sampler import Sampler, distributions, draw, pick_all
from local_engine.sequence import Sequence
from local_engine.spec.draft import NOTHING, Draft, Weigh, Worth
from local_engine.spec.verify import DRAFT_STREAM

_DOUBT = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Grades: the probability that the drafter gives to all tokens but its favourite, up to these bounds."""

_FEW = 4
"""Tokens that are read one by one rather than in a pass of their own."""


class ModelProposer:
    """Drafts with another model of the same vocabulary, over KV of its own.

    It follows each sequence: what of its last draft was kept is kept here too, the rest truncated.
    """

    def __init__(self, name: str, runner: Runner, vocabulary: int, *, read_chunk: int = 128) -> None:
        """`vocabulary`: the logits of the model that is drafted for. Of one sequence at most `read_chunk` tokens are
        read before a proposal, so that a long prompt delays no step for long."""
        self.name = f"draft:{name}"
        self._runner = runner
        self._kv = runner.kv
        self._vocabulary = vocabulary
        self._read_chunk = read_chunk
        self._followed: dict[Sequence, _Followed] = {}

    def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft]:
        ready: list[int] = []
        segments: list[Segment] = []
        for at, sequence in enumerate(sequences):
            segment = self._catching_up(sequence, most)
            if segment is not None:
                segments.append(segment)
                if segment.logits:
                    ready.append(at)
        if not segments:
            return [NOTHING for _ in sequences]
        drafting = [sequences[at] for at in ready]
        drafts = self._favourites(drafting, segments, most, weigh)
        if drafts is None:
            drafts = self._chained(drafting, segments, most, weigh)
        found = dict(zip(ready, drafts, strict=True))
        return [found.get(at, NOTHING) for at in range(len(sequences))]

    def _favourites(
        self, sequences: Sized[Sequence], segments: Sized[Segment], most: int, weigh: Weigh
    ) -> list[Draft] | None:
        """Drafts of the most probable tokens, each in one call of our own kernels; None where those are not for it."""
        if not self._runner.writes_alone or not all(map(_is_favourite, map(_required, sequences))):
            return None
        long = [segment for segment in segments if not segment.logits or len(segment.tokens) > _FEW]
        if long:
            self._run([Segment(one.slot, one.start, one.tokens[: len(one.tokens) - one.logits]) for one in long])
        weigh.begin(0)
        drafts = []
        for sequence in sequences:
            slot = self._followed[sequence].slot
            given = sequence.ids[self._kv.length(slot) :]
            greedy = self._runner.greedy(slot, len(sequence.ids) + most)
            assert greedy is not None, "it was asked before"
            draft = _ahead(greedy, given, most, weigh)
            greedy.commit()
            while max(draft.tokens, default=0) >= self._vocabulary:
                draft = draft.cut(len(draft.tokens) - 1)
            self._followed[sequence].drafted[:] = draft.tokens
            drafts.append(draft)
        return drafts

    def _chained(self, sequences: Sized[Sequence], segments: Sized[Segment], most: int, weigh: Weigh) -> list[Draft]:
        """Drafts of all sequences together, a pass for each token."""
        logits = self._run(segments)
        following = [self._followed[sequence] for sequence in sequences]

        def after(tokens: Sized[int]) -> Tensor:
            for followed, token in zip(following, tokens, strict=True):
                followed.drafted.append(token)
            starts = [self._kv.length(followed.slot) for followed in following]
            return self._run(
                [
                    Segment(followed.slot, start, [token], 1)
                    for followed, start, token in zip(following, starts, tokens, strict=True)
                ]
            )

        return _chains(sequences, logits, after, most, weigh) if sequences else []

    def observe(self, sequence: Sequence, start: int, drafted: Sized[int], predictions: Sized[int]) -> None:
        """Nothing to learn: what was wrong is seen at the next proposal."""

    def forget(self, sequence: Sequence) -> None:
        followed = self._followed.pop(sequence, None)
        if followed is not None:
            self._kv.close(followed.slot)

    def _catching_up(self, sequence: Sequence, most: int) -> Segment | None:
        """What is to be read before the next token can be drafted, a chunk of it where it is much.

        None: there is no room, or a token that only the larger vocabulary of the other model has, in its padding.
        """
        length = len(sequence.ids)
        if length + most > self._kv.shape.context:
            return None
        try:
            followed = self._followed.get(sequence)
            if followed is None:
                followed = self._followed[sequence] = _Followed(self._kv.open(length + most))
            kept = followed.agreeing(sequence.ids)
            self._kv.truncate(followed.slot, min(kept, length - 1, self._kv.length(followed.slot)))
            start = self._kv.length(followed.slot)
            stop = min(length, start + self._read_chunk)
            self._kv.reserve(followed.slot, length + most)
        except KVFull:
            self.forget(sequence)
            return None
        tokens = sequence.ids[start:stop]
        if max(tokens) > self._runner.last_token:
            return None
        followed.base = stop
        followed.drafted.clear()
        return Segment(followed.slot, start, tokens, int(stop == length))

    def _run(self, segments: Sized[Segment]) -> Tensor:
        return _fitted(self._runner.run(segments).logits, self._vocabulary)


@dataclass(slots=True)
class _Followed:
    """What a drafting model knows of a sequence."""

    slot: int
    base: int = 0
    """So many tokens of the sequence were read."""
    drafted: list[int] = field(default_factory=list)
    """Read after them: drafts."""

    def agreeing(self, ids: Sized[int]) -> int:
        """How many of the tokens read are the sequence's."""
        kept = self.base
        for token in self.drafted:
            if kept >= len(ids) or ids[kept] != token:
                break
            kept += 1
        return kept


class ExitProposer:
    """Drafts with the first layers of the model itself, its norm and its head (LayerSkip, Elhoushi et al. 2024).

    What the drafted tokens left in the KV of those layers is truncated, and verification computes all layers: no token
    is ever kept with keys in some layers only.
    """

    def __init__(self, layer: int, runner: Runner) -> None:
        if not 0 < layer < runner.layers:
            raise ModelLoadError(f"exit:{layer} must name a layer from 1 to {runner.layers - 1}, where drafting stops")
        self.name = f"exit:{layer}"
        self._layers = (0, layer)
        self._runner = runner
        self._kv = runner.kv

    def propose(self, sequences: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft]:
        ready = [at for at, sequence in enumerate(sequences) if self._has_room(sequence, most)]
        if not ready:
            return [NOTHING for _ in sequences]
        drafting = [sequences[at] for at in ready]
        drafts = self._favourites(drafting, most, weigh) or self._chained(drafting, most, weigh)
        found = dict(zip(ready, drafts, strict=True))
        return [found.get(at, NOTHING) for at in range(len(sequences))]

    def _favourites(self, sequences: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft] | None:
        """As `ModelProposer._favourites`. Nothing is committed: to the KV these tokens were never there."""
        if not self._runner.writes_alone or not all(map(_is_favourite, map(_required, sequences))):
            return None
        weigh.begin(0)
        drafts = []
        for sequence in sequences:
            greedy = self._runner.greedy(_slot(sequence), len(sequence.ids) + most, layers=self._layers[1])
            assert greedy is not None, "it was asked before"
            drafts.append(_ahead(greedy, sequence.ids[-1:], most, weigh))
        return drafts

    def _chained(self, drafting: Sized[Sequence], most: int, weigh: Weigh) -> list[Draft]:
        """As `ModelProposer._chained`."""
        try:
            logits = self._run(drafting, [sequence.ids[-1] for sequence in drafting])
            return _chains(drafting, logits, lambda tokens: self._run(drafting, tokens), most, weigh)
        finally:
            for sequence in drafting:
                self._kv.truncate(_slot(sequence), len(sequence.ids) - 1)

    def observe(self, sequence: Sequence, start: int, drafted: Sized[int], predictions: Sized[int]) -> None:
        """Nothing to learn."""

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def _has_room(self, sequence: Sequence, most: int) -> bool:
        if sequence.slot is None or self._kv.length(sequence.slot) != len(sequence.ids) - 1:
            return False
        try:
            self._kv.reserve(sequence.slot, len(sequence.ids) + most)
        except (KVFull, ValueError):  # the byte budget, the model's context
            return False
        return True

    def _run(self, sequences: Sized[Sequence], tokens: Sized[int]) -> Tensor:
        segments = [
            Segment(_slot(sequence), self._kv.length(_slot(sequence)), [token], 1)
            for sequence, token in zip(sequences, tokens, strict=True)
        ]
        return self._runner.run(segments, layers=self._layers).logits


def check_vocabulary(drafter: LocalModel, model: LocalModel) -> None:
    """Raises ModelLoadError unless the two mean the same by every token."""
    if drafter.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise ModelLoadError(
            f"draft:{drafter.card.name} cannot draft for {model.card.name}: their vocabularies differ;"
            " name a model with the same tokenizer, or speculation: auto"
        )


def _chains(
    sequences: Sized[Sequence],
    logits: Tensor,
    after: Callable[[Sized[int]], Tensor],
    most: int,
    weigh: Weigh,
) -> list[Draft]:
    """Drafts of one length: `logits` are those after each sequence, `after` reads a token more of each.

    How long they get depends on how sure the drafter is, which is known before a token is drawn: never on a token that
    was drawn and then left out (see `Draft.cut`).
    """
    samplers = [_required(sequence) for sequence in sequences]
    drawn = [at for at, sampler in enumerate(samplers) if _is_drawn(sampler)]
    simple = all(map(_is_favourite, samplers))
    histories = [array("i", sequence.ids) for sequence in sequences]
    tokens: list[list[int]] = [[] for _ in sequences]
    grades: list[list[int]] = [[] for _ in sequences]
    proposed: list[list[Tensor]] = [[] for _ in sequences]
    weigh.begin(1)
    for length in range(most):
        if length:
            logits = after([chain[-1] for chain in tokens])
        shares, favourites = torch.softmax(logits, -1).max(-1)
        for chain, share in zip(grades, shares.tolist(), strict=True):
            chain.append(_grade(share))
        worth = weigh(sequences, grades)
        if worth is Worth.LEAVE:
            break
        chosen = favourites.tolist() if simple else [choice.token for choice in pick_all(logits, samplers, histories)]
        if drawn:
            rows = distributions(logits[drawn], [samplers[at] for at in drawn], [histories[at] for at in drawn])
            uniforms = [samplers[at].uniform(len(histories[at]), DRAFT_STREAM) for at in drawn]
            for at, row, token in zip(drawn, rows, draw(rows, uniforms).tolist(), strict=True):
                proposed[at].append(row)
                chosen[at] = token
        for chain, history, token in zip(tokens, histories, chosen, strict=True):
            chain.append(token)
            history.append(token)
        if worth is Worth.LAST:
            break
    return [
        Draft(chain, grade[: len(chain)], torch.stack(rows) if rows else None)
        for chain, grade, rows in zip(tokens, grades, proposed, strict=True)
    ]


def _ahead(greedy: Greedy, given: Sized[int], most: int, weigh: Weigh) -> Draft:
    """What comes after `given`, for as long as it is worth a pass."""
    tokens, shares = greedy.ahead(given, most, weigh.floor)
    return Draft(tokens, list(map(_grade, shares)))


def _grade(share: float) -> int:
    """Of a token that the drafter gives this probability."""
    return bisect_left(_DOUBT, 1 - share)


def _is_favourite(sampler: Sampler) -> bool:
    """Whether the token chosen is always the most probable one."""
    return sampler.greedy and sampler.plain


def _is_drawn(sampler: Sampler) -> bool:
    """Whether drafts are drawn, for rejection sampling. With a seed they are chosen, so that it decides the text."""
    return not sampler.greedy and sampler.params.seed is None


def _fitted(logits: Tensor, vocabulary: int) -> Tensor:
    """Logits for the vocabulary of another model: embeddings are padded to different sizes."""
    missing = vocabulary - logits.shape[1]
    return logits[:, :vocabulary] if missing <= 0 else torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def _required(sequence: Sequence) -> Sampler:
    assert sequence.sampler is not None, "only those that write are drafted for"
    return sequence.sampler


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "it has room"
    return sequence.slot
