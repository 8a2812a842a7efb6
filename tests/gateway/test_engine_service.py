"""`leadline engine --listen` as its users meet it: a process of its own, over HTTP, killed now and then."""

import asyncio
import base64
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest

from gateway.engine_answers import error_of
from gateway.engine_door import MAX_BODY_BYTES, Door
from gateway.engine_service import EventStream
from gateway.upstream.types import Event, Hear, StreamState
from tests.gateway.alone import SUM, TOKEN, Service, healthy, started, wait
from tests.gateway.conftest import running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = ("--model", "base=bundled/base", "--model", "small=bundled/nano")
    with started(tmp_path_factory.mktemp("engine"), *models) as service:
        yield service


def sdk(service: Service) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=TOKEN, max_retries=0)


async def test_it_speaks_openais_api(service: Service) -> None:
    async with sdk(service) as client:
        assert [model.id async for model in client.models.list()] == ["base", "small"]
        asked: Any = {"model": "base", "messages": SUM, "temperature": 0, "max_tokens": 100}
        whole = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    assert whole.choices[0].finish_reason == "stop"


async def test_a_model_is_found_by_its_name(service: Service) -> None:
    async with sdk(service) as client:
        listed = {model.id: model.model_dump() async for model in client.models.list()}
        assert (await client.models.retrieve("small")).model_dump() == listed["small"]
        with pytest.raises(openai.NotFoundError, match="model: 'a/b' is not loaded; there is base, small") as told:
            await client.models.retrieve("a/b")
    assert told.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_plan_lets_a_small_model_think_and_tells_what_each_did(service: Service, stream: bool) -> None:
    asked = {"model": "base", "messages": SUM, "temperature": 0, "stream": stream}
    async with service.client() as client:
        alone = (await client.post("/v1/chat/completions", json={**asked, "stream": False})).json()
        more = {"plan": {"type": "speculate", "draft": "small"}, "stream_options": {"include_usage": True}}
        answer = await client.post("/v1/chat/completions", json={**asked, **more})
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
        usage = chunks[-1]["usage"]
    else:
        text, usage = answer.json()["choices"][0]["message"]["content"], answer.json()["usage"]
    assert text == alone["choices"][0]["message"]["content"]
    assert usage["completion_tokens"] == alone["usage"]["completion_tokens"]
    base, small = usage["plan"]["models"]
    assert (base["model"], small["model"]) == ("base", "small")
    assert base["output_tokens"] + usage["plan"]["accepted_tokens"] == usage["completion_tokens"]
    assert small["output_tokens"] > 0


async def test_it_goes_on_from_a_thought_and_says_what_stopped_it(service: Service) -> None:
    asked = {"model": "base", "messages": SUM, "temperature": 0}
    async with service.client() as client:
        alone = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]["message"]
        first, *_ = alone["reasoning_content"].split("\n\n")
        begun = [*SUM, {"role": "assistant", "content": f"<think>\n{first}\n\n"}]
        more = {"continue_final_message": True, "add_generation_prompt": False}
        on = (await client.post("/v1/chat/completions", json={**asked, "messages": begun, **more})).json()
        step = (await client.post("/v1/chat/completions", json={**asked, "stop": ["\n\n"], "messages": [
            *SUM, {"role": "assistant", "content": "<think>\n"}], **more})).json()["choices"][0]  # fmt: skip
        wrong = await client.post("/v1/chat/completions", json={**asked, **more})
    message = on["choices"][0]["message"]
    assert f"{first}\n\n{message.get('reasoning_content') or ''}" == alone["reasoning_content"]
    assert message["content"] == alone["content"]
    assert on["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert (step["message"]["reasoning_content"], step["stop_reason"]) == (first, "\n\n")
    assert wrong.status_code == 400
    assert "the last message is not an assistant's text" in wrong.json()["error"]["message"]


async def test_without_its_token_nothing_is_told(service: Service) -> None:
    async with httpx2.AsyncClient(base_url=service.url) as client:
        for method, path in [
            ("GET", "/v1/models"), ("GET", "/v1/models/base"), ("GET", "/metrics"), ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"), ("POST", "/score"), ("POST", "/probe"), ("POST", "/hidden"),
            ("POST", "/embed"), ("POST", "/v1/embeddings"),
        ]:  # fmt: skip
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
                answer = await client.request(method, path, headers=headers, json={"model": "base", "messages": SUM})
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert (await client.get("/health")).status_code == 200


async def test_an_engine_without_a_probe_says_how_to_get_one(service: Service) -> None:
    async with httpx2.AsyncClient(base_url=service.url, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        answer = await client.post("/probe", json={"messages": SUM})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    words = "start it with `--policy FILE`, a policy that names one as `signals.difficulty.probe`"
    assert words in answer.json()["error"]["message"]


async def test_no_body_is_read_for_a_stranger() -> None:
    async def never(*_: Any) -> Any:
        raise AssertionError("it was let in")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await Door(never, TOKEN)({"type": "http", "path": "/score", "headers": []}, never, send)
    assert sent[0]["status"] == 401


async def test_scores_are_the_logprobs_of_what_it_writes(service: Service) -> None:
    async with service.client() as client:
        first = (
            await client.post(
                "/score", json={"model": "base", "messages": SUM, "candidates": ["The answer is 5.", "Cats."]}
            )
        ).json()
        likely, unlikely = first["scores"]
        assert likely["logprob"] / len(likely["tokens"]) > unlikely["logprob"] / len(unlikely["tokens"])
        assert len(likely["logprobs"]) == len(likely["entropies"]) == len(likely["tokens"])
        again = (await client.post("/score", json={"model": "base", "messages": SUM, "candidates": ["Cats."]})).json()
        assert again["scores"][0]["logprob"] == pytest.approx(unlikely["logprob"], abs=1e-3)


async def test_hidden_states_of_chosen_layers_at_chosen_tokens(service: Service) -> None:
    async with service.client() as client:
        asked = {"model": "base", "messages": SUM, "layers": [0, 2], "where": "prompt"}
        (tapped,) = (await client.post("/hidden", json=asked)).json()["hidden"]
        tokens, layers, width = tapped["shape"]
        assert (tokens, layers) == (1, 2)
        values = struct.unpack(f"<{layers * width}e", base64.b64decode(tapped["data"]))
        assert any(values)
        written = (await client.post("/hidden", json={**asked, "where": "generated", "max_tokens": 6})).json()["hidden"]
        assert sum(piece["shape"][0] for piece in written) == 5, "the last token is never read"
        wrong = await client.post("/hidden", json={**asked, "layers": [999]})
        assert (wrong.status_code, "layers" in wrong.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words"),
    [
        ("/v1/chat/completions", {"model": "nope", "messages": SUM}, 404, "model_not_found", "there is base"),
        ("/v1/chat/completions", {"model": "base", "messages": []}, 400, "invalid_request", "messages"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "cache_salt": 7}, 400, "invalid_request",
         "cache_salt"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "plan": {"type": "speculate", "draft": "nope"}},
         400, "invalid_request", "plan.draft: no local model 'nope'"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "plan": {"type": "wish"}}, 400, "invalid_request",
         "plan.type: Invalid value 'wish'; send one of exit, "),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "n": 2,
         "plan": {"type": "speculate", "draft": "small"}}, 400, "invalid_request", "plan: it is for one choice"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "plan": {"type": "speculate", "draft": "base"}},
         400, "invalid_request", "name a smaller model"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "response_format": {"type": "xml"}}, 400,
         "invalid_request",
         "response_format.type: invalid enum value 'xml'; send one of json_object, json_schema, text"),
        ("/v1/embeddings", {"model": "base", "input": "x", "encoding_format": "hex"}, 400, "invalid_request",
         "encoding_format: Invalid enum value 'hex'; send one of base64, float"),
        ("/score", {"model": "base", "messages": SUM, "candidates": []}, 400, "invalid_request", "candidates"),
        ("/score", {"model": "base", "messages": SUM, "candidates": [""]}, 400, "invalid_request", "candidates[0]"),
        ("/score", {"model": "base", "messages": SUM, "candidate": ["x"]}, 400, "invalid_request", "candidate"),
        ("/score", {"model": "base", "messages": [{"role": "user", "content": 10**30}], "candidates": ["x"]}, 400,
         "invalid_request", "messages[0].content"),
        ("/score", b"x", 400, "invalid_request", "send a JSON object"),
        ("/score", b" " * (MAX_BODY_BYTES + 1), 413, "body_too_large", "32 MiB"),
        ("/v1/chat/completions", b" " * (MAX_BODY_BYTES + 1), 413, "body_too_large", "32 MiB"),
        ("/v1/chat/completions", {"model": "base"}, 400, "invalid_request", "messages: is missing"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "logit_bias": {"x": 1}}, 400, "invalid_request",
         "logit_bias: expected `int`, got `str`"),
        ("/v1/embeddings", {"model": "base", "input": "x"}, 400, "invalid_request", "`leadline engine --encoder`"),
        ("/v1/completions", {"model": "base", "prompt": "x"}, 400, "invalid_request",
         "prompt: base takes conversations only, no raw prompt; send it as `messages` to /v1/chat/completions"),
        ("/v1/completions", {"model": "base", "prompt": "x", "stream": True, "n": 2, "stop": ["."], "logprobs": 1},
         400, "invalid_request", "prompt: base takes conversations only"),
        ("/v1/completions", {"model": "nope", "prompt": "x"}, 404, "model_not_found", "there is base"),
        ("/v1/completions", {"model": "base", "prompt": 7}, 400, "invalid_request", "prompt: send a text"),
        ("/v1/completions", {"model": "base", "prompt": "x", "n": 0}, 400, "invalid_request", "n: 0"),
        ("/v1/completions", {"model": "base", "prompt": "x", "logprobs": 21}, 400, "invalid_request", "logprobs: 21"),
        ("/hidden", {"model": "base", "messages": SUM, "layers": [10**30]}, 400, "invalid_request", "layers.0"),
        ("/hidden", {"model": "base", "messages": SUM, "layers": [1], "seed": 10**30}, 400, "invalid_request", "seed"),
        ("/hidden", {"model": "base", "messages": SUM, "layers": [1], "where": "tokens", "tokens": [99999]}, 400,
         "invalid_request", "tokens names token 99999"),
        ("/hidden", {"model": "base", "messages": SUM, "layers": []}, 400, "invalid_request", "layers"),
        ("/hidden", {"model": "base", "messages": SUM, "layers": [1, 2], "where": "generated", "max_tokens": 4097}, 400,
         "invalid_request", "max_tokens: 4097 tokens of 2 layers"),
        ("/hidden", {"model": "base", "messages": SUM, "layers": [1, 2, 1]}, 400, "invalid_request", "a layer twice"),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "sage", "content": "x"}]}, 400,
         "invalid_request", "messages[0].role must be one of system"),
        ("/v1/chat/completions", {"model": "base", "messages": [*SUM, {"role": "user", "content": None}]}, 400,
         "invalid_request", "messages[1].content is missing"),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "\ud800"}]}, 400,
         "invalid_request", "messages[0].content: \\ud800 at character 0 is half of a surrogate pair"),
        ("/score", {"model": "base", "messages": [{"role": "user", "content": "a\ud800"}], "candidates": ["x"]}, 400,
         "invalid_request", "messages[0].content: \\ud800 at character 1"),
        ("/score", {"model": "base", "messages": SUM, "candidates": ["x", "\udc00"]}, 400,
         "invalid_request", "candidates[1]: \\udc00 at character 0"),
        ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "1 + 1 " * 900}]},
         400, "context_length_exceeded", "1024"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "tools": [{"function": {"name": "f"}}]}, 400,
         "invalid_request", "tools: this model's chat template knows none"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "guided_regex": "[0-9]"}, 400,
         "invalid_request", "guided_regex: local models do not know it; send structured_outputs: {regex}"),
        ("/v1/chat/completions", {"model": "base", "messages": SUM, "chat_template_kwargs": {"depth": 3}}, 400,
         "invalid_request", "chat_template_kwargs.depth: local models know enable_thinking alone"),
        ("/v1/chat/completions",
         {"model": "base", "messages": SUM, "temperature": 0, "plan": {"type": "vote", "most": 4}}, 400,
         "invalid_request", "plan: at temperature 0 all samples of a vote are alike"),
        ("/v1/chat/completions",
         {"model": "base", "messages": SUM, "reasoning_effort": "none",
          "structured_outputs": {"regex": "(a|a)*(a|aa)*b(((x{50}){50}){50})"}}, 400, "invalid_request",
         "structured_outputs.regex: too complex"),
    ],
)  # fmt: skip
async def test_bad_input_is_named(service: Service, path: str, body: Any, status: int, code: str, words: str) -> None:
    async with service.client() as client:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.post(path, content=sent, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert words in error["message"]


async def test_a_body_that_is_not_sent_as_json_is_told_so(service: Service) -> None:
    async with service.client() as client:
        form = {"content-type": "application/x-www-form-urlencoded"}  # what curl sends unasked
        answer = await client.post("/score", content=b'{"model": "base"}', headers=form)
    assert answer.status_code == 400
    assert "Content-Type: `application/x-www-form-urlencoded`, so" in answer.json()["error"]["message"]


async def test_log_probabilities_are_those_of_the_text_that_is_told(service: Service) -> None:
    async with sdk(service) as client:
        for effort in ("none", "low"):
            answer = await client.chat.completions.create(
                model="base", messages=SUM, temperature=0, logprobs=True, reasoning_effort=cast(Any, effort)
            )
            (choice,) = answer.choices
            assert choice.logprobs is not None
            tokens = [token.token for token in choice.logprobs.content or []]
            assert "".join(tokens) == choice.message.content != ""


async def test_thinking_can_be_left_out_as_open_models_have_it(service: Service) -> None:
    async with service.client() as client:
        asked = {"model": "base", "messages": SUM, "temperature": 0}
        answers = [
            (await client.post("/v1/chat/completions", json={**asked, **more})).json()["choices"][0]["message"]
            for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"})
        ]
    assert answers[0]["reasoning_content"]
    assert not answers[1].get("reasoning_content")
    assert answers[1] == answers[2]


async def test_an_engine_that_hangs_is_not_ready(service: Service) -> None:
    victim = service.engine
    async with service.client() as client:
        victim.suspend()
        try:
            paths = "/health", "/metrics", "/prefix/stats"
            health, metrics, stats = await asyncio.gather(*map(client.get, paths))
        finally:
            victim.resume()
        assert (health.status_code, health.json()) == (503, {"status": "silent"})
        assert (stats.status_code, stats.json()["error"]["code"]) == (503, "engine_silent")
        assert "does not answer" in stats.json()["error"]["message"]
        assert "leadline_engine_up 0.0" in metrics.text
        await asyncio.to_thread(wait, lambda: healthy(service.url))  # the link's own question may have been in vain
        assert "leadline_engine_up 1.0" in (await client.get("/metrics")).text


async def test_load_and_metrics(service: Service) -> None:
    async with service.client() as client:
        asked = {"model": "base", "messages": SUM, "max_tokens": 3, "temperature": 0}
        answer = await client.post("/v1/chat/completions", json=asked, headers={"endpoint-load-metrics-format": "JSON"})
        assert answer.headers["endpoint-load-metrics"].startswith('JSON {"named_metrics":{"num_requests_running":')
        assert "endpoint-load-metrics" not in (await client.post("/v1/chat/completions", json=asked)).headers
        text = (await client.get("/metrics")).text
    shown = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert shown["leadline_engine_up"] == 1
    assert shown["leadline_engine_output_tokens_total"] >= 6
    assert 0 < shown["leadline_engine_prefix_asked_tokens_total"] >= shown["leadline_engine_prefix_hit_tokens_total"]
    assert shown["leadline_engine_requests_running"] == 0


async def test_a_caller_who_leaves_ends_its_generation(service: Service) -> None:
    async with service.client() as client:

        async def cancelled() -> float:
            text = (await client.get("/metrics")).text
            (line,) = [line for line in text.splitlines() if line.startswith("leadline_engine_cancelled_total")]
            return float(line.split()[1])

        before = await cancelled()
        for stream in (False, True):
            asked = {"model": "base", "messages": SUM, "min_tokens": 900, "temperature": 1, "stream": stream, "n": 8}
            task = asyncio.create_task(client.post("/v1/chat/completions", json=asked))
            async with asyncio.timeout(60):
                while "leadline_engine_requests_running 1.0" not in (await client.get("/metrics")).text:
                    assert not task.done(), "it ended before it could be left"
                    await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with asyncio.timeout(60):
                while "leadline_engine_requests_running 0.0" not in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.1)
        assert await cancelled() == before + 2


class Waiting:
    """A stream whose next event never comes."""

    def __init__(self) -> None:
        self.state = StreamState()
        self.closed = False

    def listen(self, hear: Hear) -> None: ...

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        yield [Event(b"{}")]
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("heard", [0, 1])
async def test_a_stream_ends_with_its_caller_even_before_its_first_event(heard: int) -> None:
    stream = Waiting()
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        while len(sent) <= heard * 2 - 1:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    answer = EventStream(stream, error_of, include_usage=False, headers={})
    async with asyncio.timeout(20):
        await answer({"type": "http"}, receive, send)
    assert stream.closed


async def test_no_salt_may_be_said_by_null(service: Service) -> None:
    async with service.client() as client:
        for path, more in (("/v1/chat/completions", {"max_tokens": 1}), ("/score", {"candidates": ["x"]})):
            asked = {"model": "base", "messages": SUM, "cache_salt": None, **more}
            assert (await client.post(path, json=asked)).status_code == 200


async def test_an_engine_that_dies_is_replaced_and_its_callers_are_told(service: Service) -> None:
    async with sdk(service) as client, service.client() as plain:
        stream = await client.chat.completions.create(
            model="base",
            messages=SUM,
            stream=True,
            n=16,
            temperature=1,
            extra_body={"min_tokens": 900},
        )
        os.kill(service.engine.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError) as told:
            async for _ in stream:
                pass
        assert told.value.code == "engine_gone"
        meanwhile = await plain.post("/v1/chat/completions", json={"model": "base", "messages": SUM, "max_tokens": 2})
        if meanwhile.status_code != 200:
            assert (meanwhile.status_code, meanwhile.json()["error"]["code"]) == (503, "engine_gone")
            assert int(meanwhile.headers["retry-after"]) >= 1
        await asyncio.to_thread(wait, lambda: healthy(service.url))
        answer = await client.chat.completions.create(model="base", messages=SUM, max_tokens=2)
        assert answer.choices
        assert "leadline_engine_restarts_total 1.0" in (await plain.get("/metrics")).text
    said = [json.loads(line) for line in service.log.read_text().splitlines()]
    assert {"engine.started", "engine.ready", "engine.failed"} <= {line["event"] for line in said}
    assert all({"level", "timestamp"} <= line.keys() for line in said), "as the gateway's logs are"


def test_what_libraries_log_is_structured_and_struck_out_too() -> None:
    program = (
        "import logging; from gateway.telemetry.logs import configure_logs; configure_logs()\n"
        "logging.getLogger('a.library').warning('cannot use %s', 'sk-abcdefghijklmnop')\n"
        "logging.getLogger('a.library').info('not said')\n"
        "try: raise ValueError('password=hunter2hunter2')\n"
        "except ValueError: logging.getLogger('another').exception('broke')\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stderr
    first, second = (json.loads(line) for line in said.splitlines())
    assert (first["event"], first["level"], first["logger"]) == ("cannot use sk-abcd…", "warning", "a.library")
    assert (second["event"], second["logger"]) == ("broke", "another")
    assert "ValueError: password=…" in second["exception"]


async def test_a_gateway_in_front_of_it(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_TOKEN", TOKEN)
    policy = f"""
version: 1
providers:
  gpu: {{server: leadline, base_url: "{service.url}/v1", api_key: env:ENGINE_TOKEN, timeout: 60s}}
models:
  base: {{provider: gpu, model: base, context: 1024, price: free}}
"""
    async with running(policy, tmp_path / "home") as gateway:
        long = [{"role": "system", "content": "You are a careful calculator. " * 10}, *SUM]
        asked = {"model": "base", "messages": long, "max_tokens": 4, "temperature": 1.0}
        for _ in range(2):
            assert (await gateway.chat(asked))[0] == 200
        cold, warm = sorted(await gateway.rows(), key=lambda row: row["created_at_ms"])
        assert cold["cached_input_tokens"] == 0
        assert warm["cached_input_tokens"] >= 32
        other = gateway.app.state.lifecycle.keys.create("other", tenant="elsewhere")
        await gateway.chat(asked, Authorization=f"Bearer {other}")
        assert sum(row["cached_input_tokens"] for row in await gateway.rows()) == warm["cached_input_tokens"]
