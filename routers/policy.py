"""A loaded policy: frozen, checked, and ready for the hot path. `routers.load` makes it from a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from routers.aims import Affinity, Explore, Guarantee, Shadow, Thinking, Worth
from routers.types import Effort, Plan, Query
from routers.units import Budget, Rate, format_duration, format_money
from routers.when import When

Objective = Literal["cheapest", "best", "utility", "fastest", "threshold"]
Otherwise = Literal["best", "cheapest", "fastest", "refuse"]
FailureCause = Literal["error", "rate_limit", "context_length", "content_filter"]
"""Why an attempt failed, as far as a policy tells its fallbacks apart."""
OnStreamFailure = Literal["error", "resume"]
Degrade = Literal["cheaper", "local"]
"""What a budget's threshold turns routing to: the cheapest candidate, or models that cost nothing."""
LimitScope = Literal["key", "team", "tenant", "run"]

DEFAULT_CACHE_TTL_MS = 3_600_000
PRIORITIES = range(-100, 101)
"""Of requests; larger is more urgent."""
DEFAULT_CONNECT_TIMEOUT_MS = 10_000


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-dollars per million tokens, by disjoint class: a token is counted in exactly one of them."""

    input: int
    cached_input: int
    cache_write: int
    output: int
    reasoning: int
    tiers: tuple["Tier", ...] = ()
    """For long prompts, by rising `above`; none is cheaper in any class than the one below it."""

    def at(self, input_tokens: int) -> "Price":
        """The price of a whole call whose prompt, cached or not, has so many tokens."""
        found = self
        for tier in self.tiers:
            if input_tokens > tier.above:
                found = tier.price
        return found


@dataclass(frozen=True, slots=True)
class Tier:
    """The price of calls with more than `above` tokens of input."""

    above: int
    price: Price


FREE = Price(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a price list knows of a model; it fills what the policy leaves out."""

    price: Price
    context: int | None = None
    max_output: int | None = None


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a target is left alone: `failures` attempts in a row failed within the window; tried again after `open_ms`
    by one request at a time."""

    failures: int = 5
    window_ms: int = 30_000
    open_ms: int = 15_000


@dataclass(frozen=True, slots=True)
class Hedge:
    """A second attempt beside the first when its first byte is late: the loser is cancelled and billed."""

    after_ms: int
    max_extra: float
    """What all second attempts cost stays within this share of what the route has spent, e.g. 0.05."""


Server = Literal["openai", "leadline", "vllm", "sglang", "llamacpp"]
"""What a server speaks beside OpenAI's API."""


PrefixStyle = Literal["deepseek", "vllm", "llamacpp", "anthropic", "leadline"]
"""How a server is told that the last message is the start of its answer: by `prefix: true` in it, and a thought beside
it (DeepSeek, Mistral); by `continue_final_message` (vLLM, SGLang, ours), with the name of what goes on (llama.cpp); by
its place alone (Anthropic and others)."""
PREFIX_STYLES: Mapping[Server, PrefixStyle] = {
    "openai": "deepseek", "leadline": "leadline", "vllm": "vllm", "sglang": "vllm", "llamacpp": "llamacpp",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Provider:
    """Where models run: the local engine (`engine`), or a server at `base_url`."""

    name: str
    engine: Literal["embedded"] | None
    base_url: str | None
    """Without a trailing slash."""
    api_key_env: str | None
    """The environment variable that holds the key; None: the server asks for none."""
    timeout_ms: int
    """The whole of one attempt, to the last byte."""
    retries: int
    connect_timeout_ms: int = DEFAULT_CONNECT_TIMEOUT_MS
    first_byte_timeout_ms: int | None = None
    """From dispatch to the first byte of the answer; None: `timeout_ms` alone bounds it."""
    idle_timeout_ms: int | None = None
    """Between two reads of an answer; None: as `timeout_ms`."""
    breaker: Breaker | None = Breaker()
    server: Server = "openai"
    replicas: tuple[str, ...] = ()
    """Base URLs of further servers with the same models."""
    priority_scheduling: bool = False
    """Of a vLLM: it takes priorities other than 0."""


PlanOption: TypeAlias = "str | int | float | tuple[tuple[str, PlanOption], ...]"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """How compute is spent on a model's answers."""

    kind: Literal["exit", "speculate", "cascade", "vote"]
    options: tuple[tuple[str, PlanOption], ...]
    """As the policy states them, by name; a part of several options is one of them."""
    draft: str | None = None
    """`speculate`, `cascade`: the model of the policy that writes the steps, or answers first."""

    def __str__(self) -> str:
        draft = () if self.draft is None else (f"draft {self.draft}",)
        return f"{self.kind}: {', '.join((*draft, *_in_words(self.options)))}"

    @property
    def stated(self) -> dict[str, object]:
        """The options, nested as in the policy."""
        return _nested(self.options)


def _in_words(options: tuple[tuple[str, PlanOption], ...]) -> list[str]:
    return [
        f"{name} ({', '.join(_in_words(value))})" if isinstance(value, tuple) else f"{name} {value}"
        for name, value in options
    ]


def _nested(options: tuple[tuple[str, PlanOption], ...]) -> dict[str, object]:
    return {name: _nested(value) if isinstance(value, tuple) else value for name, value in options}


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the policy names it."""

    name: str
    provider: str
    upstream: str
    """The provider's own name for it."""
    context: int | None
    """Tokens, prompt and answer together; None: not known."""
    max_output: int | None
    """Tokens of one answer; None: not known."""
    price: Price | None
    """None: not known (`unpriced`), which is not: free."""
    tools: bool
    structured: bool
    """Can hold its answer to a JSON schema."""
    logprobs: bool
    prefix: PrefixStyle | None = None
    """How it is given the start of an answer to go on from; None: it does not."""
    embeds: bool = False
    """Turns texts into vectors, and does nothing else."""
    completes: bool = True
    """Takes a raw text to continue, beside conversations."""
    speculation: str | None = None
    """How the local engine drafts for it; None: it runs elsewhere."""
    slots: int | None = None
    """Answers that its target writes side by side before any waits; None: not known."""
    plans: tuple[tuple[Effort, EnginePlan], ...] = ()
    """How the local engine answers, by the effort that is asked for; others: the model alone, as long as it thinks."""
    thinking: Thinking | None = None
    """How it is told how much to think; None: it cannot be told."""
    concise: bool = False
    """It is asked for short steps of thought."""


@dataclass(frozen=True, slots=True)
class Difficulty:
    """The signal p_success: which probes to ask, and which of their heads speaks for which model."""

    probes: tuple[str, ...]
    """Each is asked where the one before it is not sure."""
    heads: Mapping[str, str]
    """Model of the policy → head of the probe."""
    timeout_ms: int
    encoder: str = "default"
    """What the probe reads with: `default`, a folder, or a hub id."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a candidate must satisfy; None: not asked."""

    p_success: float | None = None
    """At least this chance of a good answer."""
    p_success_gap: float | None = None
    """At most this far below the best candidate's chance."""
    cost_nanousd: int | None = None
    """At most this expected cost."""
    ttft_p95_ms: int | None = None
    """At most this long to the first token, 19 times in 20."""
    latency_ms: int | None = None
    """At most this expected time to the end of the answer."""

    @property
    def ask_p_success(self) -> bool:
        """Whether one of them cannot be checked without p_success."""
        return self.p_success is not None or self.p_success_gap is not None

    def __str__(self) -> str:
        parts = []
        if self.p_success is not None:
            parts.append(f"p_success >= {self.p_success:g}")
        if self.p_success_gap is not None:
            parts.append(f"p_success_gap <= {self.p_success_gap:g}")
        if self.cost_nanousd is not None:
            parts.append(f"cost <= {format_money(self.cost_nanousd)}")
        if self.ttft_p95_ms is not None:
            parts.append(f"ttft_p95 <= {format_duration(self.ttft_p95_ms)}")
        if self.latency_ms is not None:
            parts.append(f"latency <= {format_duration(self.latency_ms)}")
        return " and ".join(parts)


@dataclass(frozen=True, slots=True)
class Route:
    """A condition and what follows from it. Either `use` (an ordered list) or `candidates` (an objective) is filled."""

    name: str
    when: When
    use: tuple[str, ...]
    candidates: tuple[str, ...]
    """Listed from the weakest to the strongest: the order decides where p_success is not known."""
    objective: Objective
    constraints: Constraints
    otherwise: Otherwise
    on_failure: tuple[str, ...]
    cache_ttl_ms: int | None
    """How long an answer may be reused; None: not at all."""
    heads: Mapping[str, str]
    """Candidate → probe head, where this route needs p_success to decide; else empty."""
    on_cause: Mapping[FailureCause, tuple[str, ...]] = field(default_factory=dict)
    """Fallbacks for one cause, in place of `on_failure`; empty: none."""
    deadline_ms: int | None = None
    """From admission to the end of the answer, all attempts and waits included; None: the attempts' own bounds."""
    hedge: Hedge | None = None
    shadow: Shadow | None = None
    on_stream_failure: OnStreamFailure = "error"
    worth: Worth | None = None
    """Of the objective `utility`."""
    threshold: float | None = None
    """Of the objective `threshold`: how much higher the second candidate's p_success must be for it to answer."""
    explore: Explore | None = None
    guarantee: Guarantee | None = None
    affinity: Affinity | None = None
    effort: Effort | Literal["auto"] | None = None
    """How much models that can be told think; None: as they do by themselves, or as the caller says."""
    priority: int = 0
    """Of its requests at targets that have a line; their callers may ask for less."""
    plans: Mapping[str, Plan] = field(default_factory=dict)
    """Of those candidates that are more than a model: `strong+high`, `weak>strong`."""
    rule: str = field(init=False)
    """The sentence of the objective, e.g. `cheapest with p_success >= 0.9`."""

    def __post_init__(self) -> None:
        asked = str(self.constraints)
        rule: str = "first available of " + ", ".join(self.use) if self.use else self.objective
        if self.objective == "utility" and self.worth is not None:
            rule += f" at {self.worth}"
        elif self.objective == "threshold" and self.threshold is not None:
            rule += f" {self.threshold:g}"
        object.__setattr__(self, "rule", f"{rule} with {asked}" if asked else rule)

    @property
    def targets(self) -> tuple[str, ...]:
        """The models this route chooses from."""
        return self.use or self.candidates

    @property
    def timed(self) -> bool:
        """Whether it decides by what the targets are doing."""
        asked = self.constraints.ttft_p95_ms is not None or self.constraints.latency_ms is not None
        valued = self.worth is not None and self.worth.second > 0
        return asked or valued or "fastest" in (self.objective, self.otherwise)


@dataclass(frozen=True, slots=True)
class Threshold:
    """From this share of a budget on, routing degrades."""

    percent: int
    action: Degrade


@dataclass(frozen=True, slots=True)
class Limit:
    """What a key, a team, a tenant or an agent run may use; the name `*` means each of them by itself."""

    scope: LimitScope
    name: str
    budget: Budget | None
    rate: Rate | None
    tokens: Rate | None = None
    """Tokens per span, prompt and answer together."""
    concurrency: int | None = None
    """Requests under way at a time."""
    at: tuple[Threshold, ...] = ()
    """By rising percent; only with a budget. At 100% what costs money is refused in any case."""


_Taker = tuple[frozenset[str], frozenset[str], Callable[[Query], bool] | None, Route]
"""Its tags, its tenants, what else it asks (None: nothing), and the route."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One version of what the operator allows."""

    providers: Mapping[str, Provider]
    models: Mapping[str, Model]
    difficulty: Difficulty | None
    routes: tuple[Route, ...]
    limits: tuple[Limit, ...]
    version_hash: str
    """12 hexadecimal digits over the content: comments, layout and key order do not change it, prices do."""
    aliases: tuple[str, ...] = field(init=False)
    """Names that callers may ask for and that are not models, such as `auto`; in route order."""
    timed: bool = field(init=False)
    """Whether some route decides by what the targets are doing."""
    guarded: frozenset[str] = field(init=False)
    """Models that a route names in its `when`: they are reached through a matching route, or not at all."""
    _limits: Mapping[tuple[LimitScope, str], tuple[Limit, ...]] = field(init=False, repr=False, compare=False)
    """What holds for each name that has limits of its own, and for `*`, any other."""
    _takers: dict[str, tuple[_Taker, ...]] = field(init=False, repr=False, compare=False)
    """The routes that can take a request for each model and alias."""
    _takers_of_others: tuple[_Taker, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        asked = [name for route in self.routes for name in sorted(route.when.models) if name not in self.models]
        object.__setattr__(self, "aliases", tuple(dict.fromkeys(asked)))
        guarded = frozenset(name for route in self.routes for name in route.when.models if name in self.models)
        object.__setattr__(self, "guarded", guarded)
        object.__setattr__(self, "timed", any(route.timed for route in self.routes))
        named = dict.fromkeys((limit.scope, limit.name) for limit in self.limits)
        object.__setattr__(self, "_limits", {(s, n): _limits_of(self.limits, s, n) for s, n in named})
        names = (*self.models, *self.aliases)
        object.__setattr__(self, "_takers", {n: _takers(self.routes, n, n in self.models) for n in names})
        object.__setattr__(self, "_takers_of_others", _takers(self.routes, None, False))

    def route_for(self, query: Query) -> Route | None:
        """The first route whose conditions hold.

        A model named by the caller skips a route that does not speak of it and does not say who asks: it goes straight
        to that model. A route on tags, tenants, keys or teams holds for named models too, so that `private` stays
        private.
        """
        for tags, tenants, rest_holds, route in self._takers.get(query.model, self._takers_of_others):
            if tenants and query.tenant not in tenants:
                continue
            if tags and tags.isdisjoint(query.tags):
                continue
            if rest_holds is None or rest_holds(query):
                return route
        return None

    def heads_for(self, query: Query) -> Mapping[str, str]:
        """Model → probe head to ask before deciding this query; empty where no signal would change the decision."""
        route = self.route_for(query)
        return route.heads if route is not None else {}

    def limits_for(self, *, key: str, tenant: str, team: str | None = None) -> tuple[Limit, ...]:
        """The limits that hold for a caller, by scope: key, team, tenant, and each of its agent runs (`run`).

        What is given for a name replaces what is given for `*`, each kind by itself: budgets (with their thresholds),
        rates of requests, rates of tokens, concurrency.
        """
        if not self._limits:
            return ()
        get = self._limits.get
        of_key = get(("key", key)) or get(("key", "*"), ())
        of_team = (get(("team", team)) or get(("team", "*"), ())) if team is not None else ()
        of_tenant = get(("tenant", tenant)) or get(("tenant", "*"), ())
        return of_key + of_team + of_tenant + get(("run", "*"), ())


def _takers(routes: tuple[Route, ...], name: str | None, is_model: bool) -> tuple[_Taker, ...]:
    """The routes that a request for `name` may come to, in order; None: for a name that no route and no model has."""
    return tuple(
        (route.when.tags, route.when.tenants, route.when.rest_holds if route.when.beyond_names else None, route)
        for route in routes
        if name in route.when.models or (not route.when.models and (route.when.binds_named or not is_model))
    )


def _limits_of(limits: tuple[Limit, ...], scope: LimitScope, name: str) -> tuple[Limit, ...]:
    own = [limit for limit in limits if limit.scope == scope and limit.name == name]
    if name == "*":
        return tuple(own)
    found: list[Limit] = []
    for limit in limits:
        if limit.scope != scope or limit.name != "*":
            continue
        if any(mine.budget for mine in own):
            limit = replace(limit, budget=None, at=())
        if any(mine.rate for mine in own):
            limit = replace(limit, rate=None)
        if any(mine.tokens for mine in own):
            limit = replace(limit, tokens=None)
        if any(mine.concurrency for mine in own):
            limit = replace(limit, concurrency=None)
        if limit.budget or limit.rate or limit.tokens or limit.concurrency:
            found.append(limit)
    return (*found, *own)
