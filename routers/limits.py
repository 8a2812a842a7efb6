"""The limits of a policy file: whom each one is for, what it limits, and that no two say the same."""

import re
from itertools import pairwise
from typing import get_args

from routers.policy import Degrade, Limit, LimitScope, Threshold
from routers.schema import LimitFile
from routers.shape import validated
from routers.yaml import Document, Path, concealed

_NAME = re.compile(r"\*\Z|[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}\Z")
_SCOPES: tuple[LimitScope, ...] = get_args(LimitScope)
_EFFECTS: tuple[Degrade, ...] = get_args(Degrade)


def read_limits(document: Document, items: list[object]) -> list[Limit]:
    """The limits, with every problem noted in the document."""
    limits: list[Limit] = []
    seen: dict[tuple[str, str, str, str], int] = {}
    for index, value in enumerate(items):
        path: Path = ("limits", index)
        part = validated(document, LimitFile, value, path)
        if part is None:
            continue
        given = [scope for scope in _SCOPES if getattr(part, scope) is not None]
        if len(given) != 1:
            message = "both " + " and ".join(given) if given else "neither key nor team nor tenant nor run"
            document.report(path, message, "write one of them, with a name or `*`")
            continue
        scope = given[0]
        name = str(getattr(part, scope))
        if not _NAME.match(name) or concealed(name) != name:
            whose = "the name given to the key when it was made" if scope == "key" else f"the name of the {scope}"
            document.report((*path, scope), "not a name", f"write {whose}, or `*`", show=False)
        kinds: dict[str, str] = {}
        if part.budget is not None:
            kinds["budget"] = part.budget.window
        if part.rate is not None:
            kinds["rate"] = f"{part.rate.per_s}s"
        if part.tokens is not None:
            kinds["tokens"] = f"{part.tokens.per_s}s"
        if part.concurrency is not None:
            kinds["concurrency"] = ""
        if not kinds:
            fix = "add `budget: $50/month`, `rate: 600/min`, `tokens: 100000/min` or `concurrency: 10`"
            document.report(path, "limits nothing", fix)
        for kind, span in kinds.items():
            first = seen.setdefault((scope, name, kind, span), index)
            if first != index:
                document.report((*path, kind), f"the same limit as in limits[{first}]", "keep one of the two")
        thresholds = _thresholds(document, part, path)
        limits.append(Limit(scope, name, part.budget, part.rate, part.tokens, part.concurrency, thresholds))
    return limits


def _thresholds(document: Document, part: LimitFile, path: Path) -> tuple[Threshold, ...]:
    """By rising percent, where each one goes further than the one before."""
    if part.at is None:
        return ()
    if part.budget is None:
        document.report((*path, "at"), "a share of no budget", "add `budget: $50/month`, or remove it")
    thresholds = tuple(Threshold(percent, part.at[percent]) for percent in sorted(part.at))
    for threshold in thresholds:
        if threshold.percent == 100 and threshold.action != "local":
            message = "at 100% nothing is left for what costs money, however cheap"
            fix = f"write a lower percentage, such as `80%: {threshold.action}`, or `100%: local`"
            document.report((*path, "at", "100%"), message, fix)
    for before, after in pairwise(thresholds):
        if _EFFECTS.index(after.action) <= _EFFECTS.index(before.action):
            message = f"changes nothing: `{before.action}` holds from {before.percent}% on"
            fix = "remove it, or let a higher percentage go further: `cheaper` first, then `local`"
            document.report((*path, "at", f"{after.percent}%"), message, fix)
    return thresholds
