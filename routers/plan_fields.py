"""Fields of a plan that belong to one way of it: beside another they would be read by nobody, which is a mistake."""

from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel

from routers.schema import PlanFile

_READ_BY: Final[Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]] = {
    "exit": (
        "rule",
        {
            "delta": ("probe",),
            "form": ("probe",),
            "loss": ("probe",),
            "agree": ("convergence", "redundancy"),
            "gamma": ("momentum",),
            "budget": ("budget",),
        },
    ),
    "speculate": ("method", {"threshold": ("score", "specreason", "glimprouter", "entropy")}),
    "cascade": ("hint", {"floor": ("offer",)}),
    "vote": ("stop", {"bound": ("posterior", "entropy")}),
}
"""Kind of plan to (the field that says which way, field to the ways that read it); fields not here are read by all."""


def unread(part: PlanFile) -> list[tuple[tuple[str, str], str, str]]:
    """(field, what is wrong, the fix) of each that is written and that the way beside it does not read."""
    found = []
    for kind, (key, readers) in _READ_BY.items():
        stated: BaseModel | None = getattr(part, kind)
        if stated is None:
            continue
        way = getattr(stated, key)
        for field in sorted(stated.model_fields_set & readers.keys()):
            ways = readers[field]
            if way not in ways:
                fix = f"remove it, or write `{key}: {ways[0]}`" + "".join(f" or `{other}`" for other in ways[1:])
                found.append(((kind, field), f"`{key}: {way}` does not read it", fix))
    return found
