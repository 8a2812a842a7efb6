"""The routes of a policy file: each one checked against the models and signals, and all of them for reachability."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import get_args

from routers.aims import Shadow
from routers.aims_file import (
    RuleLookup,
    accept_of,
    affinity_of,
    check_aims,
    explore_of,
    guarantee_of,
    with_rule,
    worth_of,
)
from routers.cost import least_nanousd
from routers.plans import models_of, parse_plan, plan_name
from routers.policy import (
    DEFAULT_CACHE_TTL_MS,
    Constraints,
    Difficulty,
    FailureCause,
    Hedge,
    Model,
    Route,
)
from routers.reach import takers_of
from routers.schema import OnFailureFile, RouteFile, ShadowFile
from routers.shape import did_you_mean, validated
from routers.types import Cascade, Plan, Single
from routers.units import UnitError, format_duration, format_money
from routers.when import When
from routers.when_file import when_of
from routers.yaml import Document, Path, concealed

_CAUSES: tuple[FailureCause, ...] = get_args(FailureCause)


class RoutesReader:
    """Reads routes against what the layers above them hold."""

    def __init__(
        self,
        document: Document,
        models: Mapping[str, Model],
        model_names: list[str],
        difficulty: Difficulty | None,
        signals_read: bool,
        rules: RuleLookup,
    ) -> None:
        self._document = document
        self._rules = rules
        self._models = models
        self._model_names = model_names  # also of models that did not load: a broken model is not an unknown one
        self._difficulty = difficulty
        self._signals_read = signals_read  # False: the section is broken, and what leans on it cannot be judged

    def read(self, items: list[object]) -> list[Route]:
        routes: list[Route] = []
        names: dict[str, int] = {}
        for index, value in enumerate(items):
            path: Path = ("routes", index)
            causes = [("on_failure", cause) for cause in _CAUSES]
            for key in (("use",), ("candidates",), ("on_failure",), ("shadow", "models"), *causes):
                self._check_models((*path, *key))
            part = validated(self._document, RouteFile, value, path)
            if part is None:
                continue
            if part.accept is not None:
                accept = with_rule(self._document, part.accept, (*path, "accept"), self._rules)
                part = part.model_copy(update={"accept": accept})
            if part.name == "named" or part.name in names:
                taken = f"the name of routes[{names[part.name]}] too" if part.name in names else "a reserved name"
                self._document.report((*path, "name"), taken, "give this route a name of its own")
            names.setdefault(part.name, index)
            self._check_route(part, path)
            if part.when is not None and part.when.not_ is not None and not part.when.not_.model_fields_set:
                fix = "write at least one condition, such as `tag: urgent`, or remove it"
                self._document.report((*path, "when", "not"), "empty", fix)
            when = when_of(part.when, part.name)
            if not when and index < len(items) - 1:
                fix = "move this route to the end, or give it a `when`"
                message = "a route without conditions leaves nothing to the routes after it: they are unreachable"
                self._document.report(path, message, fix)
            elif when:
                self._check_reach(when, routes, path)
            routes.append(self._route(part, when))
        return routes

    def _check_reach(self, when: When, routes: list[Route], path: Path) -> None:
        takers = takers_of(when, [(route.name, route.when) for route in routes if route.when])
        if takers is None:
            return
        if takers:
            before = " and ".join(f"`{concealed(name)}`" for name in takers)
            message, fix = f"all of this is already taken by {before}", f"move it before {before}, or change its `when`"
        else:
            message, fix = "these conditions never hold together", "remove one of them"
        self._document.report((*path, "when"), f"unreachable: {message}", fix)

    def _check_route(self, part: RouteFile, path: Path) -> None:
        if (part.use is None) == (part.candidates is None):
            given = "both use and candidates" if part.use else "neither use nor candidates"
            fix = "write `use: […]` for a fixed order, or `candidates: […]` with an objective"
            self._document.report(path, given, fix)
        if part.use is not None:
            for key in (
                "objective",
                "worth",
                "threshold",
                "subject_to",
                "otherwise",
                "explore",
                "guarantee",
                "affinity",
            ):
                if getattr(part, key) is not None:
                    fix = "remove it, or write `candidates` instead of `use`"
                    self._document.report((*path, key), "has no meaning with `use`, a fixed order", fix)
        if part.otherwise is not None and part.subject_to is None:
            message = "nothing to fall back from: the route has no `subject_to`"
            self._document.report((*path, "otherwise"), message, "remove it, or add `subject_to`")
        self._check_signals(part, path)
        self._check_cost(part, path)
        self._check_named(part, path)
        heads = self._difficulty.heads if self._difficulty else {}
        plans = _plans(part.candidates or ())
        check_aims(self._document, part, path, plans, self._models, heads if self._signals_read else None)
        self._check_attempts(part, path)

    def _check_models(self, path: Path) -> None:
        """On the list as written, so that another mistake in the route does not hide these."""
        names = self._document.at(path)
        if not isinstance(names, list):
            return
        seen: list[tuple[Single, ...]] = []
        for index, name in enumerate(names):
            if not isinstance(name, str):
                continue
            try:
                stages = parse_plan(name) if path[-1] == "candidates" else (Single(name),)
            except UnitError as error:
                self._document.report((*path, index), str(error), error.fix)
                continue
            if plan_name(stages) in [plan_name(before) for before in seen]:
                self._document.report((*path, index), "listed twice", "keep one of the two")
            seen.append(stages)
            for model in dict.fromkeys(stage.model for stage in stages):
                if model in self._model_names:
                    continue
                if re.search("[+>&]", model):
                    fix = f"write the model alone, `{concealed(re.split('[+>&]', model)[0])}`"
                    self._document.report((*path, index), "efforts and cascades stand among `candidates` only", fix)
                else:
                    fix = did_you_mean(model, self._model_names)
                    self._document.report((*path, index), "no model of this name", fix)

    def _check_signals(self, part: RouteFile, path: Path) -> None:
        """A bound or an objective on p_success needs heads; a broken `signals` section has been reported already."""
        if not part.candidates or not self._signals_read:
            return
        heads = self._difficulty.heads if self._difficulty else {}
        plans = _plans(part.candidates)
        headed = [name for name, stages in plans.items() if all(stage.name in heads for stage in stages)]
        bounds = part.subject_to
        fix = "name heads for the candidates in `signals.difficulty.heads`"
        if bounds and bounds.p_success is not None and not headed:
            at = (*path, "subject_to", "p_success")
            self._document.report(at, "nothing can satisfy this: no candidate has a probe head", fix)
        if bounds and bounds.p_success_gap is not None and len(headed) < len(plans):
            missing = ", ".join(concealed(name) for name in plans if name not in headed)
            at = (*path, "subject_to", "p_success_gap")
            self._document.report(at, f"nothing can satisfy this: no probe head for {missing}", fix)
        if part.objective == "best" and not headed and part.explore is None:  # what is explored becomes known
            at = (*path, "objective")
            self._document.report(at, "no candidate has a probe head, so none is known to be best", f"{fix}, or `use`")

    def _check_cost(self, part: RouteFile, path: Path) -> None:
        cost = part.subject_to.cost if part.subject_to else None
        models = [self._models[name] for name in part.candidates or [] if name in self._models]
        if cost is None or not models or len(models) < len(part.candidates or ()):
            return
        least_tokens = part.when.input_tokens[0] if part.when is not None and part.when.input_tokens else 1
        leasts = {model.name: least for model in models if (least := least_nanousd(model, least_tokens)) is not None}
        if not leasts or min(leasts.values()) <= cost:
            return
        cheapest = min(leasts, key=lambda name: leasts[name])
        of = f"the shortest call of the cheapest, `{concealed(cheapest)}`, costs {format_money(leasts[cheapest])}"
        message = f"nothing can satisfy this: {of}"
        fix = f"write at least {format_money(leasts[cheapest])}, or add a cheaper model"
        self._document.report((*path, "subject_to", "cost"), message, fix)

    def _check_named(self, part: RouteFile, path: Path) -> None:
        asked = (part.when.model or []) if part.when else []
        for index, name in enumerate(asked):
            if name in self._model_names and (len(asked) > 1 or not part.use or part.use[0] != name):
                written_as_list = isinstance(self._document.at((*path, "when", "model")), list)
                at = (*path, "when", "model", *([index] if written_as_list else []))
                message = "this is a model, and a request that names a model goes straight to it"
                fix = f"choose another alias, or write a route for this model alone with `use: [{name}]` first"
                self._document.report(at, message, fix)

    def _check_attempts(self, part: RouteFile, path: Path) -> None:
        if part.on_failure is not None and not part.on_failure.model_fields_set:
            fix = "write a list, or lists by cause: error, rate_limit, context_length, content_filter"
            self._document.report((*path, "on_failure"), "empty", fix)
        if part.hedge and part.deadline and part.hedge.after >= part.deadline:
            message = f"never happens: the deadline of {format_duration(part.deadline)} comes first"
            self._document.report((*path, "hedge", "after"), message, "write a shorter time, or a longer deadline")
        judge = part.shadow.judge if part.shadow else None
        if judge is not None and judge not in self._model_names:
            fix = did_you_mean(judge, self._model_names)
            self._document.report((*path, "shadow", "judge"), "no model of this name", fix)
        if part.on_stream_failure == "resume":
            listed = [*(part.use or part.candidates or ()), *((part.on_failure and part.on_failure.error) or ())]
            names = models_of(listed)
            known = [self._models[name] for name in names if name in self._models]
            if len(known) == len(names) and not any(model.prefix for model in known):
                message = "no model of this route goes on from the start of an answer"
                fix = "add one to `on_failure`, such as a local model, or say `prefix: true` of a model that can"
                self._document.report((*path, "on_stream_failure"), message, fix)

    def _route(self, part: RouteFile, when: When) -> Route:
        bounds = part.subject_to
        constraints = (
            Constraints(bounds.p_success, bounds.p_success_gap, bounds.cost, bounds.ttft_p95, bounds.latency)
            if bounds is not None
            else Constraints()
        )
        objective = part.objective or "cheapest"
        stages = _plans(part.candidates or ())
        candidates = tuple(stages)
        plans = {name: _plan(of, part) for name, of in stages.items() if of != (Single(name),)}
        cascades = any(len(of) > 1 for of in stages.values())
        otherwise = part.otherwise or "best"
        asks = objective in ("best", "utility", "threshold") or constraints.ask_p_success
        asks = asks or cascades or part.guarantee is not None or part.explore is not None
        heads = self._difficulty.heads if self._difficulty and asks else {}
        failures = part.on_failure or OnFailureFile()
        on_failure = tuple(failures.error or ())
        by_cause = {cause: getattr(failures, cause) for cause in _CAUSES if cause != "error"}
        on_cause: dict[FailureCause, tuple[str, ...]] = {
            cause: tuple(names) for cause, names in by_cause.items() if names is not None
        }
        return Route(
            name=part.name,
            when=when,
            use=tuple(part.use or ()),
            candidates=candidates,
            objective=objective,
            constraints=constraints,
            otherwise=otherwise,
            on_failure=on_failure,
            on_cause=MappingProxyType(on_cause),
            deadline_ms=part.deadline,
            hedge=Hedge(part.hedge.after, part.hedge.max_extra) if part.hedge is not None else None,
            shadow=_shadow(part.shadow),
            on_stream_failure=part.on_stream_failure,
            cache_ttl_ms=DEFAULT_CACHE_TTL_MS if part.cache is None else part.cache.ttl or None,
            worth=worth_of(part.worth),
            threshold=part.threshold,
            explore=explore_of(part.explore),
            guarantee=guarantee_of(part.guarantee),
            affinity=affinity_of(part.affinity),
            effort=part.effort,
            priority=part.priority,
            plans=MappingProxyType(plans),
            heads=MappingProxyType({s.name: heads[s.name] for of in stages.values() for s in of if s.name in heads}),
        )


def _plans(names: Sequence[str]) -> dict[str, tuple[Single, ...]]:
    """The candidates that can be read, by the one spelling of their names."""
    found = {}
    for name in names:
        with suppress(UnitError):
            stages = parse_plan(name)
            found[plan_name(stages)] = stages
    return found


def _plan(stages: tuple[Single, ...], part: RouteFile) -> Plan:
    return stages[0] if len(stages) == 1 else Cascade(stages, accept_of(part.accept))


def _shadow(part: ShadowFile | None) -> Shadow | None:
    return None if part is None else Shadow(tuple(part.models), part.share, part.judge, part.keep)
