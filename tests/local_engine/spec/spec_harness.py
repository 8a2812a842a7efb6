"""Decoding with drafts over a real runner, step by step, on a clock that the test owns."""

from collections.abc import Iterable
from collections.abc import Sequence as Sized
from dataclasses import dataclass

from local_engine.kv import KVCache
from local_engine.runner import Runner, Segment
from local_engine.sampler import Sampler
from local_engine.sequence import Sequence, token_ids
from local_engine.spec.draft import NOTHING, Proposer
from local_engine.spec.speculator import Speculator
from local_engine.spec.steptime import StepTime
from local_engine.spec.verify import Window, verify


class FreeVerification(StepTime):
    """A machine on which steps of all sizes take the same time, whatever the clock says."""

    def __call__(self, rows: int, sequences: int = 1) -> float:
        return 1e-3

    def fresh(self, sequences: int) -> bool:
        return True


def flat_speculator(*free: Proposer, drafter: Proposer | None = None) -> Speculator:
    """Drafts as long as it can."""
    return Speculator(free, drafter, step_time=FreeVerification(), clock=lambda: 0.0)


def writing(ids: Iterable[int], sampler: Sampler, slot: int | None = None, salt: bytes = b"") -> Sequence:
    """A sequence that has read all but the last of its tokens."""
    tokens = token_ids(ids)
    return Sequence(tokens, (0.0, 0), 1 << 20, sampler=sampler, slot=slot, salt=salt, computed=len(tokens) - 1)


def decode(
    runner: Runner,
    prompts: Sized[Sized[int]],
    samplers: Sized[Sampler],
    count: int,
    speculator: Speculator | None = None,
) -> "Decoded":
    """`count` tokens after each prompt, all prompts side by side."""
    kv: KVCache = runner.kv
    sequences = [
        writing(prompt, sampler, kv.open(len(prompt))) for prompt, sampler in zip(prompts, samplers, strict=True)
    ]
    for sequence in sequences:
        sequence.limit = len(sequence.ids) + count
    runner.run([Segment(slot(sequence), 0, sequence.ids[:-1]) for sequence in sequences])
    passes = 0
    while active := [sequence for sequence in sequences if len(sequence.ids) < sequence.limit]:
        drafts = speculator.propose(active) if speculator else [NOTHING for _ in active]
        windows = [
            Window(sampler_of(sequence), sequence.ids, draft.tokens, draft.distributions)
            for sequence, draft in zip(active, drafts, strict=True)
        ]
        output = runner.run(
            [
                Segment(slot(sequence), len(sequence.ids) - 1, [sequence.ids[-1], *window.drafted], window.rows)
                for sequence, window in zip(active, windows, strict=True)
            ]
        )
        passes += 1
        predictions = output.logits.argmax(-1).tolist()
        row = 0
        for sequence, window, run in zip(active, windows, verify(output.logits, windows), strict=True):
            tokens = [choice.token for choice in run]
            sequence.ids.extend(tokens)
            kv.truncate(slot(sequence), len(sequence.ids) - 1)
            sequence.drafted += len(window.drafted)
            sequence.accepted += len(tokens) - 1
            if speculator:
                speculator.learn(sequence, len(window.drafted), tokens, predictions[row : row + window.rows])
            row += window.rows
        if speculator and speculator.timed:
            speculator.settle(row, len(active))
    for sequence in sequences:
        if speculator:
            speculator.forget(sequence)
        kv.close(slot(sequence))
    return Decoded(
        texts=[list(sequence.ids[sequence.prompt_len :]) for sequence in sequences],
        passes=passes,
        drafted=sum(sequence.drafted for sequence in sequences),
        accepted=sum(sequence.accepted for sequence in sequences),
    )


@dataclass(frozen=True)
class Decoded:
    texts: list[list[int]]
    passes: int
    """Forward passes that wrote."""
    drafted: int
    accepted: int


def slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def sampler_of(sequence: Sequence) -> Sampler:
    assert sequence.sampler is not None
    return sequence.sampler
