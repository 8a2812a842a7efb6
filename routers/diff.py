"""What changed between two policies, in meaning: their fields, and which sample queries they decide otherwise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from itertools import islice, product
from typing import Any

from msgspec.structs import replace

from probes.types import Estimate
from routers.cost import costs_nanousd
from routers.decide import decide
from routers.errors import NoCandidate
from routers.policy import Policy, Price, Route
from routers.seeds import UNEXPLORED
from routers.types import Cascade, Plan, Query, Signals, State
from routers.units import Budget, Rate, format_duration, format_money
from routers.when import Schedule, When

MAX_SAMPLES = 2_000
_WEEKDAY_NOON, _WEEKEND_NIGHT = 1_773_835_200_000, 1_774_062_000_000
"""Wednesday 2026-03-18 12:00 and Saturday 2026-03-21 03:00, UTC."""
_DIFFICULTIES = {"easy": (0.97, 0.99), "fairly easy": (0.92, 0.96), "middling": (0.75, 0.93), "hard": (0.2, 0.9)}
"""p_success of the cheapest model and of the dearest."""
_IN_RULE = frozenset({"use", "objective", "constraints", "otherwise", "worth", "threshold"})
_DERIVED = frozenset({"name", "scope", "rule", "heads", "salt", "beyond_names", "binds_named"})


@dataclass(frozen=True, slots=True)
class Change:
    """One field that means something else."""

    field: str
    before: str | None
    """In words; None: it was not there."""
    after: str | None
    """None: it is not there any more."""

    def __str__(self) -> str:
        if self.before is None:
            return f"+ {self.field}: {self.after}"
        if self.after is None:
            return f"- {self.field}: {self.before}"
        return f"~ {self.field}: {self.before} -> {self.after}"


@dataclass(frozen=True, slots=True)
class Moved:
    """A query that the two policies decide otherwise."""

    query: str
    before: str
    """The plan, or why there was none."""
    after: str


def changes(before: Policy, after: Policy) -> list[Change]:
    """Every field whose meaning differs: layout, comments and the order of keys are no differences, prices are."""
    found: list[Change] = []
    for section in ("providers", "models"):
        found += _of_named(section, getattr(before, section), getattr(after, section))
    if before.difficulty != after.difficulty:
        found += _of_one("signals.difficulty", before.difficulty, after.difficulty)
    old = {route.name: route for route in before.routes}
    new = {route.name: route for route in after.routes}
    found += _of_named("routes", old, new)
    kept = [name for name in old if name in new]
    if kept != (order := [name for name in new if name in old]):
        found.append(Change("routes: order", ", ".join(kept), ", ".join(order)))
    gone, come = ([one for one in a.limits if one not in b.limits] for a, b in ((before, after), (after, before)))
    found += [Change(f"limits.{limit.scope} {limit.name}", _shown(limit), None) for limit in gone]
    found += [Change(f"limits.{limit.scope} {limit.name}", None, _shown(limit)) for limit in come]
    return found


def _of_named(section: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield from _of_one(f"{section}.{name}", before.get(name), after.get(name))


def _of_one(field: str, before: Any, after: Any) -> Iterator[Change]:
    if before is None or after is None:
        yield Change(field, before and _shown(before), after and _shown(after))
        return
    for part in fields(before):
        old, new = getattr(before, part.name), getattr(after, part.name)
        if isinstance(before, Route) and part.name == "plans":
            if (accepted := _accept(old)) != (accepts := _accept(new)):
                yield Change(f"{field}.accept", accepted, accepts)
        elif part.name not in _DERIVED and old != new:
            yield Change(f"{field}.{_written(part.name)}", _shown(old, part.name), _shown(new, part.name))


def _accept(plans: Mapping[str, Plan]) -> str | None:
    """The accept rule of a route's cascades in words, which their names do not tell; None: it has no cascade."""
    rule = next((plan.accept for plan in plans.values() if isinstance(plan, Cascade)), None)
    if rule is None:
        return None
    told: dict[str, float] = {str(name): weight for name, weight in rule.weights}
    told |= {"agree": rule.agree} if rule.agree else {"bias": rule.bias, "at_least": rule.at_least}
    measured = {"keeps_right": rule.keeps_right, "keeps_wrong": rule.keeps_wrong}
    told |= {name: share for name, share in measured.items() if share is not None}
    return ", ".join(f"{name} {value:.4g}" for name, value in told.items()) + f", unaccepted {rule.unaccepted}"


def _shown(value: Any, name: str = "") -> str:
    """A value of a policy in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("_ms"):
        return format_duration(value)
    if isinstance(value, int) and (name.endswith("nanousd") or name in ("point", "second")):
        return format_money(value)
    if isinstance(value, Price):
        return _price(value)
    if isinstance(value, Plan):
        return value.name
    if isinstance(value, When) and not value:
        return "every request"
    if isinstance(value, Schedule):
        return str(value)
    if isinstance(value, Budget):
        return f"{format_money(value.nanousd)}/{value.window}"
    if isinstance(value, Rate):
        return f"{value.count} per {format_duration(value.per_s * 1000)}"
    if is_dataclass(value):
        told = [(part.name, getattr(value, part.name)) for part in fields(value) if _tells(value, part)]
        return ", ".join(f"{_written(n)} {_shown(v, n)}" for n, v in told) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(part)}" for key, part in value.items()) or "none"
    if isinstance(value, frozenset):
        return ", ".join(sorted(map(str, value))) or "any"
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or "none"
    return str(value)


def _tells(value: Any, part: Field[Any]) -> bool:
    """Whether a field says anything beside the others and its default."""
    inside = getattr(value, part.name)
    if part.name in _DERIVED - {"rule"} or (isinstance(value, Route) and part.name in _IN_RULE):
        return False
    return inside is not None and inside != part.default and inside not in ("", (), {}, frozenset())


def _written(name: str) -> str:
    return name.removesuffix("_ms").removesuffix("_nanousd").removesuffix("_env")


def _price(price: Price) -> str:
    names = ("input", "cached_input", "cache_write", "output", "reasoning")
    classes = ", ".join(f"{name} {format_money(getattr(price, name))}/Mtok" for name in names)
    return "; ".join([classes, *(f"above {tier.above} tokens {_price(tier.price)}" for tier in price.tiers)])


def sample_changes(before: Policy, after: Policy) -> tuple[list[Moved], int]:
    """(the sample queries that are decided otherwise, how many were asked): one for each name that callers may ask
    for, tag, tenant, key and team that the policies speak of, short and long, easy, hard and not sounded."""
    found, count = [], 0
    for words, query, signals in islice(_samples(before, after), MAX_SAMPLES):
        count += 1
        state = State(now_ms=query.at_ms)
        old, new = (outcome(policy, query, signals, state) for policy in (before, after))
        if old != new:
            found.append(Moved(words, old, new))
    return found, count


def outcome(policy: Policy, query: Query, signals: Signals, state: State) -> str:
    """The plan that this policy holds for best, or why there is none."""
    try:
        return decide(query, signals, policy, state, UNEXPLORED).plan.name
    except NoCandidate as error:
        return f"refused ({error.kind})"


def _samples(before: Policy, after: Policy) -> Iterator[tuple[str, Query, Signals]]:
    whens = [route.when for policy in (before, after) for route in policy.routes]
    names = dict.fromkeys((*after.aliases, *before.aliases, *after.models, *before.models))
    moments = [_WEEKDAY_NOON, _WEEKEND_NIGHT] if any(when.schedule for when in whens) else [_WEEKDAY_NOON]
    ranked = _by_cost(before, after)
    cases = {"": Signals()} | {words: _p(ranked, *ends) for words, ends in _DIFFICULTIES.items()}
    for name, (words, caller), tokens, at_ms, case in product(names, _callers(whens), (100, 20_000), moments, cases):
        told = [name, words, "long" if tokens > 1000 else "", case, "at the weekend" if at_ms != _WEEKDAY_NOON else ""]
        query = replace(caller, model=name, input_tokens_estimate=tokens, at_ms=at_ms)
        yield ", ".join(filter(None, told)), query, cases[case]


def _callers(whens: Sequence[When]) -> list[tuple[str, Query]]:
    """Somebody of whom no route speaks, and for each name that one does, its bearer."""
    nobody = Query("", "", 0, None, id="sample")
    found = {"": nobody}
    for when in (*whens, *(when.none_of for when in whens if when.none_of is not None)):
        found |= {f"tag {tag}": replace(nobody, tags=frozenset({tag})) for tag in sorted(when.tags)}
        found |= {f"tenant {tenant}": replace(nobody, tenant=tenant) for tenant in sorted(when.tenants)}
        found |= {f"key {key}": replace(nobody, key=key) for key in sorted(when.keys)}
        found |= {f"team {team}": replace(nobody, team=team) for team in sorted(when.teams)}
    return [*found.items()]


def _by_cost(*policies: Policy) -> list[str]:
    """The models of all of them, cheapest first; what a caller would expect to be the weakest first."""
    query = Query("", "", 100, None)
    costs = {name: costs_nanousd(model, query, 100)[0] for policy in policies for name, model in policy.models.items()}
    return sorted(costs, key=lambda name: (costs[name] is None, costs[name] or 0))


def _p(models: Sequence[str], first: float, last: float) -> Signals:
    """A p_success for each model, rising in equal steps."""
    step = (last - first) / max(len(models) - 1, 1)
    return Signals(p_success={name: Estimate(first + at * step, "sample") for at, name in enumerate(models)})
