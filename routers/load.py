"""From the text of a policy file to a Policy, or to every problem found in it at once."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from difflib import get_close_matches
from importlib import resources
from itertools import product
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from routers.errors import PolicyError, Problem
from routers.policy import (
    DEFAULT_CACHE_TTL_MS,
    FREE,
    Constraints,
    Difficulty,
    Limit,
    Listing,
    Model,
    Policy,
    Price,
    Provider,
    Route,
    When,
)
from routers.schema import (
    NAME_PATTERN,
    LimitFile,
    ModelFile,
    PolicyFile,
    PriceFile,
    ProviderFile,
    RouteFile,
    SignalsFile,
    WhenFile,
)
from routers.units import UnitError
from routers.yaml import Document, Path, concealed, read

PriceLookup = Callable[[Provider, str], Listing | None]
"""A price list: (provider, the provider's name for the model) → what it knows, or None."""

PresetName = Literal["default", "openai"]

_Part = TypeVar("_Part", bound=BaseModel)
_NAME = re.compile(NAME_PATTERN)
_LIMIT_NAME = re.compile(r"\*\Z|[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}\Z")
_HIDDEN = {"api_key", "base_url"}


def parse(text: str, *, file: str = "policy.yaml", prices: PriceLookup | None = None) -> Policy:
    """The policy in `text`. `file` is the name to show in problems. Raises PolicyError with all of them."""
    document = read(text, file)
    policy = _Loader(document, prices or (lambda provider, model: None)).run()
    if document.problems:
        raise PolicyError(document.problems)
    return policy


def load(path: FilePath | str, *, prices: PriceLookup | None = None) -> Policy:
    """The policy in a UTF-8 file. Raises PolicyError, and OSError where the file cannot be read."""
    content = FilePath(path).read_bytes()
    try:
        return parse(content.decode(), file=str(path), prices=prices)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    raise PolicyError([Problem(str(path), line, "", "not UTF-8", "save the file as UTF-8")])


def preset(name: PresetName) -> str:
    """The text of a policy that ships with the package."""
    if name not in get_args(PresetName):
        raise ValueError(f"no preset `{name}`; there are {', '.join(get_args(PresetName))}")
    return resources.files("routers").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")


class _Loader:
    """Validates each entry by itself, so that a broken one does not hide the problems of the others."""

    def __init__(self, document: Document, prices: PriceLookup) -> None:
        self._document = document
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
        routes = self._read_routes()
        limits = self._read_limits()
        content = {
            "providers": {name: asdict(provider) for name, provider in self._providers.items()},
            "models": {name: asdict(model) for name, model in self._models.items()},
            "difficulty": self._difficulty and [*self._difficulty_key()],
            "routes": [_canonical(route) for route in routes],
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
        return self._difficulty.probe, dict(self._difficulty.heads), self._difficulty.timeout_ms

    # Shape

    def _top(self) -> None:
        data, known = self._document.data, list(PolicyFile.model_fields)
        for key in data:
            if key not in known:
                self._document.report((key,), "unknown key", _did_you_mean(key, known), show=False)
        for key in ("version", "providers", "models"):
            if key not in data:
                fix = "write `version: 1`" if key == "version" else f"add the section `{key}:`"
                self._document.report((), f"`{key}` is missing", fix)
        if data.get("version", 1) != 1 or isinstance(data.get("version"), bool):
            self._document.report(("version",), "not a version that can be read here", "write `version: 1`")

    def _section(self, name: str) -> dict[str, object]:
        """The named entries of a section; those with a name that cannot be used are reported and still read."""
        value = self._document.data.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._document.report((name,), "not a mapping", "write one named entry per line, `name: {…}`")
            return {}
        for key in value:
            if not _NAME.match(key):
                fix = "use letters, digits and . _ : / @ -, starting with a letter or a digit"
                self._document.report((name, key), "this name cannot be used", fix, show=False)
        return value

    def _items(self, name: str) -> list[object]:
        value = self._document.data.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self._document.report((name,), "not a list", "start each entry with a dash")
            return []
        return value

    def _shape(self, kind: type[_Part], value: object, path: Path) -> _Part | None:
        if value is None:  # an empty value, reported by the reader
            return None
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self._report(kind, path, detail)
            return None

    def _report(self, kind: type[BaseModel], base: Path, detail: ErrorDetails) -> None:
        path = (*base, *detail["loc"])
        if path in self._document.lines and self._document.at(path) is None:  # an empty value, reported by the reader
            return
        show = not (_HIDDEN & {str(step) for step in path})
        context: dict[str, Any] = detail.get("ctx", {})
        match detail["type"]:
            case "extra_forbidden":
                known = _known_keys(kind, detail["loc"])
                self._document.report(path, "unknown key", _did_you_mean(str(path[-1]), known), show=False)
            case "missing":
                self._document.report(path, "missing", f"add `{path[-1]}:`")
            case "literal_error":
                given = self._document.at(path)
                options = re.findall(r"'([^']*)'", str(context["expected"]))
                self._document.report(path, "not one of the choices", _did_you_mean(str(given), options), show=show)
            case "value_error" if isinstance(context.get("error"), UnitError):
                unit_error: UnitError = context["error"]
                self._document.report(path, str(unit_error), unit_error.fix, show=show)
            case type_name:
                message, fix = _SHAPE_PROBLEMS.get(type_name, ("not valid", "see the schema of a policy"))
                self._document.report(path, message.format(**context), fix.format(**context), show=show)

    # Layers

    def _read_providers(self) -> None:
        for name, value in self._section("providers").items():
            path = ("providers", name)
            part = self._shape(ProviderFile, value, path)
            if part is None:
                continue
            if (part.engine is None) == (part.base_url is None):
                given = "both engine and base_url" if part.engine else "neither engine nor base_url"
                fix = "write `engine: embedded` for the local engine, or the `base_url` of a server"
                self._document.report(path, given, fix)
            elif part.engine and part.api_key:
                self._document.report((*path, "api_key"), "the local engine asks for no key", "remove it", show=False)
            else:
                self._providers[name] = Provider(
                    name, part.engine, part.base_url, part.api_key, part.timeout, part.retries
                )

    def _read_models(self) -> None:
        providers = list(self._section_names("providers"))
        for name, value in self._section("models").items():
            path = ("models", name)
            part = self._shape(ModelFile, value, path)
            if part is None:
                continue
            if part.provider not in providers:
                fix = _did_you_mean(part.provider, providers)
                self._document.report((*path, "provider"), "no provider of this name", fix)
            provider = self._providers.get(part.provider)
            if provider is None:
                continue
            local = provider.engine is not None
            listing = None if local else self._prices(provider, part.model)
            price = _price(part.price) if part.price else FREE if local else listing.price if listing else None
            if price is None:
                fix = "add `price: {input: $…/Mtok, output: $…/Mtok}`, or `price: free`"
                self._document.report(
                    path, f"missing price: the price list does not know `{concealed(part.model)}`", fix
                )
                continue
            context = part.context or (listing.context if listing else None)
            max_output = part.max_output or (listing.max_output if listing else None)
            if part.max_output and part.context and part.max_output > part.context:
                fix = f"write at most the context, {part.context}"
                self._document.report((*path, "max_output"), "longer than the context", fix)
            tools = part.tools if part.tools is not None else not local
            self._models[name] = Model(
                name, part.provider, part.model, context, max_output, price, tools, part.logprobs
            )

    def _read_signals(self) -> None:
        part = self._shape(SignalsFile, self._document.data.get("signals"), ("signals",))
        self._signals_read = part is not None or "signals" not in self._document.data
        if part is None or part.difficulty is None:
            return
        for name in part.difficulty.heads:
            self._known_model(name, ("signals", "difficulty", "heads", name), show=False)
        heads = MappingProxyType(part.difficulty.heads)
        self._difficulty = Difficulty(part.difficulty.probe, heads, part.difficulty.timeout)

    def _read_routes(self) -> list[Route]:
        routes: list[Route] = []
        items = self._items("routes")
        names: dict[str, int] = {}
        for index, value in enumerate(items):
            path: Path = ("routes", index)
            part = self._shape(RouteFile, value, path)
            if part is None:
                continue
            if part.name == "named" or part.name in names:
                taken = f"the name of routes[{names[part.name]}] too" if part.name in names else "a reserved name"
                self._document.report((*path, "name"), taken, "give this route a name of its own")
            names.setdefault(part.name, index)
            self._check_route(part, path)
            when = _when(part.when)
            if not when and index < len(items) - 1:
                fix = "move this route to the end, or give it a `when`"
                message = "a route without conditions leaves nothing to the routes after it: they are unreachable"
                self._document.report(path, message, fix)
            elif when and (before := self._covered_by(when, routes)):
                fix = f"move it before {before}, or change its `when`"
                self._document.report((*path, "when"), f"unreachable: all of this is already taken by {before}", fix)
            routes.append(self._route(part, when))
        return routes

    def _check_route(self, part: RouteFile, path: Path) -> None:
        if (part.use is None) == (part.candidates is None):
            given = "both use and candidates" if part.use else "neither use nor candidates"
            fix = "write `use: […]` for a fixed order, or `candidates: […]` with an objective"
            self._document.report(path, given, fix)
        for key in ("use", "candidates", "on_failure"):
            self._check_models(getattr(part, key) or [], (*path, key))
        if part.use is not None:
            for key in ("objective", "subject_to", "otherwise"):
                if getattr(part, key) is not None:
                    fix = "remove it, or write `candidates` instead of `use`"
                    self._document.report((*path, key), "has no meaning with `use`, a fixed order", fix)
        if part.otherwise is not None and part.subject_to is None:
            message = "nothing to fall back from: the route has no `subject_to`"
            self._document.report((*path, "otherwise"), message, "remove it, or add `subject_to`")
        self._check_signals(part, path)
        self._check_cost(part, path)
        self._check_named(part, path)

    def _check_models(self, names: list[str], path: Path) -> None:
        for index, name in enumerate(names):
            if "+" in name or ">" in name:
                kind = "an effort (+)" if "+" in name else "a cascade (>)"
                fix = f"write the model alone, `{concealed(re.split('[+>]', name)[0])}`"
                self._document.report((*path, index), f"{kind} is not part of policy version 1", fix)
            elif name in names[:index]:
                self._document.report((*path, index), "listed twice", "keep one of the two")
            else:
                self._known_model(name, (*path, index))

    def _check_signals(self, part: RouteFile, path: Path) -> None:
        """A bound or an objective on p_success needs heads; a broken `signals` section has been reported already."""
        if not part.candidates or not self._signals_read:
            return
        heads = self._difficulty.heads if self._difficulty else {}
        headed = [name for name in part.candidates if name in heads]
        bounds = part.subject_to
        fix = "name heads for the candidates in `signals.difficulty.heads`"
        if bounds and bounds.p_success is not None and not headed:
            at = (*path, "subject_to", "p_success")
            self._document.report(at, "nothing can satisfy this: no candidate has a probe head", fix)
        if bounds and bounds.p_success_gap is not None and len(headed) < len(part.candidates):
            missing = ", ".join(name for name in part.candidates if name not in headed)
            at = (*path, "subject_to", "p_success_gap")
            self._document.report(at, f"nothing can satisfy this: no probe head for {missing}", fix)
        if part.objective == "best" and not headed:
            at = (*path, "objective")
            self._document.report(at, "no candidate has a probe head, so none is known to be best", f"{fix}, or `use`")

    def _check_cost(self, part: RouteFile, path: Path) -> None:
        cost = part.subject_to.cost if part.subject_to else None
        models = [self._models[name] for name in part.candidates or [] if name in self._models]
        if cost == 0 and models and all(model.price.input and model.price.output for model in models):
            at = (*path, "subject_to", "cost")
            self._document.report(at, "nothing can satisfy this: no candidate is free", "raise it, or add a free model")

    def _check_named(self, part: RouteFile, path: Path) -> None:
        asked = (part.when.model or []) if part.when else []
        for index, name in enumerate(asked):
            if name in self._section_names("models") and (len(asked) > 1 or not part.use or part.use[0] != name):
                written_as_list = isinstance(self._document.at((*path, "when", "model")), list)
                at = (*path, "when", "model", *([index] if written_as_list else []))
                message = "this is a model, and a request that names a model goes straight to it"
                fix = f"choose another alias, or write a route for this model alone with `use: [{name}]` first"
                self._document.report(at, message, fix)

    def _covered_by(self, when: When, routes: list[Route]) -> str | None:
        """The names of the earlier routes that together take every query this condition can take, if they do."""
        takers: dict[str, None] = {}
        for tag, model, tenant in product(
            *(sorted(values) or [None] for values in (when.tags, when.models, when.tenants))
        ):
            for route in routes:
                earlier = route.when
                if (
                    earlier
                    and (not earlier.tags or tag in earlier.tags)
                    and (not earlier.models or model in earlier.models)
                    and (not earlier.tenants or tenant in earlier.tenants)
                ):
                    takers[route.name] = None
                    break
            else:
                return None
        return " and ".join(f"`{concealed(name)}`" for name in takers)

    def _route(self, part: RouteFile, when: When) -> Route:
        bounds = part.subject_to
        constraints = (
            Constraints(bounds.p_success, bounds.p_success_gap, bounds.cost) if bounds is not None else Constraints()
        )
        objective = part.objective or "cheapest"
        candidates = tuple(part.candidates or ())
        otherwise = part.otherwise or "best"
        asks = objective == "best" or constraints.ask_p_success
        heads = self._difficulty.heads if self._difficulty and asks else {}
        return Route(
            name=part.name,
            when=when,
            use=tuple(part.use or ()),
            candidates=candidates,
            objective=objective,
            constraints=constraints,
            otherwise=otherwise,
            on_failure=tuple(part.on_failure or ()),
            cache_ttl_ms=DEFAULT_CACHE_TTL_MS if part.cache is None else part.cache.ttl or None,
            heads=MappingProxyType({name: heads[name] for name in candidates if name in heads}),
        )

    def _read_limits(self) -> list[Limit]:
        limits: list[Limit] = []
        seen: dict[tuple[str, ...], int] = {}
        for index, value in enumerate(self._items("limits")):
            path: Path = ("limits", index)
            part = self._shape(LimitFile, value, path)
            if part is None:
                continue
            if (part.key is None) == (part.tenant is None):
                given = "both key and tenant" if part.key else "neither key nor tenant"
                self._document.report(path, given, "write one of them, with a name or `*`")
                continue
            if part.budget is None and part.rate is None:
                self._document.report(path, "limits nothing", "add `budget: $50/month` or `rate: 600/min`")
            scope: Literal["key", "tenant"] = "key" if part.key is not None else "tenant"
            name = part.key or part.tenant or ""
            if not _LIMIT_NAME.match(name) or concealed(name) != name:
                fix = "write the name given to the key when it was made, or `*`"
                self._document.report((*path, scope), "not a name", fix, show=False)
            marks = [(scope, name, "budget", part.budget.window)] if part.budget else []
            rates = [(scope, name, "rate", f"{part.rate.per_s}")] if part.rate else []
            for mark in (*marks, *rates):
                if mark in seen:
                    message = f"the same limit as in limits[{seen[mark]}]"
                    self._document.report((*path, mark[2]), message, "keep one of the two")
                seen.setdefault(mark, index)
            limits.append(Limit(scope, name, part.budget, part.rate))
        return limits

    def _section_names(self, name: str) -> dict[str, object]:
        """The entries of a section, whether they loaded or not: a broken model is not also an unknown one."""
        value = self._document.data.get(name)
        return value if isinstance(value, dict) else {}

    def _known_model(self, name: str, path: Path, *, show: bool = True) -> None:
        models = list(self._section_names("models"))
        if name not in models:
            self._document.report(path, "no model of this name", _did_you_mean(name, models), show=show)


_SHAPE_PROBLEMS = {
    "string_type": ("not text", "write it as text, in quotes if it looks like a number"),
    "string_too_short": ("empty", "write at least one character"),
    "string_too_long": ("too long", "write at most {max_length} characters"),
    "int_type": ("not a whole number", "write a whole number, without quotes"),
    "bool_type": ("neither true nor false", "write true or false, without quotes"),
    "list_type": ("not a list", "write a list, such as [a, b]"),
    "dict_type": ("not a mapping", "write `name: value` pairs"),
    "model_type": ("not a mapping", "write `key: value` pairs"),
    "too_short": ("empty", "name at least one"),
    "greater_than_equal": ("too small", "write {ge} or more"),
    "less_than_equal": ("too large", "write {le} or less"),
}


def _did_you_mean(given: str, known: list[str]) -> str:
    close = get_close_matches(given, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"write one of: {', '.join(known)}" if known else "there is none yet; add it first"


def _known_keys(kind: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys that exist beside an unknown one."""
    for step in location[:-1]:
        annotation = kind.model_fields[str(step)].annotation
        parts = [annotation, *(inner for outer in get_args(annotation) for inner in (outer, *get_args(outer)))]
        kind = next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return list(kind.model_fields)


def _price(part: PriceFile) -> Price:
    def given(price: int | None, default: int) -> int:
        return default if price is None else price

    return Price(
        input=part.input,
        cached_input=given(part.cached_input, part.input),
        cache_write=given(part.cache_write, part.input),
        output=part.output,
        reasoning=given(part.reasoning, part.output),
    )


def _when(part: WhenFile | None) -> When:
    if part is None:
        return When()
    return When(frozenset(part.tag or ()), frozenset(part.model or ()), frozenset(part.tenant or ()))


def _canonical(route: Route) -> dict[str, object]:
    return {
        "name": route.name,
        "when": [sorted(route.when.tags), sorted(route.when.models), sorted(route.when.tenants)],
        "use": route.use,
        "candidates": route.candidates,
        "objective": route.objective,
        "constraints": asdict(route.constraints),
        "otherwise": route.otherwise,
        "on_failure": route.on_failure,
        "cache_ttl_ms": route.cache_ttl_ms,
    }
