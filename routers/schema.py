"""The shape of a policy file, version 1, and its JSON Schema. What the parts mean together is checked in `load`."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from routers import units
from routers.policy import Objective, Otherwise
from routers.units import UnitError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UnitError("not text", "write it as text, in quotes if it looks like a number")
    return value


def _token_price(value: object) -> int:
    if not isinstance(value, str):
        raise UnitError("a price without its unit", "write dollars per million tokens, such as $0.25/Mtok")
    return units.parse_token_price(value)


def _duration(value: object) -> int:
    if not isinstance(value, str):
        raise UnitError("a duration without its unit", "write a number and ms, s, min, h or d, such as 250ms or 1h")
    milliseconds = units.parse_duration_ms(value)
    if milliseconds == 0:
        raise UnitError("a duration of zero", "write a longer one, such as 250ms or 1h")
    return milliseconds


def _budget(value: object) -> units.Budget:
    if not isinstance(value, str):
        raise UnitError("a budget without its unit", "write dollars per window, such as $50/month")
    return units.parse_budget(value)


def _rate(value: object) -> units.Rate:
    if not isinstance(value, str):
        raise UnitError("a rate without its unit", "write requests per s, min or h, such as 600/min")
    return units.parse_rate(value)


def _bound(value: object, sign: str, example: str) -> str:
    text = _text(value) if isinstance(value, str) else ""
    if not text.startswith(sign):
        raise UnitError("not a bound", f'write it with its sign and in quotes, such as "{sign} {example}"')
    return text.removeprefix(sign).strip()


def _probability(value: object, sign: str, example: str) -> float:
    text = _bound(value, sign, example)
    if not re.match(r"[0-9]{1,3}(\.[0-9]{1,9})?\Z", text):
        raise UnitError("not a probability", f'write a number between 0 and 1, such as "{sign} {example}"')
    number = float(text)
    if number > 1:
        raise UnitError(
            "no probability is above 1: nothing can satisfy this" if sign == ">=" else "above 1: always satisfied",
            f'write a number between 0 and 1, such as "{sign} {example}"',
        )
    return number


def _base_url(value: object) -> str:
    text = _text(value)
    fix = "write the server's address, such as https://api.openai.com/v1"
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UnitError("not an address", fix) from None
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f]", text):
        raise UnitError("not an http or https address with a host", fix)
    if "@" in parts.netloc:
        raise UnitError("an address must not carry a user or a password", "give the key in `api_key: env:NAME`")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise UnitError("an address must not carry a query or a fragment", "end the address at its path, such as /v1")
    return text.rstrip("/")


def _secret_name(value: object) -> str:
    if not isinstance(value, str) or not re.match(r"env:[A-Za-z_][A-Za-z0-9_]{0,127}\Z", value):
        raise UnitError(
            "not the name of an environment variable; a policy never holds the key itself",
            "put the key in the environment and write its name, such as env:OPENAI_API_KEY",
        )
    return value.removeprefix("env:")


def _free(value: object) -> object:
    if value == "free":
        return {"input": "$0/Mtok", "output": "$0/Mtok"}
    if not isinstance(value, dict):
        raise UnitError("not a price", "write free, or {input: $0.25/Mtok, output: $2/Mtok}")
    return value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _off(value: object) -> object:
    return CacheFile.model_construct(ttl=0) if value == "off" else value


def _schema(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


Text = Annotated[str, Field(min_length=1, max_length=256)]
TokenPrice = Annotated[int, BeforeValidator(_token_price), _schema(units.TOKEN_PRICE_PATTERN, "$0.25/Mtok")]
Duration = Annotated[int, BeforeValidator(_duration), _schema(units.DURATION_PATTERN, "60s")]
BudgetText = Annotated[units.Budget, BeforeValidator(_budget), _schema(units.BUDGET_PATTERN, "$50/month")]
RateText = Annotated[units.Rate, BeforeValidator(_rate), _schema(units.RATE_PATTERN, "600/min")]
AtLeast = Annotated[
    float, BeforeValidator(lambda v: _probability(v, ">=", "0.90")), _schema(r"^>= *(0(\.\d+)?|1(\.0+)?)$", ">= 0.90")
]
AtMost = Annotated[
    float, BeforeValidator(lambda v: _probability(v, "<=", "0.10")), _schema(r"^<= *(0(\.\d+)?|1(\.0+)?)$", "<= 0.10")
]
CostAtMost = Annotated[
    int,
    BeforeValidator(lambda v: units.parse_money(_bound(v, "<=", "$0.01"))),
    _schema(r"^<= *\$\d{1,9}(\.\d{1,9})?$", "<= $0.01"),
]
BaseUrl = Annotated[str, BeforeValidator(_base_url), _schema(r"^https?://[^@?#\s]+$", "https://api.openai.com/v1")]
SecretName = Annotated[
    str, BeforeValidator(_secret_name), _schema(r"^env:[A-Za-z_][A-Za-z0-9_]*$", "env:OPENAI_API_KEY")
]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Tokens = Annotated[int, Field(ge=1, le=100_000_000)]
Names = Annotated[list[Text], Field(min_length=1)]
NameOrNames = Annotated[Names, BeforeValidator(_one_or_many, json_schema_input_type=Text | Names)]


class ProviderFile(_Strict):
    """Where models run: `engine: embedded`, or the `base_url` of an OpenAI-compatible server."""

    engine: Literal["embedded"] | None = None
    """The local engine, in this machine."""
    base_url: BaseUrl | None = None
    """The server's address, without a query."""
    api_key: SecretName | None = None
    """The name of the environment variable that holds the key. Leave it out for a server without keys."""
    timeout: Duration = 60_000
    """How long one attempt may take."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Further attempts after a failure that may pass."""


class PriceFile(_Strict):
    """Dollars per million tokens. Each token is counted in one class."""

    input: TokenPrice
    cached_input: TokenPrice | None = None
    """Default: as input."""
    cache_write: TokenPrice | None = None
    """Default: as input."""
    output: TokenPrice
    reasoning: TokenPrice | None = None
    """Default: as output."""


class ModelFile(_Strict):
    """A model by the name that routes and callers use."""

    provider: Text
    model: Text
    """The provider's own name for it."""
    context: Tokens | None = None
    """Tokens, prompt and answer together."""
    max_output: Tokens | None = None
    """Tokens of one answer."""
    price: Annotated[PriceFile, BeforeValidator(_free, json_schema_input_type=Literal["free"] | PriceFile)] | None = (
        None
    )
    """Default: free on the local engine, else from the price list."""
    tools: bool | None = None
    """Whether it can call tools. Default: yes, and no on the local engine."""
    structured: bool | None = None
    """Whether it can hold an answer to a JSON schema. Default: yes, and no on the local engine."""
    logprobs: bool = True
    """Whether it can return log probabilities."""


class DifficultyFile(_Strict):
    """Ask a probe, before routing, how likely each model is to answer well."""

    probe: Text
    heads: Annotated[dict[str, Text], Field(min_length=1)]
    """Model of this policy: head of the probe."""
    encoder: Text = "default"
    """What the probe reads with, as when it was fitted: `default`, a folder, or a hub id."""
    timeout: Duration = 250
    """After this long the route decides without the signal."""


class SignalsFile(_Strict):
    """What is measured before routing."""

    difficulty: DifficultyFile | None = None


class WhenFile(_Strict):
    """Conditions, all of which must hold. A list means any of its values."""

    tag: NameOrNames | None = None
    model: NameOrNames | None = None
    """The name that the caller asks for."""
    tenant: NameOrNames | None = None


class ConstraintsFile(_Strict):
    """What the chosen model must satisfy."""

    p_success: AtLeast | None = None
    """The chance of a good answer."""
    p_success_gap: AtMost | None = None
    """How far below the best candidate's chance."""
    cost: CostAtMost | None = None
    """The expected cost of the answer."""


class CacheFile(_Strict):
    """How long a complete answer may be reused for the same request."""

    ttl: Duration  # never zero in a file: zero is how `cache: off` is held


class RouteFile(_Strict):
    """A condition and what follows from it. The first route whose condition holds decides."""

    name: Name
    when: WhenFile | None = None
    """Leave it out on the last route, to catch every name that is not a model."""
    use: Names | None = None
    """The first of these that is available."""
    candidates: Names | None = None
    """The models to choose from, from the weakest to the strongest."""
    objective: Objective | None = None
    """How to choose among the candidates that satisfy `subject_to`. Default: cheapest."""
    subject_to: ConstraintsFile | None = None
    otherwise: Otherwise | None = None
    """What to choose when no candidate satisfies `subject_to`. Default: best. The bound on cost still goes first."""
    on_failure: Names | None = None
    """What to try, in order, when the chosen model fails before its first word, or when none can run."""
    cache: Annotated[CacheFile, BeforeValidator(_off, json_schema_input_type=Literal["off"] | CacheFile)] | None = None
    """`off`, or how long. Default: one hour."""


class LimitFile(_Strict):
    """What one key, or one tenant, may use. `*` means each of them by itself."""

    key: Text | None = None
    """The name of a key, never the key."""
    tenant: Text | None = None
    budget: BudgetText | None = None
    rate: RateText | None = None


class PolicyFile(_Strict):
    """What Leadline may use, and how it chooses."""

    version: Literal[1]
    providers: Annotated[dict[Name, ProviderFile], Field(min_length=1)]
    models: Annotated[dict[Name, ModelFile], Field(min_length=1)]
    signals: SignalsFile = SignalsFile()
    routes: list[RouteFile] = []
    limits: list[LimitFile] = []


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
