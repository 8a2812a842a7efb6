"""What the engine's tests share: talking to an engine in this process, and networks that can be watched and held."""

import asyncio
import json
import queue
import threading
from collections.abc import Callable
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from local_engine.engine import Engine, Link
from local_engine.types import (
    Cancel,
    Delta,
    Event,
    Failed,
    Finished,
    Generate,
    Probe,
    ProbeResult,
    SamplingParams,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
StartEngine = Callable[..., Engine]
PATIENCE_S = 60.0
"""A bound that only a broken engine meets."""
GREEDY = SamplingParams(temperature=0)


def user(text: str) -> bytes:
    return json.dumps([{"role": "user", "content": text}]).encode()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread or process brings about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


class WatchedNetwork:
    """A network that remembers the tokens of every forward pass and, when gated, waits for leave to do one."""

    def __init__(self, network: Any, *, gated: bool = False) -> None:
        self._network = network
        self._gated = gated
        self._leave = threading.Semaphore(0)
        self._asked = threading.Condition()
        self.passes: list[list[int]] = []
        self.fails_at: int | None = None

    @property
    def config(self) -> Any:
        return self._network.config

    def __call__(self, **inputs: Any) -> Any:
        with self._asked:
            self.passes.append(inputs["input_ids"][0].tolist())
            self._asked.notify_all()
        if self._gated and not self._leave.acquire(timeout=PATIENCE_S):
            raise TimeoutError("nobody gave leave for a forward pass")
        if self.fails_at == len(self.passes):
            raise RuntimeError("made to fail")
        return self._network(**inputs)

    def allow(self, passes: int) -> None:
        self._leave.release(passes)

    def wait_for_pass(self, number: int) -> None:
        """Wait until the given pass, counted from 1, was asked for."""
        with self._asked:
            assert self._asked.wait_for(lambda: len(self.passes) >= number, PATIENCE_S)


class Caller:
    """One link to an engine, and the events that came back."""

    def __init__(self, engine: Engine) -> None:
        self._queue: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self._ids = iter(range(1, 1_000_000))
        self.seen: dict[int, list[Event]] = {}
        self.link: Link = engine.connect(self._queue.put)

    def generate(self, text: str | bytes, sampling: SamplingParams = GREEDY, model: str = "m") -> int:
        id = next(self._ids)
        messages = text if isinstance(text, bytes) else user(text)
        self.link.submit(Generate(id, model, messages, sampling))
        return id

    def probe(self, messages_json: bytes) -> int:
        id = next(self._ids)
        self.link.submit(Probe(id, messages_json))
        return id

    def cancel(self, id: int) -> None:
        self.link.submit(Cancel(id))

    def wait(self, id: int) -> list[Event]:
        """All events of one command, once it is over."""
        while not any(isinstance(event, Finished | Failed | ProbeResult) for event in self.seen.get(id, [])):
            for event in self._queue.get(timeout=PATIENCE_S):
                assert not hasattr(event, "models")
                self.seen.setdefault(event.id, []).append(event)
        return self.seen[id]

    def finished(self, id: int) -> Finished:
        last = self.wait(id)[-1]
        assert isinstance(last, Finished), last
        return last

    def failed(self, id: int) -> Failed:
        last = self.wait(id)[-1]
        assert isinstance(last, Failed), last
        return last

    def content(self, id: int) -> str:
        return "".join(event.content for event in self.wait(id) if isinstance(event, Delta))

    def reasoning(self, id: int) -> str:
        return "".join(event.reasoning for event in self.wait(id) if isinstance(event, Delta))
