"""A thought that has begun: written on, word for word, by the local engine, and told to each server in its own way."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from gateway.edge.wire import read_chat
from gateway.errors import InvalidRequest
from gateway.upstream.begun import begun, read_begun
from gateway.upstream.local import LocalUpstream
from gateway.upstream.types import Answer, CallHeaders, ChatCall, Target, UpstreamError
from local_engine.arithmetic import problems
from local_engine.client import EngineClient
from local_engine.engine import Engine
from local_engine.errors import EngineGone
from local_engine.model import load_model
from local_engine.server import serve
from local_engine.types import ThoughtSoFar
from routers.policy import PrefixStyle

pytestmark = pytest.mark.anyio

TARGET = Target("local", "home", "m", None, 1024, 1024, 60.0, 0)
QUESTION = problems(7, 4, 1)[0].question
STYLES: list[PrefixStyle] = ["deepseek", "vllm", "llamacpp", "anthropic", "leadline"]


class Link:
    def __init__(self, client: EngineClient) -> None:
        self.client = client


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def upstream(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalUpstream]:
    socket = str(tmp_path_factory.mktemp("begun") / "e.sock")
    engine = Engine({"m": load_model("m", "bundled/base", "float32", "cpu")}, None)
    engine.start()
    serving = asyncio.create_task(serve(engine, socket))
    client = EngineClient(socket)
    while not client.connected:
        try:
            await client.connect()
        except EngineGone:
            await asyncio.sleep(0.005)
    yield LocalUpstream(Link(client))
    await client.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await asyncio.to_thread(engine.stop)


def call(thought: ThoughtSoFar | None = None, prefix: str = "", **fields: Any) -> ChatCall:
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}
    asked = read_chat(json.dumps(body).encode(), CallHeaders(token=""))
    return msgspec.structs.replace(asked, thought=thought, prefix=prefix)


def choice(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.body)["choices"][0]
    return found


async def test_a_thought_goes_on_where_it_was_cut_and_its_prefix_is_not_read_again(upstream: LocalUpstream) -> None:
    alone = choice(await upstream.complete(TARGET, call()))["message"]
    thought, answer = alone["reasoning_content"], alone["content"]
    steps = thought.split("\n\n")
    assert len(steps) > 2
    cut = steps[0] + "\n\n"
    whole = await upstream.complete(TARGET, call(ThoughtSoFar(cut)))
    message = choice(whole)["message"]
    assert cut + message["reasoning_content"] == thought
    assert message["content"] == answer
    again = await upstream.complete(TARGET, call(ThoughtSoFar(cut + steps[1] + "\n\n")))
    assert whole.usage is not None
    assert again.usage is not None
    read = again.usage.input + again.usage.cached_input
    assert again.usage.cached_input >= whole.usage.input + whole.usage.cached_input - 32, "in blocks of 32"
    assert again.usage.input < read / 2


async def test_a_thought_that_is_over_is_answered(upstream: LocalUpstream) -> None:
    alone = choice(await upstream.complete(TARGET, call()))["message"]
    found = choice(await upstream.complete(TARGET, call(ThoughtSoFar(alone["reasoning_content"], over=True))))
    assert found["message"] == {"role": "assistant", "content": alone["content"]}
    assert found["stop_reason"] is None


async def test_a_step_ends_at_its_stop_string_and_tells_how_likely_its_tokens_were(upstream: LocalUpstream) -> None:
    alone = choice(await upstream.complete(TARGET, call()))["message"]["reasoning_content"]
    first, second, *_ = alone.split("\n\n")
    asked = call(ThoughtSoFar(first + "\n\n"), stop=["\n\n"], logprobs=True, top_logprobs=5)
    step = choice(await upstream.complete(TARGET, asked))
    assert step["message"]["reasoning_content"] == second
    assert (step["finish_reason"], step["stop_reason"]) == ("stop", "\n\n")
    tokens = step["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).startswith(second)
    assert all(len(token["top_logprobs"]) == 5 for token in tokens)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("over", [False, True])
def test_each_server_is_told_in_its_own_way(style: PrefixStyle, over: bool) -> None:
    asked = call(ThoughtSoFar("One.\n\n", over), "So" if over else "")
    fields = {name: json.loads(bytes(raw)) for name, raw in begun(asked, style).items()}
    first, last = fields["messages"]
    assert first["content"] == QUESTION
    tagged = "<think>\nOne.\n</think>\n\nSo" if over else "<think>\nOne.\n\n"
    if style == "leadline" and over:
        tagged = "<think>\nOne.\n\n</think>\n\nSo"
    if style == "deepseek":
        said = {"content": "So" if over else "", "reasoning_content": "One.\n\n", "prefix": True}
        assert last == {"role": "assistant", **said}
    elif style == "llamacpp":
        said = {"content": "So" if over else "", "reasoning_content": "One.\n" if over else "One.\n\n"}
        assert last == {"role": "assistant", **said}
    else:
        assert last == {"role": "assistant", "content": tagged}
    goes_on: dict[str, Any] = dict.fromkeys(("vllm", "leadline"), True)
    goes_on["llamacpp"] = "content" if over else "reasoning_content"
    told = {"continue_final_message": goes_on[style], "add_generation_prompt": False} if style in goes_on else {}
    assert {name: value for name, value in fields.items() if name != "messages"} == told


def test_llamacpp_begins_what_has_no_words_yet_by_itself() -> None:
    """A last message without words makes its server leave out that the assistant's turn has begun."""
    assert begun(call(ThoughtSoFar("")), "llamacpp") == {}
    over = begun(call(ThoughtSoFar("\n", over=True), chat_template_kwargs={"a": 1}), "llamacpp")
    assert {name: json.loads(bytes(raw)) for name, raw in over.items()} == {
        "chat_template_kwargs": {"a": 1, "enable_thinking": False}
    }


@pytest.mark.parametrize("thought", [None, ThoughtSoFar("One.\n\n"), ThoughtSoFar("One.", over=True)])
def test_the_engines_own_server_reads_what_it_is_told(thought: ThoughtSoFar | None) -> None:
    prefix = "So" if thought is None or thought.over else ""
    asked = call(thought, prefix)
    sent = msgspec.structs.replace(asked, fields={**asked.fields, **begun(asked, "vllm")}, thought=None, prefix="")
    read = read_begun(sent)
    assert read.prefix == prefix
    assert (read.thought is None) == (thought is None)
    if thought is not None and read.thought is not None:
        assert (read.thought.text.rstrip("\n"), read.thought.over) == (thought.text.rstrip("\n"), thought.over)
    assert json.loads(bytes(read.fields["messages"])) == json.loads(bytes(asked.fields["messages"]))


@pytest.mark.parametrize(
    ("flag", "last", "read"),
    [
        (True, {"content": "So"}, ("So", None)),
        (True, {"content": "So", "reasoning_content": "One."}, ("So", ThoughtSoFar("One.", over=True))),
        (True, {"content": None, "reasoning_content": "One."}, ("", ThoughtSoFar("One."))),
        (True, {"content": "So", "reasoning_content": None, "reasoning": "One."}, ("So", ThoughtSoFar("One.", True))),
        (True, {"content": "<think>\nOne.</think>\n\nSo"}, ("So", ThoughtSoFar("One.", over=True))),
        ("content", {"content": "So"}, ("So", None)),
        ("content", {"content": "", "reasoning": "One."}, ("", ThoughtSoFar("One.", over=True))),
        ("content", {"content": "<think>"}, ("<think>", None)),
        ("reasoning_content", {"content": "", "reasoning_content": "One."}, ("", ThoughtSoFar("One."))),
        ("reasoning_content", {"content": "<think>\nOne."}, ("", ThoughtSoFar("One."))),
        ("reasoning_content", {}, ("", ThoughtSoFar(""))),
    ],
)
def test_a_caller_may_say_what_goes_on_in_any_of_the_ways(
    flag: Any, last: dict[str, Any], read: tuple[str, ThoughtSoFar | None]
) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", **last}]
    found = read_begun(call(messages=messages, continue_final_message=flag, add_generation_prompt=False))
    assert (found.prefix, found.thought) == read
    assert "add_generation_prompt" not in found.fields
    assert json.loads(bytes(found.fields["messages"])) == messages[:1]
    assert read_begun(found) == found, "once"


@pytest.mark.parametrize(
    ("flag", "last", "problem"),
    [
        ("thought", {"content": "So"}, "'thought' is none of true, false"),
        ("reasoning_content", {"content": "So", "reasoning_content": "One."}, "leave its `content` empty"),
        (True, {"content": [{"type": "text", "text": "So"}]}, "not an assistant's text"),
        (True, {"content": []}, "not an assistant's text"),
        (1, {"content": "So"}, "'1' is none of true, false"),
        (0, {"content": "So"}, "'0' is none of true, false"),
        (True, {"content": "", "reasoning_content": 1}, "not an assistant's text"),
    ],
)
def test_what_cannot_go_on_is_told(flag: Any, last: dict[str, Any], problem: str) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", **last}]
    with pytest.raises(InvalidRequest, match=problem):
        read_begun(call(messages=messages, continue_final_message=flag))


async def test_a_gateways_caller_may_say_it_too(upstream: LocalUpstream) -> None:
    alone = choice(await upstream.complete(TARGET, call()))["message"]
    cut = alone["reasoning_content"].split("\n\n")[0] + "\n\n"
    messages = [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "", "reasoning_content": cut}
    ]  # fmt: skip
    on = choice(await upstream.complete(TARGET, call(messages=messages, continue_final_message="reasoning_content")))
    assert cut + on["message"]["reasoning_content"] == alone["reasoning_content"]
    with pytest.raises(UpstreamError) as caught:
        await upstream.complete(TARGET, call(continue_final_message=True))
    assert (caught.value.cause, caught.value.status) == ("refused", 400)
    with pytest.raises(UpstreamError, match=r"^continue_final_message: 'x' is none of"):
        await upstream.complete(TARGET, call(continue_final_message="x"))


def test_who_would_have_a_question_gone_on_with_is_told() -> None:
    with pytest.raises(InvalidRequest, match="the last message is not an assistant's text"):
        read_begun(call(continue_final_message=True))
