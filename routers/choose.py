"""The choice among candidates that can run: bounds first, then the objective, and in words why each other one lost.

    cheapest    the least expected cost, leaving the conversation's model included
    best        the highest p_success
    utility     the most of: what p_success is worth, less the cost, less what the time is worth
    fastest     the least expected time to the end of the answer
    threshold   of two, the second where its p_success is higher than the first's by more than the threshold

A p_success or a price that is not known never wins where another one is known, and meets no bound. With time it is the
other way around, as a target that nothing is sent to would never be measured: what is not known meets the bound, and is
the fastest; in `utility` it is taken as the mean of the known ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

from routers.errors import NoCandidate
from routers.options import Option
from routers.policy import Objective, Otherwise, Route
from routers.types import Query
from routers.units import format_duration, format_money


def choose(
    route: Route, usable: Sequence[Option], query: Query, cheaper: str | None = None
) -> tuple[Option, str, bool, list[Option]]:
    """(the choice, the sentence that made it, whether it wanted a p_success that nobody knows, what it chose from).

    The last is empty where nothing met the bounds, or there was nothing to compare. `cheaper`: why the cheapest is
    wanted, whatever the route says; None: it is not. Raises NoCandidate where the route refuses.
    """
    if cheaper is not None:
        return min(usable, key=by_cost), f"cheapest, as {cheaper}", False, []
    if route.use:
        return usable[0], route.rule, False, []
    hinted = ""
    if query.hints is not None and query.hints.min_p_success is not None:
        hinted = f"p_success >= {query.hints.min_p_success:g}, asked by the caller"
    judge(route, usable, query)
    if route.objective == "utility":
        weigh(route, usable)
    satisfying = [option for option in usable if not option.violation]
    if satisfying:
        chosen, guessed = _first_by(route.objective, satisfying, usable, route)
        return chosen, f"{route.rule} and {hinted}" if hinted else route.rule, guessed, satisfying
    missed = "no candidate meets " + " and ".join(filter(None, (str(route.constraints), hinted)))
    if route.otherwise == "refuse":
        raise NoCandidate("constraints", missed, tuple((option.name, option.violation) for option in usable))
    all_known = all(option.p is not None for option in usable)
    cap = route.constraints.cost_nanousd
    within = [o for o in usable if cap is None or (o.expected is not None and o.expected <= cap)]
    if not within:
        asks = route.constraints.ask_p_success or bool(hinted)
        return min(usable, key=by_cost), f"{missed}; cheapest", asks and not all_known, []
    chosen, _ = _first_by(route.otherwise, within, usable, route)
    by = "highest p_success" if all_known else "last listed, as p_success is not known"
    words = f"{missed}; otherwise {route.otherwise}" + (f" ({by})" if route.otherwise == "best" else "")
    if cap is not None:
        words += f" with cost <= {format_money(cap)}"
    return chosen, words, not all_known, []


def judge(route: Route, usable: Sequence[Option], query: Query) -> None:
    """Write into each option the first bound that it does not meet."""
    bounds, hints = route.constraints, query.hints
    least, gap, cap = bounds.p_success, bounds.p_success_gap, bounds.cost_nanousd
    if hints is not None and hints.min_p_success is not None:
        least = hints.min_p_success if least is None else max(least, hints.min_p_success)
    best: float | None = None
    if gap is not None:
        known = [option.p for option in usable if option.p is not None]
        best = max(known) if len(known) == len(usable) else None
    timed = bounds.ttft_p95_ms is not None or bounds.latency_ms is not None
    for option in usable:
        p, expected = option.p, option.expected
        violation = ""
        if least is not None and (p is None or p < least):
            violation = f"p_success not known, {least:g} asked" if p is None else f"p_success {p:.3g} below {least:g}"
        elif gap is not None and (best is None or p is None):
            violation = f"p_success_gap not known, at most {gap:g} asked"
        elif gap is not None and best is not None and p is not None and best - p > gap:
            violation = f"p_success {p:.3g} is {best - p:.3g} below the best, {gap:g} allowed"
        elif cap is not None and (expected is None or expected > cap):
            costs = (
                "its price is not known, at most"
                if expected is None
                else f"expected cost {format_money(expected)} above"
            )
            violation = f"{costs} {format_money(cap)}" + (" asked" if expected is None else "")
        elif timed:
            violation = _too_slow(route, option)
        option.violation = violation


def _too_slow(route: Route, option: Option) -> str:
    bounds = route.constraints
    for asked, expected, what in (
        (bounds.ttft_p95_ms, option.ttft_p95_ms, "time to the first token"),
        (bounds.latency_ms, option.expected_ms, "time to the end"),
    ):
        if asked is not None and expected is not None and expected > asked:
            return f"{what} {format_duration(round(expected))} above {format_duration(asked)}"
    return ""


def weigh(route: Route, options: Sequence[Option]) -> None:
    """Write the utility into each option, in nano-dollars; None: its p_success or its price is not known."""
    worth = route.worth
    assert worth is not None
    times = [option.expected_ms for option in options if option.expected_ms is not None] if worth.second else []
    mean = sum(times) / len(times) if times else 0.0
    for option in options:
        p = option.p
        if p is None or option.expected is None:
            option.utility = None
            continue
        ms = mean if option.expected_ms is None else option.expected_ms
        option.utility = round(100 * p * worth.point - option.expected - option.switch - ms * worth.second / 1000)


def by_cost(option: Option) -> tuple[bool, int, int]:
    """Sorts the cheapest first; a cost that is not known comes last, then the order as listed decides."""
    expected = option.expected
    return expected is None, 0 if expected is None else expected + option.switch, option.index


def _by_p(option: Option) -> tuple[Any, ...]:
    return -(option.p or 0.0), by_cost(option)


def _by_utility(option: Option) -> tuple[Any, ...]:
    return option.utility is None, -(option.utility or 0), by_cost(option)


def _by_time(option: Option) -> tuple[Any, ...]:
    return option.expected_ms is not None, option.expected_ms or 0.0, by_cost(option)


_KEYS: dict[Objective, Callable[[Option], tuple[Any, ...]]] = {
    "cheapest": by_cost,
    "best": _by_p,
    "utility": _by_utility,
    "fastest": _by_time,
}


def _first_by(
    objective: Objective | Otherwise, options: Sequence[Option], usable: Sequence[Option], route: Route
) -> tuple[Option, bool]:
    """(the first of the options by the objective, whether it had to trust their order as p_success is not known)."""
    if objective == "threshold":
        return _by_threshold(route, options)
    if objective == "best" and any(option.p is None for option in usable):
        return options[-1], True
    if objective == "utility" and all(option.utility is None for option in options):
        return options[-1], True
    assert objective != "refuse"
    return min(options, key=_KEYS[objective]), False


def _by_threshold(route: Route, options: Sequence[Option]) -> tuple[Option, bool]:
    weak, strong = options[0], options[-1]
    assert route.threshold is not None
    if weak is strong:
        return weak, False
    if weak.p is None or strong.p is None:
        return strong, True
    return (strong if strong.p - weak.p > route.threshold else weak), False


def why_not(route: Route, option: Option, chosen: Option, cheaper: str | None) -> str:
    """Why an option that can run lost to the chosen one, in words."""
    if cheaper is not None:
        return _dearer(option, chosen)
    if route.use:
        return f"listed after {chosen.name}"
    return option.violation or _comparison(route, option, chosen)


def _comparison(route: Route, option: Option, chosen: Option) -> str:
    name, objective = chosen.name, route.objective
    if objective == "best":
        if option.p is None or chosen.p is None:
            return f"listed before {name}, and p_success is not known"
        if option.p < chosen.p:
            return f"p_success {option.p:.3g} below {chosen.p:.3g} of {name}"
    elif objective == "threshold":
        if option.p is None or chosen.p is None:
            return f"{name} is the stronger, and p_success is not known"
        if option.index > chosen.index:
            return f"better than {name} by {option.p - chosen.p:.3g}, more than {route.threshold:g} asked"
        return f"p_success {option.p:.3g} is {chosen.p - option.p:.3g} below {name}, {route.threshold:g} allowed"
    elif objective == "utility":
        if option.utility is None:
            unknown = "p_success" if option.p is None else "price"
            return f"its {unknown} is not known, and so not what it is worth"
        if chosen.utility is not None and option.utility < chosen.utility:
            return f"worth {format_money(option.utility)}, {name} {format_money(chosen.utility)}"
    elif objective == "fastest" and option.expected_ms is not None:
        mine = f"takes {format_duration(round(option.expected_ms))}"
        if chosen.expected_ms is None:
            return f"{mine}, and {name} is yet to be measured"
        if option.expected_ms > chosen.expected_ms:
            return f"{mine}, {name} {format_duration(round(chosen.expected_ms))}"
    return _dearer(option, chosen)


def _dearer(option: Option, chosen: Option) -> str:
    name, mine, its = chosen.name, option.expected, chosen.expected
    if its is None:
        return f"as good as {name}, listed later"
    its += chosen.switch
    if mine is None:
        return f"its price is not known, {name} costs {format_money(its)}"
    mine += option.switch
    if mine > its:
        leaving = f" with {format_money(option.switch)} to leave the conversation's model" if option.switch else ""
        return f"costs {format_money(mine)}{leaving}, {name} {format_money(its)}"
    return f"as good as {name}, listed later"
