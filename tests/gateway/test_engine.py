"""The whole path on one machine: a gateway process, its engine process, the bundled model, the probe."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway import engine_link
from local_engine import client
from local_engine.arithmetic import problems
from probes.extract import locate
from routers.explain import from_dict, to_dict
from tests.conftest import free_port, stop, wait_for_port
from tests.gateway.conftest import Gateway, running, until
from tests.gateway.fake_upstream import FakeUpstream

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]
READY_S = 200
"""An engine takes half a minute to come up on a busy machine."""
LONG: dict[str, Any] = {"min_tokens": 900, "temperature": 1}
"""So long an answer is under way still, however late its caller does what it does."""

POLICY = """
version: 1
providers:
  home: {{engine: embedded}}
  fake: {{base_url: "{url}", timeout: 5s, retries: 0}}
models:
  local: {{provider: home, model: bundled/base, context: 1024, price: free}}
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
signals:
  difficulty: {{probe: default, heads: {{local: local, cheap: weak}}, timeout: 20s}}
routes:
  - name: private
    when: {{tag: private}}
    use: [local]
  - name: auto
    when: {{model: auto}}
    objective: best
    candidates: [local, cheap]
    on_failure: [cheap]
limits: [{{key: "*", budget: $1/day}}]
"""


@pytest.fixture
async def home(upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway with an engine, both up."""
    async with running(POLICY.format(url=upstream.url), tmp_path / "home") as gateway:
        assert gateway.app.engine is not None
        async with asyncio.timeout(READY_S):
            await gateway.app.engine.ready.wait()
        yield gateway


def ask(text: str, model: str = "local", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


async def test_the_bundled_model_answers_and_reasons_in_one_stream(home: Gateway) -> None:
    (problem,) = problems(seed=11, level=1, n=1)
    async with openai.AsyncOpenAI(base_url=f"{home.url}/v1", api_key=home.key) as client:
        stream = await client.chat.completions.create(
            model="local", messages=[{"role": "user", "content": problem.question}], temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_headers={"Cache-Control": "no-store"},
        )  # fmt: skip
        content = reasoning = ""
        usage = None
        async for chunk in stream:
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += (choice.delta.model_extra or {}).get("reasoning_content", "")
            usage = chunk.usage or usage
        plain = await client.chat.completions.create(
            model="local", messages=[{"role": "user", "content": problem.question}], temperature=0,
            extra_headers={"Cache-Control": "no-store"},
        )  # fmt: skip
    assert reasoning
    assert content == plain.choices[0].message.content
    assert usage is not None
    assert plain.usage is not None
    cold, warm = usage.prompt_tokens_details, plain.usage.prompt_tokens_details
    assert cold is not None
    assert warm is not None
    assert cold.cached_tokens == 0
    assert 0 < (warm.cached_tokens or 0) < plain.usage.prompt_tokens, "the prompt was read once"
    assert plain.usage.model_copy(update={"prompt_tokens_details": cold}) == usage
    rows = await home.rows()
    assert {(row["cost_nanousd"], row["cost_estimated"]) for row in rows} == {(0, False)}
    assert len({(row["output_tokens"], row["reasoning_tokens"]) for row in rows}) == 1
    assert {row["cached_input_tokens"] for row in rows} == {0, warm.cached_tokens}
    assert {row["input_tokens"] + row["cached_input_tokens"] for row in rows} == {usage.prompt_tokens}


async def test_choices_stop_logprobs_and_seed_on_the_local_model(home: Gateway) -> None:
    body = ask("What is 3 + 4?", n=2, logprobs=True, top_logprobs=2, temperature=1.0, seed=5)
    _, _, answer = await home.chat(body, **{"Cache-Control": "no-store"})
    _, _, again = await home.chat(body, **{"Cache-Control": "no-store"})
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    # Logprobs differ in their last digits with what shares a pass, drafts among it; the texts do not.
    assert [c["message"] for c in answer["choices"]] == [c["message"] for c in again["choices"]]
    token = answer["choices"][0]["logprobs"]["content"][0]
    assert token["logprob"] <= 0
    assert len(token["top_logprobs"]) == 2
    _, _, stopped = await home.chat(ask("What is 3 + 4?", stop=[" is"]))
    assert stopped["choices"][0]["message"]["content"] == "The answer"
    assert stopped["choices"][0]["finish_reason"] == "stop"


async def test_auto_sounds_the_query_and_says_why(home: Gateway) -> None:
    await home.chat(ask("What is 23 + 48 - 7?", model="auto"))
    await home.chat(ask("Which enzyme unwinds DNA during replication in eukaryotes?", model="auto"))
    hard, easy = await home.rows()
    decisions = [to_dict(from_dict(json.loads(row["decision"]))) for row in (easy, hard)]
    assert all(d["probe_version"] and not d["degraded"] for d in decisions)
    assert all(0 <= c["p_success"] <= 1 for d in decisions for c in d["candidates"])
    assert (easy["model_served"], hard["model_served"]) == ("local", "cheap")


async def test_a_probe_may_read_with_an_encoder_of_its_own(upstream: FakeUpstream, tmp_path: Path) -> None:
    """A copy of the default encoder in a folder beside the policy, named by a relative path."""
    (tmp_path / "encoder").symlink_to(locate("default")[0])
    policy = POLICY.format(url=upstream.url).replace("probe: default,", "probe: default, encoder: ./encoder,")
    async with running(policy, tmp_path / "home", policy_folder=tmp_path) as gateway:
        engine, process = gateway.app.engine, gateway.app.engine_process
        assert engine is not None
        assert process is not None
        await until(lambda: engine.ready.is_set() or process.failed.is_set(), READY_S)
        await gateway.chat(ask("What is 12 + 30?", model="auto"))
        (row,) = await gateway.rows()
    assert json.loads(row["decision"])["probe_version"]


async def test_a_prompt_beyond_the_local_context_is_refused_with_its_count(home: Gateway) -> None:
    status, _, body = await home.chat(ask("1 + " * 900))
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "1024" in body["error"]["message"]


async def test_a_local_model_writes_no_more_than_is_held_for_it(tmp_path: Path) -> None:
    """Its policy gives it less than its window; the caller says nothing of a length, or more."""
    dear = "price: {input: $0/Mtok, output: $1000/Mtok}"
    policy = f"""
version: 1
providers: {{home: {{engine: embedded}}}}
models:
  brief: {{provider: home, model: bundled/base, context: 1024, max_output: 20, {dear}}}
  narrow: {{provider: home, model: bundled/base, context: 60, {dear}}}
routes: [{{name: auto, when: {{model: auto}}, use: [brief], cache: off}}]
"""
    hard = "What is 23 + 48 - 7 * 3 + 5 * 6 - 2?"
    async with running(policy, tmp_path / "home") as gateway:
        assert gateway.app.engine is not None
        async with asyncio.timeout(READY_S):
            await gateway.app.engine.ready.wait()
        for model, most in (("brief", 20), ("narrow", 60)):
            status, _, body = await gateway.chat(ask(hard, model))
            assert (status, body["choices"][0]["finish_reason"]) == (200, "length"), model
            usage = body["usage"]
            written = usage["completion_tokens"] if model == "brief" else usage["total_tokens"]
            assert written == most, model
            row = (await gateway.rows())[0]
            assert row["cost_nanousd"] <= row["reserved_nanousd"]
        status, _, body = await gateway.chat(ask(hard, "brief", min_tokens=500))
        assert (status, body["error"]["param"]) == (400, "min_tokens")
        assert "from 0 to max_tokens (20), not 500" in body["error"]["message"]
        status, _, body = await gateway.chat(ask("7 " * 80, "narrow"))
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        status, _, body = await gateway.chat(ask(hard, "brief", max_tokens=500))
        assert (status, body["error"]["param"]) == (400, "max_tokens")
        assert "answers at most 20 tokens, 500 asked; send max_tokens: 20" in body["error"]["message"]


async def test_a_private_tag_stays_on_this_machine(home: Gateway, upstream: FakeUpstream) -> None:
    status, headers, _ = await home.chat(ask("2 + 2", model="auto"), **{"X-Leadline-Tags": "private"})
    assert (status, headers["x-leadline-model"], headers["x-leadline-route"]) == (200, "local", "private")
    status, _, body = await home.chat(ask("2 + 2", model="cheap"), **{"X-Leadline-Tags": "private"})
    assert (status, body["error"]["code"]) == (403, "forbidden")
    assert upstream.bodies == []


async def test_a_caller_who_leaves_frees_the_engine(home: Gateway) -> None:
    async with home.session.post(
        f"{home.url}/v1/chat/completions", json=ask("What is 9 + 8 - 7 + 6 - 5 + 4?", stream=True, n=8) | LONG,
        headers=home.headers(),
    ) as response:  # fmt: skip
        await response.content.readany()
        response.close()
    async with asyncio.timeout(60):
        while not (rows := await home.rows()):
            await asyncio.sleep(0.02)
    assert rows[0]["outcome"] == "cancelled"
    status, _, _ = await home.chat(ask("What is 1 + 1?"))
    assert status == 200


async def test_a_dead_engine_is_replaced_while_the_fallback_serves(home: Gateway, upstream: FakeUpstream) -> None:
    engine = home.app.engine
    assert engine is not None
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.client is None)
    status, headers, _ = await home.chat(ask("What is 2 + 3?", model="auto"))
    assert (status, headers["x-leadline-model"]) == (200, "cheap")
    assert headers["x-leadline-degraded"] in ("unavailable", "probe_unavailable")
    status, headers, body = await home.chat(ask("What is 2 + 3?"))
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (503, "unavailable", "true")
    assert "engine" in body["error"]["message"]
    async with asyncio.timeout(READY_S):
        await engine.ready.wait()
    status, _, body = await home.chat(ask("What is 2 + 3?"))
    assert (status, body["choices"][0]["message"]["content"]) == (200, "The answer is 5.")


async def test_an_engine_that_is_back_serves_at_once_however_many_calls_it_lost(home: Gateway) -> None:
    engine = home.app.engine
    assert engine is not None
    assert engine.pid is not None

    async def lost() -> bytes:
        return (await home.stream(ask("What is 9 + 8 - 7 + 6 - 5 + 4?", n=8)))[2]

    asked = engine.client
    assert asked is not None
    os.kill(engine.pid, signal.SIGSTOP)
    calls = [asyncio.create_task(lost()) for _ in range(8)]
    await until(lambda: len(asked._inboxes) >= 8)
    os.kill(engine.pid, signal.SIGKILL)
    ends = await asyncio.gather(*calls)
    assert all(b'"error"' in raw for raw in ends), "more than a breaker takes"
    assert home.app.state.lifecycle.world.breakers["local"].state == "closed"
    async with asyncio.timeout(READY_S):
        await engine.ready.wait()
    assert (await home.chat(ask("What is 2 + 3?")))[0] == 200


async def test_an_engine_that_hangs_is_not_available_until_it_answers_again(
    home: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = home.app.engine
    assert engine is not None
    assert engine.pid is not None

    async def readiness() -> dict[str, Any]:
        async with home.session.get(f"{home.url}/health/readiness") as response:
            found: dict[str, Any] = await response.json()
            return found

    assert "local" not in (await readiness())["unavailable"]
    monkeypatch.setattr(engine_link, "ASKED_EVERY_S", 0.1)
    monkeypatch.setattr(client, "COUNTS_WITHIN_S", 1.0)
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(60):
            while "local" not in (await readiness())["unavailable"]:
                await asyncio.sleep(0.1)
        status, headers, _ = await home.chat(ask("What is 2 + 3?", model="auto"))
        assert (status, headers["x-leadline-model"]) == (200, "cheap")
        status, _, body = await home.chat(ask("What is 2 + 3?"))
        assert (status, body["error"]["code"]) == (503, "unavailable")
    finally:
        monkeypatch.setattr(client, "COUNTS_WITHIN_S", 30.0)  # who is only slow is not silent again
        os.kill(engine.pid, signal.SIGCONT)
    async with asyncio.timeout(READY_S):
        await engine.ready.wait()
    assert "local" not in (await readiness())["unavailable"]
    status, _, body = await home.chat(ask("What is 2 + 3?"))
    assert (status, body["choices"][0]["message"]["content"]) == (200, "The answer is 5.")


async def test_an_engine_killed_in_the_middle_of_a_stream_ends_it_with_an_error(home: Gateway) -> None:
    engine = home.app.engine
    assert engine is not None
    assert engine.pid is not None
    async with home.session.post(
        f"{home.url}/v1/chat/completions", json=ask("What is 9 + 8 - 7 + 6 - 5 + 4?", stream=True, n=4) | LONG,
        headers=home.headers(),
    ) as response:  # fmt: skip
        raw = await response.content.readany()
        os.kill(engine.pid, signal.SIGKILL)
        raw += await response.read()
    assert b"[DONE]" not in raw
    assert b'data: {"error":{' in raw


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """`leadline serve` with nothing but its defaults, as a newcomer runs it."""
    port = free_port()
    env = {**os.environ, "LEADLINE_HOME": str(tmp_path)}
    env.pop("OPENAI_API_KEY", None)
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "gateway", "serve", "--port", str(port)], env=env, stdout=out)
    wait_for_port(port, process)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveness", timeout=30):
        pass
    yield f"http://127.0.0.1:{port}", str(tmp_path)
    stop(process)
    assert process.returncode == 0


async def test_serve_prints_what_a_newcomer_needs(served: tuple[str, str]) -> None:
    url, home = served
    out = Path(home, "out")
    async with asyncio.timeout(60):
        while "Try next" not in out.read_text():
            await asyncio.sleep(0.05)
    text, key = out.read_text(), Path(home, "key").read_text()
    for promised in (f"{url}/v1", f"{url}/dashboard", key, "bundled/base", "curl"):
        assert promised in text
    assert Path(home, "key").stat().st_mode & 0o077 == 0
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
        answer = await client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "What is 23 + 48 - 7?"}], temperature=0
        )
    assert answer.choices[0].message.content == "The answer is 64."
