"""What a step computes of one sequence: the segment that the model runs, and the window that is then verified."""

from collections.abc import Sequence as Sized
from typing import Final

from local_engine.runner import Segment
from local_engine.sequence import Sequence
from local_engine.spec.verify import Window

_FEW: Final = 4
"""Tokens that are read one by one rather than packed."""


def segment_of(sequence: Sequence, count: int) -> Segment:
    """The next `count` tokens of a sequence, and what is wanted of them."""
    assert sequence.slot is not None, "only those with a slot are planned"
    start, stop = sequence.computed, sequence.computed + count
    tokens = sequence.ids[start:stop]
    tokens.extend(sequence.draft[: stop - start - len(tokens)])
    if sequence.scored_from is not None and sequence.scores is not None:
        due = sequence.scored_from - 1 + len(sequence.scores.logprobs)  # what was scored before a preemption stays
        logits = max(0, stop - max(start, due))
    else:
        logits = stop - len(sequence.ids) + 1 if sequence.sampler is not None and stop >= len(sequence.ids) else 0
    return Segment(sequence.slot, start, tokens, logits, _rows(sequence, start, tokens))


def window_of(sequence: Sequence) -> Window:
    assert sequence.sampler is not None, "only those with a sampler write"
    drawn_from = sequence.drawn_from
    return Window(
        sequence.sampler,
        sequence.ids,
        list(sequence.draft),
        None if drawn_from is None else drawn_from[: len(sequence.draft)],
        sequence.floor,
    )


def _rows(sequence: Sequence, start: int, tokens: Sized[int]) -> list[int]:
    """Which of `tokens` have their hidden states wanted: to be told, or summed."""
    if sequence.means is not None:
        return list(range(min(len(tokens), sequence.prompt_len - start)))
    return told_taps(sequence, start, tokens)


def told_taps(sequence: Sequence, start: int, tokens: Sized[int]) -> list[int]:
    """Which of `tokens`, at positions from `start`, are tapped and have not been told yet."""
    spec = sequence.taps
    if spec is None:
        return []
    stop = start + len(tokens)
    if spec.where == "prompt":
        last = sequence.prompt_len - 1
        return [last - start] if max(start, sequence.tapped) <= last < stop else []
    new = range(max(start, sequence.tapped, sequence.prompt_len), stop)
    return [at - start for at in new if spec.where == "generated" or tokens[at - start] in spec.tokens]


def may_write_on(sequence: Sequence) -> bool:
    """Whether its tokens may come several a step, and are then those that its sampler would choose."""
    sampler = sequence.sampler
    return (
        sequence.writes_on is not None
        and 0 < sequence.pending <= _FEW
        and not sequence.draft
        and sequence.taps is None
        and sequence.means is None
        and sequence.kept_logits is None
        and sampler is not None
        and sampler.greedy
        and sampler.plain
        and not sampler.params.top_logprobs
    )
