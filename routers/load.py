"""From the text of a policy file to a Policy, or to every problem found in it at once."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Literal, get_args

from routers.aims import TOLD_BY_EFFORT
from routers.aims_file import RuleLookup, thinking_of
from routers.canonical import canonical
from routers.errors import PolicyError, Problem
from routers.fields import NAME_PATTERN
from routers.limits import read_limits
from routers.plan_files import check_drafts, read_plans
from routers.plans import parse_plan
from routers.policy import (
    DEFAULT_CONNECT_TIMEOUT_MS,
    FREE,
    PREFIX_STYLES,
    Breaker,
    Difficulty,
    Listing,
    Model,
    Policy,
    Price,
    Provider,
    Tier,
)
from routers.routes import RoutesReader
from routers.schema import (
    ModelFile,
    PolicyFile,
    PriceFile,
    ProviderFile,
    SignalsFile,
    TierFile,
)
from routers.shape import NAME_FIX, did_you_mean, validated
from routers.units import UnitError, format_duration
from routers.yaml import Document, Path, concealed, read

PriceLookup = Callable[[Provider, str], Listing | None]
"""A price list: (provider, the provider's name for the model) → what it knows, or None."""

PresetName = Literal["default", "openai"]

_NAME = re.compile(NAME_PATTERN)


def parse(
    text: str, *, file: str = "policy.yaml", prices: PriceLookup | None = None, rules: RuleLookup | None = None
) -> Policy:
    """The policy in `text`. `file` is the name to show in problems. Raises PolicyError with all of them.

    `rules`: how files of accept rules are read; without, none can be.
    """
    document = read(text, file)
    policy = _Loader(document, prices or (lambda provider, model: None), rules or _no_rule).run()
    if document.problems:
        raise PolicyError(document.problems)
    return policy


def load(path: FilePath | str, *, prices: PriceLookup | None = None, rules: RuleLookup | None = None) -> Policy:
    """The policy in a UTF-8 file. Raises PolicyError, and OSError where the file cannot be read."""
    content = FilePath(path).read_bytes()
    try:
        return parse(content.decode(), file=str(path), prices=prices, rules=rules)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    raise PolicyError([Problem(str(path), line, "", "not UTF-8", "save the file as UTF-8")])


def preset(name: PresetName) -> str:
    """The text of a policy that ships with the package."""
    if name not in get_args(PresetName):
        raise ValueError(f"no preset `{name}`; there are {', '.join(get_args(PresetName))}")
    return resources.files("routers").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")


def _no_rule(name: str) -> dict[str, float]:
    raise ValueError("no files are read here; write its numbers")


class _Loader:
    """Validates each entry by itself, so that a broken one does not hide the problems of the others."""

    def __init__(self, document: Document, prices: PriceLookup, rules: RuleLookup) -> None:
        self._document = document
        self._rules = rules
        self._prices = prices
        self._providers: dict[str, Provider] = {}
        self._models: dict[str, Model] = {}
        self._difficulty: Difficulty | None = None
        self._signals_read = True

    def run(self) -> Policy:
        self._top()
        self._read_providers()
        self._read_models()
        self._read_signals()
        routes = RoutesReader(
            self._document, self._models, self._names("models"), self._difficulty, self._signals_read, self._rules
        ).read(self._items("routes"))
        limits = read_limits(self._document, self._items("limits"))
        content = {
            "providers": {name: asdict(provider) for name, provider in self._providers.items()},
            "models": {name: asdict(model) for name, model in self._models.items()},
            "difficulty": self._difficulty and [*self._difficulty_key()],
            "routes": [canonical(route) for route in routes],
            "limits": [asdict(limit) for limit in limits],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        return Policy(
            providers=MappingProxyType(self._providers),
            models=MappingProxyType(self._models),
            difficulty=self._difficulty,
            routes=tuple(routes),
            limits=tuple(limits),
            version_hash=digest[:12],
        )

    def _difficulty_key(self) -> tuple[object, ...]:
        assert self._difficulty is not None
        of = self._difficulty
        return of.probes[0] if len(of.probes) == 1 else of.probes, dict(of.heads), of.timeout_ms, of.encoder

    def _top(self) -> None:
        data, known = self._document.data, list(PolicyFile.model_fields)
        for key in data:
            if key not in known:
                self._document.report((key,), "unknown key", did_you_mean(key, known), show=False)
        for key in ("version", "providers", "models"):
            if key not in data:
                fix = "write `version: 1`" if key == "version" else f"add the section `{key}:`"
                self._document.report((), f"`{key}` is missing", fix)
        version = data.get("version")
        if version is not None and (version != 1 or not isinstance(version, int) or isinstance(version, bool)):
            self._document.report(("version",), "not a version that can be read here", "write `version: 1`")

    def _section(self, name: str) -> dict[str, object]:
        """The named entries of a section; those with a name that cannot be used are reported and still read."""
        value = self._document.data.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._document.report((name,), "not a mapping", "write one named entry per line, `name: {…}`")
            return {}
        if not value:
            self._document.report((name,), "empty", "add one named entry per line, `name: {…}`")
        for key in value:
            if not _NAME.fullmatch(key):
                self._document.report((name, key), "this name cannot be used", NAME_FIX, show=False)
        return value

    def _items(self, name: str) -> list[object]:
        value = self._document.data.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self._document.report((name,), "not a list", "start each entry with a dash")
            return []
        return value

    def _read_providers(self) -> None:
        for name, value in self._section("providers").items():
            path = ("providers", name)
            part = validated(self._document, ProviderFile, value, path)
            if part is None:
                continue
            if (part.engine is None) == (part.base_url is None):
                given = "both engine and base_url" if part.engine else "neither engine nor base_url"
                fix = "write `engine: embedded` for the local engine, or the `base_url` of a server"
                self._document.report(path, given, fix)
            elif part.engine and part.api_key:
                self._document.report((*path, "api_key"), "the local engine asks for no key", "remove it", show=False)
            elif part.engine and part.connect_timeout:
                message = "the local engine is in this machine: nothing has to be connected to"
                self._document.report((*path, "connect_timeout"), message, "remove it")
            elif part.engine and (part.replicas or part.server != "openai"):
                key = "replicas" if part.replicas else "server"
                self._document.report((*path, key), "the local engine is no server", "remove it", show=False)
            elif part.priority_scheduling and part.server != "vllm":
                at, message = (
                    (*path, "priority_scheduling"),
                    "said of a vLLM alone: other servers are told as they take it",
                )
                self._document.report(at, message, "remove it", show=False)
            elif part.base_url and part.replicas and len({part.base_url, *part.replicas}) <= len(part.replicas):
                self._document.report(
                    (*path, "replicas"), "the same address twice", "remove one of the two", show=False
                )
            elif part.server == "leadline" and (wrong := _beside_v1(part)):
                fix = "end the address with /v1, such as http://gpu1:8100/v1"
                self._document.report((*path, *wrong), "an engine that listens answers below /v1", fix, show=False)
            else:
                self._providers[name] = self._provider(name, part, path)

    def _provider(self, name: str, part: ProviderFile, path: Path) -> Provider:
        for key in ("connect_timeout", "first_byte_timeout", "idle_timeout"):
            milliseconds = getattr(part, key)
            if milliseconds is not None and milliseconds > part.timeout:
                message = f"longer than `timeout`, {format_duration(part.timeout)}, which ends the attempt first"
                fix = f"write at most {format_duration(part.timeout)}, or a longer `timeout`"
                self._document.report((*path, key), message, fix)
        breaker = part.breaker
        return Provider(
            name,
            part.engine,
            part.base_url,
            part.api_key,
            part.timeout,
            part.retries,
            connect_timeout_ms=part.connect_timeout or min(DEFAULT_CONNECT_TIMEOUT_MS, part.timeout),
            first_byte_timeout_ms=part.first_byte_timeout,
            idle_timeout_ms=part.idle_timeout,
            breaker=None if breaker is None else Breaker(breaker.failures, breaker.window, breaker.open),
            server=part.server,
            replicas=tuple(part.replicas or ()),
            priority_scheduling=part.priority_scheduling,
        )

    def _read_models(self) -> None:
        providers = self._names("providers")
        for name, value in self._section("models").items():
            path = ("models", name)
            wanted = self._document.at((*path, "provider"))  # as written: another mistake must not hide this one
            if isinstance(wanted, str) and wanted not in providers:
                fix = did_you_mean(wanted, providers)
                self._document.report((*path, "provider"), "no provider of this name", fix)
            part = validated(self._document, ModelFile, value, path)
            if part is None:
                continue
            provider = self._providers.get(part.provider)
            if provider is None:
                continue
            local = provider.engine is not None
            listing = None if local else self._prices(provider, part.model)
            if part.price and part.price.output is None and not part.embeds:
                self._document.report((*path, "price"), "no price of output", "add `output: $…/Mtok`")
            price = None
            if part.price is not None:
                price = to_price(part.price, self._document, (*path, "price"))
            elif not part.unpriced:
                price = FREE if local else listing.price if listing else None
            if price is None and not part.unpriced:
                fix = "add `price: {input: $…/Mtok, output: $…/Mtok}` or `price: free`, or say `price: unpriced`"
                self._document.report(
                    path, f"missing price: the price list does not know `{concealed(part.model)}`", fix
                )
                continue
            context = part.context or (listing.context if listing else None)
            max_output = part.max_output or (listing.max_output if listing else None)
            if part.max_output and part.context and part.max_output > part.context:
                fix = f"write at most the context, {part.context}"
                self._document.report((*path, "max_output"), "longer than the context", fix)
            if part.speculation is not None and not local:
                fix = f"remove it, or let the model run on the local engine; {part.provider} drafts as it is set up to"
                self._document.report((*path, "speculation"), "only the local engine is told how to draft", fix)
            tools = part.tools if part.tools is not None else not local
            prefix = PREFIX_STYLES[provider.server] if part.prefix is True else part.prefix or None
            if part.prefix is None and local:
                prefix = PREFIX_STYLES["leadline"]
            if part.completes and local:
                fix = "remove it, and send conversations to /v1/chat/completions"
                self._document.report((*path, "completes"), "the local engine takes conversations only", fix)
            completes = part.completes if part.completes is not None else not (local or provider.server == "leadline")
            self._models[name] = Model(
                name, part.provider, part.model, context, max_output, price, tools, part.structured, part.logprobs,
                prefix, embeds=part.embeds, completes=completes,
                speculation=part.speculation or ("auto" if local else None),
                slots=part.slots, plans=read_plans(self._document, part, path, local, bool(prefix)),
                concise=part.concise,
                thinking=thinking_of(part.thinking) or (TOLD_BY_EFFORT if local and not part.embeds else None),
            )  # fmt: skip
        check_drafts(self._document, self._models, self._providers, self._names("models"))
        for model in [*self._models.values()]:
            if model.speculation is not None and self._answers_here(model):
                parts = [self._drafting(model, part) for part in model.speculation.split("+")]
                self._models[model.name] = replace(model, speculation="+".join(parts))
        self._check_drafting()

    def _answers_here(self, model: Model) -> bool:
        return not model.embeds and self._providers[model.provider].engine is not None

    def _drafting(self, model: Model, part: str) -> str:
        """With the source of a local model of the policy in place of its name; what is no such name may be a source."""
        draft = self._models.get(part.removeprefix("draft:")) if part.startswith("draft:") else None
        if draft is None or not self._answers_here(draft):
            return part
        if draft.upstream == model.upstream:
            fix = "name a smaller one with the same tokenizer"
            at = ("models", model.name, "speculation")
            self._document.report(at, f"`{concealed(draft.name)}` is the model itself", fix)
        return f"draft:{draft.upstream}"

    def _check_drafting(self) -> None:
        """The engine loads a model once, however many names it has, and drafts for it in one way."""
        first: dict[str, Model] = {}
        for model in self._models.values():
            if model.speculation is None or model.embeds:
                continue
            other = first.setdefault(model.upstream, model)
            if other.speculation != model.speculation:
                message = f"`{concealed(other.name)}` is the same model and drafts another way: {other.speculation}"
                fix = "write the same `speculation` for both; the engine loads the model once"
                self._document.report(("models", model.name, "speculation"), message, fix)

    def _read_signals(self) -> None:
        part = validated(self._document, SignalsFile, self._document.data.get("signals"), ("signals",))
        self._signals_read = part is not None or "signals" not in self._document.data
        if part is None or part.difficulty is None:
            return
        models = self._names("models")
        said = self._own_heads() if part.difficulty.heads is None else part.difficulty.heads
        heads: dict[str, str] = {}
        for name, head in said.items():
            path = ("signals", "difficulty", "heads", name)
            try:
                stages = parse_plan(name)
            except UnitError as error:
                self._document.report(path, str(error), error.fix, show=False)
                continue
            if len(stages) > 1:
                fix = "name a head for each of its stages"
                self._document.report(path, "a head speaks of a model, or of a model at one effort", fix, show=False)
            elif stages[0].model not in models:
                fix = did_you_mean(stages[0].model, models)
                self._document.report(path, "no model of this name", fix, show=False)
            heads[stages[0].name] = head
        named = part.difficulty.probe
        probes = (named,) if isinstance(named, str) else tuple(named)
        self._difficulty = Difficulty(probes, MappingProxyType(heads), part.difficulty.timeout, part.difficulty.encoder)

    def _own_heads(self) -> dict[str, str]:
        """A head for each model that answers, by its own name."""
        models = self._models
        return {name: name for name in self._names("models") if name not in models or not models[name].embeds}

    def _names(self, section: str) -> list[str]:
        """The entries of a section, whether they loaded or not: a broken model is not also an unknown one."""
        value = self._document.data.get(section)
        return list(value) if isinstance(value, dict) else []


def _beside_v1(part: ProviderFile) -> Path:
    """The field of the first address that does not end with /v1; empty: all do."""
    if part.base_url is not None and not part.base_url.endswith("/v1"):
        return ("base_url",)
    outside = (number for number, url in enumerate(part.replicas or ()) if not url.endswith("/v1"))
    return next((("replicas", number) for number in outside), ())


def to_price(part: PriceFile, document: Document, path: Path) -> Price:
    """The price of one entry; what is wrong between its parts is noted in the document, at `path`."""
    base = _classes(part)
    tiers: list[Tier] = []
    for number, tier in enumerate(part.tiers):
        below = tiers[-1] if tiers else Tier(-1, base)
        found = Tier(tier.above, _classes(tier))
        here = (*path, "tiers", number)
        if found.above <= below.above:
            fix = "sort the tiers by rising `above`, each once"
            document.report((*here, "above"), "not above the tier before it", fix)
        names = ("input", "cached_input", "cache_write", "output", "reasoning")
        cheaper = [name for name in names if getattr(found.price, name) < getattr(below.price, name)]
        if cheaper:
            fix = "give every class, at no less than before; a reservation counts on it"
            document.report(here, f"cheaper than the tier before it in {', '.join(cheaper)}", fix)
        tiers.append(found)
    return replace(base, tiers=tuple(tiers))


def _classes(part: PriceFile | TierFile) -> Price:
    def given(price: int | None, default: int) -> int:
        return default if price is None else price

    return Price(
        input=part.input,
        cached_input=given(part.cached_input, part.input),
        cache_write=given(part.cache_write, part.input),
        output=part.output or 0,
        reasoning=given(part.reasoning, part.output or 0),
    )
