"""Many callers who ask, leave and come back, in an engine with little room: nothing of them stays."""

import random
from typing import Any

from local_engine.kv import KVShape
from local_engine.model import LocalModel
from local_engine.types import Failed, Finished, SamplingParams, ScoreResult, TapSpec
from tests.conftest import Size
from tests.local_engine.devices import ON_DEVICES
from tests.local_engine.engine_harness import Caller, StartEngine

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"n": 3},
    {"priority": 2},
    {"deadline_s": 0.02},
    {"deadline_s": 0.0, "n": 2},
    {"salt": "b"},
    {"taps": TapSpec((0, 2), "generated")},
)


@ON_DEVICES
def test_nothing_is_left_of_those_who_leave(bundled: LocalModel, start_engine: StartEngine, size: Size) -> None:
    """Each command ends, and in one way; then there is no KV, no sequence and no job (the fixture looks too)."""
    rng = random.Random(3)
    engine = start_engine(bundled, kv_bytes=3 * 256 * KVShape.of(bundled).token_bytes, prefill_chunk=32)
    for _ in range(size(4, 200)):
        caller, leaver = Caller(engine), Caller(engine)
        ids = []
        for at in range(12):
            text = f"What is {rng.randint(0, 99)} + {rng.randint(0, 99)}?" * rng.randint(1, 6)
            sampling = SamplingParams(temperature=1.0, seed=at, max_tokens=rng.randint(1, 40))
            who = leaver if rng.random() < 0.25 else caller
            if rng.random() < 0.2:
                id = who.score(text, ["7", "The answer is 7."][: rng.randint(1, 2)])
            else:
                id = who.generate(text, sampling, **rng.choice(OPTIONS))
            if who is caller:
                ids.append(id)
            if ids and rng.random() < 0.4:
                caller.cancel(rng.choice(ids))
        leaver.link.close()
        for id in ids:
            ends = [event for event in caller.wait(id) if isinstance(event, Finished | Failed | ScoreResult)]
            choices = [event.choice for event in ends if isinstance(event, Finished)]
            assert len(choices) == len(set(choices))
            assert all(event.code == "deadline" for event in ends if isinstance(event, Failed))
    caller.finished(caller.generate("What is 1 + 1?"))  # behind it, whatever was closed has ended
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_bytes, stats.kv_tokens) == (0, 0, 0, 0)
    assert stats.preemptions > 0
