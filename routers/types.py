"""The words that cross the routers' border: what is asked, what was measured, what was decided.

Structs of msgspec, as each request makes several with many fields: a frozen dataclass takes 1.9 µs where one of these
takes 0.3. Of decisions, fields that equal their defaults are left out where they are encoded.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from msgspec import Struct, field
from msgspec.structs import force_setattr

from probes.types import Estimate

Effort = Literal["none", "low", "high"]
"""How much a model thinks before it answers; as an option of a model that can be told."""
Endpoint = Literal["chat.completions", "completions", "embeddings"]
"""What is asked for: an answer to a conversation, the raw continuation of a text, or vectors of texts."""


class Hints(Struct, frozen=True):
    """What one request asks of its own decision. Each hint can only narrow what the policy allows."""

    max_cost_nanousd: int | None = None
    """At most this expected cost."""
    min_p_success: float | None = None
    """At least this chance of a good answer."""
    effort: Effort | None = None
    """At most this effort."""
    models: frozenset[str] | None = None
    """Only these models; None: any."""


class Query(Struct, frozen=True):
    """One request as the routers see it: wire formats stay at the edge."""

    model: str
    """The name the caller asked for: a model of the policy, or an alias such as `auto`."""
    tenant: str
    input_tokens_estimate: int
    """Expected prompt tokens (an estimate, about one per four bytes)."""
    max_output_tokens: int | None
    """The caller's own cap, if any."""
    tags: frozenset[str] = frozenset()
    needs_tools: bool = False
    needs_format: bool = False
    """A JSON object or schema is asked for."""
    needs_logprobs: bool = False
    choices: int = 1
    endpoint: Endpoint = "chat.completions"
    inputs: int = 1
    """Texts to complete or to embed, each with a context window of its own."""
    input_tokens_max: int | None = None
    """No tokenizer makes more prompt tokens than this (the bytes of the body); None: not bounded but by the context."""
    text: bytes | memoryview | None = None
    """The prompt as JSON, where all of it is text: read only when it may not fit, for the fewest tokens it can have."""
    session: str | None = None
    """The conversation this request goes on with; None: not known."""
    run: str | None = None
    """The agent run it belongs to; None: none."""
    hints: Hints | None = None
    reasoning: str | None = None
    """The effort that the caller's own body states, in the provider's words; it stands, whatever the policy says."""
    key: str = ""
    """The name of the caller's key."""
    team: str | None = None
    """The team of the caller's key."""
    id: str = ""
    """The request's own, for shares of requests that belong to no session."""
    at_ms: int = 0
    """When it was asked, milliseconds since 1970 UTC: all schedules are read at this one moment."""


class Signals(Struct, frozen=True):
    """What was measured for this query. Absent is absent, never zero."""

    p_success: Mapping[str, Estimate] = field(default_factory=dict)
    """Per model of the policy; `model+effort` where a head speaks of a model at one effort."""
    input_tokens: Mapping[str, int] = field(default_factory=dict)
    """Exact prompt tokens, for the models that could count them."""
    probe: Literal["ok", "unavailable", "not_asked"] = "not_asked"
    out_tokens: Mapping[str, Estimate] = field(default_factory=dict)
    """Tokens of the answer, thinking included; by the same names as `p_success`."""
    domain: Mapping[str, float] = field(default_factory=dict)
    """Probability of each domain; they sum to one."""
    needs_reasoning: Estimate | None = None
    """The chance that thinking before the answer pays."""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens of this prompt that the model's provider, or the engine, still holds from the conversation so far."""
    clusters: tuple[tuple[int, float], ...] = ()
    """The nearest clusters of queries, each with its weight; the weights sum to one."""
    difficulty: Estimate | None = None
    """From 0, easy, to 1, hard."""


class Load(Struct, frozen=True):
    """What a target is doing now; None: not known."""

    queue: int = 0
    """Requests that wait for a place."""
    running: int = 0
    """Requests under way."""
    slots: int | None = None
    """Requests that run side by side before any waits."""
    tokens_per_s: float | None = None
    """Of one answer, while it is written."""
    prefill_tokens_per_s: float | None = None
    """Of a prompt, while it is read."""
    start_ms: float = 0.0
    """Time to a first token beside the reading of the prompt and the wait; where the speed of prefill is known."""
    ttft_ms_p50: float | None = None
    """Time to the first token, queue included, of the last answers."""
    ttft_ms_p95: float | None = None


class Arm(Struct, frozen=True):
    """What one model has earned in one cluster of queries."""

    pulls: float
    """Answers with feedback; not whole where older ones count less."""
    reward: float
    """The sum of their rewards, each from 0 to 1."""


class State(Struct, frozen=True):
    """A snapshot of the world at decision time."""

    unavailable: Mapping[str, str] = field(default_factory=dict)
    """Models that cannot serve now, each with the reason (`engine down`, `breaker open until …`)."""
    budget_remaining_nanousd: int | None = None
    """What the caller may still spend; None: no budget applies."""
    degrade: Literal["cheaper", "local"] | None = None
    """What the fullest of the caller's budgets turns routing to; `degrade_reason` says which."""
    degrade_reason: str = ""
    now_ms: int = 0
    """The wall clock, milliseconds since 1970 UTC."""
    load: Mapping[str, Load] = field(default_factory=dict)
    """By model of the policy."""
    session_model: str | None = None
    """The model that answered this conversation last; None: a new one, or not known."""
    session_p: Mapping[str, float] = field(default_factory=dict)
    """The p_success of each candidate, as the conversation's last decision had it."""
    bound_to: str | None = None
    """The only provider that can read what the conversation holds; None: any can."""
    arms: Mapping[tuple[int, str], Arm] = field(default_factory=dict)
    """By cluster and model: what bandits have learned."""


class Single(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="single"):
    """A plan: one model answers."""

    kind: ClassVar[Literal["single"]] = "single"
    model: str
    effort: Effort | None = None
    """None: as the model does by itself, or as the caller's body says."""
    max_thinking_tokens: int | None = None
    beside: bool = False
    """Of a cascade's stage: asked at the same time as the one before it."""

    @property
    def name(self) -> str:
        """As a policy writes it, e.g. `local`, `local+high`."""
        return self.model if self.effort is None else f"{self.model}+{self.effort}"


def stages_name(stages: Iterable[Single]) -> str:
    """As a policy writes them."""
    return "".join([("&" if stage.beside else ">") + stage.name for stage in stages])[1:]


AnswerFeature = Literal["mean_logprob", "min_logprob", "log_tokens"]
"""Measured on an answer: over its tokens' log probabilities (nats), or the natural logarithm of their number."""


EngineFeature = Literal["mean_logprob", "min_logprob", "mean_entropy", "max_entropy", "log_tokens"]
"""Those that the local engine measures on its own answers; entropies in nats."""


class Accept(Struct, frozen=True, omit_defaults=True):
    """When an answer is good enough to be sent: as `agree` stages give it, or where its own
    P(correct) = 1 / (1 + exp(-(bias + sum of weight x feature))) is high enough."""

    weights: tuple[tuple[AnswerFeature, float], ...] = ()
    bias: float = 0.0
    at_least: float = 1.0
    """Accepted from this P(correct) on."""
    keeps_right: float | None = 1.0
    """The share of the first stage's right answers that are accepted, as measured on held-out answers; None, of
    agreement: not measured."""
    keeps_wrong: float | None = 0.0
    """The share of its wrong answers that are accepted."""
    agree: int = 0
    """So many stages must give the same answer; 0: the rule is P(correct)."""
    unaccepted: Literal["send", "fail"] = "send"
    """What becomes of the best answer that was not accepted where no later stage answers: too late, or too dear."""


class Cascade(Struct, frozen=True, tag_field="kind", tag="cascade"):
    """A plan: the first stage answers, or several side by side; where nothing is accepted the next one does."""

    kind: ClassVar[Literal["cascade"]] = "cascade"
    stages: tuple[Single, ...]
    """From the cheapest to the strongest; at least two."""
    accept: Accept
    model: str = ""
    """Of the first stage."""

    def __post_init__(self) -> None:
        force_setattr(self, "model", self.stages[0].model)

    @property
    def effort(self) -> Effort | None:
        return self.stages[0].effort

    @property
    def name(self) -> str:
        """As a policy writes it, e.g. `weak>strong`, `one&other>strong`."""
        return stages_name(self.stages)

    @property
    def rounds(self) -> tuple[tuple[Single, ...], ...]:
        """The stages that are asked at the same time, in turn."""
        rounds: list[tuple[Single, ...]] = []
        for stage in self.stages:
            if stage.beside:
                rounds[-1] = (*rounds[-1], stage)
            else:
                rounds.append((stage,))
        return tuple(rounds)


class Speculate(Struct, frozen=True, tag_field="kind", tag="speculate"):
    """A plan: `draft` writes reasoning steps, `base` judges them and writes those that do not pass."""

    kind: ClassVar[Literal["speculate"]] = "speculate"
    draft: str
    base: str
    method: str
    """How steps are judged, e.g. `spec_reason`, `entropy`."""
    effort: Effort | None = None
    max_thinking_tokens: int | None = None
    model: str = ""
    """The base."""

    def __post_init__(self) -> None:
        force_setattr(self, "model", self.base)

    @property
    def name(self) -> str:
        return f"{self.draft}~{self.base}"


class Vote(Struct, frozen=True, tag_field="kind", tag="vote"):
    """A plan: one model answers up to `n_max` times, and the answers vote; `stop` says when enough agree."""

    kind: ClassVar[Literal["vote"]] = "vote"
    model: str
    n_max: int
    stop: str
    effort: Effort | None = None
    max_thinking_tokens: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model}*{self.n_max}"


Plan = Single | Cascade | Speculate | Vote
"""What to run. Of each kind, `model` is the one that is billed first, and `name` what the policy calls the plan."""


class Candidate(Struct, frozen=True, omit_defaults=True):
    """One considered plan, and why it lost (empty for the one chosen)."""

    model: str
    """The name of the plan: a model, or what the policy makes of several, e.g. `weak>strong`."""
    p_success: float | None
    p_low: float | None
    p_high: float | None
    expected_cost_nanousd: int | None
    """None, as `worst_cost_nanousd`: the price is not known, which is not: free."""
    worst_cost_nanousd: int | None
    rejected: str = ""
    """Empty: chosen, or a fallback kept in reserve. Otherwise the constraint or comparison it lost, in words."""
    expected_ms: int | None = None
    """Expected time to the end of the answer; None: not known, or not asked for."""
    switch_nanousd: int = 0
    """What leaving the conversation's model for this one costs; it counts in every comparison of costs."""
    utility_nanousd: int | None = None
    """What the objective `utility` makes of it; None: another objective, or something in it is not known."""
    measured_by: str = ""
    """The probe, or probes, that `p_success` is from, with the head, e.g. `mmlu-minilm@3f2a9c/weak`."""
    cost_low_nanousd: int | None = None
    """The interval of `expected_cost_nanousd`, as four of five answers are long; None: no length was foretold."""
    cost_high_nanousd: int | None = None


class Decision(Struct, frozen=True, omit_defaults=True):
    """What will run and why. A pure function of (Query, Signals, Policy, State, seed)."""

    plan: Plan
    route: str
    """The route that matched; `named` where the caller named a model."""
    rule: str
    """The sentence that decided, e.g. `cheapest with p_success >= 0.9`."""
    candidates: tuple[Candidate, ...]
    fallbacks: tuple[str, ...]
    """Models to try, in order, when the plan's model fails before its first byte."""
    policy_version: str
    probe_version: str | None
    seed: int
    degraded: str = ""
    """Why this decision is less than the policy wanted, or empty: `probe_unavailable`, `budget`, `unavailable`, and
    where `on_failure` steps in because no candidate can run, also `context_length` or `capability`."""
    on_cause: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Fallbacks for one cause of failure, in place of `fallbacks`; complete for `context_length` and `content_filter`:
    where they are not named here, there is none. For `context_length`, only models whose context is not known to be
    as short."""
    resume: tuple[str, ...] = ()
    """Models that may go on with a stream that broke, best first, each once; empty unless the route says `resume`."""
    propensity: float = 1.0
    """The probability, over seeds, with which these inputs lead to this plan; 1: nothing is explored."""
    explored: bool = False
    """Whether the plan was drawn to learn from it, not chosen as the best."""
    among: tuple[str, ...] = ()
    """The plans of which one is drawn, each with a propensity above 0; empty: nothing is explored."""
    shadow: tuple[str, ...] = ()
    """Models to be called beside the plan; nobody is shown their answers."""

    @property
    def effort(self) -> Effort | None:
        return self.plan.effort
