"""The shape of a policy file, version 1, and its JSON Schema. What the parts mean together is checked in `load`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from routers.aims_file import AcceptFile, AffinityFile, ExploreFile, GuaranteeFile, ThinkingFile, WorthFile
from routers.fields import (
    AtLeast,
    AtMost,
    BaseUrl,
    BudgetOrTotal,
    CostAtMost,
    Duration,
    DurationAtMost,
    Name,
    Names,
    RateText,
    SecretName,
    Share,
    Speculation,
    Text,
    TokenPrice,
    TokenRateText,
    Tokens,
    WholePercent,
)
from routers.policy import PRIORITIES, Degrade, Objective, OnStreamFailure, Otherwise, PrefixStyle, Server
from routers.shape import Strict
from routers.types import EngineFeature
from routers.units import UnitError
from routers.when_file import WhenFile


def _price_words(value: object) -> object:
    if value == "free":
        return {"input": "$0/Mtok", "output": "$0/Mtok"}
    if value == "unpriced":
        return None
    if not isinstance(value, dict):
        raise UnitError("not a price", "write free, unpriced, or {input: $0.25/Mtok, output: $2/Mtok}")
    return value


def _off(value: object) -> object:
    return CacheFile.model_construct(ttl=0) if value == "off" else value


def _off_is_none(value: object) -> object:
    return None if value == "off" else value


def _agree(value: object) -> object:
    if isinstance(value, str) and value != "agree":
        raise UnitError(
            "no rule", "write `agree`, or a rule such as {mean_logprob: …, at_least: …, keeps_right: …, keeps_wrong: …}"
        )
    return {"agree": 2} if value == "agree" else value


def _for_error(value: object) -> object:
    return {"error": value} if isinstance(value, list) else value


class BreakerFile(Strict):
    """When a target that keeps failing is left alone."""

    failures: Annotated[int, Field(ge=1, le=1000)] = 5
    """So many attempts in a row failed, ..."""
    window: Duration = 30_000
    """... within this time."""
    open: Duration = 15_000
    """Left alone for so long, then tried again by one request at a time."""


class ProviderFile(Strict):
    """Where models run: `engine: embedded`, or the `base_url` of an OpenAI-compatible server."""

    engine: Literal["embedded"] | None = None
    """The local engine, in this machine."""
    base_url: BaseUrl | None = None
    """The server's address, without a query."""
    server: Server = "openai"
    """What the server is: its cache, its load and its tenants' privacy are handled in its own way."""
    priority_scheduling: bool = False
    """The vLLM runs under `--scheduling-policy priority`, so calls may tell it theirs; one that does not may refuse."""
    replicas: Annotated[list[BaseUrl], Field(min_length=1, max_length=63)] | None = None
    """The addresses of further servers with the same models. A call goes where its prefix and the load say."""
    api_key: SecretName | None = None
    """The name of the environment variable that holds the key. Leave it out for a server without keys."""
    timeout: Duration = 60_000
    """How long one attempt may take."""
    connect_timeout: Duration | None = None
    """How long a connection may take to stand. At most `timeout`. Default: 10s, or `timeout` if that is shorter."""
    first_byte_timeout: Duration | None = None
    """From sending a request to the first byte of its answer. At most `timeout`. Default: as `timeout`."""
    idle_timeout: Duration | None = None
    """The longest silence within an answer. At most `timeout`. Default: as `timeout`."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Further attempts after a failure that may pass."""
    breaker: Annotated[
        BreakerFile | None, BeforeValidator(_off_is_none, json_schema_input_type=Literal["off"] | BreakerFile)
    ] = BreakerFile()
    """`off`, or when to leave a failing target alone. Default: after 5 failures in 30s, for 15s."""


class TierFile(Strict):
    """What a call costs whose prompt is long."""

    above: Tokens
    """Calls with more tokens of input than this are billed so, whole."""
    input: TokenPrice
    cached_input: TokenPrice | None = None
    cache_write: TokenPrice | None = None
    output: TokenPrice | None = None
    reasoning: TokenPrice | None = None


class PriceFile(Strict):
    """Dollars per million tokens. Each token is counted in one class."""

    input: TokenPrice
    cached_input: TokenPrice | None = None
    """Default: as input."""
    cache_write: TokenPrice | None = None
    """Default: as input."""
    output: TokenPrice | None = None
    """Left out only where `embeds: true`: vectors are not billed by the token."""
    reasoning: TokenPrice | None = None
    """Default: as output."""
    tiers: list[TierFile] = Field(default_factory=list)
    """Dearer prices of long prompts, by rising `above`."""


class ExitFile(Strict):
    """Leave a thought before its end: it is closed, and the model answers from there."""

    rule: Literal["probe", "convergence", "redundancy", "momentum", "budget"] = "probe"
    """At a cue word: `probe` (as `leadline exits` fitted it), `convergence` (forced answers agree), `redundancy` (two
    thoughts come to the same), `momentum` (no step stood out). `budget`: past so many tokens."""
    delta: Share = 0.05
    """`probe`: the share of requests that may be left early and go wrong by it."""
    form: Literal["expected", "high_probability", "per_event"] = "expected"
    """`probe`: of that promise: in expectation; for 95% of calibrations; or per event, which promises less."""
    loss: Literal["wrong", "harm"] = "wrong"
    """`probe`: what goes wrong: the answer is; or it is, and would not have been at the thought's own end."""
    agree: Annotated[int, Field(ge=2, le=16)] = 2
    """`convergence`, `redundancy`: so many in a row."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.9
    """`momentum`: smaller leaves more thoughts."""
    budget: Tokens | None = None
    """`budget`: of the thought. Default: as fitted, by the length of the prompt."""
    max_thinking_tokens: Tokens | None = None
    """The thought is closed here in any case."""


class SpeculateFile(Strict):
    """A smaller model writes the steps of a thought, and this one judges them and writes those that do not pass."""

    draft: Text
    """Another model of this policy. On the same engine, with the same tokenizer, the two share a thought token by
    token; elsewhere, step by step, where both have a `prefix`."""
    method: Literal["score", "specreason", "glimprouter", "speculative_thinking", "entropy"] = "score"
    """How steps are judged: by how probable this model finds them; by a digit it rates them with; by the entropy of
    their first token; by words of doubt; by the entropy of their last tokens. `score` needs one engine for both."""
    threshold: float | None = None
    """Of the method. Default: its own."""
    max_thinking_tokens: Tokens | None = None
    """A thought that is longer is closed, and answered."""


_ANSWER_FEATURES = Annotated[dict[EngineFeature, float], Field(min_length=1)]


class AcceptRuleFile(Strict):
    """When the smaller model's answer is sent: P(correct) is a logistic regression over what it has written."""

    weights: _ANSWER_FEATURES
    """By feature: mean_logprob, min_logprob, mean_entropy, max_entropy (nats), log_tokens."""
    bias: float
    at_least: Annotated[float, Field(ge=0, le=1)]
    """Accepted from this P(correct) on."""
    prospect_weights: _ANSWER_FEATURES | None = None
    """The same of P(it will be accepted), while it is written."""
    prospect_bias: float = 0.0
    go_on_above: Annotated[float, Field(ge=0, le=1)] = 0.0
    """It is abandoned once P(it will be accepted) is below this. Default: 0, never."""


class CascadePlanFile(Strict):
    """A smaller model answers first, and this one where that answer is not accepted; nothing of it is shown then."""

    draft: Text
    """Another model of this policy, on the same engine."""
    accept: AcceptRuleFile
    hint: Literal["none", "offer"] = "none"
    """`offer`: this model keeps a rejected answer up to the first improbable token, and both go on from there."""
    floor: Annotated[float, Field(lt=0)] = -0.69
    """`offer`: that improbable, a natural logarithm."""


class VoteFile(Strict):
    """Several samples of one prompt, which is read once, until they agree; one of those that agree is shown, whole.

    All are paid for. Requests with temperature 0, whose samples would not differ, run without."""

    most: Annotated[int, Field(ge=2, le=128)] = 16
    """Samples at most; as many are reserved."""
    stop: Literal["posterior", "entropy", "agreement"] = "posterior"
    """When: the leading answer stays ahead with probability `bound`; the answers' entropy is at most 1 - `bound` nats;
    the first three agree. Or nobody can catch up."""
    bound: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weigh: Literal["count", "perplexity", "probability"] = "probability"
    """Of a sample: one; the inverse of its perplexity; its probability (of different samples only)."""
    prune: Annotated[float, Field(lt=0)] | None = None
    """Give up a sample at a token less probable than this natural logarithm once a finished one had none such."""
    exit: ExitFile | None = None
    """How each sample's thought may be left. Default: it is not."""


class PlanFile(Strict):
    """How compute is spent on an answer: one of these."""

    exit: ExitFile | None = None
    speculate: SpeculateFile | None = None
    cascade: CascadePlanFile | None = None
    vote: VoteFile | None = None


class EffortPlansFile(Strict):
    """A plan for each effort that a caller may ask for."""

    none: PlanFile | None = None
    low: PlanFile | None = None
    """Also where the caller asks for none in particular."""
    high: PlanFile | None = None


class ModelFile(Strict):
    """A model by the name that routes and callers use."""

    provider: Text
    model: Text
    """The provider's own name for it."""
    context: Tokens | None = None
    """Tokens, prompt and answer together."""
    max_output: Tokens | None = None
    """Tokens of one answer."""
    price: Annotated[
        PriceFile | None,
        BeforeValidator(_price_words, json_schema_input_type=Literal["free", "unpriced"] | PriceFile),
    ] = None
    """Default: free on the local engine, else from the price list. `unpriced`: not known, and not counted as zero; it
    cannot be used where a budget holds."""
    tools: bool | None = None
    """Whether it can call tools. Default: yes, and no on the local engine, where the chat template must know them."""
    structured: bool = True
    """Whether it can hold an answer to a JSON schema."""
    logprobs: bool = True
    """Whether it can return log probabilities."""
    prefix: bool | PrefixStyle | None = None
    """Whether it goes on from the start of an answer, given as the last message; `true`, in the way of its `server`
    (`openai`: as `deepseek`), or in this one: `deepseek` (`prefix: true`, and `reasoning_content`; Mistral, too),
    `vllm` (`continue_final_message`; SGLang, too), `leadline` (as that), `llamacpp`, or `anthropic` (nothing more).
    Default: no, and yes on the local engine."""
    embeds: bool = False
    """Whether it turns texts into vectors; such a model answers no conversation."""
    completes: bool | None = None
    """Whether it continues a raw text (`/v1/completions`). The local engine takes conversations only. Default
    elsewhere: yes, and no where the server is another local engine (`server: leadline`)."""
    speculation: Speculation | None = None
    """How the local engine drafts tokens for it; what it writes stays the same. `off`, or some of `ngram`, `recycle`,
    `auto` (both) and one of `draft:MODEL` (a smaller one with the same tokenizer: a local model of this policy by its
    name, or `bundled/…`, a folder or a hub id) and `exit:LAYER` (its own first layers), joined by `+`. Default:
    `auto`."""
    plan: PlanFile | None = None
    """Who writes its thoughts, and when they end. Of a model that is reached by an API: `exit` and `speculate`, where
    it has a `prefix`. Default: the model alone, as long as it thinks. Several names may stand for one model with
    different plans."""
    plans: EffortPlansFile | None = None
    """The same by effort, in place of `plan`. `leadline tune` measures and writes them."""
    thinking: ThinkingFile | None = None
    """How it is told how much to think. Default: it is not, and efforts cannot be asked of it; on the local engine, by
    `reasoning_effort`."""
    concise: bool = False
    """Whether it is asked, in the system's words, to keep each step of its thought short (Chain of Draft)."""
    slots: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """How many answers its target writes side by side before any waits. Default: not known, so no queue is expected."""

    @property
    def unpriced(self) -> bool:
        return "price" in self.model_fields_set and self.price is None


class DifficultyFile(Strict):
    """Ask a probe, before routing, how likely each model is to answer well."""

    probe: Text | Annotated[list[Text], Field(min_length=1, max_length=4)]
    """A probe that ships with Leadline, or a folder. Of a list each is asked where the one before it is not sure: at
    most one of each tier, in the order static, encoder, prefill, self."""
    heads: Annotated[dict[str, Text], Field(min_length=1)] | None = None
    """Model of this policy: head of the probe. Default: for each model that answers, the head of its own name."""
    encoder: Text = "default"
    """What the probe reads with, as when it was fitted: `default`, a folder, or a hub id."""
    timeout: Duration = 250
    """After this long the route decides without the signal."""


class SignalsFile(Strict):
    """What is measured before routing."""

    difficulty: DifficultyFile | None = None


class ConstraintsFile(Strict):
    """What the chosen model must satisfy."""

    p_success: AtLeast | None = None
    """The chance of a good answer."""
    p_success_gap: AtMost | None = None
    """How far below the best candidate's chance."""
    cost: CostAtMost | None = None
    """The expected cost of the answer."""
    ttft_p95: DurationAtMost | None = None
    """The time to the first token, of 95% of the answers of late. What was never measured is taken to meet it."""
    latency: DurationAtMost | None = None
    """The expected time to the end of the answer, by the load of the target. As `ttft_p95` where not measured."""


class CacheFile(Strict):
    """How long a complete answer may be reused for the same request."""

    ttl: Duration  # never zero in a file: zero is how `cache: off` is held


class OnFailureFile(Strict):
    """Fallbacks by the cause of a failure. An empty list: none, the failure is the answer."""

    error: Names | None = None
    """Errors, timeouts, lost connections, and every cause that has no list of its own."""
    rate_limit: list[Text] | None = None
    """The provider allows no more for now."""
    context_length: list[Text] | None = None
    """The prompt is too long for the model. Only models with a longer context are tried."""
    content_filter: list[Text] | None = None
    """The provider refuses the content."""


class HedgeFile(Strict):
    """A second attempt beside a first that is slow to begin, at the next fallback; whichever begins first answers."""

    after: Duration
    """How long the first byte may take before the second attempt goes out."""
    max_extra: Share = 0.05
    """At most this share of the route's requests. Default: 5%."""


class ShadowFile(Strict):
    """Models that are asked the same beside the one that answers, after it has: nobody is shown what they say."""

    models: Names
    share: Share = 0.01
    """Of the route's requests. Default: 1%."""
    judge: Text | None = None
    """A model that compares the answers, twice, in both orders. Default: nobody does."""
    keep: bool = False
    """Store the prompt and the answers, for `leadline export outcomes`. Default: no."""


class RouteFile(Strict):
    """A condition and what follows from it. The first route whose condition holds decides."""

    name: Name
    when: WhenFile | None = None
    """Leave it out on the last route, to catch every name that is not a model."""
    use: Names | None = None
    """The first of these that is available."""
    candidates: Names | None = None
    """What to choose from, from the weakest to the strongest: models, models at an effort (`strong+high`, or `none`,
    `low`), and cascades (`weak>strong`: the second answers where the first one's answer is not accepted;
    `one&other>strong`: the first two are asked at the same time, and the last where they do not agree)."""
    accept: (
        Annotated[AcceptFile, BeforeValidator(_agree, json_schema_input_type=Literal["agree"] | AcceptFile)] | None
    ) = None
    """`agree`, or when an answer of an earlier stage is good enough to be sent."""
    effort: Literal["auto", "none", "low", "high"] | None = None
    """How much models with `thinking` think; `auto`: by the signals of each query. A caller who says so itself is
    obeyed. Default: as they do by themselves."""
    objective: Objective | None = None
    """How to choose among the candidates that satisfy `subject_to`. Default: cheapest."""
    worth: WorthFile | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the objective `threshold`: how much higher the second candidate's p_success must be for it to answer."""
    subject_to: ConstraintsFile | None = None
    otherwise: Otherwise | None = None
    """What to choose when no candidate satisfies `subject_to`. Default: best. The bound on cost still goes first."""
    explore: ExploreFile | None = None
    guarantee: GuaranteeFile | None = None
    affinity: AffinityFile | None = None
    on_failure: (
        Annotated[OnFailureFile, BeforeValidator(_for_error, json_schema_input_type=Names | OnFailureFile)] | None
    ) = None
    """What to try, in order, when the chosen model fails before its first word, or when none can run. One list for all
    causes, or a list by cause."""
    on_stream_failure: OnStreamFailure = "error"
    """When an answer breaks after its first word: end it with an error, or let another model go on from there."""
    priority: Annotated[int, Field(ge=PRIORITIES.start, lt=PRIORITIES.stop)] = 0
    """Of its requests at the local engine and at servers that have priorities: larger goes first, and ten seconds of
    waiting are worth one. The most that its callers may have: they may ask for less."""
    deadline: Duration | None = None
    """From admission to the end of the answer, all attempts and waits included. Default: none."""
    hedge: HedgeFile | None = None
    shadow: ShadowFile | None = None
    cache: Annotated[CacheFile, BeforeValidator(_off, json_schema_input_type=Literal["off"] | CacheFile)] | None = None
    """`off`, or how long. Default: one hour."""


class LimitFile(Strict):
    """What one key, team or tenant, or each agent run, may use. `*` means each of them by itself."""

    key: Text | None = None
    """The name of a key, never the key."""
    team: Text | None = None
    tenant: Text | None = None
    run: Literal["*"] | None = None
    """Each agent run by itself, its sub-agents included."""
    budget: BudgetOrTotal | None = None
    """Dollars per window; of a run also without one: `$2` is `$2/total`."""
    at: (
        Annotated[dict[WholePercent, Degrade], Field(min_length=1, json_schema_extra={"additionalProperties": False})]
        | None
    ) = None
    """From this share of the budget on: `cheaper`, the cheapest candidate; `local`, only models that cost nothing."""
    rate: RateText | None = None
    """Requests."""
    tokens: TokenRateText | None = None
    """Tokens, prompt and answer together."""
    concurrency: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests under way at a time."""

    @model_validator(mode="before")
    @classmethod
    def _run_has_no_window(cls, value: object) -> object:
        if isinstance(value, dict) and "run" in value and isinstance(budget := value.get("budget"), str):
            return value | {"budget": budget if "/" in budget else f"{budget}/total"}
        return value


class PolicyFile(Strict):
    """What Leadline may use, and how it chooses."""

    version: Literal[1]
    providers: Annotated[dict[Name, ProviderFile], Field(min_length=1)]
    models: Annotated[dict[Name, ModelFile], Field(min_length=1)]
    signals: SignalsFile = SignalsFile()
    routes: list[RouteFile] = Field(default_factory=list)
    limits: list[LimitFile] = Field(default_factory=list)


def policy_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file, for editors. It covers the shape; names and coverage are checked on load."""
    schema = PolicyFile.model_json_schema(mode="validation")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_as_written(schema),
        "title": "Leadline policy, version 1",
    }


def _as_written(node: Any) -> Any:
    """The schema without what no file may hold: nulls, and defaults in their parsed form."""
    if isinstance(node, list):
        return [_as_written(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _as_written(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    if node.get("type") not in ("integer", "boolean"):
        kept.pop("default", None)
    if "anyOf" in kept:
        choices = [choice for choice in kept.pop("anyOf") if choice != {"type": "null"}]
        kept |= choices[0] if len(choices) == 1 else {"anyOf": choices}
    return kept
