"""What a page shows is in its URL: the range and the filters, read from the query and written back into links."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from gateway.admission.keys import Principal
from gateway.ledger.browse import Cursor, Slice

RANGES = {"24h": 24 * 3600, "7d": 7 * 86400, "30d": 30 * 86400, "all": None}
"""The ranges on offer, in seconds."""
RANGE_NAMES = {"24h": "24 hours", "7d": "7 days", "30d": "30 days", "all": "All time"}


@dataclass(frozen=True, slots=True)
class Filters:
    range: str = "24h"
    model: str = ""
    outcome: str = ""
    cache: str = ""
    stream: str = ""
    tenant: str = ""
    before: str = ""
    """A cursor of `cursor_text`: the page starts after it."""

    @classmethod
    def read(cls, query: Mapping[str, str]) -> "Filters":
        """Unknown names and values that no row can have are left out; an unknown range is the default one."""
        known = {name: query[name].strip() for name in cls.__dataclass_fields__ if query.get(name, "\0").isprintable()}
        if known.get("range") not in RANGES:
            known.pop("range", None)
        return cls(**known)

    def slice(self, principal: Principal, *, now_s: float) -> Slice:
        """The rows meant, never another tenant's unless an admin asks."""
        length_s = RANGES[self.range]
        return Slice(
            since_ms=0 if length_s is None else int((now_s - length_s) * 1000),
            tenant=(self.tenant or None) if principal.role == "admin" else principal.tenant,
            model=self.model or None,
            outcome=self.outcome or None,
            cache=self.cache or None,
            stream={"yes": True, "no": False}.get(self.stream),
        )

    def cursor(self) -> Cursor | None:
        at_ms, _, request_id = self.before.partition(".")
        return (int(at_ms), request_id) if at_ms.isascii() and at_ms.isdecimal() and len(at_ms) < 16 else None

    def link(self, **changes: Any) -> str:
        """The query string of this page with `changes`; another page starts at its top unless they say otherwise."""
        changed = replace(self, **{"before": "", **changes})
        default = Filters()
        query = {
            name: value
            for name in self.__dataclass_fields__
            if (value := getattr(changed, name)) != getattr(default, name)
        }
        return "?" + urlencode(query)


def cursor_text(cursor: Cursor) -> str:
    return f"{cursor[0]}.{cursor[1]}"
