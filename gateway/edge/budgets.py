"""Budgets as they stand now, for the admin API and for a key's own view."""

import datetime as dt
import time
from collections.abc import Iterable
from typing import Any

from gateway.admission.budgets import Budget
from gateway.admission.keys import Principal
from gateway.admission.limits import BudgetLimits
from gateway.lifecycle import Lifecycle
from gateway.upstream.types import CallHeaders
from routers.units import Window

_LENGTH_MS: dict[Window, int] = {"hour": 3_600_000, "day": 86_400_000, "week": 7 * 86_400_000}


async def budgets_of(lifecycle: Lifecycle, principals: Iterable[Principal], run: str | None = None) -> list[Budget]:
    """The budgets that bound these keys, each once, loaded from the ledger where they were not in use.

    With `run`, those of that run and of the runs above it, too.
    """
    limits, now_ms = BudgetLimits(), time.time_ns() // 1_000_000
    found: dict[tuple[str, Window], Budget] = {}
    for principal in principals:
        bounds = limits.budgets(lifecycle.world.policy, principal, CallHeaders(token="", scope=run))
        account = await lifecycle.budgets.find(bounds, now_ms, "")
        found |= {(budget.scope, budget.window): budget for budget in account.budgets}
    return list(found.values())


def shown(budget: Budget) -> dict[str, Any]:
    """Integers of nano-dollars; `resets_at_ms` is null where the window has no end."""
    return {
        "scope": budget.scope,
        "label": budget.label or budget.scope,
        "window": budget.window,
        "limit_nanousd": budget.limit_nanousd,
        "spent_nanousd": budget.spent_nanousd,
        "reserved_nanousd": budget.reserved_nanousd,
        "remaining_nanousd": budget.remaining_nanousd,
        "resets_at_ms": window_end_ms(budget.window, budget.started_ms),
    }


def window_end_ms(window: Window, start_ms: int) -> int | None:
    """The first instant after the calendar window (UTC) that begins at `start_ms`."""
    if window == "total":
        return None
    if window != "month":
        return start_ms + _LENGTH_MS[window]
    start = dt.datetime.fromtimestamp(start_ms / 1000, dt.UTC)
    after = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    return int(after.timestamp() * 1000)
