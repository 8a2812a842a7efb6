"""Adapters before real engines: what vllm_engine.py and llamacpp_engine.py share.

The server runs the bundled model in float32 on the CPU; the gateway before it is a process of its own, whose embedded
engine has the same model. Checked of every server: answers, streamed and not; cached tokens in the ledger; what tenants
share; plans that go on from a thought; a caller who leaves ends the generation.
"""

import asyncio
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import openai

from local_engine.arithmetic import problems
from tests.conftest import stop
from tests.faults.serving import Serving, serving

MODEL = Path(__file__).parents[2] / "local_engine" / "bundled" / "base"
START_S = 300
_FAR = """model: base, context: 1024, max_output: 512, prefix: true,
         price: {input: $1/Mtok, cached_input: $0.1/Mtok, output: $2/Mtok}"""
POLICY = """
version: 1
providers:
  gpu: {{server: {server}, base_url: "{url}", timeout: 60s, retries: 0, breaker: off}}
  same: {{server: {server}, base_url: "{url}", timeout: 60s, retries: 0, breaker: off}}
  home: {{engine: embedded}}
models:
  base: {{provider: gpu, {far}}}
  twin: {{provider: same, {far}}}
  shared: {{provider: gpu, {far}, plan: {{speculate: {{draft: twin, method: specreason}}}}}}
  left: {{provider: gpu, {far}, plan: {{exit: {{rule: budget, budget: 20}}}}}}
  own: {{provider: home, model: bundled/base}}
routes: [{{name: auto, when: {{model: auto}}, use: [base], cache: off}}]
"""
LONG = "You are a careful calculator. " * 20
EASY = "What is 2 + 3?"
HARD = problems(4, 3, 1)[0].question


@contextmanager
def started(command: Sequence[str], env: Mapping[str, str], log: Path, health: str) -> Iterator[None]:
    """A server of somebody else's, up when entered. Raises RuntimeError if it does not start."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**inherited, **env}, stdout=out, stderr=out, cwd=log.parent)
    try:
        until = time.monotonic() + START_S
        while not _answers(health):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        stop(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def ask(url: str, headers: dict[str, str], body: bytes | None = None) -> tuple[bytes, Any]:
    """(body, headers) of an answer."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as response:
        return response.read(), response.headers


def with_system(question: str) -> list[Any]:
    return [{"role": "system", "content": LONG}, {"role": "user", "content": question}]


def _other_key(gateway: Serving) -> str:
    body, _ = ask(
        f"http://127.0.0.1:{gateway.port}/leadline/v1/admin/keys",
        {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"},
        json.dumps({"name": "other", "tenant": "elsewhere"}).encode(),
    )
    key: str = json.loads(body)["key"]
    return key


def _thought(message: Any) -> str:
    """By either name: the engines' own answers come as they are."""
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""


def _words(message: Any) -> tuple[list[str], str]:
    """(thought, answer) of a message or of deltas put together, without the spaces at their ends."""
    thought, answer = _thought(message), message.content or ""
    if not thought and answer.lstrip().startswith("<think>"):
        thought, _, answer = answer.lstrip().removeprefix("<think>").partition("</think>")
    return thought.split(), answer.strip()


def _count(plan: str, kind: str, name: str) -> int:
    """What a plan of this kind counted, by what the header says of it."""
    found = re.fullmatch(rf"{kind}; .*\b{name}=(\d+).*", plan)
    return int(found[1]) if found else 0


def _goes_on(url: str, thought: str) -> bool:
    """Whether the server itself writes each step after the text before it."""
    steps, prompt = (
        thought.strip().split("\n\n"),
        f"<|im_start|>user\n{HARD}<|im_end|>\n<|im_start|>assistant\n<think>\n",
    )
    for step in steps:
        asked = {"model": "base", "prompt": prompt, "temperature": 0, "max_tokens": 60, "stop": ["\n\n", "</think>"]}
        body, _ = ask(f"{url}/completions", {"Content-Type": "application/json"}, json.dumps(asked).encode())
        if json.loads(body)["choices"][0]["text"].strip() != step.strip():
            return False
        prompt += f"{step}\n\n"
    return len(steps) > 2


async def judge(url: str, gateway: Serving, running: Callable[[], float], *, salted: bool) -> dict[str, bool]:
    """What holds of the server at `url` behind the gateway. `running`: how many requests it works on; `salted`: it
    keeps tenants' prefixes apart."""
    base = f"http://127.0.0.1:{gateway.port}/v1"
    mine = openai.AsyncOpenAI(base_url=base, api_key=gateway.key, max_retries=0)
    other = openai.AsyncOpenAI(base_url=base, api_key=_other_key(gateway), max_retries=0)

    async def said(model: str, question: str) -> tuple[tuple[list[str], str], Any, str]:
        """What is said, the whole answer, and what the plan did."""
        raw = await mine.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=400
        )
        answer = raw.parse()
        return _words(answer.choices[0].message), answer, raw.headers.get("x-leadline-plan", "")

    async def cached(client: openai.AsyncOpenAI, question: str) -> int:
        answer = await client.chat.completions.create(model="base", messages=with_system(question), max_tokens=4)
        details = answer.usage.prompt_tokens_details if answer.usage else None
        return (details.cached_tokens or 0) if details else 0

    ready = f"http://127.0.0.1:{gateway.port}/health/readiness"
    async with asyncio.timeout(START_S):
        while json.loads((await asyncio.to_thread(ask, ready, {}))[0])["unavailable"]:
            await asyncio.sleep(0.1)  # for the embedded engine
    found = {}
    words, answer, _ = await said("base", EASY)
    found["answers"] = bool(words[1]) and answer.choices[0].finish_reason == "stop"
    stream = await mine.chat.completions.create(
        model="base", messages=[{"role": "user", "content": EASY}], temperature=0, max_tokens=400, stream=True
    )
    deltas = [chunk.choices[0].delta async for chunk in stream if chunk.choices]
    found["streams the same"] = words == _words(
        openai.types.chat.ChatCompletionMessage(
            role="assistant",
            content="".join(delta.content or "" for delta in deltas),
            reasoning_content="".join(_thought(delta) for delta in deltas),
        )
    )
    found["first prompt is cold"] = await cached(mine, "What is 4 + 5?") < 16
    found["a shared prefix is cached"] = await cached(mine, "What is 6 + 7?") >= 64
    met = await cached(other, "What is 6 + 7?")
    found["another tenant shares nothing" if salted else "tenants share prefixes, as is said of it"] = (
        met == 0 if salted else met >= 64
    )
    spend = await asyncio.to_thread(
        ask, f"http://127.0.0.1:{gateway.port}/leadline/v1/spend", {"Authorization": f"Bearer {gateway.key}"}
    )
    found["every call is in the ledger"] = json.loads(spend[0])["requests"] == 5

    alone, whole, _ = await said("base", HARD)
    found["writes what our own engine writes"] = alone == (await said("own", HARD))[0]
    (_, told), shared, plan = await said("shared", HARD)
    found["a thought written step by step goes on, each time, from the words before"] = (
        bool(told)
        and _count(plan, "speculate", "drafted_steps") > 1
        and await asyncio.to_thread(_goes_on, url, _thought(shared.choices[0].message))
    )
    left, cut, plan = await said("left", HARD)
    found["a thought that is left is answered from where it was left"] = (
        bool(left[0])
        and left[0] == alone[0][: len(left[0])] != alone[0]
        and plan.startswith("exit; by=budget; ")
        and left[1].startswith("The answer is")
        and cut.usage.completion_tokens < whole.usage.completion_tokens
    )

    leaving = await mine.chat.completions.create(
        model="base", messages=[{"role": "user", "content": EASY}], max_tokens=512, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for _ in leaving:
        break
    ran = await asyncio.to_thread(running)
    await leaving.close()
    until = time.monotonic() + 10
    while (still := await asyncio.to_thread(running)) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    found["a caller who leaves ends its generation"] = ran >= 1 and still == 0
    await asyncio.gather(mine.close(), other.close())
    return found


def report(
    server: str,
    engine: Callable[[Path], AbstractContextManager[str]],
    running: Callable[[str], float],
    more: Callable[[str], Mapping[str, bool]],
    *,
    salted: bool,
) -> int:
    """Start both, judge, print what holds; the exit status. `engine` yields a base URL, `more` judges it directly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with engine(folder) as url, serving(POLICY.format(url=url, server=server, far=_FAR), folder) as gateway:
            found = asyncio.run(judge(url, gateway, lambda: running(url), salted=salted)) | dict(more(url))
    for words, holds in found.items():
        print(f"{server}: {'yes' if holds else 'NO '} {words}", flush=True)  # noqa: T201
    return 0 if all(found.values()) else 1
