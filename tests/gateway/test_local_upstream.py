"""The local engine as an upstream: whose prefix is whose, what is billed as cached, and when time is up."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from gateway.edge.prompts import read_completion
from gateway.edge.wire import read_chat
from gateway.ledger.settle import Usage
from gateway.upstream.local import LocalStream, LocalUpstream
from gateway.upstream.types import CallHeaders, ChatCall, Planned, Progress, Target, UpstreamError
from local_engine.client import EngineClient
from local_engine.engine import Engine
from local_engine.errors import EngineGone
from local_engine.model import LocalModel, load_model
from local_engine.plan_types import Exit
from local_engine.server import serve
from local_engine.types import SamplingParams
from tests.local_engine.engine_harness import Watch

pytestmark = pytest.mark.anyio

TARGET = Target("local", "home", "m", None, 1024, 1024, 60.0, 0)
QUESTION = "Anna has 12 apples. She buys 7 more. How many apples are there now?"


class Link:
    def __init__(self, client: EngineClient) -> None:
        self.client = client


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return load_model("m", "bundled/base", "float32", "cpu")


@asynccontextmanager
async def served(engine: Engine, socket: str) -> AsyncIterator[EngineClient]:
    engine.start()
    serving = asyncio.create_task(serve(engine, socket))
    client = EngineClient(socket)
    while not client.connected:
        try:
            await client.connect()
        except EngineGone:
            await asyncio.sleep(0.005)
    yield client
    await client.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await asyncio.to_thread(engine.stop)


@pytest.fixture
async def client(tmp_path: Path, model: LocalModel) -> AsyncIterator[EngineClient]:
    async with served(Engine({"m": model}, None), str(tmp_path / "e.sock")) as client:
        yield client


class Held(NamedTuple):
    """An engine whose passes wait for leave, once its gate is `gated`."""

    client: EngineClient
    gate: Watch

    async def step_by_step(self, done: int) -> None:
        """Give leave for each pass after `done`, so that the engine does not run ahead of a loop that is held up."""
        while True:
            while len(self.gate.passes) == done:
                await asyncio.sleep(0.002)
            self.gate.allow(1)
            done += 1


@pytest.fixture
async def held(tmp_path: Path, model: LocalModel) -> AsyncIterator[Held]:
    gate = Watch()
    async with served(Engine({"m": model}, None, make_runner=gate), str(tmp_path / "e.sock")) as client:
        yield Held(client, gate)
        gate.allow(1_000_000)


@pytest.fixture
def upstream(client: EngineClient) -> LocalUpstream:
    return LocalUpstream(Link(client))


def call(tenant: str = "a", **fields: Any) -> ChatCall:
    body = {"model": "local", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}
    return msgspec.structs.replace(read_chat(json.dumps(body).encode(), CallHeaders("")), tenant=tenant)


async def test_a_prompt_is_cached_for_its_tenant_and_billed_as_such(upstream: LocalUpstream) -> None:
    first, again, other = [await upstream.complete(TARGET, call(tenant)) for tenant in ("a", "a", "b")]
    assert first.usage is not None
    assert again.usage is not None
    cached = again.usage.cached_input
    assert cached > 0
    assert again.usage == Usage(
        first.usage.input - cached, cached, output=first.usage.output, reasoning=first.usage.reasoning
    )
    assert json.loads(again.body)["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert other.usage == first.usage, "what one tenant asked is not to be seen in another's usage"


async def test_choices_share_one_prompt(upstream: LocalUpstream) -> None:
    one = await upstream.complete(TARGET, call("one", seed=3, temperature=1.0))
    three = await upstream.complete(TARGET, call("three", seed=3, temperature=1.0, n=3))
    assert one.usage is not None
    assert three.usage is not None
    assert (three.usage.input, three.usage.cached_input) == (one.usage.input, 0)
    choices = json.loads(three.body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert choices[0]["message"] == json.loads(one.body)["choices"][0]["message"]


async def test_a_raw_prompt_is_refused_by_its_field(upstream: LocalUpstream) -> None:
    asked = read_completion(b'{"model": "local", "prompt": "Once upon"}', CallHeaders(""))
    for answer in (upstream.complete, upstream.stream):
        with pytest.raises(UpstreamError, match="prompt: local takes conversations only") as told:
            await answer(TARGET, asked)
        assert (told.value.cause, told.value.error and told.value.error["param"]) == ("refused", "prompt")


async def test_an_answer_that_is_late_is_a_timeout(client: EngineClient) -> None:
    """By the engine's clock here: the gateway's own would wait for longer."""
    asked = call()
    messages = bytes(asked.fields["messages"])
    stream = LocalStream(client.generate("m", messages, SamplingParams(), deadline_s=0.0), TARGET, asked)
    with pytest.raises(UpstreamError) as late:
        await stream.read_first()
    assert late.value.cause == "timeout"
    await stream.close()


async def test_what_is_cut_off_is_counted_as_far_as_it_came(held: Held) -> None:
    """By the engine's own count, which is that of the whole answer but for the token that ends the turn."""
    upstream = LocalUpstream(Link(held.client))
    await upstream.complete(TARGET, call())  # what is cached now is in the count, too
    held.gate.gated = True
    stepping = asyncio.create_task(held.step_by_step(len(held.gate.passes)))
    stream = await upstream.stream(TARGET, call())
    counts = [stream.state.so_far() async for _ in stream]
    await stream.close()
    stepping.cancel()
    usage, last = stream.state.usage, counts[-1]
    assert usage is not None
    assert last is not None
    assert (last.input, last.cached_input, last.reasoning) == (usage.input, usage.cached_input, usage.reasoning)
    assert usage.output - last.output == 1
    written = [0 if count is None else count.output + count.reasoning for count in counts]
    assert written == sorted(written)
    assert len(set(written)) > 5


@pytest.mark.parametrize("gone", [False, True], ids=["left", "its engine is gone"])
async def test_a_whole_answer_that_does_not_come_is_counted_as_far_as_it_came(held: Held, gone: bool) -> None:
    progress = Progress()
    held.gate.gated = True
    stepping = asyncio.create_task(held.step_by_step(0))
    asking = asyncio.create_task(LocalUpstream(Link(held.client)).complete(TARGET, call(), progress))
    async with asyncio.timeout(60):
        while progress.state is None or progress.state.deltas < 4:
            await asyncio.sleep(0)
    stepping.cancel()
    if gone:
        await held.client.close()
        with pytest.raises(UpstreamError, match="went away"):
            await asking
    else:
        asking.cancel()
        await asyncio.wait((asking,))
    counted = progress.state.so_far()
    assert counted is not None
    assert counted.output + counted.reasoning >= 4
    assert counted.input > 0
    assert not counted.estimated


async def test_an_answer_with_a_plan_is_counted_at_its_end_alone(upstream: LocalUpstream) -> None:
    planned = dataclasses.replace(TARGET, plans={"low": Planned(Exit(rule="budget", budget=16))})
    stream = await upstream.stream(planned, call())
    assert [stream.state.so_far() async for _ in stream][-1] is None
    assert stream.state.usage is not None
    await stream.close()
