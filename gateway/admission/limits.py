"""Which budgets one call draws on: those of its key, its team, its tenant, and of every agent run it belongs to.

A run is a path such as `run42/research/fetch`, sent as `x-leadline-scope`; each prefix of it is a run of its own, so
what a sub-agent spends counts towards all of its ancestors. A policy's `run: "*"` bounds the root of each such tree;
`x-leadline-scope-budget` bounds the last run of the path. Where the policy bounds runs, a session without a scope is a
root run too, and the agent that started the caller is a sub-run of it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.admission.keys import Principal
from gateway.upstream.types import CallHeaders
from routers.policy import Limit, Policy, Threshold
from routers.units import Window

RUN_WINDOW: Window = "total"
"""The budget that a caller gives to a run lasts as long as the run."""
MAX_PATH = 200
"""Characters of a run's path, as wide as the ledger's column."""
MAX_SEGMENTS = 8
MAX_REMEMBERED = 20_000
_SEGMENT = re.compile(r"[A-Za-z0-9._:-]{1,64}")
RUN_PATTERN = rf"^{_SEGMENT.pattern}(/{_SEGMENT.pattern}){{0,{MAX_SEGMENTS - 1}}}$"
"""`valid_run`, but for MAX_PATH, as a regular expression."""


@dataclass(frozen=True, slots=True)
class BudgetLimit:
    """One budget that applies to a call."""

    scope: str
    """`key:ID`, `team:NAME`, `tenant:NAME` or `scope:KEY_ID:PATH`, as `ledger.report.spent_since` reads it."""
    window: Window
    nanousd: int | None
    """What the operator allows; None: only what callers have given this run bounds it, if they have."""
    label: str
    """The scope as a caller knows it, e.g. `key:alice`."""
    at: tuple[Threshold, ...] = ()
    given_nanousd: int | None = None
    """What this call gives to its run."""


class BudgetLimits:
    """Resolves calls under one policy at a time; what does not depend on the call is worked out once per key."""

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._runs: tuple[Limit, ...] = ()
        self._fixed: dict[str, tuple[Principal, tuple[BudgetLimit, ...]]] = {}
        """By key, for as long as its owner stays the same object."""

    def run_path(self, policy: Policy, headers: CallHeaders) -> str | None:
        """The run that this call belongs to: what the ledger's `scope` column holds. None: none."""
        self._follow(policy)
        if headers.scope is not None or headers.session is None or not self._runs:
            return headers.scope
        session = _segment(headers.session)
        return session if headers.parent_agent is None else f"{session}/{_segment(headers.parent_agent)}"

    def budgets(self, policy: Policy, principal: Principal, headers: CallHeaders) -> Sequence[BudgetLimit]:
        """Each (scope, window) once, with the lowest limit that anyone set for it."""
        self._follow(policy)
        found = self._fixed.get(principal.key_id)
        if found is None or found[0] is not principal:
            if len(self._fixed) >= MAX_REMEMBERED:
                self._fixed.clear()
            found = self._fixed[principal.key_id] = (principal, _fixed(policy, principal))
        path = self.run_path(policy, headers)
        if path is None:
            return found[1]
        return (*found[1], *self._of_run(path, principal.key_id, headers.scope_budget_nanousd))

    def _follow(self, policy: Policy) -> None:
        if policy is not self._policy:
            self._policy = policy
            self._fixed = {}
            self._runs = tuple(limit for limit in policy.limits if limit.scope == "run" and limit.budget is not None)

    def _of_run(self, path: str, key_id: str, given: int | None) -> list[BudgetLimit]:
        segments = path.split("/")
        root = segments[0]
        found: list[BudgetLimit] = []
        for depth in range(1, len(segments) + 1):
            run = "/".join(segments[:depth])
            scope, label = f"scope:{key_id}:{run}", f"run:{run}"
            bounds = {}
            if depth == 1:
                bounds = {
                    limit.window: limit
                    for limit in _tightest([_limit(r, scope, label) for r in self._runs if r.name in ("*", root)])
                }
            own = bounds.pop(RUN_WINDOW, None) or BudgetLimit(scope, RUN_WINDOW, None, label)
            if given is not None and depth == len(segments):
                own = replace(own, given_nanousd=given)
            found += (*bounds.values(), own)
        return found


def valid_run(path: str) -> bool:
    """Whether a caller may name a run so: `/` between segments of letters, digits and `._:-`, within the bounds."""
    segments = path.split("/")
    return len(path) <= MAX_PATH and len(segments) <= MAX_SEGMENTS and all(map(_SEGMENT.fullmatch, segments))


def _fixed(policy: Policy, principal: Principal) -> tuple[BudgetLimit, ...]:
    who = {
        "key": (f"key:{principal.key_id}", f"key:{principal.key_name}"),
        "team": (f"team:{principal.team}",) * 2,
        "tenant": (f"tenant:{principal.tenant}",) * 2,
    }
    found = [
        _limit(limit, *who[limit.scope])
        for limit in policy.limits_for(key=principal.key_name, team=principal.team, tenant=principal.tenant)
        if limit.budget is not None and limit.scope in who
    ]
    if principal.budget_nanousd is not None and principal.budget_window is not None:
        scope, label = who["key"]
        found.append(BudgetLimit(scope, principal.budget_window, principal.budget_nanousd, label))
    return _tightest(found)


def _limit(limit: Limit, scope: str, label: str) -> BudgetLimit:
    assert limit.budget is not None
    return BudgetLimit(scope, limit.budget.window, limit.budget.nanousd, label, limit.at)


def _tightest(limits: Sequence[BudgetLimit]) -> tuple[BudgetLimit, ...]:
    """One for each scope and window: the lowest, with its own thresholds where it has any."""
    found: dict[tuple[str, Window], BudgetLimit] = {}
    for limit in limits:
        other = found.get((limit.scope, limit.window))
        if other is not None:
            lower, higher = (limit, other) if (limit.nanousd or 0) < (other.nanousd or 0) else (other, limit)
            limit = lower if lower.at else replace(lower, at=higher.at)
        found[limit.scope, limit.window] = limit
    return tuple(found.values())


def _segment(name: str) -> str:
    """A session's or an agent's own id as a segment: itself where it can be one, else a digest of it."""
    if _SEGMENT.fullmatch(name):
        return name
    return f"s-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
