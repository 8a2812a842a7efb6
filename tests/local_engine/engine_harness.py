"""What the engine's tests share: talking to an engine in this process, and networks that can be watched and held."""

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
from local_engine.kv import KVCache
from local_engine.model import LocalModel
from local_engine.runner import Runner, Segment, StepOutput
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
    Score,
    ScoreResult,
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


class Watch:
    """Remembers the segments of every forward pass and, when gated, holds each until leave is given for it.

    An engine takes it as its `make_runner`: the passes it lets through are a real runner's.
    """

    def __init__(self, *, gated: bool = False) -> None:
        self.gated = gated
        self._leave = threading.Semaphore(0)
        self._asked = threading.Condition()
        self.passes: list[list[Segment]] = []
        self.fails: Callable[[list[Segment]], bool] = lambda segments: False
        self.error: Exception = RuntimeError("made to fail")

    def __call__(self, model: LocalModel, kv: KVCache) -> "WatchedRunner":
        return WatchedRunner(Runner(model, kv), self)

    def enter(self, segments: list[Segment]) -> None:
        with self._asked:
            self.passes.append(segments)
            self._asked.notify_all()
        if self.gated and not self._leave.acquire(timeout=PATIENCE_S):
            raise TimeoutError("nobody gave leave for a forward pass")
        if self.fails(segments):
            raise self.error

    def read_in(self, prompt: list[int]) -> list[int]:
        """All tokens computed in the slot that read `prompt`, in order."""
        slots: dict[int, list[int]] = {}
        for segments in self.passes:
            for segment in segments:
                slots.setdefault(segment.slot, []).extend(segment.tokens)
        return next(tokens for tokens in slots.values() if tokens[: len(prompt)] == prompt)

    @property
    def sizes(self) -> list[list[int]]:
        """Tokens of each segment of each pass, the smallest first."""
        return [sorted(len(segment.tokens) for segment in segments) for segments in self.passes]

    def allow(self, passes: int) -> None:
        self._leave.release(passes)

    def wait_for_pass(self, number: int) -> None:
        """Wait until the given pass, counted from 1, was asked for."""
        with self._asked:
            assert self._asked.wait_for(lambda: len(self.passes) >= number, PATIENCE_S)


class WatchedRunner:
    def __init__(self, runner: Runner, watch: Watch) -> None:
        self._runner = runner
        self._watch = watch

    def run(self, segments: Sequence[Segment], *, tap_layers: Sequence[int] = ()) -> StepOutput:
        self._watch.enter(list(segments))
        return self._runner.run(segments, tap_layers=tap_layers)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self._runner.logits(states)

    def greedy(self, slot: int, room: int) -> None:
        """None, so that every token is computed by a `run`, which is watched."""


class Caller:
    """One link to an engine, and the events that came back."""

    def __init__(self, engine: Engine) -> None:
        self._queue: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self._ids = iter(range(1, 1_000_000))
        self.seen: dict[int, list[Event]] = {}
        self._expected: dict[int, int] = {}
        self.link: Link = engine.connect(self._queue.put)

    def generate(self, text: str | bytes, sampling: SamplingParams = GREEDY, model: str = "m", **options: Any) -> int:
        id = next(self._ids)
        messages = text if isinstance(text, bytes) else user(text)
        self._expected[id] = max(1, options.get("n", 1))
        self.link.submit(Generate(id, model, messages, sampling, **options))
        return id

    def score(self, text: str, candidates: list[str], model: str = "m", **options: Any) -> int:
        id = next(self._ids)
        self.link.submit(Score(id, model, user(text), candidates, **options))
        return id

    def probe(self, messages_json: bytes, model: str = "", **options: Any) -> int:
        id = next(self._ids)
        self.link.submit(Probe(id, messages_json, model, **options))
        return id

    def cancel(self, id: int) -> None:
        self.link.submit(Cancel(id))

    def wait(self, id: int) -> list[Event]:
        """All events of one command, once it is over."""
        while not self._over(id):
            for event in self._queue.get(timeout=PATIENCE_S):
                assert not hasattr(event, "models")
                self.seen.setdefault(event.id, []).append(event)
        return self.seen[id]

    def _over(self, id: int) -> bool:
        seen = self.seen.get(id, [])
        if any(isinstance(event, Failed | ProbeResult | ScoreResult) for event in seen):
            return True
        return sum(isinstance(event, Finished) for event in seen) >= self._expected.get(id, 1)

    def finished(self, id: int, choice: int = 0) -> Finished:
        ends = [event for event in self.wait(id) if isinstance(event, Finished | Failed)]
        last = next(event for event in ends if isinstance(event, Failed) or event.choice == choice)
        assert isinstance(last, Finished), last
        return last

    def failed(self, id: int) -> Failed:
        last = self.wait(id)[-1]
        assert isinstance(last, Failed), last
        return last

    def content(self, id: int, choice: int = 0) -> str:
        return "".join(event.content for event in self.deltas(id, choice))

    def reasoning(self, id: int, choice: int = 0) -> str:
        return "".join(event.reasoning for event in self.deltas(id, choice))

    def deltas(self, id: int, choice: int = 0) -> list[Delta]:
        return [event for event in self.wait(id) if isinstance(event, Delta) and event.choice == choice]
