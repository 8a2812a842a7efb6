"""The link: an engine served on a unix socket, seen through the client."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from local_engine.client import EngineClient
from local_engine.config import EngineConfig
from local_engine.engine import Engine
from local_engine.errors import ConfigError, EngineFailure, EngineGone
from local_engine.model import LocalModel
from local_engine.server import serve
from local_engine.types import Delta, Event, Finished, Generate, Hello, SamplingParams
from local_engine.wire import MAX_FRAME_BYTES, decode_event, encode_frame, read_frame
from tests.local_engine.engine_harness import GREEDY, PATIENCE_S, StartEngine, Watch, until, user
from tests.local_engine.fake_prober import FakeProber

pytestmark = pytest.mark.anyio


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    return str(tmp_path / "e.sock")


@pytest.fixture
async def client(
    bundled: LocalModel, prober: FakeProber, start_engine: StartEngine, socket_path: str
) -> AsyncIterator[EngineClient]:
    """A client of a served engine with the bundled model."""
    async with aclosing(served(start_engine(bundled, prober), socket_path)) as clients:
        yield await anext(clients)


async def served(engine: Engine, socket_path: str) -> AsyncGenerator[EngineClient, None]:
    serving = asyncio.create_task(serve(engine, socket_path))
    client = EngineClient(socket_path)
    while not client.connected:
        try:
            await client.connect()
        except EngineGone:
            await asyncio.sleep(0.005)
    try:
        yield client
    finally:
        await client.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert not Path(socket_path).exists()


async def answer(client: EngineClient, text: str, sampling: SamplingParams = GREEDY) -> tuple[str, Finished]:
    content = ""
    async for event in client.generate("m", user(text), sampling):
        if isinstance(event, Finished):
            return content, event
        content += event.content
    raise AssertionError("the stream ended without Finished")


async def test_the_engine_introduces_itself(client: EngineClient) -> None:
    [card] = client.hello.models
    assert (card.name, card.context_window, card.reasoning) == ("m", 1024, True)
    assert (client.hello.probe_version, client.hello.probe_heads) == ("fake-1", ["m"])


async def test_an_answer_streams_and_is_counted(client: EngineClient) -> None:
    events = [event async for event in client.generate("m", user("What is 3 + 4?"), GREEDY)]
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, Delta) for event in events[:-1])
    assert "".join(event.content for event in events if isinstance(event, Delta)) == "The answer is 7."


async def test_many_tasks_share_a_connection(client: EngineClient) -> None:
    many = asyncio.gather(*(answer(client, f"What is {n} + 1?") for n in range(1, 10)))
    probe, vectors = await asyncio.gather(client.probe(user("abc")), client.embed(["a", "bc"]))
    answers = await many
    assert probe.p_success == {"m": 0.25}
    assert (vectors.dims, len(vectors.vectors), vectors.tokens) == (2, 16, 3)
    assert [content for content, _ in answers] == [f"The answer is {n + 1}." for n in range(1, 10)]


async def test_failures_have_a_code(client: EngineClient) -> None:
    with pytest.raises(EngineFailure) as failure:
        await anext(aiter(client.generate("other", user("hi"), GREEDY)))
    assert failure.value.code == "model_not_found"
    with pytest.raises(EngineFailure) as failure:
        await client.probe(b"{")
    assert failure.value.code == "invalid_request"
    assert client.connected


async def test_leaving_a_stream_cancels_it(
    endless: LocalModel, gate: Watch, start_engine: StartEngine, socket_path: str
) -> None:
    engine = start_engine(endless, make_runner=gate)
    async with aclosing(served(engine, socket_path)) as clients:
        client = await anext(clients)
        gate.allow(100)
        async with aclosing(client.generate("m", user("1 + 1"), GREEDY)) as stream:
            await anext(stream)
        gate.allow(10_000)
        await until(lambda: engine.stats().running == engine.stats().kv_tokens == 0)


async def test_closing_the_connection_cancels_everything(
    endless: LocalModel, gate: Watch, start_engine: StartEngine, socket_path: str
) -> None:
    engine = start_engine(endless, make_runner=gate)
    async with aclosing(served(engine, socket_path)) as clients:
        client = await anext(clients)
        tasks = [asyncio.create_task(answer(client, "1 + 1")) for _ in range(3)]

        def all_run() -> bool:
            gate.allow(1)  # the first pass may be held before all have come
            return engine.stats().running == 3

        await until(all_run)
        await client.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, EngineGone)
        gate.allow(10_000)
        await until(lambda: engine.stats().running == 0)
        with pytest.raises(EngineGone):
            await answer(client, "1 + 1")
        await client.connect()
        assert (await answer(client, "1 + 1", SamplingParams(max_tokens=2)))[1].output_tokens == 2


@pytest.mark.parametrize(
    "bad",
    [
        b"\x00\x00\x00\x03abc",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        encode_frame(Hello([], None, [], 1)),
        b"\x00\x00\x00\x00",
    ],
    ids=["no msgpack", "too large", "no command", "empty"],
)
async def test_a_bad_frame_closes_its_connection_only(bad: bytes, client: EngineClient, socket_path: str) -> None:
    reader, writer = await asyncio.open_unix_connection(socket_path)
    hello = await read_frame(reader)
    assert hello is not None
    assert isinstance(decode_event(hello), Hello)
    writer.write(bad)
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert (await answer(client, "What is 3 + 4?"))[0] == "The answer is 7."


async def test_a_slow_reader_gets_merged_deltas(client: EngineClient) -> None:
    async with aclosing(client.generate("m", user("What is 3 + 4?"), GREEDY)) as stream:
        first = await anext(stream)
        await answer(client, "What is 3 + 4?")  # by now the first stream is over as well
        rest = [event async for event in stream]
    *deltas, end = [first, *rest]
    assert isinstance(end, Finished)
    assert len(rest) <= 2, "one delta and the end; the first may have held all, where the engine was faster"
    assert "".join(delta.content for delta in deltas if isinstance(delta, Delta)).endswith("The answer is 7.")
    assert end.output_tokens > 2


async def test_frames_survive_any_cut(client: EngineClient, socket_path: str) -> None:
    reader, writer = await asyncio.open_unix_connection(socket_path)
    for byte in encode_frame(Generate(5, "m", user("What is 3 + 4?"), GREEDY)):
        writer.write(bytes([byte]))
        await asyncio.sleep(0)
    events: list[Event] = []
    while not (events and isinstance(events[-1], Finished)):
        body = await read_frame(reader)
        assert body is not None
        events.append(decode_event(body))
    assert "".join(event.content for event in events if isinstance(event, Delta)) == "The answer is 7."
    writer.close()
    await writer.wait_closed()


async def test_nobody_listening_is_engine_gone(tmp_path: Path) -> None:
    client = EngineClient(str(tmp_path / "none.sock"))
    with pytest.raises(EngineGone, match="no engine at"):
        await client.connect()
    with pytest.raises(EngineGone):
        await client.probe(user("hi"))
    assert not client.connected


async def test_a_second_server_is_refused_and_the_first_goes_on(
    client: EngineClient, bundled: LocalModel, start_engine: StartEngine, socket_path: str
) -> None:
    before = Path(socket_path).stat()
    with pytest.raises(ConfigError, match=f"an engine already listens at {socket_path}; stop it, or choose another"):
        await serve(start_engine(bundled), socket_path)
    assert Path(socket_path).stat().st_ino == before.st_ino
    assert (await answer(client, "What is 3 + 4?"))[0] == "The answer is 7."


async def test_at_its_end_a_server_removes_its_own_socket_alone(
    bundled: LocalModel, start_engine: StartEngine, socket_path: str
) -> None:
    first = asyncio.create_task(serve(start_engine(bundled), socket_path))
    await until(lambda: Path(socket_path).exists())
    Path(socket_path).unlink()
    async with aclosing(served(start_engine(bundled), socket_path)) as clients:
        client = await anext(clients)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert Path(socket_path).exists()
        await client.connect()
        assert (await answer(client, "What is 3 + 4?"))[0] == "The answer is 7."


@pytest.mark.parametrize("greeting", [b"", b"\x00\x00\x00\x01x", encode_frame(Finished(1, "stop", 1, 1, 0))])
async def test_what_is_no_engine_is_engine_gone(greeting: bytes, socket_path: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(greet, socket_path):
        with pytest.raises(EngineGone):
            await EngineClient(socket_path).connect()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"models": {"m": ""}}, "models"),
        ({"socket_path": ""}, "socket_path"),
        ({"socket_path": "x" * 200}, "socket_path"),
        ({"threads": 0}, "threads"),
        ({"max_running": 0}, "max_running"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"kv_bytes": 0}, "kv_bytes"),
        ({"prefix_bytes": -1}, "prefix_bytes"),
    ],
)
async def test_a_bad_configuration_is_named(options: dict[str, object], reason: str) -> None:
    good: dict[str, object] = {"models": {"m": "bundled/base"}, "socket_path": "e.sock"}
    with pytest.raises(ValueError, match=reason):
        EngineConfig(**{**good, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ["client", "server", "config", "types", "arithmetic"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    check = f"import sys, local_engine.{module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    root = str(Path(sys.modules["local_engine"].__file__ or "").parents[1])
    subprocess.run([sys.executable, "-c", check], check=True, cwd=root)


def test_commands_and_events_survive_the_wire() -> None:
    command = Generate(3, "m", b"[]", SamplingParams(stop=("a",), seed=-5, effort="high"), b"[]")
    assert msgspec.msgpack.decode(encode_frame(command)[4:], type=Generate) == command
