"""The words that cross the engine's border. Imported by gateway workers, so: no torch here.

The link carries length-prefixed msgpack frames (four bytes, big endian, then one struct of the unions below).
The engine speaks first, with `Hello`. Commands carry an `id` chosen by the client and unique on its connection;
every event names the command it answers. `Generate` is answered, for each of its `n` choices, by any number of `Delta`
and then one `Finished`, or, for all of them together, by one `Failed`; `Probe`, `Embed` and `Score` by one result or
one `Failed`. `Cancel` has no answer of its own: the cancelled command ends with `Finished(finish_reason="cancelled")`,
one for each choice that is not over, within one engine step; so does, with `"deadline"`, a command whose time is up.
`Prefix` and `Stats` are answered by one result; `Follow` by events until it is cancelled.
"""

from typing import Any, Literal

import msgspec

from local_engine.plan_types import Plan, PlanUse
from local_engine.prefix_types import KVEvent, PrefixStats

Effort = Literal["none", "low", "high"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "deadline"]
FailureCode = Literal["context_length_exceeded", "model_not_found", "invalid_request", "deadline", "internal"]
"""`deadline`: of a command that has nothing to give before it is done; a generation ends with what it has."""
Message = dict[str, Any]
"""One chat message in OpenAI's shape, as decoded JSON."""


class TextFormat(msgspec.Struct, frozen=True):
    """What the text of an answer may be."""

    kind: Literal["json_object", "json_schema", "regex"]
    definition: str = ""
    """The JSON schema, or the regular expression (Rust's syntax) that the whole text matches."""
    field: str = "response_format"
    """The request's field that asked for it, for error messages."""


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of a tool call: first its id and name, then its arguments as they are written."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    """JSON, in pieces to be joined."""


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
    response_format: TextFormat | None = None
    """Holds the text after the thinking block to a format."""
    effort: Effort = "low"
    """How long to think, for models trained with effort modes; others ignore it."""


class ThoughtSoFar(msgspec.Struct, frozen=True):
    """A thought that has begun elsewhere: the model thinks on from its last word or, where it is over, answers."""

    text: str
    """Without the markers around it."""
    over: bool = False


class TapSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which hidden states come back: of these layers, at these tokens."""

    layers: tuple[int, ...]
    """0 is the embeddings, k the output of the k-th decoder layer; the last one is before the final norm."""
    where: Literal["prompt", "generated", "tokens"] = "prompt"
    """The last token of the prompt; every generated token; or those of the generated ones that are in `tokens`."""
    tokens: tuple[int, ...] = ()


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    id: int
    model: str
    messages_json: bytes
    """The request's `messages` array, untouched."""
    sampling: SamplingParams
    tools_json: bytes | None = None
    prefix: str = ""
    """Words of the answer that are there already: the model writes on from them, without thinking first."""
    n: int = 1
    """Answers to write; the prompt is read once. Choice k uses the seed plus k."""
    priority: int = 0
    """More urgent is larger. Waiting counts: ten seconds are worth one."""
    deadline_s: float | None = None
    """Seconds from now after which what is not over ends, with what it has."""
    salt: str = ""
    """The tenant: what was computed for one is never found by another."""
    taps: TapSpec | None = None
    """Hidden states to send back."""
    tool_choice: Literal["none", "auto", "required"] = "auto"
    tool: str = ""
    """With `required`: the tool to call; any one where empty."""
    plan: Plan | None = None
    """None: this model alone, and as long as it thinks."""
    thought: ThoughtSoFar | None = None
    """What it has thought already, before `prefix`. Of one that is not over, stop strings and log-probabilities count
    within the thought, too."""
    context: int | None = None
    """Tokens of prompt and answer together, where they are to be fewer than the model's window has."""


class Score(msgspec.Struct, frozen=True, tag="score"):
    """How probable are these continuations of a conversation?"""

    id: int
    model: str
    messages_json: bytes
    candidates: list[str]
    tools_json: bytes | None = None
    prefix: str = ""
    priority: int = 0
    deadline_s: float | None = None
    salt: str = ""


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """How likely is a good answer? Asked of the encoder; with `model`, of that model's own reading of the prompt."""

    id: int
    messages_json: bytes
    model: str = ""
    tools_json: bytes | None = None
    effort: Effort = "low"
    salt: str = ""
    ttl_s: float = 0.0
    """With `model`: how long what was read is kept for the request that writes on from it, and computes none of it."""
    deadline_s: float | None = None


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    id: int
    texts: list[str]


class Prefix(msgspec.Struct, frozen=True, tag="prefix"):
    """Work on what a tenant has of stored prefixes. Answered by one PrefixResult or one Failed.

    `lookup`: tokens of the prompt that a request would find now. `pin`: the conversation so far is kept from eviction,
    and read first where it is not stored. `unpin`: no more. `evict`: it is forgotten with all that continues it, but
    for what is pinned or just being loaded.
    """

    id: int
    model: str
    action: Literal["lookup", "pin", "unpin", "evict"]
    messages_json: bytes | None = None
    """None: of `evict`, all that the tenant has, in every tier."""
    tools_json: bytes | None = None
    effort: Effort = "low"
    """Of `lookup`: as the request would have it."""
    salt: str = ""
    deadline_s: float | None = None


class Follow(msgspec.Struct, frozen=True, tag="follow"):
    """Tell what a model's prefix store has and, from then on, what comes and goes: PrefixEvents, until it is cancelled
    and ends with one Finished."""

    id: int
    model: str


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    id: int
    """The command to cancel."""


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """How is the engine? Answered at once, beside the steps."""

    id: int


Command = Generate | Score | Probe | Embed | Prefix | Follow | Cancel | Stats


class ModelCard(msgspec.Struct, frozen=True):
    name: str
    context_window: int
    """Tokens, prompt and answer together."""
    parameters: int
    reasoning: bool
    dtype: str = ""
    """Of its weights, as torch calls it."""
    device: str = ""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    models: list[ModelCard]
    probe_version: str | None
    """Version of the loaded probe artifact; None when the engine has no probe."""
    probe_heads: list[str]
    pid: int
    readers: dict[str, str] = {}
    """Model to the versions, joined by `+`, of what is asked when it reads a prompt for a probe."""


class TokenLogprob(msgspec.Struct, frozen=True):
    token: bytes
    """The token's own, which may be a part of a character."""
    logprob: float
    """Natural; before temperature, penalties and constraints."""
    top: list[tuple[bytes, float]] = []
    entropy: float | None = None
    """Of the distribution that the token was drawn from, as raw, in nats."""


class Tapped(msgspec.Struct, frozen=True):
    """Hidden states that a TapSpec asked for."""

    positions: list[int]
    """Of the tokens, counted from the start of the prompt."""
    shape: tuple[int, int, int]
    """(tokens, layers in the order asked for, width)"""
    data: bytes
    """float16, little endian, row major."""


class Delta(msgspec.Struct, frozen=True, tag="delta", omit_defaults=True):
    """New text of one choice of a running command; either part may be empty. Never half a character."""

    id: int
    content: str = ""
    reasoning: str = ""
    tokens: int = 1
    """Tokens this delta stands for."""
    logprobs: list[TokenLogprob] = []
    choice: int = 0
    tapped: list[Tapped] = []
    """Where taps were asked for: a generated token's states come with the step after it, so the last token has none."""
    tool_calls: list[ToolCallDelta] = []
    reasoning_tokens: int = 0
    """Of its tokens, those inside the thinking block."""
    input_tokens: int = 0
    """Of the prompt: in the first delta of each choice, so that one which is cut off can be billed."""
    cached_tokens: int = 0
    """As in Finished, likewise."""


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    id: int
    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int
    """All generated tokens, reasoning and a final end-of-turn token included."""
    reasoning_tokens: int
    """Of the output tokens, those inside the thinking block."""
    cached_tokens: int = 0
    """Of the input tokens, those whose KV the prefix store had. Choices share a prompt: choice 0 says it."""
    choice: int = 0
    drafted_tokens: int = 0
    """Tokens that speculation proposed and the model verified."""
    accepted_tokens: int = 0
    """Of them, those that were right."""
    plan: PlanUse | None = None
    """Of a command with a plan."""
    stopped_by: str = ""
    """The stop string that ended it, if one did."""


class ProbeResult(msgspec.Struct, frozen=True, tag="probe_result"):
    id: int
    p_success: dict[str, float]
    """Calibrated P(correct) per head; a head that abstains is absent."""
    input_tokens: dict[str, int]
    """Exact prompt length per local model, chat template included."""
    """Of a probe with a model: of that one."""
    cost_us: int
    """Wall time in the engine, microseconds."""
    undecided: list[str] = []
    """Of these heads it knows hardly more than the base rate."""
    out_tokens: dict[str, tuple[float, float, float]] = {}
    """Per head (expected, low, high) tokens of the answer."""
    domain: dict[str, float] = {}
    """Probability of each domain."""
    needs_reasoning: float | None = None
    by: dict[str, str] = {}
    """Per head the version of the reader whose word it is, of a probe with a model that several readers hear."""


class EmbedResult(msgspec.Struct, frozen=True, tag="embed_result"):
    id: int
    dims: int
    vectors: bytes
    """float32, little endian, row major: [len(texts), dims]."""
    tokens: int


class CandidateScore(msgspec.Struct, frozen=True):
    """What the model thinks of each token of one candidate; raw, at temperature 1."""

    tokens: list[int]
    logprobs: list[float]
    """Natural logarithms."""
    entropies: list[float]
    """Of the distribution in whose place each token stands, in nats."""


class ScoreResult(msgspec.Struct, frozen=True, tag="score_result"):
    id: int
    candidates: list[CandidateScore]
    input_tokens: int
    """Of the prompt, which is read once."""
    cached_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True):
    """All models together; what is counted is counted since the start."""

    running: int
    """Requests that have begun to be computed."""
    waiting: int
    steps: int
    """Steps that ran at least one forward pass."""
    kv_tokens: int
    """Tokens held in the caches of running sequences."""
    kv_bytes: int
    """What the caches of running sequences take."""
    kv_bytes_limit: int
    preemptions: int
    """How often a sequence gave its cache back to compute it again later."""
    computed_tokens: int
    """Read or written by a model, drafts that were verified included."""
    output_tokens: int
    prefix_bytes: int
    """What stored prefixes take."""
    prefix_asked_tokens: int
    prefix_hit_tokens: int
    cancelled: int
    """Requests whose callers left."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    held_prompts: int = 0
    """Read for a probe, and waiting for who writes on from them."""
    held_found: int = 0
    """How often somebody did."""


class StatsResult(msgspec.Struct, frozen=True, tag="stats_result"):
    id: int
    stats: EngineStats
    prefixes: dict[str, PrefixStats] = {}
    """Of each model that stores prefixes."""


class PrefixResult(msgspec.Struct, frozen=True, tag="prefix_result"):
    id: int
    tokens: int
    """Found, pinned, or forgotten; of `unpin` those that were pinned."""
    prompt_tokens: int
    """Of the conversation that was asked about."""


class PrefixEvents(msgspec.Struct, frozen=True, tag="prefix_events"):
    id: int
    events: list[KVEvent]
    """In their order; the first ones name all blocks that there are, each after the one that it continues."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    id: int
    code: FailureCode
    message: str
    param: str = "messages"
    """Of an `invalid_request`: the field at fault."""


Event = (
    Hello
    | Delta
    | Finished
    | ScoreResult
    | ProbeResult
    | EmbedResult
    | StatsResult
    | PrefixResult
    | PrefixEvents
    | Failed
)
