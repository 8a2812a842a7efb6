"""The decision: which model answers a query, which ones wait in reserve, and why each other one does not.

    route     the first whose conditions hold; a model named by the caller needs none, unless a route speaks of it
    weigh     each model the route offers: can it do this, does it fit, is it affordable, is it there
    choose    `use`: the first that can. `candidates`: by objective, among those that satisfy the constraints
    reserve   `on_failure`, without the chosen model and without what cannot run

Where p_success of a candidate is not known (no answer from the probe, no head), a bound on it counts as not met. When
no candidate meets the bounds, `otherwise` chooses among those within the bound on cost, if any, else the cheapest. And
where `best` has to rank candidates of which one is not known, it trusts their order: the last listed is the strongest.
"""

from collections.abc import Sequence

from routers.cost import expected_and_worst_nanousd
from routers.errors import NoCandidate, NoCandidateKind
from routers.policy import Model, Policy, Route
from routers.types import Candidate, Decision, Query, Signals, Single, State
from routers.units import format_money

_CLOSEST_FIRST: tuple[NoCandidateKind, ...] = ("unavailable", "budget", "context_length", "capability")


class _Option:
    """One model under consideration."""

    __slots__ = ("expected", "index", "model", "obstacle", "p", "reason", "worst")

    def __init__(self, model: Model, index: int, query: Query, signals: Signals, state: State) -> None:
        name = model.name
        estimate = signals.p_success.get(name)
        tokens = signals.input_tokens.get(name, query.input_tokens_estimate)
        self.model = model
        self.index = index
        self.p = None if estimate is None else estimate.value
        self.expected, self.worst = expected_and_worst_nanousd(model, query, tokens)
        self.obstacle: NoCandidateKind | None = None
        self.reason = ""
        self._look_for_obstacle(query, tokens, state)

    def _look_for_obstacle(self, query: Query, tokens: int, state: State) -> None:
        """The lasting obstacles first: what is only unavailable would run if it came back."""
        model, asked, remaining = self.model, query.max_output_tokens, state.budget_remaining_nanousd
        if model.embeds != (query.endpoint == "embeddings"):
            self.obstacle, self.reason = "capability", "only embeds" if model.embeds else "cannot embed"
        elif query.endpoint == "completions" and not model.completes:
            self.obstacle, self.reason = "capability", "takes conversations only, no raw prompt"
        elif query.needs_tools and not model.tools:
            self.obstacle, self.reason = "capability", "cannot call tools"
        elif query.needs_format and not model.structured:
            self.obstacle, self.reason = "capability", "cannot hold to a JSON format"
        elif query.needs_logprobs and not model.logprobs:
            self.obstacle, self.reason = "capability", "cannot return log probabilities"
        elif asked is not None and model.max_output is not None and asked > model.max_output:
            self.obstacle = "context_length"
            self.reason = f"answers at most {model.max_output} tokens, {asked} asked"
        elif model.context is not None and tokens // query.inputs + (asked or 1) > model.context:
            self.obstacle = "context_length"
            self.reason = f"does not fit: {tokens} tokens in and {asked or 1} out, context {model.context}"
        elif remaining is not None and self.worst > max(remaining, 0):
            self.obstacle = "budget"
            self.reason = f"may cost {format_money(self.worst)}, budget left {format_money(remaining)}"
            if asked is None:
                self.reason += "; send max_tokens to reserve less"
        elif model.name in state.unavailable:
            self.obstacle, self.reason = "unavailable", f"unavailable: {state.unavailable[model.name]}"


def decide(query: Query, signals: Signals, policy: Policy, state: State, seed: int) -> Decision:
    """What will run and why: a pure function of its arguments. Raises NoCandidate where nothing can run."""
    route = policy.route_for(query)
    targets = _targets(query, policy, route)
    options = [_Option(policy.models[name], index, query, signals, state) for index, name in enumerate(targets)]
    reserve = [
        next((option for option in options if option.model.name == name), None)
        or _Option(policy.models[name], len(options), query, signals, state)
        for name in (route.on_failure if route is not None else ())
    ]
    usable = [option for option in options if option.obstacle is None]
    degraded = ""
    if usable:
        chosen, rule, guessed = _choose(route, usable, query)
        if route is not None and len(targets) < len(route.targets):
            rule += f" (only {query.model}, which the caller named)"
        degraded = _missed(route, options, chosen, query) or ("probe_unavailable" if guessed else "")
        for option in usable:
            option.reason = "" if option is chosen else _why_not(route, option, chosen, usable)
    else:
        found = next((option for option in reserve if option.obstacle is None), None)
        if found is None:
            reasons = {option.model.name: option.reason for option in (*options, *reserve)}
            raise NoCandidate(_closest((*options, *reserve)), "no model can run this", tuple(reasons.items()))
        chosen, rule, degraded = found, "first of on_failure, as no candidate can run", _closest(options)

    fallbacks = tuple(o.model.name for o in reserve if o.obstacle is None and o is not chosen)
    considered = options + [option for option in reserve if option not in options]
    return Decision(
        plan=Single(chosen.model.name),
        route="named" if route is None else route.name,
        rule=rule,
        candidates=tuple([_candidate(option, signals, fallbacks) for option in considered]),
        fallbacks=fallbacks,
        policy_version=policy.version_hash,
        probe_version=_probe_version(signals),
        seed=seed,
        degraded=degraded,
    )


def _targets(query: Query, policy: Policy, route: Route | None) -> tuple[str, ...]:
    """The models to choose from. A model named by the caller narrows a route on tags or tenants, and widens none."""
    name = query.model
    if route is None:
        if name not in policy.models:
            raise NoCandidate("unknown_model", f"`{name}` is neither a model nor an alias of the policy")
        if name in policy.guarded:
            raise NoCandidate("not_allowed", f"no route that takes `{name}` takes this request")
        return (name,)
    if name not in policy.models or route.when.models:
        return route.targets
    if name not in route.targets:
        offers = ", ".join(route.targets)
        raise NoCandidate("not_allowed", f"route `{route.name}` does not offer `{name}`; it offers {offers}")
    return (name,)


def _choose(route: Route | None, usable: Sequence[_Option], query: Query) -> tuple[_Option, str, bool]:
    """(the choice, the sentence that made it, whether it wanted a p_success that nobody knows)."""
    if route is None:
        return usable[0], f"the caller named {query.model}", False
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
    within = [option for option in usable if cap is None or option.expected <= cap]
    if not within:
        return _first_by("cheapest", usable, all_known), f"{missed}; cheapest", bounds.ask_p_success and not all_known
    by = "highest p_success" if all_known else "last listed, as p_success is not known"
    rule = f"{missed}; otherwise {route.otherwise}" + (f" ({by})" if route.otherwise == "best" else "")
    if cap is not None:
        rule += f" with cost <= {format_money(cap)}"
    return _first_by(route.otherwise, within, all_known), rule, not all_known


def _first_by(objective: str, options: Sequence[_Option], all_known: bool) -> _Option:
    if objective == "cheapest":
        return min(options, key=lambda option: (option.expected, option.index))
    if all_known:
        return min(options, key=lambda option: (-(option.p or 0.0), option.expected, option.index))
    return options[-1]


def _violation(route: Route, option: _Option, usable: Sequence[_Option]) -> str:
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
    if bounds.cost_nanousd is not None and option.expected > bounds.cost_nanousd:
        return f"expected cost {format_money(option.expected)} above {format_money(bounds.cost_nanousd)}"
    return ""


def _missed(route: Route | None, options: Sequence[_Option], chosen: _Option, query: Query) -> str:
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


def _why_not(route: Route | None, option: _Option, chosen: _Option, usable: Sequence[_Option]) -> str:
    if route is None or route.use:
        return f"listed after {chosen.model.name}"
    return _violation(route, option, usable) or _comparison(route, option, chosen)


def _comparison(route: Route, option: _Option, chosen: _Option) -> str:
    """Why an option that meets the bounds lost to the chosen one."""
    name = chosen.model.name
    if route.objective == "best":
        if option.p is None or chosen.p is None:
            return f"listed before {name}, and p_success is not known"
        if option.p < chosen.p:
            return f"p_success {option.p:.3g} below {chosen.p:.3g} of {name}"
    if option.expected > chosen.expected:
        return f"costs {format_money(option.expected)}, {name} {format_money(chosen.expected)}"
    return f"as good as {name}, listed later"


def _closest(options: Sequence[_Option]) -> NoCandidateKind:
    obstacles = {option.obstacle for option in options}
    return next(kind for kind in _CLOSEST_FIRST if kind in obstacles)


def _candidate(option: _Option, signals: Signals, fallbacks: tuple[str, ...]) -> Candidate:
    name = option.model.name
    estimate = signals.p_success.get(name)
    low, high = (None, None) if estimate is None else (estimate.low, estimate.high)
    rejected = "" if name in fallbacks else option.reason
    return Candidate(name, option.p, low, high, option.expected, option.worst, rejected)


def _probe_version(signals: Signals) -> str | None:
    """The artifact that measured, e.g. `mmlu-minilm@3f2a9c`; the source of an estimate names its head after it."""
    for estimate in signals.p_success.values():
        return estimate.source.rpartition("/")[0] or estimate.source
    return None
