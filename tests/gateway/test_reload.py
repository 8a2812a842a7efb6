"""A policy file that changes while requests run: in force whole, or refused whole and said so."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.upstream.breaker import Breaker
from probes.manifest import ARTIFACTS, Certificate, bands_of, read_manifest, write_manifest
from tests.gateway.conftest import Gateway, ask, running, until
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PROVIDERS = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 30s, retries: 0}}
  other: {{base_url: "{url}", timeout: {timeout}, retries: 0}}
"""
ONE = (
    PROVIDERS
    + """
models:
  one: {{provider: fake, model: cheap, context: 16000, price: {{input: $0.15/Mtok, output: $0.60/Mtok}}}}
  aside: {{provider: other, model: cheap, context: 16000, price: free}}
routes:
  - {{name: first, when: {{model: auto}}, use: [one], cache: off}}
"""
)
TWO = (
    PROVIDERS
    + """
models:
  two: {{provider: fake, model: dear, context: 128000, price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok,
        output: $10/Mtok}}}}
  one: {{provider: fake, model: cheap, context: 16000, price: {{input: $0.15/Mtok, output: $0.60/Mtok}}}}
  aside: {{provider: other, model: cheap, context: 16000, price: free}}
routes:
  - {{name: second, when: {{model: auto}}, use: [two], cache: off}}
"""
)
BAD = ONE.replace("use: [one]", "use: [onee]")


class Watched:
    """A gateway on a policy file."""

    def __init__(self, gateway: Gateway, file: Path, url: str) -> None:
        self.gateway = gateway
        self._file = file
        self._url = url

    @property
    def reloader(self) -> Any:
        return self.gateway.app.state.reloader

    @property
    def version(self) -> str:
        found: str = self.gateway.app.state.lifecycle.world.policy.version_hash
        return found

    def write(self, text: str, wait: str = "30s") -> None:
        self._file.write_text(text.format(url=self._url, timeout=wait))

    async def change(self, text: str, wait: str = "30s") -> None:
        """Until it is in force, or refused."""
        version, refused = self.version, self.reloader.refused
        self.write(text, wait)
        self.gateway.app.reload_policy()
        await until(lambda: self.version != version or self.reloader.refused != refused)

    async def get(self, path: str) -> str:
        session, url = self.gateway.session, self.gateway.url
        async with session.get(url + path, headers=self.gateway.headers()) as response:
            return await response.text()


@pytest.fixture
async def watched(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Watched]:
    file = tmp_path / "policy.yaml"
    text = ONE.format(url=upstream.url, timeout="30s")
    file.write_text(text)
    async with running(text, tmp_path / "home", policy_file=file, policy_folder=tmp_path) as gateway:
        yield Watched(gateway, file, upstream.url)


async def test_no_request_fails_or_sees_half_a_policy_while_it_changes(watched: Watched) -> None:
    gateway, going, statuses = watched.gateway, True, []

    async def call(number: int) -> None:
        while going:
            if number % 2:
                status, _, text = await gateway.stream(ask(model="auto"))
                statuses.append((status, text.endswith(b"data: [DONE]\n\n")))
            else:
                status, _, _ = await gateway.chat(ask(model="auto"))
                statuses.append((status, True))

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(call(number))
        versions = {watched.version: "one"}
        for text, model in [(TWO, "two"), (BAD, ""), (ONE, "one"), (TWO, "two"), (BAD, ""), (ONE, "one")]:
            before = len(statuses)
            await until(lambda before=before: len(statuses) > before + 12)  # type: ignore[misc]  # a lambda's default
            await watched.change(text)
            if model:
                versions[watched.version] = model
        going = False

    assert len(versions) == 2
    assert set(statuses) == {(200, True)}
    rows = await gateway.rows()
    assert len(rows) == len(statuses)
    assert {row["policy_version"] for row in rows} == set(versions)
    for row in rows:
        model = versions[row["policy_version"]]
        assert (row["model_served"], row["route"]) == (model, "first" if model == "one" else "second")
        assert json.loads(row["decision"])["policy_version"] == row["policy_version"]
        assert [attempt["model"] for attempt in row["attempt_rows"]] == [model]


async def test_a_request_under_way_keeps_the_world_it_was_admitted_under(
    watched: Watched, upstream: FakeUpstream
) -> None:
    await watched.change(TWO)
    upstream.pace_s = 0.05
    streaming = asyncio.create_task(watched.gateway.stream(ask(model="auto")))
    await until(lambda: upstream.open_streams == 1)
    await watched.change(ONE)  # which has no model `two`
    status, _, text = await streaming
    assert (status, text.endswith(b"data: [DONE]\n\n")) == (200, True)
    (row,) = await watched.gateway.rows()
    assert (row["model_served"], row["outcome"], row["cost_nanousd"]) == ("two", "ok", upstream.truth[0].nanousd)


async def test_a_file_that_changes_is_noticed(watched: Watched) -> None:
    before = watched.version
    watched.write(TWO)
    await until(lambda: watched.version != before)
    status, headers, _ = await watched.gateway.chat(ask(model="auto"))
    assert (status, headers["x-leadline-model"]) == (200, "two")


async def test_a_bad_file_keeps_the_old_policy_and_says_so_until_a_good_one_comes(watched: Watched) -> None:
    good = watched.version
    assert "leadline_policy_stale 0.0" in await watched.get("/metrics")
    await watched.change(BAD)
    assert watched.version == good
    status, _, _ = await watched.gateway.chat(ask(model="auto"))
    assert status == 200
    metrics = await watched.get("/metrics")
    assert "leadline_policy_stale 1.0" in metrics
    assert 'leadline_policy_loads_total{outcome="refused"} 1.0' in metrics
    assert '"policy":"the policy file is not in force' in await watched.get("/health/readiness")
    said = await watched.get("/leadline/v1/admin/policy")
    assert "policy.yaml:11: routes[0].use[0]: no model of this name (got `onee`). Fix: did you mean `one`?" in said
    page = await overview(watched.gateway)
    assert "stays in force" in page
    assert "did you mean `one`?" in page

    await watched.change(TWO)
    assert watched.version != good
    assert "leadline_policy_stale 0.0" in await watched.get("/metrics")
    assert '"refused":null' in await watched.get("/leadline/v1/admin/policy")
    assert "stays in force" not in await overview(watched.gateway)


async def overview(gateway: Gateway) -> str:
    async with gateway.session.post(
        f"{gateway.url}/dashboard/login", data={"key": gateway.key}, allow_redirects=False
    ) as response:
        cookies = {name: morsel.value for name, morsel in response.cookies.items()}
    async with gateway.session.get(f"{gateway.url}/dashboard", cookies=cookies) as response:
        return await response.text()


async def test_a_file_that_goes_is_said_and_one_that_comes_back_is_read(watched: Watched) -> None:
    before = watched.version
    watched._file.unlink()
    await until(lambda: watched.reloader.refused is not None)
    assert "cannot be read" in watched.reloader.refused
    assert watched.version == before
    await watched.change(ONE)
    assert (watched.version, watched.reloader.refused) == (before, None)


async def test_what_is_known_of_providers_that_stay_is_kept(watched: Watched) -> None:
    def breakers() -> dict[str, Breaker]:
        found: dict[str, Breaker] = watched.gateway.app.state.lifecycle.world.breakers
        return found

    breakers()["one"].limited(3600)
    breakers()["aside"].limited(3600)
    upstreams = dict(watched.gateway.app.state.lifecycle.world.upstreams)
    await watched.change(TWO, wait="31s")
    assert (breakers()["one"].closed, breakers()["two"].closed, breakers()["aside"].closed) == (False, True, True)
    now = watched.gateway.app.state.lifecycle.world.upstreams
    assert (now["fake"] is upstreams["fake"], now["other"] is upstreams["other"]) == (True, False)
    assert 'leadline_breaker_state{model="one"} 2.0' in await watched.get("/metrics")


async def test_a_secret_that_is_not_set_refuses_the_file(watched: Watched) -> None:
    await watched.change(ONE.replace("timeout: 30s, retries", "api_key: env:NOT_SET_HERE, timeout: 30s, retries"))
    assert "NOT_SET_HERE" in watched.reloader.refused


GUARANTEED = """
signals:
  difficulty: {{probe: ./words, heads: {{one: weak, aside: strong}}}}
routes:
  - {{name: first, when: {{model: auto}}, candidates: [aside, one], cache: off,
     guarantee: {{loss: accepted_wrong, at_most: 0.1}}}}
"""


def certify(folder: Path, threshold: float) -> None:
    manifest = read_manifest(folder)
    found = Certificate(
        loss="accepted_wrong", heads=("strong",), method="crc", alpha=0.1, delta=None, horizon=None, n=100, risk=0.05,
        threshold=threshold, shares={"strong": 0.5}, rows="held_out", data_sha256="0",
        tensors_sha256=manifest.tensors_sha256, encoder_sha256=manifest.encoder_sha256, created="2026-11-21",
    )  # fmt: skip
    write_manifest(manifest.model_copy(update={"certificates": (found,)}), folder)


async def test_a_new_certificate_is_taken_up_where_the_file_is_read_again(watched: Watched, tmp_path: Path) -> None:
    shutil.copytree(ARTIFACTS / "static", tmp_path / "words")
    certify(tmp_path / "words", 0.5)
    await watched.change(ONE.partition("routes:")[0] + GUARANTEED)

    def threshold() -> float | None:
        guarantee = watched.gateway.app.state.lifecycle.world.policy.routes[0].guarantee
        return guarantee.bound.threshold if guarantee is not None and guarantee.bound is not None else None

    assert watched.reloader.refused is None
    assert threshold() == 0.5
    version = watched.version
    certify(tmp_path / "words", 0.7)
    watched.gateway.app.reload_policy()
    await until(lambda: threshold() == 0.7)
    assert watched.version == version


async def test_a_static_probe_that_was_fitted_anew_is_read_where_the_file_is(watched: Watched, tmp_path: Path) -> None:
    shutil.copytree(ARTIFACTS / "static", tmp_path / "words")
    await watched.change(ONE.partition("routes:")[0] + GUARANTEED.partition("routes:")[0] + ONE[ONE.index("routes:") :])
    assert watched.reloader.refused is None

    def known() -> tuple[str, object]:
        probes = watched.gateway.app.state.lifecycle.world.probes
        assert probes.static is not None
        return probes.static.version, probes.bands["static"]

    version, bands = known()
    manifest = read_manifest(tmp_path / "words")
    assert bands == bands_of(manifest)
    assert any(head.bands for head in manifest.heads)
    anew = {"name": "anew", "heads": tuple(head.model_copy(update={"bands": ()}) for head in manifest.heads)}
    write_manifest(manifest.model_copy(update=anew), tmp_path / "words")
    watched.gateway.app.reload_policy()
    await until(lambda: known()[0] != version)
    assert not any(bands_of(read_manifest(tmp_path / "words")).values())
    assert known()[1] == bands_of(read_manifest(tmp_path / "words"))
