"""`leadline engine --listen --policy`: its encoder and its probe; and `--encoder`, which needs no policy."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.engine_alone import run_alone
from gateway.policies import CannotServe
from tests.gateway.alone import SUM, Service, started

pytestmark = [pytest.mark.anyio, pytest.mark.engine]
POLICY = """
version: 1
providers: {home: {engine: embedded}}
models:
  local: {provider: home, model: bundled/base, context: 1024}
  vectors: {provider: home, model: default, embeds: true}
signals:
  difficulty: {probe: default, heads: {local: local}}
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "policy.yaml").write_text(POLICY)
    with started(folder, "--policy", str(folder / "policy.yaml")) as service:
        yield service


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with started(tmp_path_factory.mktemp("encoder"), "--encoder", "default") as service:
        yield service


def product(first: list[float], second: list[float]) -> float:
    return sum(x * y for x, y in zip(first, second, strict=True))


async def test_the_policys_probe_says_how_likely_a_good_answer_is(service: Service) -> None:
    hard = [{"role": "user", "content": "Prove that no cubic surface over the rationals has exactly four lines."}]
    async with service.client() as client:
        easy, other = [(await client.post("/probe", json={"messages": messages})).json() for messages in (SUM, hard)]
    assert easy["p_success"].keys() == other["p_success"].keys() == {"local", "weak", "strong"}
    assert all(0 < chance < 1 for chance in (*easy["p_success"].values(), *other["p_success"].values()))
    assert easy["p_success"]["local"] > other["p_success"]["local"]
    (tokens,), (more,) = easy["prompt_tokens"].values(), other["prompt_tokens"].values()
    assert 0 < tokens < more
    assert easy["cost_us"] > 0


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
@pytest.mark.parametrize("by", ["service", "encoder"])
async def test_an_encoder_turns_texts_into_vectors(path: str, by: str, request: pytest.FixtureRequest) -> None:
    texts = ["the cat sleeps", "a cat is sleeping", "interest rates rose"]
    async with request.getfixturevalue(by).client() as client:
        answer = (await client.post(path, json={"model": "vectors", "input": texts})).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    first, alike, other = (entry["embedding"] for entry in answer["data"])
    assert math.hypot(*first) == pytest.approx(1, abs=1e-4)
    assert product(first, alike) > 0.6 > 0.3 > product(first, other)
    assert answer["usage"]["prompt_tokens"] > 9


async def test_an_encoder_alone_says_what_it_has_not(encoder: Service) -> None:
    async with encoder.client() as client:
        probe = await client.post("/probe", json={"messages": SUM})
        chat = await client.post("/v1/chat/completions", json={"model": "local", "messages": SUM})
        listed = (await client.get("/v1/models")).json()
    assert (probe.status_code, chat.status_code, listed["data"]) == (400, 404, [])
    assert "signals.difficulty.probe" in probe.json()["error"]["message"]
    assert "model: 'local' is not loaded; there is none" in chat.json()["error"]["message"]


async def test_a_policy_names_its_own_encoder() -> None:
    with pytest.raises(CannotServe, match="--policy names the encoder"):
        run_alone(None, "127.0.0.1:8100", Path("policy.yaml"), [], "default")
