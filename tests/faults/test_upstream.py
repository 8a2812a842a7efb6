"""The judge is judged first: the fake upstream says the same streamed and whole, and its books survive kill -9."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.upstream.faults import FAULTS
from tests.upstream.oracle import Tokens, nanousd
from tests.upstream.play import PLAYERS
from tests.upstream.process import UpstreamProcess, upstream_process

pytestmark = pytest.mark.anyio

QUESTION = {"model": "large", "messages": [{"role": "user", "content": "how deep is it"}], "n": 2}


async def post(upstream: UpstreamProcess, path: str, body: dict[str, Any]) -> bytes:
    async with (
        aiohttp.ClientSession() as session,
        session.post(upstream.url + path, json=body, timeout=aiohttp.ClientTimeout(30)) as response,
    ):
        return await response.read()


def events_of(raw: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]


async def test_a_stream_says_what_a_whole_answer_says(tmp_path: Path) -> None:
    with upstream_process(tmp_path / "truth") as upstream:
        whole = json.loads(await post(upstream, "/chat/completions", QUESTION))
        streamed = {**QUESTION, "stream": True, "stream_options": {"include_usage": True}}
        raw = await post(upstream, "/chat/completions", streamed)
        one, two = upstream.rows()
    said: dict[int, dict[str, str]] = {0: {}, 1: {}}
    for event in events_of(raw):
        for choice in event["choices"]:
            for name in ("content", "reasoning_content"):
                text = said[choice["index"]].get(name, "") + (choice["delta"].get(name) or "")
                said[choice["index"]][name] = text
    for choice in whole["choices"]:
        message = choice["message"]
        assert said[choice["index"]]["content"] == (message["content"] or "")
        assert said[choice["index"]]["reasoning_content"] == message.get("reasoning_content", "")
    assert events_of(raw)[-1]["usage"] == whole["usage"] == one.tokens.wire()
    assert raw.endswith(b"data: [DONE]\n\n")
    assert (one.tokens, one.nanousd, one.reported) == (two.tokens, two.nanousd, two.reported)
    assert two.delivered_tokens == two.tokens.completion


async def test_a_row_is_written_before_its_answer_can_be_lost(tmp_path: Path) -> None:
    with upstream_process(tmp_path / "truth") as upstream:
        await post(upstream, "/chat/completions", {**QUESTION, "metadata": {"call": "one"}})
        upstream.process.kill()
        upstream.process.wait()
        (row,) = upstream.rows()
    assert (row.call, row.phase, row.attempt) == ("one", "complete", 1)


async def test_completions_and_embeddings_are_counted_too(tmp_path: Path) -> None:
    with upstream_process(tmp_path / "truth") as upstream:
        text = json.loads(await post(upstream, "/completions", {"model": "small", "prompt": "one two three"}))
        vectors = json.loads(await post(upstream, "/embeddings", {"model": "embed", "input": ["one", "two three"]}))
        rows = upstream.rows()
    assert [row.tokens.prompt for row in rows] == [3, 3]
    assert text["usage"]["completion_tokens"] == rows[0].tokens.output == len(text["choices"][0]["text"].split())
    assert [len(item["embedding"]) for item in vectors["data"]] == [8, 8]
    assert vectors["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_money_is_rounded_once_and_tiers_hold_for_the_whole_call() -> None:
    assert nanousd("small", Tokens(cached_input=3)) == 227, "3 x 75.5555 is 226.67"
    assert nanousd("large", Tokens(input=4, cached_input=3, cache_write=2, output=2, reasoning=1)) == 52_346
    assert nanousd("tiered", Tokens(input=40, output=1)) == 60_000
    assert nanousd("tiered", Tokens(input=30, cached_input=11, output=1)) == 96_875


def test_every_fault_is_numbered_and_has_its_player() -> None:
    ids = [fault.id for fault in FAULTS]
    assert ids == [f"F{number:02}" for number in range(1, 29)]
    assert set(PLAYERS) == set(ids[4:]), "the first four never reach an upstream"
