"""The demo's caller: real questions through the `openai` client, and a transcript of what came back."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import openai

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Task:
    """One question. `recorded` says whether weak and strong were right, by the recording's own labels."""

    kind: Literal["gsm8k", "arithmetic"]
    question: str
    gold: str
    recorded: tuple[bool, bool] | None = None
    level: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """What the client saw of one call. Money and tokens are None where the call failed."""

    arm: str
    task: Task
    streamed: bool
    status: int
    request_id: str
    completion_id: str
    model: str
    cache: str
    degraded: str
    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_nanousd: int | None
    latency_ms: float

    @property
    def graded(self) -> bool:
        """Whether the number in the answer is the gold one."""
        return answers(self.text, self.task.gold)

    @property
    def correct(self) -> bool:
        """By the recorded label where there is one for the model that answered, else graded from the text."""
        recorded = self.task.recorded
        if recorded is not None and self.model in ("weak", "strong"):
            return self.status == 200 and recorded[self.model == "strong"]
        return self.graded


def answers(text: str, gold: str) -> bool:
    """Whether the number after `####`, else the last number, equals `gold`."""
    marked = text.rpartition("####")
    found = _NUMBER.findall(marked[2])
    if not found:
        return False
    return _value(found[0] if marked[1] else found[-1]) == _value(gold)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def drive(
    base_url: str, key: str, arm: str, model: str, tasks: Sequence[Task], *, concurrency: int, store: bool = False
) -> list[Call]:
    """Ask every task, every second one as a stream; without `store` the response cache is left out of it."""
    return asyncio.run(_drive(base_url, key, arm, model, tasks, concurrency, store))


async def _drive(
    base_url: str, key: str, arm: str, model: str, tasks: Sequence[Task], concurrency: int, store: bool
) -> list[Call]:
    headers = {} if store else {"Cache-Control": "no-store"}
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    slots = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key=key, max_retries=0, default_headers=headers, http_client=http
    ) as client:

        async def ask(index: int, task: Task) -> Call:
            async with slots:
                return await _ask(client, arm, model, task, streamed=index % 2 == 1)

        return list(await asyncio.gather(*(ask(index, task) for index, task in enumerate(tasks))))


async def _ask(client: openai.AsyncOpenAI, arm: str, model: str, task: Task, *, streamed: bool) -> Call:
    fields: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": task.question}],
        "temperature": 0,
    }
    started = time.perf_counter()
    try:
        seen = await (_streamed(client, fields) if streamed else _plain(client, fields))
    except openai.APIStatusError as error:
        seen = _Seen(error.response.headers, status=error.status_code)
    latency_ms = (time.perf_counter() - started) * 1000
    return Call(
        arm=arm,
        task=task,
        streamed=streamed,
        status=seen.status,
        request_id=seen.headers.get("x-request-id", ""),
        completion_id=seen.completion_id,
        model=seen.headers.get("x-leadline-model", ""),
        cache=seen.headers.get("x-leadline-cache", ""),
        degraded=seen.headers.get("x-leadline-degraded", ""),
        text=seen.text,
        prompt_tokens=seen.prompt_tokens,
        completion_tokens=seen.completion_tokens,
        cost_nanousd=seen.cost_nanousd,
        latency_ms=latency_ms,
    )


@dataclass(slots=True)
class _Seen:
    """One answer, whichever way it came."""

    headers: Any
    status: int = 200
    completion_id: str = ""
    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_nanousd: int | None = None


async def _plain(client: openai.AsyncOpenAI, fields: dict[str, Any]) -> _Seen:
    raw = await client.chat.completions.with_raw_response.create(**fields)
    answer = raw.parse()
    return _Seen(
        raw.headers,
        completion_id=answer.id,
        text=answer.choices[0].message.content or "",
        prompt_tokens=answer.usage.prompt_tokens,
        completion_tokens=answer.usage.completion_tokens,
        cost_nanousd=int(raw.headers["x-leadline-cost-nanousd"]),
    )


async def _streamed(client: openai.AsyncOpenAI, fields: dict[str, Any]) -> _Seen:
    """A stream's cost comes with its last chunk, in the extension `leadline`; a cached one's is known at its start."""
    raw = await client.chat.completions.with_raw_response.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    seen = _Seen(raw.headers)
    async for chunk in raw.parse():
        seen.completion_id = chunk.id
        if chunk.choices:
            seen.text += chunk.choices[0].delta.content or ""
        if chunk.usage is not None:
            seen.prompt_tokens = chunk.usage.prompt_tokens
            seen.completion_tokens = chunk.usage.completion_tokens
            receipt = (chunk.model_extra or {}).get("leadline")
            seen.cost_nanousd = receipt["cost_nanousd"] if receipt else int(raw.headers["x-leadline-cost-nanousd"])
    return seen
