"""A thought goes on at vLLM as raw text, whatever its chat template would make of one that has only begun."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.edge.wire import read_chat
from gateway.upstream.raw_thought import RawThought, completion, conversation_body, limit, with_thought
from gateway.upstream.types import CallHeaders, ChatCall
from local_engine.types import ThoughtSoFar
from tests.gateway.conftest import until
from tests.gateway.reasoner import ANSWER, Mind, Reasoner
from tests.gateway.test_stepping import QUESTION, RIGHT, ask, start, told

pytestmark = pytest.mark.anyio


def call(**fields: Any) -> ChatCall:
    body = {"model": "m", "messages": [{"role": "user", "content": "Q"}], **fields}
    return read_chat(json.dumps(body).encode(), CallHeaders(token=""))


async def test_each_model_is_asked_for_its_prompt_once(far: Reasoner, tmp_path: Path) -> None:
    assert far.raw is not None
    async with start(far, tmp_path / "home") as gateway:
        assert (await told(gateway, stream=True))[:2] == (RIGHT, ANSWER)
        assert [[m["content"] for m in messages] for messages in far.raw.conversations] == [[QUESTION]] * 2
        assert all(body["raw"] for body in far.bodies)
        assert far.bodies[-1]["max_tokens"] == far.context - far.truth[-1].prompt, "left out, it stops at 16"


async def test_a_server_without_these_paths_gets_a_chat(far: Reasoner, tmp_path: Path) -> None:
    """As behind a proxy that lets /v1 alone through."""
    plain = await Reasoner({"base": Mind(), "draft": Mind()}, raw=None).start()
    try:
        async with start(plain, tmp_path / "home") as gateway:
            assert (await told(gateway, stream=True))[:2] == (RIGHT, ANSWER)
        assert all(body["continue_final_message"] for body in plain.bodies)
    finally:
        await plain.stop()


async def test_a_tokenizer_that_reads_no_special_tokens_in_a_text_gets_a_chat(far: Reasoner, tmp_path: Path) -> None:
    assert far.raw is not None
    far.raw.reads_special = False
    async with start(far, tmp_path / "home") as gateway:
        assert (await told(gateway, stream=True))[:2] == (RIGHT, ANSWER)
    assert len(far.raw.conversations) == 2
    assert not any("raw" in body for body in far.bodies)


async def test_what_is_not_text_goes_out_as_a_chat(far: Reasoner, tmp_path: Path) -> None:
    assert far.raw is not None
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, image]}]
    async with start(far, tmp_path / "home") as gateway:
        status, _, _ = await gateway.stream({**ask(), "messages": messages})
    assert status == 200
    assert not far.raw.conversations


async def test_who_leaves_while_the_prompt_is_told_pays_nothing(far: Reasoner, tmp_path: Path) -> None:
    assert far.raw is not None
    far.raw.hold.clear()
    async with start(far, tmp_path / "home") as gateway:
        asked = asyncio.ensure_future(gateway.chat(ask()))
        await until(lambda: far.raw is not None and far.raw.conversations)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        lifecycle = gateway.app.state.lifecycle
        await until(lambda: not lifecycle.metrics.in_flight.value)
        row = (await gateway.rows())[0]
    assert (row["outcome"], row["cost_nanousd"], far.bodies) == ("cancelled", 0, [])


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("A:\n", "A:\n<think>\n"),
        ("A:\n<think>\n", "A:\n<think>\n"),
        ("A:<think>", "A:<think>"),
        ("A:\n<think>\n\n</think>\n\n", "A:\n<think>\n\n</think>\n\n<think>\n"),
    ],
    ids=["closed", "opened", "opened without a line", "off"],
)
def test_a_thought_stands_behind_the_prompt_once_opened(prompt: str, begun: str) -> None:
    assert with_thought(prompt, ThoughtSoFar(""), "") == begun
    assert with_thought(prompt, ThoughtSoFar("One.\n\nTwo"), "") == begun + "One.\n\nTwo"
    assert with_thought(prompt, ThoughtSoFar("One.\n\n", over=True), "So") == begun + "One.\n</think>\n\nSo"
    heard = "" if prompt.endswith(">") else "\n"  # the line that a model breaks behind the tag
    assert with_thought(prompt, ThoughtSoFar(f"{heard}One."), "") == begun + "One."


def test_what_belongs_to_chats_alone_stays_behind() -> None:
    asked = call(
        max_completion_tokens=9, logprobs=True, top_logprobs=3, top_k=5, seed=1, stop=["x"], reasoning_effort="low",
        chat_template_kwargs={"a": 1}, tools=[], chat_template="T",
    )  # fmt: skip
    fields = {name: json.loads(bytes(raw)) for name, raw in completion(asked.fields, "P", msgspec.Raw(b"9")).items()}
    kept = {"model": "m", "max_tokens": 9, "logprobs": 3, "top_k": 5, "seed": 1, "stop": ["x"]}
    assert fields == {**kept, "prompt": "P", "add_special_tokens": False}
    assert limit(asked.fields) == msgspec.Raw(b"9")
    assert limit(call(max_tokens=None).fields) is None
    assert limit(call(max_tokens=None, max_completion_tokens=50).fields) == msgspec.Raw(b"50")
    told = json.loads(conversation_body(asked, "wire"))
    assert told == {
        "model": "wire", "messages": [{"role": "user", "content": "Q"}], "tools": [], "chat_template": "T",
        "chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": True, "a": 1},
    }  # fmt: skip
    assert json.loads(conversation_body(call(), "m"))["chat_template_kwargs"] == {}


def test_a_closing_tag_is_found_wherever_the_stream_is_cut() -> None:
    text = "One < two.</thin\n</think>\n\nSo."
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            raw, heard = RawThought(over=False), {"reasoning_content": "", "content": ""}
            for at, piece in enumerate((text[:first], text[first:second], text[second:])):
                reason = "stop" if at == 2 else None
                said = {"choices": [{"index": 0, "text": piece, "logprobs": None, "finish_reason": reason}]}
                (choice,) = json.loads(raw.as_chat(json.dumps(said).encode()))["choices"]
                assert "text" not in choice
                for name, words in choice["delta"].items():
                    heard[name] += words
            assert heard == {"reasoning_content": "One < two.</thin\n", "content": "\n\nSo."}


@pytest.mark.parametrize(
    "listed", [{}, [], {"tokens": ["a"], "token_logprobs": [], "top_logprobs": [None]}, {"tokens": None}]
)
def test_odd_log_probabilities_cost_no_words(listed: object) -> None:
    said = {"choices": [{"index": 0, "text": "One", "logprobs": listed, "finish_reason": None}]}
    (choice,) = json.loads(RawThought(over=False).as_chat(msgspec.json.encode(said)))["choices"]
    assert (choice["delta"], choice["logprobs"]) == ({"reasoning_content": "One"}, None)


DEEP = b'{"choices": ' + b"[" * 100_000


@pytest.mark.parametrize("data", [b"[DONE]", b"{", b"[]", b'{"error": {"message": "x"}}', b'{"choices": 1}', DEEP])
def test_what_is_no_chunk_is_left_as_it_is(data: bytes) -> None:
    assert RawThought(over=False).as_chat(data) == data


def test_a_text_that_ends_in_the_thought_keeps_nothing_back() -> None:
    said = {"choices": [{"index": 0, "text": "One </thi", "finish_reason": "length", "stop_reason": None}]}
    (choice,) = json.loads(RawThought(over=False).as_chat(msgspec.json.encode(said)))["choices"]
    assert choice["delta"] == {"reasoning_content": "One </thi"}
