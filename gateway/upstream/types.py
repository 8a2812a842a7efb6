"""What lifecycle knows of an upstream: a target, a call, an answer, an error."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from gateway.ledger.settle import Usage
from gateway.upstream.tool_calls import ToolCallOrder
from local_engine.plan_types import Plan
from local_engine.types import ThoughtSoFar
from routers.policy import PrefixStyle, Price
from routers.types import Effort, Endpoint, Hints

Cause = Literal[
    "connect", "timeout", "status", "bad_answer", "cut", "auth", "refused", "engine_gone",
    "rate_limit", "context_length", "content_filter", "breaker_open",
]  # fmt: skip
"""`rate_limit`, `context_length` and `content_filter` are refusals that a policy may answer with other fallbacks."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and the smaller model that it may have, billed beside."""

    plan: Plan
    """The smaller model by its name where it runs."""
    draft: "Target | None" = None


@dataclass(frozen=True, slots=True)
class Target:
    """One model of the policy and how to reach it."""

    model: str
    """Its name in the policy."""
    provider: str
    wire_model: str
    """Its name at the provider."""
    price: Price | None
    """None: not known."""
    context: int
    max_output: int
    timeout_s: float
    """The whole of one attempt, to the last byte."""
    retries: int
    connect_timeout_s: float = 10.0
    first_byte_timeout_s: float = 60.0
    idle_timeout_s: float = 60.0
    plans: Mapping[Effort, Planned] = field(default_factory=dict)
    """How the local engine answers, by the effort that is asked for."""
    steps: Mapping[Effort, Planned] = field(default_factory=dict)
    """How a thought is shared or left over calls to it (`gateway.stepping`), likewise."""
    prefix: PrefixStyle | None = None
    """How it is given the start of an answer; None: it cannot go on from one."""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a plan of the engine did for one answer."""

    kind: str
    counts: Mapping[str, int | float | str]
    """In names of its own; what is nothing is left out."""
    draft: Usage | None = None
    """What the smaller model read and wrote."""


class UpstreamError(Exception):
    """An attempt failed before its first byte went to the caller."""

    def __init__(
        self,
        cause: Cause,
        message: str,
        *,
        status: int | None = None,
        error: dict[str, object] | None = None,
        retry_after_s: float | None = None,
        may_be_billed: bool = False,
        should_retry: bool | None = None,
        words: str = "",
        delivered_bytes: int = 0,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.status = status
        self.error = error
        self.retry_after_s = retry_after_s
        self.may_be_billed = may_be_billed
        """The provider may have worked on it: the attempt is billed as an estimate."""
        self.delivered_bytes = delivered_bytes
        """Of a body that came whole and is no answer: no more can have been written than that."""
        self.should_retry = should_retry
        """What the provider says itself (`x-should-retry`); None where it says nothing."""
        self.words = words
        """The provider's own words within `message`: for the caller, who may read its own prompt in them."""

    @property
    def kept(self) -> str:
        """The message as ledger and log may keep it: a provider's words can quote a prompt or a key."""
        return self.message.replace(self.words, "[…]")[:300] if self.words else self.message[:300]

    def hide(self, secret: str) -> "UpstreamError":
        """Itself, without a key that the provider may have quoted back."""
        self.message, self.words = self.message.replace(secret, "[key]"), self.words.replace(secret, "[key]")
        if self.error is not None:
            self.error = msgspec.json.decode(msgspec.json.encode(self.error).replace(secret.encode(), b"[key]"))
        return self

    @property
    def retryable(self) -> bool:
        """Whether the same target is worth another try."""
        if self.should_retry is not None:
            return self.should_retry
        return self.cause not in ("auth", "refused", "context_length", "content_filter")


class Sampling(msgspec.Struct, frozen=True):
    """The sampling fields of a chat request that a local engine needs."""

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool
    top_logprobs: int
    reasoning_effort: str | None


class ChatCall(msgspec.Struct):
    """One chat request as it came in: the fields untouched, the few that we read decoded."""

    fields: dict[str, msgspec.Raw]
    """Every field of the body, as the caller's own bytes."""
    body_bytes: int
    model: str
    stream: bool
    include_usage: bool
    choices: int
    has_tools: bool
    has_format: bool
    """A JSON object or schema is asked for."""
    text_only: bool
    sampling: Sampling
    headers: "CallHeaders"
    endpoint: Endpoint = "chat.completions"
    prefix: str = ""
    """Words of the answer that are there already: the target writes on from them."""
    thought: ThoughtSoFar | None = None
    """What has been thought before them: the target thinks on or, where it is over, answers."""
    inputs: int = 1
    """Texts to complete or to embed, each with a context window of its own; a conversation is one."""
    tenant: str = ""
    """Whose it is: set at admission, and by nobody after. Engines keep the prefixes of tenants apart by it."""
    priority: int | None = None
    """Larger goes first (`gateway.priority`); None: none is asked for. After admission what the policy allows."""
    rendered: dict[tuple[str, bytes], str] = msgspec.field(default_factory=dict)
    """Prompts that providers have made of it for `gateway.upstream.raw_thought`, shared by all calls of one plan."""
    request_id: str | None = None
    """Given at the edge where it must be known before admission."""


class CallHeaders(msgspec.Struct, frozen=True):
    """What we read of the request's headers."""

    token: str
    session: str | None = None
    tags: frozenset[str] = frozenset()
    no_cache: bool = False
    no_store: bool = False
    scope: str | None = None
    """Path of the agent run, e.g. `run42/research/fetch`: each prefix is a run whose budget counts this call."""
    scope_budget_nanousd: int | None = None
    """Given to the last run of the path."""
    idempotency_key: str | None = None
    retry_count: int = 0
    """How often the caller's own client has already tried (`x-stainless-retry-count`)."""
    timeout_s: float | None = None
    """The caller's own deadline (`x-leadline-timeout`), which can only shorten the policy's."""
    parent_agent: str | None = None
    """The agent that started the one that calls (`x-claude-code-parent-agent-id`)."""
    traceparent: str | None = None
    """The caller's span (W3C Trace Context), as it was sent; it goes into traces and nowhere else."""
    hints: Hints | None = None
    """What the caller asks of the decision, within what the policy allows."""
    priority: int | None = None
    """What the caller asks for; stands before the body's own."""

    def __repr__(self) -> str:
        return f"CallHeaders(session={self.session!r}, scope={self.scope!r})"  # never the token


class Answer(msgspec.Struct):
    """A whole chat completion."""

    body: bytes
    usage: Usage | None
    """None when the provider reported none."""
    delivered_bytes: int = 0
    plan: PlanReport | None = None


class Pattern(msgspec.Struct, frozen=True, gc=False):
    """What the chunks of a stream have in common that differ in a word of their text alone."""

    head: bytes
    tail: bytes

    def words(self, data: bytes) -> bytes:
        """What stands between head and tail."""
        return data[len(self.head) : -len(self.tail)]

    def around(self, words: bytes) -> bytes:
        """The chunk that says all these words."""
        return b"%b%b%b" % (self.head, words, self.tail)


@dataclass(slots=True)
class StreamState:
    """How far a stream has come; read by the ledger when it ends, however it ends."""

    usage: Usage | None = None
    delivered_bytes: int = 0
    """UTF-8 bytes of generated text (content, reasoning, tool arguments)."""
    deltas: int = 0
    finished_choices: set[int] = field(default_factory=set)
    tool_calls: dict[int, ToolCallOrder] = field(default_factory=dict)
    """By choice."""
    pattern: Pattern | None = None
    """That of the last chunk of text."""
    patterns_left: int = 8
    """How often another may be looked for."""
    done: bool = False
    """The terminator came, or a finish reason for every choice: nothing is missing."""
    plan: PlanReport | None = None
    prompt: tuple[int, int] | None = None
    """Tokens of the prompt, and the cached ones, where the engine counts as it goes: then `deltas` are tokens."""
    thought: int = 0
    """Of those tokens, the ones inside the thinking block."""

    def so_far(self) -> Usage | None:
        """The count of an answer that is cut off here: the provider's where it came before the cut, else the engine's
        own; None: it does not count as it goes."""
        if self.done and self.usage is not None:
            return self.usage
        if self.prompt is None:
            return None
        tokens, cached = self.prompt
        return Usage(tokens - cached, cached, output=self.deltas - self.thought, reasoning=self.thought)


@dataclass(slots=True)
class Progress:
    """How far a call has come whose answer is not here yet: what one that breaks off is billed by."""

    state: StreamState | None = None
    """None: nobody sees anything of it before its end."""
    unsent: bool = False
    """Nothing has gone out yet that somebody could work on."""

    def goes_out(self) -> None:
        self.unsent = False


class Event(msgspec.Struct, frozen=True, gc=False):
    """One server-sent event, ready to be forwarded."""

    data: bytes
    """The JSON after `data: `."""
    usage_only: bool = False
    """A last chunk that carries usage and no choices."""
    pattern: Pattern | None = None
    """The one that it follows, where that is known."""


Hear = Callable[[list[Event]], bool]
"""Takes a group of events at once, or says that it cannot."""


class AnswerStream(Protocol):
    """A running stream whose first event has arrived. Iterating raises UpstreamError(`cut`) if it ends too soon."""

    state: StreamState

    def listen(self, hear: Hear) -> None:
        """Whoever iterates may be given groups by `hear`, in the callback that read them; what it does not take, and
        what a stream has no use to give so, is yielded."""
        ...

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Events in the groups in which they arrived."""
        ...

    async def close(self) -> None: ...


class Upstream(Protocol):
    async def complete(self, target: Target, call: ChatCall, progress: Progress | None = None) -> Answer:
        """`progress` is told how far the answer has come, where that is seen before its end."""
        ...

    async def stream(self, target: Target, call: ChatCall, progress: Progress | None = None) -> AnswerStream: ...

    def unavailable(self, target: Target) -> str | None:
        """Why this target cannot serve now; None when it can."""
        ...
