"""The words that cross the engine's border. Imported by gateway workers, so: no torch here.

The link carries length-prefixed msgpack frames (four bytes, big endian, then one struct of the unions below).
The engine speaks first, with `Hello`. Commands carry an `id` chosen by the client and unique on its connection;
every event names the command it answers. `Generate` is answered by any number of `Delta` and then exactly one of
`Finished` or `Failed`; `Probe` and `Embed` by one result or one `Failed`. `Cancel` has no answer of its own: the
cancelled command ends with `Finished(finish_reason="cancelled")` within one engine step.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

Effort = Literal["none", "low", "high"]
FinishReason = Literal["stop", "length", "cancelled"]
FailureCode = Literal["context_length_exceeded", "model_not_found", "invalid_request", "internal"]
Message = dict[str, Any]
"""One chat message in OpenAI's shape, as decoded JSON."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to turn logits into text. Defaults are OpenAI's; temperature 0 is greedy."""

    max_tokens: int | None = None
    """Most tokens to generate, reasoning included; None: up to the model's context."""
    min_tokens: int = 0
    """The model cannot end its turn before this many."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Only the most probable ones; 0 and -1 mean all."""
    min_p: float = 0.0
    """Only tokens at least this probable, as a share of the most probable one."""
    presence_penalty: float = 0.0
    """Off the logit of every token already written."""
    frequency_penalty: float = 0.0
    """Off the logit of every token, as often as it was written."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of every token of prompt and output."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these tokens."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the turn, beside the model's own."""
    logprobs: bool = False
    """Natural logarithms before temperature, penalties and constraints."""
    top_logprobs: int = 0
    effort: Effort = "low"
    """How long to think, for models trained with effort modes; others ignore it."""


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    id: int
    model: str
    messages_json: bytes
    """The request's `messages` array, untouched."""
    sampling: SamplingParams
    tools_json: bytes | None = None
    prefix: str = ""
    """Words of the answer that are there already: the model writes on from them, without thinking first."""


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    id: int
    messages_json: bytes


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    id: int
    texts: list[str]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    id: int
    """The command to cancel."""


Command = Generate | Probe | Embed | Cancel


class ModelCard(msgspec.Struct, frozen=True):
    name: str
    context_window: int
    """Tokens, prompt and answer together."""
    parameters: int
    reasoning: bool


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    models: list[ModelCard]
    probe_version: str | None
    """Version of the loaded probe artifact; None when the engine has no probe."""
    probe_heads: list[str]
    pid: int


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    top: list[tuple[str, float]] = []


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """New text of one running command; either part may be empty. Never half a character."""

    id: int
    content: str = ""
    reasoning: str = ""
    tokens: int = 1
    """Tokens this delta stands for."""
    logprobs: list[TokenLogprob] = []


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    id: int
    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int
    """All generated tokens, reasoning and a final end-of-turn token included."""
    reasoning_tokens: int
    """Of the output tokens, those inside the thinking block."""


class ProbeResult(msgspec.Struct, frozen=True, tag="probe_result"):
    id: int
    p_success: dict[str, float]
    """Calibrated P(correct) per head; a head that abstains is absent."""
    input_tokens: dict[str, int]
    """Exact prompt length per local model, chat template included."""
    cost_us: int
    """Wall time in the engine, microseconds."""


class EmbedResult(msgspec.Struct, frozen=True, tag="embed_result"):
    id: int
    dims: int
    vectors: bytes
    """float32, little endian, row major: [len(texts), dims]."""
    tokens: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    id: int
    code: FailureCode
    message: str


Event = Hello | Delta | Finished | ProbeResult | EmbedResult | Failed


class Prober(Protocol):
    """What the engine needs of a probe; the gateway passes one in, so that engine and probes stay strangers."""

    @property
    def version(self) -> str: ...

    @property
    def heads(self) -> Sequence[str]: ...

    def probe(self, conversations: Sequence[Sequence[Message]]) -> list[dict[str, float]]:
        """Calibrated P(correct) per head for each conversation."""
        ...

    def embed(self, texts: Sequence[str]) -> tuple[bytes, int, int]:
        """(float32 little-endian [n, dims] bytes, dims, tokens read)."""
        ...
