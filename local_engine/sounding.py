"""One `Probe` of a local model: its prompt is read once, heard at its last token, and kept for the answer.

Readers are asked in order, each only where the one before left a head open. One that rates reads, on a fork of the
prompt, a fixed question about it; three numbers come of that (`Rating`), which need no training:

- the entropy of the first token of the answer;
- P(True) (Kadavath et al., 2022): the model's own P(yes) against P(no) after the question;
- Internal Confidence (Chen and Varoquaux, 2025): the same P(yes) read off every second layer at the question's last
  tokens by the final norm and head; weights halve with every token further from the end and grow with the layer.
"""

import time
from collections.abc import Sequence as Sized
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from local_engine.lane import Lane
from local_engine.model import LocalModel
from local_engine.primitives import Primitives
from local_engine.probe_types import PromptReader, Rating, Sounding
from local_engine.room import out_of_room
from local_engine.sequence import Sequence
from local_engine.turns import Turn
from local_engine.types import Event, Failed, Finished, FinishReason, Probe, ProbeResult, TapSpec

END_TOKENS: Final = 4
"""The last tokens of the question at which layers are read."""


def rated_layers(layers: int) -> tuple[int, ...]:
    """Those read for Internal Confidence: every second of the upper half, the last among them."""
    return tuple(sorted(range(layers, layers // 2 - 1, -2)))


@dataclass(slots=True)
class _Heard:
    """What readers said so far."""

    p_success: dict[str, float] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)
    out_tokens: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    domain: dict[str, float] = field(default_factory=dict)
    needs_reasoning: float | None = None
    by: dict[str, str] = field(default_factory=dict)
    """The reader's version, by head."""

    def add(self, said: Sounding, version: str) -> None:
        for head, p in said.p_success.items():
            if head not in self.p_success or head in self.undecided:
                self.p_success[head] = p
                self.by[head] = version
                self.undecided.discard(head)
                if head in said.undecided:
                    self.undecided.add(head)
        self.out_tokens = {**said.out_tokens, **self.out_tokens}
        self.domain = self.domain or dict(said.domain)
        if self.needs_reasoning is None:
            self.needs_reasoning = said.needs_reasoning

    def open(self, heads: Sized[str]) -> bool:
        return any(head in self.undecided or head not in self.p_success for head in heads)


class PromptSounding:
    """Controller of one `Probe` with a model."""

    def __init__(
        self, command: Probe, prompt: list[int], model: LocalModel, lane: Lane, readers: Sized[PromptReader]
    ) -> None:
        self._command = command
        self._prompt = prompt
        self._model = model
        self._lane = lane
        self._readers = list(readers)
        self._began = time.perf_counter()
        self._last = int(model.network.config.num_hidden_layers)
        layers = {layer for reader in readers for layer in reader.layers}
        self._layers = tuple(sorted(layers | {self._last}))
        self._engine: Primitives | None = None
        self._heard = _Heard()
        self._reading: Sequence | None = None
        self._rating: Sequence | None = None
        self._rated: list[Tensor] = []
        self._states: Tensor | None = None
        self._logits: Tensor | None = None
        self.done = False

    def begin(self, engine: Primitives) -> None:
        self._engine = engine
        whole = any(reader.over == "prompt" for reader in self._readers)
        means = self._lane.means(len(self._prompt)) if whole else None
        taps = TapSpec(self._layers, "prompt")
        self._reading = engine.open(self._command.model, self._prompt, taps=taps, means=means)

    def stepped(self, turn: Turn) -> list[Event]:
        assert self._engine is not None, "it has begun"
        if turn.out_of_room:
            self.done = True
            return [out_of_room(self._command.id, self._command.model, len(turn.sequence.ids))]
        if turn.sequence is self._rating:
            if turn.hidden is not None:
                self._rated.append(turn.hidden.states)
            return self._finish(self._rate(torch.cat(self._rated))) if turn.rested else []
        if turn.hidden is not None:
            self._states = turn.hidden.states[-1]
            self._logits = self._lane.logits(self._states[-1:])[0]
        return self._ask() if turn.rested else []

    def ended(self, reason: FinishReason) -> list[Event]:
        if reason == "deadline":
            return [Failed(self._command.id, "deadline", "the time for the probe ran out")]
        return [Finished(self._command.id, reason, len(self._prompt), 0, 0)]

    def _ask(self) -> list[Event]:
        """The readers that need no more than the prompt; then the question, where one is needed."""
        while self._readers:
            reader = self._readers[0]
            if self._heard.p_success and not self._heard.open(reader.heads):
                self._readers.pop(0)
            elif reader.question:
                return self._begin_rating(reader.question)
            else:
                self._hear(self._readers.pop(0), Rating(self._entropy()))
        return self._result()

    def _begin_rating(self, question: str) -> list[Event]:
        assert self._engine is not None
        assert self._reading is not None
        tokens = self._model.tokenizer.encode(question, add_special_tokens=False, split_special_tokens=True)
        if len(self._prompt) + len(tokens) > self._reading.limit:
            self._readers.clear()  # no room to ask
            return self._result()
        self._rating = self._engine.fork(self._reading)
        self._rating.taps = TapSpec(rated_layers(self._last), "generated")
        self._engine.append(self._rating, tokens)
        return []

    def _rate(self, states: Tensor) -> Rating:
        """`states`: [question tokens, rated layers, width]."""
        reader = self._readers[0]
        yes, no = (self._first_token(word) for word in reader.answers)
        ends = states[-END_TOKENS:]
        logits = self._lane.logits(ends.reshape(-1, ends.shape[-1]))[:, [yes, no]]
        p_yes = torch.softmax(logits, -1)[:, 0].reshape(ends.shape[:2])
        tokens = torch.pow(0.5, torch.arange(len(ends) - 1, -1, -1, dtype=torch.float32))
        layers = torch.arange(1, ends.shape[1] + 1, dtype=torch.float32)
        weights = (tokens[:, None] * layers[None, :]).to(p_yes.device)
        return Rating(self._entropy(), float(p_yes[-1, -1]), float((p_yes * weights).sum() / weights.sum()))

    def _first_token(self, word: str) -> int:
        token: int = self._model.tokenizer.encode(word, add_special_tokens=False)[0]
        return token

    def _entropy(self) -> float:
        assert self._logits is not None, "the prompt is read"
        return float(torch.special.entr(torch.softmax(self._logits, -1)).sum())

    def _finish(self, rating: Rating) -> list[Event]:
        assert self._engine is not None
        assert self._rating is not None
        self._engine.close(self._rating)
        self._hear(self._readers.pop(0), rating)
        return self._ask()

    def _hear(self, reader: PromptReader, rating: Rating) -> None:
        assert self._states is not None, "the prompt is read"
        assert self._reading is not None
        if reader.over == "prompt" and self._reading.means is not None:
            states = self._reading.means.mean(reader.layers)
        else:
            states = self._states[[self._layers.index(layer) for layer in reader.layers]]
        self._heard.add(reader.read(states.float().cpu().numpy(), rating), reader.version)

    def _result(self) -> list[Event]:
        assert self._engine is not None
        assert self._reading is not None
        self.done = True
        if self._command.ttl_s > 0 and self._logits is not None:
            self._engine.keep(self._reading, self._logits, time.perf_counter() + self._command.ttl_s)
        heard = self._heard
        return [
            ProbeResult(
                self._command.id,
                heard.p_success,
                {self._command.model: len(self._prompt)},
                int((time.perf_counter() - self._began) * 1e6),
                sorted(heard.undecided),
                heard.out_tokens,
                heard.domain,
                heard.needs_reasoning,
                heard.by,
            )
        ]
