"""What an engine keeps of prompts, over its socket and over HTTP: found, pinned, forgotten, counted, told."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from gateway.edge.refused import tell_refusals
from gateway.engine_names import ModelNames
from gateway.engine_prefixes import add_prefix_routes
from local_engine.client import EngineClient
from local_engine.engine import Engine
from local_engine.errors import EngineFailure, EngineGone
from local_engine.model import load_model
from local_engine.prefix_types import BlockRemoved, BlockStored, KVEvent
from local_engine.server import serve
from local_engine.types import Finished, SamplingParams
from tests.local_engine.engine_harness import Watch

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
RULES = {"role": "system", "content": "You add numbers and show each step. " * 12}
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ONE = SamplingParams(temperature=0, max_tokens=1)
BLOCK = 16


class Running:
    def __init__(self, engine: Engine, client: EngineClient, watch: Watch) -> None:
        self.engine, self.client, self.watch = engine, client, watch

    async def ask(self, *messages: dict[str, str], salt: str = "a") -> Finished:
        async with aclosing(self.client.generate("m", json.dumps(messages).encode(), ONE, salt=salt)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event
        raise AssertionError("an answer ends")

    async def do(self, action: Any, *messages: dict[str, str], salt: str = "a", model: str = "m") -> tuple[int, int]:
        asked = json.dumps(messages).encode() if messages else None
        result = await self.client.prefix(model, action, asked, salt=salt)
        return result.tokens, result.prompt_tokens


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    watch = Watch()
    models = {"m": load_model("m", "bundled/nano", "float32", "cpu")}
    engine = Engine(models, None, prefix_bytes=1 << 20, make_runner=watch)
    engine.start()
    socket = str(tmp_path / "e.sock")
    serving = asyncio.create_task(serve(engine, socket))
    client = EngineClient(socket)
    while not client.connected:
        try:
            await client.connect()
        except EngineGone:
            await asyncio.sleep(0.005)
    yield Running(engine, client, watch)
    await client.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await asyncio.to_thread(engine.stop)


async def test_a_lookup_foretells_what_a_request_finds(running: Running) -> None:
    assert (await running.do("lookup", RULES, QUESTION))[0] == 0
    first = await running.ask(RULES, QUESTION)
    found, tokens = await running.do("lookup", RULES, QUESTION)
    again = await running.ask(RULES, QUESTION)
    assert (found, tokens) == (again.cached_tokens, first.input_tokens)
    assert found > 100
    assert (await running.do("lookup", RULES, QUESTION, salt="b"))[0] == 0, "another tenant has nothing"
    assert 0 < (await running.do("lookup", RULES, {"role": "user", "content": "Why?"}))[0] <= found


async def test_a_pin_reads_what_is_not_there_and_keeps_it_until_it_is_undone(running: Running) -> None:
    pinned, tokens = await running.do("pin", RULES)
    assert tokens // BLOCK * BLOCK == pinned > 100
    assert [len(s.tokens) for segments in running.watch.passes for s in segments] == [tokens], "read once"
    assert (await running.do("pin", RULES))[0] == pinned
    assert len(running.watch.passes) == 2, "and of what is stored its last token"
    for number in range(60):  # more than the store holds
        await running.ask({"role": "user", "content": f"{number} is a number. " * 40})
    assert (await running.client.prefix_stats())["m"].evicted_tokens > 0
    assert (await running.ask(RULES, QUESTION)).cached_tokens >= pinned
    assert (await running.do("evict"))[0] > 0
    assert (await running.do("lookup", RULES, QUESTION))[0] >= pinned, "what is pinned is not evicted"
    assert (await running.do("unpin", RULES))[0] == pinned
    assert (await running.do("unpin", RULES))[0] == 0
    await running.do("evict", RULES)
    assert (await running.do("lookup", RULES, QUESTION))[0] == 0


async def test_a_pin_is_kept_by_a_store_that_rests(running: Running) -> None:
    number = 0
    while not (await running.client.prefix_stats())["m"].resting:
        number += 1_000_003
        await running.ask({"role": "user", "content": f"{number} is a number. " * 40})
    await running.ask({"role": "user", "content": "Who will read this again? " * 40})
    assert (await running.do("lookup", {"role": "user", "content": "Who will read this again? " * 40}))[0] < 20
    pinned, tokens = await running.do("pin", RULES)
    assert pinned == tokens // BLOCK * BLOCK > 100


async def test_evicting_a_conversation_forgets_it_and_no_other(running: Running) -> None:
    other = {"role": "user", "content": "Another conversation altogether. " * 10}
    for salt in ("a", "b"):
        await running.ask(RULES, QUESTION, salt=salt)
        await running.ask(other, salt=salt)
    gone, _ = await running.do("evict", RULES)
    assert gone > 0
    assert (await running.do("lookup", RULES, QUESTION))[0] == 0
    assert (await running.do("lookup", other))[0] > 0
    assert (await running.do("lookup", RULES, QUESTION, salt="b"))[0] > 0
    assert await running.do("evict", {"role": "user", "content": "?"}) != (0, 0)
    assert (await running.do("lookup", other))[0] > 0, "what is too short to be stored names nothing else"


async def test_a_pin_of_less_than_a_block_says_that_nothing_is_pinned(running: Running) -> None:
    with pytest.raises(
        EngineFailure, match=r"messages: nothing was pinned: .* \d tokens .* blocks of 16 .*; pin more"
    ) as told:
        await running.do("pin", {"role": "user", "content": "?"})
    assert (told.value.code, told.value.param) == ("invalid_request", "messages")
    assert running.watch.passes == [], "nothing was read for it"


async def test_what_cannot_be_done_is_refused_by_its_field(running: Running) -> None:
    with pytest.raises(EngineFailure, match="messages is missing"):
        await running.do("pin")
    with pytest.raises(EngineFailure, match="no local model 'x'"):
        await running.do("lookup", RULES, model="x")
    with pytest.raises(EngineFailure, match="no local model 'x'"):
        await anext(running.client.prefix_events("x"))


async def test_who_follows_and_does_not_read_is_told_so_and_holds_no_more_memory(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_engine.client.MAX_UNREAD", 4)
    async with aclosing(running.client.prefix_events("m")) as events:
        first = asyncio.ensure_future(anext(events))
        await running.ask(RULES, QUESTION)
        await first
        most = 0
        for number in range(12):
            await running.ask({"role": "user", "content": f"{number} is a number. " * 4})
            most = max(most, *(len(inbox._events) for inbox in running.client._inboxes.values()))
        assert most == 4
        with pytest.raises(EngineFailure, match="begin anew"):
            await anext(events)


class Router:
    """Keeps the books of one store from its events alone."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, BlockStored] = {}

    def hear(self, events: list[KVEvent]) -> None:
        for event in events:
            if isinstance(event, BlockRemoved):
                for name in event.block_hashes:
                    del self.blocks[name]
                continue
            parent = event.parent_block_hash
            for at, name in enumerate(event.block_hashes):
                assert parent is None or parent in self.blocks, "each comes after the one that it continues"
                tokens = event.token_ids[at * BLOCK : (at + 1) * BLOCK]
                self.blocks[name] = BlockStored([name], parent, tokens, BLOCK, salt=event.salt)
                parent = name


async def test_a_router_that_follows_knows_what_is_there(running: Running) -> None:
    await running.ask(RULES, QUESTION)  # before it comes
    router = Router()

    async def follow() -> None:
        async with aclosing(running.client.prefix_events("m")) as groups:
            async for events in groups:
                router.hear(events)

    async def agrees() -> None:
        async with asyncio.timeout(60):
            while len(router.blocks) != (await running.client.prefix_stats())["m"].blocks:
                await asyncio.sleep(0.005)

    following = asyncio.create_task(follow())
    await agrees()
    await running.ask(RULES, QUESTION, {"role": "assistant", "content": "5"}, QUESTION, salt="b")
    await agrees()
    assert {block.salt for block in router.blocks.values()} == {"a", "b"}
    await running.do("evict", salt="a")
    await agrees()
    assert {block.salt for block in router.blocks.values()} == {"b"}
    assert following.done() is False
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    store = running.engine._lanes["m"].store
    assert store is not None
    async with asyncio.timeout(60):
        while store.on_event is not None:
            await asyncio.sleep(0.005)
    assert running.engine.stats().cancelled == 0, "who stops to follow is no caller that left"


async def test_all_of_it_over_http(running: Running) -> None:
    app = FastAPI()
    add_prefix_routes(app, lambda: running.client, ModelNames(lambda: running.client, {}))
    tell_refusals(app)
    asked = {"model": "m", "messages": [RULES], "cache_salt": "a"}
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://engine") as http:
        pinned = (await http.post("/prefix/pin", json=asked)).json()
        assert pinned["tokens"] == pinned["prompt_tokens"] // BLOCK * BLOCK > 100
        found = (await http.post("/prefix/lookup", json=asked | {"messages": [RULES, QUESTION]})).json()
        assert found["tokens"] >= pinned["tokens"]
        stats = (await http.get("/prefix/stats")).json()["models"]["m"]
        assert (stats["pinned_blocks"], stats["blocks"]) == (pinned["tokens"] // BLOCK,) * 2
        assert (await http.post("/prefix/evict", json={"model": "m", "cache_salt": "a"})).json()["tokens"] == 0
        assert (await http.post("/prefix/unpin", json=asked)).json()["tokens"] == pinned["tokens"]
        assert (await http.post("/prefix/evict", json=asked)).json()["tokens"] == pinned["tokens"]
        for path, body in (("lookup", {"model": "m"}), ("pin", asked | {"model": "x"}), ("evict", {"messages": []})):
            refused = await http.post(f"/prefix/{path}", json=body)
            assert (refused.status_code, "error" in refused.json()) == ({"pin": 404}.get(path, 400), True), path
        assert (await http.get("/prefix/events", params={"model": "x"})).status_code == 404
