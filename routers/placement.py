"""How long an answer will take at a target, from what the target does now: its queue, its speed, its free places.

As in KAIROS (heterogeneous targets behind one name): a request waits for a place behind those already queued, its
prompt, less what a kept prefix saves, is read at the target's prefill speed, and its answer is written at the speed of
one stream. What a target has not told or shown is left out, and an expectation that would be a guess is None.
"""

from routers.types import Load


def wait_ms(load: Load, answer_tokens: float) -> float:
    """Expected wait for a place: as many answers as are ahead of this one, shared by the places; 0 where one is free,
    and where the places are not known."""
    if not load.slots or load.tokens_per_s is None or load.tokens_per_s <= 0:
        return 0.0
    ahead = load.queue + load.running + 1 - load.slots
    return ahead / load.slots * answer_tokens / load.tokens_per_s * 1000 if ahead > 0 else 0.0


def ttft_ms(load: Load, new_tokens: int, answer_tokens: float) -> float | None:
    """Expected time to the first token of an answer. `new_tokens`: of the prompt, those that no kept prefix holds.
    Where prompts have not yet told reading from the rest, as most first tokens came of late; None: none has come."""
    speed = load.prefill_tokens_per_s
    if speed is not None and speed > 0:
        return wait_ms(load, answer_tokens) + load.start_ms + new_tokens / speed * 1000
    if load.ttft_ms_p50 is None:
        return None
    return max(load.ttft_ms_p50, wait_ms(load, answer_tokens))


def ttft_ms_p95(load: Load, new_tokens: int, answer_tokens: float) -> float | None:
    """The slowest first token in twenty: as measured of late, and never less than what is expected now."""
    expected = ttft_ms(load, new_tokens, answer_tokens)
    measured = load.ttft_ms_p95
    if expected is None or measured is None:
        return expected if measured is None else measured
    return max(expected, measured)


def latency_ms(load: Load, new_tokens: int, answer_tokens: float) -> float | None:
    """Expected time to the end of an answer. None: the speed of writing is not known. Where no first token has been
    seen, the speed is that of whole answers, first token included."""
    if load.tokens_per_s is None or load.tokens_per_s <= 0:
        return None
    first = ttft_ms(load, new_tokens, answer_tokens)
    if first is None:
        first = wait_ms(load, answer_tokens)
    return first + answer_tokens / load.tokens_per_s * 1000
