"""The prefix store at work in the engine: what is computed once is not computed again, and nothing else changes."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from local_engine.config import Device, EngineConfig
from local_engine.engine import Engine
from local_engine.errors import ConfigError
from local_engine.kv import KVCache
from local_engine.model import LocalModel, load_model
from local_engine.prefix_block import Block
from local_engine.prefix_disk import DiskTier
from local_engine.prefix_identity import weights_fingerprint
from local_engine.prefix_tiers import SlowTiers, open_tiers
from local_engine.runner import Runner, new_kv
from local_engine.types import SamplingParams
from tests.local_engine.devices import ON_DEVICES
from tests.local_engine.engine_harness import PATIENCE_S, Caller, StartEngine, Watch

SHARED = "You add numbers and show each step. " * 100
FEW = SamplingParams(temperature=0, max_tokens=6)
BLOCK = 16


@pytest.fixture(scope="module")
def roomy(
    device: torch.device, tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> LocalModel:
    """A tiny random model with room for long prompts, which never ends its turn."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    shutil.copytree(tiny_folder("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    where: Device = "cuda" if device.type == "cuda" else "cpu"
    return dataclasses.replace(load_model("m", str(folder), "float32", where), end_tokens=frozenset())


class Answered:
    """One request to an engine, and what it took."""

    def __init__(self, engine: Engine, watch: Watch, text: str, salt: str = "tenant") -> None:
        before = len(watch.passes)
        caller = Caller(engine)
        id = caller.generate(text, FEW, salt=salt)
        end = caller.finished(id)
        self.text = caller.reasoning(id) + caller.content(id)
        self.input_tokens = end.input_tokens
        self.cached_tokens = end.cached_tokens
        self.computed_tokens = sum(sum(sizes) for sizes in watch.sizes[before:])
        assert self.computed_tokens == self.input_tokens - self.cached_tokens + end.output_tokens - 1


@ON_DEVICES
def test_of_two_prompts_that_begin_alike_the_second_computes_only_the_rest(
    roomy: LocalModel, start_engine: StartEngine
) -> None:
    watch, plain_watch = Watch(), Watch()
    engine = start_engine(roomy, make_runner=watch)
    plain = start_engine(roomy, make_runner=plain_watch, prefix_bytes=0)
    first = Answered(engine, watch, SHARED + "What is 2 + 2?")
    second = Answered(engine, watch, SHARED + "Is 7 a prime?")
    assert first.cached_tokens == 0
    assert second.cached_tokens >= 1000
    assert second.cached_tokens % BLOCK == 0
    assert second.computed_tokens < 200
    assert second.text == Answered(plain, plain_watch, SHARED + "Is 7 a prime?").text
    assert Answered(plain, plain_watch, SHARED + "Is 7 a prime?").cached_tokens == 0
    stats = engine.prefix_stats()["m"]
    assert stats.hit_tokens == second.cached_tokens
    assert stats.asked_tokens == first.input_tokens + second.input_tokens
    assert plain.prefix_stats() == {}


@ON_DEVICES
def test_a_repeated_prompt_still_computes_its_last_token(roomy: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch()
    engine = start_engine(roomy, make_runner=watch)
    answers = [Answered(engine, watch, SHARED) for _ in range(2)]
    assert answers[0].text == answers[1].text
    assert answers[1].cached_tokens == (answers[1].input_tokens - 1) // BLOCK * BLOCK


def test_another_tenant_computes_everything_itself(roomy: LocalModel, start_engine: StartEngine) -> None:
    watch = Watch()
    engine = start_engine(roomy, make_runner=watch)
    mine = Answered(engine, watch, SHARED, salt="a")
    theirs = Answered(engine, watch, SHARED, salt="b")
    assert theirs.cached_tokens == 0
    assert theirs.text == mine.text


@ON_DEVICES
def test_after_a_restart_the_disk_has_it(roomy: LocalModel, start_engine: StartEngine, tmp_path: Path) -> None:
    def tiers() -> SlowTiers:
        return SlowTiers([DiskTier(tmp_path, 1 << 26)], wait_s=PATIENCE_S)

    Runner(roomy, new_kv(roomy, 1 << 20))  # the first one takes weights over: both engines are to find them so
    watch, written = Watch(), tiers()
    engine = Engine({"m": roomy}, make_runner=watch, prefix_tiers=written)
    engine.start()
    before = Answered(engine, watch, SHARED + "What is 2 + 2?")
    assert written.flush(PATIENCE_S)  # at its end an engine gives that a few seconds
    engine.stop()
    watch = Watch()
    engine = start_engine(roomy, make_runner=watch, prefix_tiers=tiers())
    after = Answered(engine, watch, SHARED + "What is 2 + 2?")  # first: what computing takes bounds later fetches
    assert after.cached_tokens >= 1000
    assert after.text == before.text
    other = Answered(engine, watch, SHARED + "Is 7 a prime?", salt="other")
    assert other.cached_tokens == 0
    stats = engine.prefix_stats()["m"]
    assert stats.promoted_tokens == after.cached_tokens
    assert stats.tiers[0].medium == "disk"


class SilentTier:
    """Never answers a read before it is told to stop."""

    medium = "silent"

    def __init__(self) -> None:
        self.reads = Watch(gated=True)

    def may_have(self, root: bytes, digest: bytes) -> bool:
        return True

    def read(self, root: bytes, digests: Sequence[bytes]) -> list[bytes]:
        self.reads.enter([])
        return []

    def keep(self, root: bytes, path: Sequence[Block], rewrite: frozenset[Block]) -> Iterator[None]:
        return iter(())

    def forget(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        pass

    def close(self) -> None:
        pass


def test_while_one_request_waits_for_a_slow_tier_others_are_stepped_and_it_can_be_cancelled(
    roomy: LocalModel, start_engine: StartEngine
) -> None:
    tier = SilentTier()
    engine = start_engine(roomy, prefix_tiers=SlowTiers([tier], wait_s=PATIENCE_S))
    caller = Caller(engine)
    tier.reads.allow(1)
    runs = caller.generate("Count for ever.", SamplingParams(temperature=0))
    wait_for_steps(engine, 2)
    waits = caller.generate(SHARED, FEW)
    tier.reads.wait_for_pass(2)
    wait_for_steps(engine, engine.stats().steps + 5)
    caller.cancel(waits)
    assert caller.finished(waits).finish_reason == "cancelled"
    caller.cancel(runs)
    assert caller.finished(runs).finish_reason == "cancelled"
    tier.reads.allow(1000)


def wait_for_steps(engine: Engine, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while engine.stats().steps < steps:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_request_is_served_when_a_slow_tier_does_not_answer_in_time(
    roomy: LocalModel, start_engine: StartEngine
) -> None:
    tier = SilentTier()
    engine = start_engine(roomy, prefix_tiers=SlowTiers([tier], wait_s=0.05))
    caller = Caller(engine)
    assert caller.finished(caller.generate(SHARED, FEW)).cached_tokens == 0
    tier.reads.allow(1000)


def test_every_weight_is_in_the_fingerprint(bundled: LocalModel, tiny_folder: Callable[[str], Path]) -> None:
    network = load_model("m", str(tiny_folder("qwen3")), "float32", "cpu").network  # no runner took its weights over
    before = weights_fingerprint(network)
    assert weights_fingerprint(network) == before != weights_fingerprint(bundled.network)
    with torch.no_grad():
        weight = network.model.layers[1].mlp.down_proj.weight
        weight[0, 0] += 1.0
        changed = weights_fingerprint(network)
        weight[0, 0] -= 1.0
    assert changed != before


def test_a_model_that_drafts_for_another_has_its_own_weights_in_its_stores_identity(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base, draft = (load_model("m", str(tiny_folder("qwen3")), "float32", "cpu") for _ in range(2))
    expected = weights_fingerprint(draft.network)
    tiers = open_tiers(EngineConfig(models={}, socket_path="s", prefix_disk=tmp_path))

    def drafting(name: str, model: LocalModel, kv: KVCache) -> None:
        Runner(draft, new_kv(draft, 1 << 20))  # repacks the draft's weights, before its own lane is made

    engine = Engine({"base": base, "draft": draft}, prefix_tiers=tiers, make_speculator=drafting)
    engine.start()
    try:
        store = engine._lanes["draft"].store
        assert store is not None
        assert store.identity.weights == expected
    finally:
        engine.stop()


def test_settings_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = EngineConfig(models={}, socket_path="s", prefix_disk=tmp_path / "file")
    with pytest.raises(ConfigError, match=r"prefix_disk: .*file cannot be used: Not a directory"):
        open_tiers(config)
    with pytest.raises(ConfigError, match="prefix_redis: cannot be used: Redis URL must specify"):
        open_tiers(EngineConfig(models={}, socket_path="s", prefix_redis="localhost:6379"))
    assert open_tiers(EngineConfig(models={}, socket_path="s")) is None
    with pytest.raises(ValueError, match="prefix_disk_bytes must be at least 1, not 0"):
        EngineConfig(models={}, socket_path="s", prefix_disk_bytes=0)
