"""Probers without a model; imports no torch, as an engine process is configured before torch is."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from local_engine.probe_types import Rating
from local_engine.types import Message


@dataclass(frozen=True)
class Said:
    """A sounding."""

    p_success: Mapping[str, float] = field(default_factory=dict)
    undecided: frozenset[str] = frozenset()
    out_tokens: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    domain: Mapping[str, float] = field(default_factory=dict)
    needs_reasoning: float | None = None


class FakeProber:
    """Finds everything as hard as it is long, and remembers its batches. It can be held before it answers."""

    version = "fake-1"
    heads = ("m",)

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.entered = threading.Semaphore(0)
        self.leave = threading.Event()
        self.leave.set()

    def sound(self, conversations: Sequence[Sequence[Message]]) -> list[Said]:
        self.batches.append(len(conversations))
        self.entered.release()
        assert self.leave.wait(60), "nobody gave leave for an answer"
        if any(conversation[-1]["content"] == "break" for conversation in conversations):
            raise RuntimeError("made to fail")
        return [Said({"m": 1 / (1 + len(conversation[-1]["content"]))}) for conversation in conversations]

    def embed(self, texts: Sequence[str]) -> tuple[bytes, int, int]:
        return b"\0\0\x80\x3f" * 2 * len(texts), 2, sum(len(text) for text in texts)


class FakeReader:
    """Remembers what it was given to read."""

    heads = ("m",)
    answers = ("yes", "no")

    def __init__(
        self,
        layers: tuple[int, ...] = (1, 2),
        question: str = "",
        *,
        decided: bool = True,
        version: str = "reads-1",
        over: Literal["last", "prompt"] = "last",
    ) -> None:
        self.over: Literal["last", "prompt"] = over
        self.version = version
        self.layers = layers
        self.question = question
        self.decided = decided
        self.seen: list[tuple[Any, Rating]] = []

    def read(self, states: Any, rating: Rating) -> Said:
        self.seen.append((states, rating))
        return Said({"m": 0.25}, frozenset() if self.decided else frozenset(("m",)))
