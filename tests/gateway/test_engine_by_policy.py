"""`leadline engine --listen --policy`: its names, encoder and probe; and `--encoder`, which needs no policy."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.engine_alone import run_alone
from gateway.policies import CannotServe
from tests.gateway.alone import SUM, Service, started

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]
POLICY = """
version: 1
providers: {home: {engine: embedded}}
models:
  local: {provider: home, model: bundled/base, context: 1024}
  brief: {provider: home, model: bundled/base, context: 1024}
  small: {provider: home, model: bundled/nano, context: 1024}
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
    assert 0 < easy["prompt_tokens"]["bundled/base"] < other["prompt_tokens"]["bundled/base"]
    assert easy["cost_us"] > 0


async def test_the_policys_names_and_those_that_gateways_send_are_both_known(service: Service) -> None:
    """A gateway elsewhere has in its own policy, as `model`, what is listed here."""
    names = ["local", "brief", "small", "bundled/base", "bundled/nano"]
    rules = [{"role": "system", "content": "You are a careful calculator. " * 10}, *SUM]
    async with service.client() as client:

        async def ask(path: str, **more: Any) -> dict[str, Any]:
            answer = await client.post(path, json={"messages": rules, **more})
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        listed = (await client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["root"]) for card in listed] == [
            ("local", "bundled/base"), ("brief", "bundled/base"), ("small", "bundled/nano"),
            ("bundled/base", "bundled/base"), ("bundled/nano", "bundled/nano"),
        ]  # fmt: skip
        assert {card["max_model_len"] for card in listed} == {1024}
        plain = {"temperature": 0, "max_tokens": 20}
        answers = {name: await ask("/v1/chat/completions", model=name, **plain) for name in names}
        assert [answer["model"] for answer in answers.values()] == names
        said = {name: answer["choices"][0]["message"] for name, answer in answers.items()}
        assert said["local"] == said["brief"] == said["bundled/base"] != said["small"] == said["bundled/nano"]
        assert answers["brief"]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "it is the same model"
        for name in ("local", "bundled/base"):
            assert (await ask("/score", model=name, candidates=["5"]))["model"] == name
            assert (await ask("/hidden", model=name, layers=[1]))["model"] == name
            assert (await ask("/prefix/lookup", model=name))["tokens"] > 0
            async with client.stream("GET", "/prefix/events", params={"model": name}) as events:
                assert events.status_code == 200
        shared = {"type": "speculate", "draft": "small"}
        models = (await ask("/v1/chat/completions", model="local", plan=shared, **plain))["usage"]["plan"]["models"]
        assert [use["model"] for use in models] == ["bundled/base", "bundled/nano"]
        wrong = await client.post("/v1/chat/completions", json={"model": "nope", "messages": SUM})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
    assert f"there is {', '.join(names)}." in wrong.json()["error"]["message"]


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
