"""A policy that names models or probes which the running engine has not loaded: a fresh engine takes its place."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.engines import Engines
from gateway.reload import PolicyReloader
from local_engine.config import locate
from probes.manifest import ARTIFACTS, read_manifest, write_manifest
from tests.gateway.conftest import Gateway, ask, running, until

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(240)]

START_S = 120.0
HOME = "version: 1\nproviders: {home: {engine: embedded, timeout: 120s}}\nmodels:\n"
SMALL = "  small: {provider: home, model: bundled/nano}\n"
LARGE = "  large: {provider: home, model: bundled/base}\n"
ROUTE = "routes:\n  - {name: auto, when: {model: auto}, use: [%s], cache: off}\n"
FAR = HOME.replace("home: {engine: embedded, timeout: 120s}", 'far: {base_url: "http://127.0.0.1:9/v1"}')
NO_ENGINE = FAR + "  far: {provider: far, model: x, price: free}\n" + ROUTE % "far"
PROBE = "signals:\n  difficulty: {probe: ./probe, heads: {small: weak}}\n"
LONG = ask("What is 9 + 8 - 7 + 6 - 5 + 4?", model="small", stream=True, n=32, temperature=2.0, max_tokens=400)


class Home:
    """A gateway on a policy file, in a folder of its own."""

    def __init__(self, gateway: Gateway, file: Path) -> None:
        self.gateway = gateway
        self.file = file

    @property
    def engines(self) -> Engines:
        found = self.gateway.app._engines
        assert found is not None
        return found

    @property
    def reloader(self) -> PolicyReloader:
        found = self.gateway.app.state.reloader
        assert found is not None
        return found

    @property
    def version(self) -> str:
        found: str = self.gateway.app.state.lifecycle.world.policy.version_hash
        return found

    def write(self, text: str) -> None:
        self.file.write_text(text)
        self.gateway.app.reload_policy()

    async def change(self, text: str) -> None:
        """Until it is in force."""
        version, refused = self.version, self.reloader.refused
        self.write(text)
        await until(lambda: self.version != version or self.reloader.refused != refused, START_S)
        assert self.reloader.refused is None

    async def ready(self) -> int:
        await until(lambda: self.engines.link.ready.is_set(), START_S)
        assert self.engines.link.pid is not None
        return self.engines.link.pid

    async def answer(self, model: str) -> tuple[int, Any]:
        status, _, body = await self.gateway.chat(ask("What is 2 + 3?", model=model, temperature=0, max_tokens=60))
        return status, body

    async def get(self, path: str) -> Any:
        url = self.gateway.url + path
        async with self.gateway.session.get(url, headers=self.gateway.headers()) as response:
            return await response.json()


@asynccontextmanager
async def home(folder: Path, text: str, **options: Any) -> AsyncIterator[Home]:
    file = folder / "policy.yaml"
    file.write_text(text)
    async with running(text, folder / "home", policy_file=file, policy_folder=folder, **options) as gateway:
        yield Home(gateway, file)


def processes() -> Iterator[psutil.Process]:
    for child in psutil.Process().children():
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
        if "gateway.engine_main" in " ".join(command):
            yield child


async def test_new_local_models_are_served_by_a_fresh_engine_and_old_requests_end_on_the_old_one(
    tmp_path: Path,
) -> None:
    async with home(tmp_path, HOME + SMALL + ROUTE % "small") as at:
        first = await at.ready()
        async with at.gateway.session.post(
            f"{at.gateway.url}/v1/chat/completions", json=LONG, headers=at.gateway.headers()
        ) as streaming:
            assert await streaming.content.readany()
            at.write(HOME + SMALL + LARGE + ROUTE % "large")
            await until(lambda: at.reloader.waits, START_S)
            assert "waits for a fresh engine" in (await at.get("/health/readiness"))["degraded"]["policy"]
            await at.change(HOME + SMALL + LARGE + ROUTE % "large")
            assert (await at.get("/health/readiness"))["degraded"] == {}
            second = await at.ready()
            assert second != first
            assert {process.pid for process in processes()} == {first, second}
            assert (await at.answer("large"))[0] == (await at.answer("auto"))[0] == 200
            assert (await at.get("/health/readiness"))["unavailable"] == {}
            assert {"small", "large"} <= {model["id"] for model in (await at.get("/v1/models"))["data"]}
            rest = await streaming.content.read()
        assert rest.endswith(b"data: [DONE]\n\n"), "it ended where it had begun"
        await until(lambda: [process.pid for process in processes()] == [second], 60)
        async with at.gateway.session.get(f"{at.gateway.url}/metrics") as scraped:
            assert "leadline_engine_up 1.0" in await scraped.text()
        rows = await at.gateway.rows()
    assert {(row["model_served"], row["outcome"]) for row in rows} == {("small", "ok"), ("large", "ok")}
    assert [*processes()] == []


async def test_a_gateway_that_stops_keeps_nothing_of_the_engine_that_it_was_leaving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.engines.QUIET_S", 60.0)
    before = asyncio.all_tasks()
    async with home(tmp_path, HOME + SMALL + ROUTE % "small") as at:
        first = await at.ready()
        await at.change(HOME + SMALL + LARGE + ROUTE % "large")
        assert await at.ready() != first
        assert first in {process.pid for process in processes()}, "it is left once it has been quiet for a while"
    assert [*processes()] == []
    assert asyncio.all_tasks() == before


async def test_what_cannot_be_loaded_leaves_the_engine_and_the_policy_as_they_were(tmp_path: Path) -> None:
    place, _ = locate("bundled/nano")
    shutil.copytree(place, tmp_path / "broken")
    for weights in (tmp_path / "broken").glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    broken = "  broken: {provider: home, model: ./broken}\n"
    async with home(tmp_path, HOME + SMALL + ROUTE % "small") as at:
        first, version = await at.ready(), at.version
        at.write(HOME + SMALL + broken + ROUTE % "broken")
        await until(lambda: at.reloader.refused is not None, START_S)
        refused = at.reloader.refused or ""
        assert f"{at.file}:5: models.broken.model: the engine has not loaded" in refused
        assert "a fresh engine for it did not start (the engine process ended with status 1" in refused
        assert at.version == version
        assert (await at.answer("small"))[0] == 200
        assert [process.pid for process in processes()] == [first]
        await at.change(HOME + SMALL + LARGE + ROUTE % "large")
        assert (await at.answer("large"))[0] == 200


async def test_the_first_local_model_may_come_later_and_the_last_one_go(tmp_path: Path) -> None:
    async with home(tmp_path, NO_ENGINE) as at:
        assert [*processes()] == []
        await at.change(HOME + SMALL + ROUTE % "small")
        assert (await at.answer("small"))[0] == 200
        await at.change(NO_ENGINE)
        status, body = await at.answer("small")
        assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_an_engine_that_somebody_else_keeps_up_is_theirs_to_replace(tmp_path: Path) -> None:
    async with home(tmp_path, NO_ENGINE, engine=tmp_path / "theirs.sock") as at:
        at.write(HOME + SMALL + ROUTE % "small")
        await until(lambda: at.reloader.refused is not None)
        assert "models.small.model: the engine has not loaded 'bundled/nano' but nothing" in str(at.reloader.refused)
        assert "restart that engine with this policy, then this gateway" in str(at.reloader.refused)
        assert [*processes()] == []


async def test_a_probe_that_was_fitted_anew_in_its_place_is_loaded_when_the_file_is_read_again(tmp_path: Path) -> None:
    shutil.copytree(ARTIFACTS / "default", tmp_path / "probe")
    policy = HOME + SMALL + PROBE + ROUTE % "small"
    async with home(tmp_path, policy) as at:
        first = await at.ready()
        version = at.engines.link.client and at.engines.link.client.hello.probe_version
        manifest = read_manifest(tmp_path / "probe")
        write_manifest(manifest.model_copy(update={"name": "fitted-anew"}), tmp_path / "probe")
        at.gateway.app.reload_policy()
        await until(lambda: at.engines.link.pid not in (None, first), START_S)
        client = at.engines.link.client
        assert client is not None
        assert client.hello.probe_version != version
        world = at.gateway.app.state.lifecycle.world
        assert world.engine is at.engines.link
        await at.gateway.chat(ask("What is 3 + 4?", model="auto"))
        assert at.reloader.refused is None
