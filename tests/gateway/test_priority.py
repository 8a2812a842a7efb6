"""Who comes first at the local engine: what a caller may ask for, and what nobody waits for goes last."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.edge.headers import read_headers
from gateway.edge.wire import read_chat
from gateway.errors import InvalidRequest
from gateway.priority import beside, priority_of
from local_engine.engine import Engine
from local_engine.model import load_model
from local_engine.server import serve
from tests.gateway.conftest import Gateway, running, until
from tests.local_engine.engine_harness import Watch

POLICY = """
version: 1
providers:
  home: {engine: embedded}
models:
  base: {provider: home, model: m, context: 1024, price: free}
routes:
  - {name: urgent, when: {tag: urgent}, use: [base], cache: off, priority: 5}
  - {name: shadowed, when: {model: shadowed}, use: [base], cache: off, shadow: {models: [other], share: 100%}}
  - {name: auto, when: {model: auto}, use: [base], cache: off}
"""


class Line:
    """A gateway before an engine of one place, whose every pass is held until it is let go."""

    def __init__(self, gateway: Gateway, engine: Engine, gate: Watch) -> None:
        self.gateway, self.engine, self.gate = gateway, engine, gate
        self.tasks: dict[str, asyncio.Task[Any]] = {}

    async def ask(
        self, name: str, model: str = "auto", *, priority: int | None = None, tag: str = "", header: str = ""
    ) -> None:
        """Send it, and wait until it stands in the engine's line. Its first pass is known by the length of `name`."""
        before = self.engine.stats()
        asked = {"model": model, "messages": [{"role": "user", "content": name}], "temperature": 0, "max_tokens": 1}
        asked["reasoning_effort"] = "none"  # the one token is a word of the answer
        headers = {"x-leadline-tags": tag} | ({"x-leadline-priority": header} if header else {})
        self.tasks[name] = asyncio.create_task(self.gateway.chat({**asked, "priority": priority}, **headers))
        await until(lambda: sum(self.now) > before.running + before.waiting)

    @property
    def now(self) -> tuple[int, int]:
        stats = self.engine.stats()
        return stats.running, stats.waiting

    def order(self, names: dict[str, int]) -> list[str]:
        """The names, in the order in which their prompts were read."""
        by_length = {length: name for name, length in names.items()}
        sizes = [len(segment.tokens) for segments in self.gate.passes for segment in segments]
        return [by_length[size] for size in sizes if size in by_length]


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    gate = Watch(gated=True)
    model = load_model("m", "bundled/nano", "float32", "cpu")
    engine = Engine({"m": model}, None, max_running=1, prefix_bytes=0, make_runner=gate)
    engine.start()
    socket = tmp_path / "e.sock"
    serving = asyncio.create_task(serve(engine, str(socket)))
    policy = POLICY.replace("price: free}\n", "price: free}\n  other: {provider: home, model: m, price: free}\n", 1)
    try:
        async with running(policy, tmp_path / "home", engine=socket) as gateway:
            assert gateway.app.engine is not None
            async with asyncio.timeout(60):
                await gateway.app.engine.ready.wait()
            yield Line(gateway, engine, gate)
            gate.allow(1_000_000)
    finally:
        gate.allow(1_000_000)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await asyncio.to_thread(engine.stop)


def words(number: int) -> str:
    """A prompt whose length says which it is."""
    return "?" + " 7" * number


@pytest.mark.anyio
@pytest.mark.timeout(120)
async def test_the_more_urgent_overtakes_and_nobody_raises_itself(line: Line) -> None:
    await line.ask(words(1))  # holds the engine's one place
    line.gate.wait_for_pass(1)
    await line.ask(words(10), priority=-5)
    await line.ask(words(20), header="50")
    await line.ask(words(30))
    await line.ask(words(40), tag="urgent")
    await line.ask(words(50), priority=3, tag="urgent", header="4")
    line.gate.allow(1_000_000)
    answers = await asyncio.gather(*line.tasks.values())
    assert [status for status, _, _ in answers] == [200] * 6, (answers, line.gate.sizes)
    lengths = {name: answer["usage"]["prompt_tokens"] for name, (_, _, answer) in zip(line.tasks, answers, strict=True)}
    assert line.order(lengths) == [words(n) for n in (1, 40, 50, 20, 30, 10)]


@pytest.mark.anyio
@pytest.mark.timeout(120)
async def test_a_shadow_waits_for_everybody(line: Line) -> None:
    await line.ask(words(10), model="shadowed")
    line.gate.wait_for_pass(1)
    await line.ask(words(1))  # behind it; takes the place that it leaves
    line.gate.allow(1)
    await line.tasks[words(10)]
    await until(lambda: line.now == (1, 1))  # its shadow stands in the line
    line.gate.wait_for_pass(2)
    await line.ask(words(20))
    line.gate.allow(1_000_000)
    answers = await asyncio.gather(*line.tasks.values())
    lengths = {name: answer["usage"]["prompt_tokens"] for name, (_, _, answer) in zip(line.tasks, answers, strict=True)}
    await until(lambda: len(line.order(lengths)) == 4)
    assert line.order(lengths) == [words(10), words(1), words(20), words(10)]


def read(body: dict[str, Any], *headers: tuple[bytes, bytes]) -> Any:
    asked = {"model": "auto", "messages": [{"role": "user", "content": "?"}], **body}
    return read_chat(json.dumps(asked).encode(), read_headers(headers))


def test_what_is_asked_for_is_read_and_told_to_no_provider_as_it_came() -> None:
    call = read({"priority": -7})
    assert (call.priority, "priority" in call.fields) == (-7, False)
    assert read({"priority": -7}, (b"x-leadline-priority", b"2")).priority == 2
    assert read({}).priority is None
    assert read({"priority": None}).priority is None
    for body, headers in (({"priority": 101}, ()), ({}, ((b"x-leadline-priority", b"1e3"),))):
        with pytest.raises(InvalidRequest, match="priority"):
            read(body, *headers)


def test_a_route_bounds_what_its_callers_have() -> None:
    assert [priority_of(asked, None) for asked in (None, -3, 3)] == [0, -3, 0]
    call = read({})
    found = []
    for priority in (None, 5, -5, -100):
        call.priority = priority
        found.append(beside(call))
    assert found == [-10, -10, -15, -100]
