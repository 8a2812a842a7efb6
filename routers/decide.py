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

from collections.abc import Sequence

from routers.errors import NoCandidate, NoCandidateKind
from routers.options import Option
from routers.policy import FailureCause, Model, Policy, Route
from routers.types import Decision, Query, Signals, Single, State
from routers.units import format_money

_CLOSEST_FIRST: tuple[NoCandidateKind, ...] = ("unavailable", "budget", "context_length", "capability")


def decide(query: Query, signals: Signals, policy: Policy, state: State, seed: int) -> Decision:
    """What will run and why: a pure function of its arguments. Raises NoCandidate where nothing can run."""
    route = policy.route_for(query)
    targets = _targets(query, policy, route)
    if route is None:
        return _named(policy.models[targets[0]], query, signals, policy, state, seed)
    options = [Option(policy.models[name], index, query, signals, state) for index, name in enumerate(targets)]
    by_name = {option.model.name: option for option in options}
    reserve = _reserve(route, by_name, policy, query, signals, state)
    considered = list(by_name.values())
    steps_in = _steps_in(options, reserve)
    _settle_doubts(considered, (*options, *steps_in))
    usable = [option for option in options if option.obstacle is None]
    degraded = ""
    if usable:
        cheaper = state.degrade_reason if state.degrade == "cheaper" and query.model not in policy.models else None
        chosen, rule, guessed = _choose(route, usable, query, cheaper)
        if len(targets) < len(route.targets):
            rule += f" (only {query.model}, which the caller named)"
        if cheaper is not None:
            degraded = "budget"
        else:
            degraded = _missed(route, options, chosen, query) or ("probe_unavailable" if guessed else "")
        for option in usable:
            option.reason = "" if option is chosen else _why_not(route, option, chosen, usable, cheaper)
    else:
        found = next((option for option in steps_in if option.obstacle is None), None)
        if found is None:
            reasons = {option.model.name: option.reason for option in considered}
            raise NoCandidate(_closest(considered), "no model can run this", tuple(reasons.items()))
        chosen, rule, degraded = found, "first of on_failure, as no candidate can run", _closest(options)

    in_reserve: dict[str, tuple[str, ...]] = {
        cause: tuple([o.model.name for o in listed if o.obstacle is None and o is not chosen])
        for cause, listed in reserve.items()
    }
    if "context_length" in in_reserve:
        in_reserve["context_length"] = _longer(in_reserve["context_length"], chosen, by_name)
    fallbacks = in_reserve.pop("error", ())
    on_cause = {cause: names for cause, names in in_reserve.items() if names or cause == "rate_limit"}
    running = {chosen.model.name, *fallbacks}.union(*on_cause.values())
    return Decision(
        plan=Single(chosen.model.name),
        route=route.name,
        rule=rule,
        candidates=tuple([option.candidate(signals, option.model.name in running) for option in considered]),
        fallbacks=fallbacks,
        on_cause=on_cause,
        resume=_resume(route, fallbacks, options, chosen, by_name),
        policy_version=policy.version_hash,
        probe_version=_probe_version(signals),
        seed=seed,
        degraded=degraded,
    )


def _named(model: Model, query: Query, signals: Signals, policy: Policy, state: State, seed: int) -> Decision:
    """The one model that the caller named, where no route speaks of it: nothing is compared, nothing is in reserve."""
    option = Option(model, 0, query, signals, state)
    if option.obstacle is not None:
        raise NoCandidate(option.obstacle, "no model can run this", ((model.name, option.reason),))
    return Decision(
        plan=Single(model.name),
        route="named",
        rule=f"the caller named {model.name}",
        candidates=(option.candidate(signals, running=True),),
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
    others = [option.model.name for option in options if option.obstacle is None and option is not chosen]
    names = dict.fromkeys((*fallbacks, *others, chosen.model.name))
    return tuple([name for name in names if by_name[name].model.prefix])


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


def _choose(
    route: Route, usable: Sequence[Option], query: Query, cheaper: str | None = None
) -> tuple[Option, str, bool]:
    """(the choice, the sentence that made it, whether it wanted a p_success that nobody knows).

    `cheaper`: why the cheapest is wanted, whatever the route says; None: it is not.
    """
    if cheaper is not None:
        return min(usable, key=_by_cost), f"cheapest, as {cheaper}", False
    if route.use:
        return usable[0], route.rule, False
    bounds = route.constraints
    all_known = all(option.p is not None for option in usable)
    satisfying = [option for option in usable if not _violation(route, option, usable)]
    if satisfying:
        guessed = route.objective == "best" and not all_known
        return _first_by(route.objective, satisfying, all_known), route.rule, guessed
    missed = f"no candidate meets {bounds}"
    if route.otherwise == "refuse":
        reasons = tuple((option.model.name, _violation(route, option, usable)) for option in usable)
        raise NoCandidate("constraints", missed, reasons)
    cap = bounds.cost_nanousd
    within = [o for o in usable if cap is None or (o.expected is not None and o.expected <= cap)]
    if not within:
        return _first_by("cheapest", usable, all_known), f"{missed}; cheapest", bounds.ask_p_success and not all_known
    by = "highest p_success" if all_known else "last listed, as p_success is not known"
    rule = f"{missed}; otherwise {route.otherwise}" + (f" ({by})" if route.otherwise == "best" else "")
    if cap is not None:
        rule += f" with cost <= {format_money(cap)}"
    return _first_by(route.otherwise, within, all_known), rule, not all_known


def _by_cost(option: Option) -> tuple[bool, int, int]:
    return option.expected is None, option.expected or 0, option.index


def _first_by(objective: str, options: Sequence[Option], all_known: bool) -> Option:
    if objective == "cheapest":
        return min(options, key=_by_cost)
    if all_known:
        return min(options, key=lambda option: (-(option.p or 0.0), _by_cost(option)))
    return options[-1]


def _violation(route: Route, option: Option, usable: Sequence[Option]) -> str:
    """The first bound that the option does not meet, in words; empty if it meets them all."""
    bounds, p = route.constraints, option.p
    if bounds.p_success is not None:
        if p is None:
            return f"p_success not known, {bounds.p_success:g} asked"
        if p < bounds.p_success:
            return f"p_success {p:.3g} below {bounds.p_success:g}"
    if bounds.p_success_gap is not None:
        known = [other.p for other in usable if other.p is not None]
        if p is None or len(known) < len(usable):
            return f"p_success_gap not known, at most {bounds.p_success_gap:g} asked"
        if max(known) - p > bounds.p_success_gap:
            return f"p_success {p:.3g} is {max(known) - p:.3g} below the best, {bounds.p_success_gap:g} allowed"
    if bounds.cost_nanousd is not None:
        most = format_money(bounds.cost_nanousd)
        if option.expected is None:
            return f"its price is not known, at most {most} asked"
        if option.expected > bounds.cost_nanousd:
            return f"expected cost {format_money(option.expected)} above {most}"
    return ""


def _missed(route: Route, options: Sequence[Option], chosen: Option, query: Query) -> str:
    """The passing obstacle without which the choice would have been another one; empty: none."""
    for kind in ("budget", "unavailable"):
        wished = [option for option in options if option.obstacle in (None, kind)]
        if any(option.obstacle is not None for option in wished):
            try:
                if _choose(route, wished, query)[0] is not chosen:
                    return kind
            except NoCandidate:  # with one more candidate to compare with, the route would have refused
                continue
    return ""


def _why_not(route: Route, option: Option, chosen: Option, usable: Sequence[Option], cheaper: str | None) -> str:
    if cheaper is not None:
        return _dearer(option, chosen)
    if route.use:
        return f"listed after {chosen.model.name}"
    return _violation(route, option, usable) or _comparison(route, option, chosen)


def _comparison(route: Route, option: Option, chosen: Option) -> str:
    """Why an option that meets the bounds lost to the chosen one."""
    name = chosen.model.name
    if route.objective == "best":
        if option.p is None or chosen.p is None:
            return f"listed before {name}, and p_success is not known"
        if option.p < chosen.p:
            return f"p_success {option.p:.3g} below {chosen.p:.3g} of {name}"
    return _dearer(option, chosen)


def _dearer(option: Option, chosen: Option) -> str:
    name = chosen.model.name
    if chosen.expected is not None and option.expected is None:
        return f"its price is not known, {name} costs {format_money(chosen.expected)}"
    if chosen.expected is not None and option.expected is not None and option.expected > chosen.expected:
        return f"costs {format_money(option.expected)}, {name} {format_money(chosen.expected)}"
    return f"as good as {name}, listed later"


def _closest(options: Sequence[Option]) -> NoCandidateKind:
    obstacles = {option.obstacle for option in options}
    return next(kind for kind in _CLOSEST_FIRST if kind in obstacles)


def _probe_version(signals: Signals) -> str | None:
    """The artifact that measured, e.g. `mmlu-minilm@3f2a9c`; the source of an estimate names its head after it."""
    for estimate in signals.p_success.values():
        return estimate.source.rpartition("/")[0] or estimate.source
    return None
