"""What the operator says of an engine's host reaches the engine, and what cannot be used is named."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.settings import EngineSettings, Settings, SettingsError
from local_engine.client import EngineClient
from local_engine.config import EngineConfig
from local_engine.errors import EngineGone

SAID = {
    "LEADLINE_ENGINE_DTYPE": ("bfloat16", "dtype", "bfloat16"),
    "LEADLINE_ENGINE_DEVICE": ("cpu", "device", "cpu"),
    "LEADLINE_ENGINE_THREADS": ("1", "threads", 1),
    "LEADLINE_ENGINE_RUNNING": ("3", "max_running", 3),
    "LEADLINE_ENGINE_CHUNK": ("64", "prefill_chunk", 64),
    "LEADLINE_KV_MIB": ("7", "kv_bytes", 7 << 20),
    "LEADLINE_KV_PREFIX_MIB": ("0", "prefix_bytes", 0),
    "LEADLINE_KV_DISK": ("/kv", "prefix_disk", Path("/kv")),
    "LEADLINE_KV_DISK_MIB": ("9", "prefix_disk_bytes", 9 << 20),
    "LEADLINE_KV_REDIS": ("redis://host:1/0", "prefix_redis", "redis://host:1/0"),
}
NEEDS = {
    "models": {"nano": "bundled/nano"},
    "speculation": {},
    "probe": None,
    "encoder": "default",
    "embeds": False,
    "readers": {},
    "exit_with_parent": True,
}


def test_every_setting_has_its_variable_and_the_engine_its_own_default() -> None:
    given = EngineSettings.from_env({name: raw for name, (raw, _, _) in SAID.items()}).given()
    assert given == {field: value for _, field, value in SAID.values()}
    assert set(given) == {field.name for field in dataclasses.fields(EngineSettings)}
    EngineConfig(models={}, socket_path="s", **given)
    assert EngineSettings.from_env({}).given() == {"dtype": "auto", "device": "auto"}


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("LEADLINE_ENGINE_DTYPE", "fp8", "'fp8' is none of auto, float32, bfloat16"),
        ("LEADLINE_ENGINE_DEVICE", "tpu", "'tpu' is none of auto, cpu, cuda"),
        ("LEADLINE_ENGINE_THREADS", "0", "'0' is not a positive whole number of threads"),
        ("LEADLINE_ENGINE_RUNNING", "many", "'many' is not a positive whole number of sequences"),
        ("LEADLINE_KV_MIB", "1.5", "'1.5' is not a positive whole number of MiB"),
        ("LEADLINE_KV_PREFIX_MIB", "-1", "'-1' is not a whole number of MiB"),
        ("LEADLINE_CACHE_MIB", "²", "'²' is not a positive whole number of MiB"),
    ],
)
def test_what_cannot_be_used_is_named_when_the_gateway_starts(name: str, raw: str, words: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: {words}$"):
        Settings.from_env({name: raw})


@pytest.mark.engine
@pytest.mark.anyio
async def test_an_engine_runs_as_it_is_told(tmp_path: Path) -> None:
    said = {"LEADLINE_ENGINE_DTYPE": "bfloat16", "LEADLINE_ENGINE_THREADS": "1", "LEADLINE_KV_MIB": "7"}
    socket = str(tmp_path / "e.sock")
    command = [sys.executable, "-m", "gateway.engine_main", json.dumps(NEEDS), socket]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **said})
    client = EngineClient(socket)
    try:
        async with asyncio.timeout(100):
            while not client.connected:
                assert process.returncode is None
                try:
                    await client.connect()
                except EngineGone:
                    await asyncio.sleep(0.05)
        assert (await client.stats()).kv_bytes_limit == 7 << 20
        (card,) = client.hello.models
        assert (card.dtype, card.device) == ("bfloat16", "cpu")
    finally:
        await client.close()
        process.terminate()
        await process.wait()


@pytest.mark.engine
def test_a_device_that_is_not_there_ends_the_engine_with_a_sentence(tmp_path: Path) -> None:
    env = {**os.environ, "LEADLINE_ENGINE_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gateway.engine_main", json.dumps(NEEDS), str(tmp_path / "e.sock")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "engine: LEADLINE_ENGINE_DEVICE: torch sees no CUDA device here" in done.stderr
