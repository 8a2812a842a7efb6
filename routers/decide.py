"""The decision: which model answers a query, which ones wait in reserve, and why each other one does not.

    route     the first whose conditions hold; a model named by the caller needs none, unless a route speaks of it
    weigh     each model the route offers: can it do this, does it fit, is it affordable, is it there
    choose    `use`: the first that can. `candidates`: by objective, among those that satisfy the constraints
    reserve   `on_failure`, without the chosen model and without what cannot run

Where p_success of a candidate is not known (no answer from the probe, no head), a bound on it counts as not met. When
no candidate meets the bounds, `otherwise` chooses among those within the bound on cost, if any, else the cheapest. And
where `best` has to rank candidates of which one is not known, it trusts their order: the last listed is the strongest.

A prompt that cannot fit is refused here: by the exact count where there is one, else by the fewest tokens that its
text can make. One that by estimate does not fit, but may, is sent only where nothing else can take it; the provider's
own refusal is then the cause `context_length`.

A model whose price is not known is never cheaper than one whose price is, meets no bound on cost, and is not used
where a budget holds.
"""

from collections.abc import Mapping, Sequence

from routers.affinity import held, switch_nanousd
from routers.bandit import explore, learned
from routers.choose import choose, why_not
from routers.effort import at_most, budget, by_signals
from routers.errors import NoCandidate, NoCandidateKind
from routers.guarantee import hold
from routers.options import CascadeOption, Option
from routers.plans import models_of
from routers.policy import FailureCause, Model, Policy, Route
from routers.shadow import cast
from routers.types import Cascade, Decision, Plan, Query, Signals, Single, State

_CLOSEST_FIRST: tuple[NoCandidateKind, ...] = ("unavailable", "budget", "constraints", "context_length", "capability")


def decide(query: Query, signals: Signals, policy: Policy, state: State, seed: int) -> Decision:
    """What will run and why: a pure function of its arguments. Raises NoCandidate where nothing can run."""
    route = policy.route_for(query)
    targets = _targets(query, policy, route)
    if route is None:
        return _named(policy.models[targets[0]], query, signals, policy, state, seed)
    measured = signals
    runs = {} if route.explore is None else _runs(route, targets, policy, query, signals)
    if route.affinity is not None or runs:
        signals = _remembered(route, runs, signals, state)
    options = _options(route, targets, policy, query, signals, state)
    by_name = {option.name: option for option in options}
    if route.guarantee is not None:
        options = hold(route.guarantee, route.candidates, options, measured)
    reserve = _reserve(route, by_name, policy, query, signals, state)
    considered = list(by_name.values())
    steps_in = _steps_in(options, reserve)
    _settle_doubts(considered, (*options, *steps_in))
    usable = [option for option in options if option.obstacle is None]
    degraded, propensity, explored = "", 1.0, False
    among: tuple[str, ...] = ()
    if usable:
        cheaper = state.degrade_reason if state.degrade == "cheaper" and query.model not in policy.models else None
        chosen, rule, guessed, satisfying = choose(route, usable, query, cheaper)
        if route.guarantee is not None:
            rule += f", {route.guarantee}"
        if len(targets) < len(route.targets):
            rule += f" (only {query.model}, which the caller named)"
        for option in usable:
            option.reason = "" if option is chosen else why_not(route, option, chosen, cheaper)
        if cheaper is not None:
            degraded = "budget"
        else:
            degraded = _missed(route, options, chosen, query) or ("probe_unavailable" if guessed else "")
        if route.explore is not None:
            arms = {runs[option.name]: option for option in (*reversed(satisfying), chosen)}
            among = tuple(dict.fromkeys(runs[option.name] for option in satisfying))
            if len(among) > 1:
                name, propensity = explore(route.explore, runs[chosen.name], among, signals, state, seed)
                if arms[name] is not chosen:
                    chosen.reason = f"the best, but this request explores {name}"
                    share = f"{100 * route.explore.share:g}% of requests"
                    rule += f"; explored {name}, as {share} do ({route.explore.method})"
                    chosen, explored = arms[name], True
                    chosen.reason = ""
            else:
                among = ()
    else:
        found = next((option for option in steps_in if option.obstacle is None), None)
        if found is None:
            reasons = {option.name: option.reason for option in considered}
            away = tuple(dict.fromkeys(option.away for option in considered if option.away))
            raise NoCandidate(_closest(considered), "no model can run this", tuple(reasons.items()), away)
        chosen, rule, degraded = found, "first of on_failure, as no candidate can run", _closest(options)

    plan = _planned(chosen.plan, chosen.model, route, query, signals)
    alone = plan.model if plan.kind == "single" else None
    in_reserve: dict[str, tuple[str, ...]] = {
        cause: tuple([o.name for o in listed if o.obstacle is None and o is not chosen and o.name != alone])
        for cause, listed in reserve.items()
    }
    if "context_length" in in_reserve:
        in_reserve["context_length"] = _longer(in_reserve["context_length"], chosen, by_name)
    fallbacks = in_reserve.pop("error", ())
    on_cause = {cause: names for cause, names in in_reserve.items() if names or cause == "rate_limit"}
    running = {chosen.name, *fallbacks}.union(*on_cause.values())
    shadow = route.shadow
    return Decision(
        plan=plan,
        route=route.name,
        rule=rule,
        candidates=tuple([option.candidate(option.name in running) for option in considered]),
        fallbacks=fallbacks,
        on_cause=on_cause,
        resume=_resume(route, fallbacks, options, chosen, by_name),
        policy_version=policy.version_hash,
        probe_version=_probe_version(signals),
        seed=seed,
        degraded=degraded,
        propensity=propensity,
        explored=explored,
        among=among,
        shadow=() if shadow is None else cast(shadow, (plan.model,), query, signals, policy, state, seed),
    )


def _runs(route: Route, targets: Sequence[str], policy: Policy, query: Query, signals: Signals) -> dict[str, str]:
    """Candidate → what it runs as for this query, with the effort that it gets: the bandit's arm."""
    runs = {}
    for name in targets:
        plan = route.plans.get(name)
        model = policy.models[name if plan is None else plan.model]
        runs[name] = _planned(plan, model, route, query, signals).name
    return runs


def _remembered(route: Route, runs: Mapping[str, str], signals: Signals, state: State) -> Signals:
    """The signals with what the bandit has learned and what the conversation so far holds on to."""
    if runs and state.arms:
        signals = learned(signals, state, runs)
    if route.affinity is not None and state.session_p:
        signals = held(signals, state.session_p, route.affinity.release)
    return signals


def _options(
    route: Route, targets: Sequence[str], policy: Policy, query: Query, signals: Signals, state: State
) -> list[Option]:
    models, plans = policy.models, route.plans
    if plans:
        options = [
            _option(plans.get(name), name, index, models, query, signals, state) for index, name in enumerate(targets)
        ]
    else:
        options = [Option(models[name], index, query, signals, state) for index, name in enumerate(targets)]
    leaves = state.session_model
    if route.affinity is not None and leaves is not None and leaves in models:
        switch = switch_nanousd(route.affinity, models[leaves], signals.cached_tokens.get(leaves, 0))
        for option in options:
            option.switch = 0 if option.model.name == leaves else switch
    if state.bound_to is not None:
        for option in options:
            answering = models_of((option.name,)) if isinstance(option.plan, Cascade) else (option.model.name,)
            if option.obstacle is None and any(models[name].provider != state.bound_to for name in answering):
                option.obstacle = "capability"
                option.reason = f"the conversation holds blocks that only {state.bound_to} can read"
    return options


def _option(
    plan: Plan | None,
    name: str,
    index: int,
    models: Mapping[str, Model],
    query: Query,
    signals: Signals,
    state: State,
) -> Option:
    if isinstance(plan, Cascade):
        stages = [Option(models[s.model], index, query, signals, state, s if s.effort else None) for s in plan.stages]
        return CascadeOption(plan, index, stages, query, signals.p_success.get(name))
    if isinstance(plan, Single):
        return Option(models[plan.model], index, query, signals, state, plan)
    return Option(models[name], index, query, signals, state)


def _planned(plan: Plan | None, model: Model, route: Route | None, query: Query, signals: Signals) -> Plan:
    """The plan of a candidate, with the effort that the route, the signals and the caller leave it."""
    thinking = model.thinking
    if isinstance(plan, Cascade):
        return plan
    if thinking is None or query.reasoning is not None:
        return Single(model.name)
    if plan is not None and plan.effort is not None:
        return Single(model.name, plan.effort, budget(plan.effort, thinking))
    asked = route.effort if route is not None else None
    if asked == "auto":
        return Single(model.name, *by_signals(query, signals, thinking))
    capped = at_most(asked, query.hints.effort if query.hints is not None else None)
    return Single(model.name, capped, budget(capped, thinking))


def _named(model: Model, query: Query, signals: Signals, policy: Policy, state: State, seed: int) -> Decision:
    """The one model that the caller named, where no route speaks of it: nothing is compared, nothing is in reserve."""
    option = Option(model, 0, query, signals, state)
    if option.obstacle is not None:
        away = (option.away,) if option.away else ()
        raise NoCandidate(option.obstacle, "no model can run this", ((model.name, option.reason),), away)
    return Decision(
        plan=_planned(None, model, None, query, signals),
        route="named",
        rule=f"the caller named {model.name}",
        candidates=(option.candidate(running=True),),
        fallbacks=(),
        policy_version=policy.version_hash,
        probe_version=_probe_version(signals),
        seed=seed,
    )


def _reserve(
    route: Route, by_name: dict[str, Option], policy: Policy, query: Query, signals: Signals, state: State
) -> dict[FailureCause, list[Option]]:
    """What to turn to, by cause: those with a list of their own, and those that do not share the engine's default.

    Adds the options that are not candidates to `by_name`.
    """
    if not (route.on_failure or route.on_cause):
        return {}
    lists: dict[FailureCause, tuple[str, ...]] = {
        "error": route.on_failure,
        "context_length": route.on_failure,
        "content_filter": route.on_failure,
        **route.on_cause,
    }
    for name in dict.fromkeys(name for names in lists.values() for name in names):
        if name not in by_name:
            by_name[name] = Option(policy.models[name], len(by_name), query, signals, state)
    return {cause: [by_name[name] for name in names] for cause, names in lists.items()}


def _steps_in(options: Sequence[Option], reserve: dict[FailureCause, list[Option]]) -> Sequence[Option]:
    """The reserve for the case that no candidate can run: by what stands in the way of the closest."""
    if not reserve or any(option.obstacle is None and not option.doubt for option in options):
        return ()
    too_long = all(option.obstacle in (None, "context_length", "capability") for option in options)
    return reserve["context_length" if too_long else "error"]


def _settle_doubts(considered: Sequence[Option], first: Sequence[Option]) -> None:
    """What will probably not fit is left out where one of `first` can run that will."""
    if any(option.obstacle is None and not option.doubt for option in first):
        for option in considered:
            if option.doubt and option.obstacle is None:
                option.obstacle, option.reason = "context_length", option.doubt


def _longer(names: tuple[str, ...], chosen: Option, by_name: dict[str, Option]) -> tuple[str, ...]:
    """Those whose context may be longer than the chosen one's."""
    short = chosen.model.context
    if short is None:
        return names
    return tuple([n for n in names if (context := by_name[n].model.context) is None or context > short])


def _resume(
    route: Route,
    fallbacks: tuple[str, ...],
    options: Sequence[Option],
    chosen: Option,
    by_name: dict[str, Option],
) -> tuple[str, ...]:
    """Who may go on with a broken stream: fallbacks, the other candidates, and last the chosen model once more."""
    if route.on_stream_failure != "resume":
        return ()
    others = [option.model for option in options if option.obstacle is None and option is not chosen]
    models = [*(by_name[name].model for name in fallbacks), *others, chosen.model]
    return tuple(dict.fromkeys([model.name for model in models if model.prefix]))


def _targets(query: Query, policy: Policy, route: Route | None) -> tuple[str, ...]:
    """The models to choose from. A model named by the caller narrows a route on tags or tenants, and widens none."""
    name = query.model
    if route is None:
        if name not in policy.models:
            known = ", ".join((*policy.aliases, *policy.models))
            raise NoCandidate(
                "unknown_model", f"`{name}` is neither a model nor an alias of the policy; it knows {known}"
            )
        if name in policy.guarded:
            raise NoCandidate("not_allowed", f"no route that takes `{name}` takes this request")
        return (name,)
    if name not in policy.models or route.when.models:
        return route.targets
    if name not in route.targets:
        offers = ", ".join(route.targets)
        raise NoCandidate("not_allowed", f"route `{route.name}` does not offer `{name}`; it offers {offers}")
    return (name,)


def _missed(route: Route, options: Sequence[Option], chosen: Option, query: Query) -> str:
    """The passing obstacle without which the choice would have been another one; empty: none."""
    if not any(option.obstacle in ("budget", "unavailable") for option in options):
        return ""
    for kind in ("budget", "unavailable"):
        wished = [option for option in options if option.obstacle in (None, kind)]
        if any(option.obstacle is not None for option in wished):
            try:
                if choose(route, wished, query)[0] is not chosen:
                    return kind
            except NoCandidate:  # with one more candidate to compare with, the route would have refused
                continue
    return ""


def _closest(options: Sequence[Option]) -> NoCandidateKind:
    obstacles = {option.obstacle for option in options}
    return next(kind for kind in _CLOSEST_FIRST if kind in obstacles)


def _probe_version(signals: Signals) -> str | None:
    """The artifact that measured, e.g. `mmlu-minilm@3f2a9c`; the source of an estimate names its head after it."""
    for estimate in signals.p_success.values():
        return estimate.source.rpartition("/")[0] or estimate.source
    return None
