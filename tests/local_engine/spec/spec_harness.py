"""Decoding with drafts over a real runner, step by step, on a clock that the test owns."""

from array import array
from collections.abc import Sequence

from local_engine.kv import KVCache
from local_engine.runner import Runner, Segment
from local_engine.sampler import Sampler
from local_engine.spec.draft import Context
from local_engine.spec.speculator import Speculator
from local_engine.spec.steptime import StepTime
from local_engine.spec.verify import Window, verify

FLAT = {(rows, sequences): 1e-3 for rows in (1, 512) for sequences in (1, 2, 4, 8)}
"""Step times of a machine on which verification is free."""


def flat_speculator(*free: object, drafter: object = None) -> Speculator:
    """Drafts as long as it can: verification is free here, and no time ever passes."""
    return Speculator(free, drafter, step_time=StepTime(FLAT), clock=lambda: 0.0)  # type: ignore[arg-type]


def decode(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    count: int,
    speculator: Speculator | None = None,
) -> tuple[list[list[int]], int]:
    """(`count` tokens after each prompt, forward passes that wrote), all prompts side by side."""
    kv: KVCache = runner.kv
    contexts = [
        Context(array("i", prompt), sampler, kv.open(len(prompt)))
        for prompt, sampler in zip(prompts, samplers, strict=True)
    ]
    limits = [len(prompt) + count for prompt in prompts]
    runner.run([Segment(context.slot or 0, 0, context.ids[:-1]) for context in contexts])
    passes = 0
    while writing := [at for at, context in enumerate(contexts) if len(context.ids) < limits[at]]:
        active = [contexts[at] for at in writing]
        rooms = [limits[at] - len(contexts[at].ids) - 1 for at in writing]
        drafts = speculator.propose(active, rooms) if speculator else None
        windows = []
        for at, context in enumerate(active):
            ids, draft = context.ids, drafts[at] if drafts else None
            assert isinstance(ids, array)
            assert context.sampler is not None
            window = Window(context.sampler, ids)
            windows.append(Window(context.sampler, ids, draft.tokens, draft.distributions) if draft else window)
        output = runner.run(
            [
                Segment(context.slot or 0, len(context.ids) - 1, [context.ids[-1], *window.drafted], window.rows)
                for context, window in zip(active, windows, strict=True)
            ]
        )
        passes += 1
        predictions = output.logits.argmax(-1).tolist()
        row = written = 0
        for context, window, run in zip(active, windows, verify(output.logits, windows), strict=True):
            tokens = [choice.token for choice in run]
            window.history.extend(tokens)
            kv.truncate(context.slot or 0, len(window.history) - 1)
            if speculator:
                speculator.learn(context, len(window.drafted), tokens, predictions[row : row + window.rows])
            row += window.rows
            written += len(tokens)
        if speculator:
            speculator.settle(1e-3, row, len(active), written)
    for context in contexts:
        if speculator:
            speculator.forget(context)
        kv.close(context.slot or 0)
    return [list(context.ids[len(prompt) :]) for context, prompt in zip(contexts, prompts, strict=True)], passes
