"""What a step's output holds for each of its sequences: states to be told, states to be summed, scores."""

from collections.abc import Sequence as Sized

import torch
from torch import Tensor

from local_engine.runner import Segment, StepOutput
from local_engine.segments import told_taps
from local_engine.sequence import Scores, Sequence
from local_engine.turns import Hidden, Turn


def summed(sequences: Sized[Sequence]) -> set[int]:
    """The layers whose states are summed over some prompt."""
    return {layer for sequence in sequences if sequence.means is not None for layer in sequence.means.layers}


def sum_up(sequences: Sized[Sequence], segments: Sized[Segment], output: StepOutput) -> None:
    """Add what was read of prompts to their sums."""
    tap = 0
    for sequence, segment in zip(sequences, segments, strict=True):
        rows = slice(tap, tap + len(segment.taps))
        if sequence.means is not None and segment.taps:
            sequence.means.add(torch.stack([output.hidden[layer][rows] for layer in sequence.means.layers], 1))
        tap = rows.stop


def reveal(turns: Sized[Turn], segments: Sized[Segment], output: StepOutput) -> None:
    """Hand out the tapped states, but for those of drafts that were wrong."""
    tap = 0
    for turn, segment in zip(turns, segments, strict=True):
        sequence, taps = turn.sequence, turn.sequence.taps
        told = segment.taps
        if sequence.means is not None:
            told = told_taps(sequence, segment.start, segment.tokens)
        kept = [at for at in told if segment.start + at < sequence.computed]
        if kept and taps is not None:
            first = tap + segment.taps.index(kept[0])  # what is told of a segment lies side by side
            states = [output.hidden[layer][first : first + len(kept)] for layer in taps.layers]
            turn.hidden = Hidden([segment.start + at for at in kept], torch.stack(states, 1))
        tap += len(segment.taps)
        sequence.tapped = max(sequence.tapped, sequence.computed)


def score(sequence: Sequence, logits: Tensor, scores: Scores) -> None:
    """Take in the logits of the next tokens to score, in order."""
    if not len(logits):
        return
    assert sequence.scored_from is not None
    first = sequence.scored_from + len(scores.logprobs)
    tokens = torch.tensor(sequence.ids[first : first + len(logits)], dtype=torch.int64, device=logits.device)
    logprobs = torch.log_softmax(logits, -1)
    scores.logprobs += logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    scores.entropies += torch.special.entr(logprobs.exp()).sum(-1).tolist()
