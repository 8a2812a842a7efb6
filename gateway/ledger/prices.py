"""Price lists by the host that bills: the vendored one, dated and never fetched, and the operator's own above it.

The operator's file is named by LEADLINE_PRICES:

    version: 1
    prices:
      api.openai.com:
        gpt-5: {input: $1/Mtok, output: $8/Mtok}
        gpt-6:
          - {input: $2/Mtok, output: $9/Mtok}
          - {from: 2027-01-01, input: $1.50/Mtok, output: $9/Mtok}

A price in the policy itself comes before both. One that changes on a day counts for policies loaded from that day on.
"""

import datetime as dt
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from routers.errors import PolicyError, Problem
from routers.load import to_price
from routers.policy import Listing, Price, Provider, Tier
from routers.schema import PriceFile
from routers.shape import did_you_mean, validated
from routers.units import UnitError
from routers.yaml import Document, read

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\Z")


def _date(value: object) -> object:
    try:
        return dt.date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UnitError("not a date", "write a day, such as 2027-01-31") from error


class _DatedPrice(PriceFile):
    from_: Annotated[dt.date, BeforeValidator(_date)] = Field(default=dt.date.min, alias="from")
    context: Annotated[int, Field(ge=1)] | None = None


Dated = tuple[dt.date, Listing]
"""A price and the first day it holds; `date.min`: since ever."""


class PriceList:
    """What models cost, by host and name, over time."""

    def __init__(self, source: str, entries: Mapping[tuple[str, str], tuple[Dated, ...]]) -> None:
        self.source = source
        """Where it comes from, and of which day it is."""
        self._entries = entries

    def lookup(self, provider: Provider, model: str, at: dt.date | None = None) -> Listing | None:
        """What holds for `model` at this provider on a day (UTC; default today). None: not known, which is not free."""
        host = urlsplit(provider.base_url or "").hostname or ""
        day = at or dt.datetime.now(dt.UTC).date()
        found = None
        for start, listing in self._entries.get((host, model), ()):
            if start <= day:
                found = listing
        return found

    def over(self, other: "PriceList") -> "PriceList":
        """Both lists; where both know a model at a host, this one alone counts."""
        return PriceList(f"{self.source}, over {other.source}", {**other._entries, **self._entries})

    def listing(self) -> list[dict[str, Any]]:
        """Every entry for people and programs: host, model, first day, context, nano-dollars per million tokens."""
        return [
            {
                "host": host,
                "model": model,
                "from": None if start == dt.date.min else start.isoformat(),
                "context": listing.context,
                "price": asdict(listing.price),
            }
            for (host, model), dated in sorted(self._entries.items())
            for start, listing in dated
        ]


def price_list(env: Mapping[str, str] | None = None) -> PriceList:
    """The list in force: the vendored one, under the file that LEADLINE_PRICES names.

    Raises PolicyError with everything that is wrong in that file, and with its name when it cannot be read.
    """
    name = (os.environ if env is None else env).get("LEADLINE_PRICES")
    return load(Path(name)).over(vendored()) if name else vendored()


def load(path: Path) -> PriceList:
    """An operator's own list. Raises PolicyError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fix = "correct LEADLINE_PRICES, or unset it"
        raise PolicyError([Problem(str(path), 1, "", f"cannot be read ({error.strerror})", fix)]) from error
    except UnicodeDecodeError as error:
        raise PolicyError([Problem(str(path), 1, "", "not UTF-8", "save the file as UTF-8")]) from error
    document = read(text, str(path))
    entries = _read(document)
    if document.problems:
        raise PolicyError(document.problems)
    return PriceList(str(path), entries)


def lookup(provider: Provider, model: str) -> Listing | None:
    """What the vendored list knows of `model` at this provider today."""
    return vendored().lookup(provider, model)


@cache
def vendored() -> PriceList:
    """The list that ships with this version."""
    document = json.loads(resources.files("gateway.ledger").joinpath("prices.json").read_text())
    entries = {
        (host, model): tuple(_vendored_entry(entry) for entry in history)
        for host, models in document["hosts"].items()
        for model, history in models.items()
    }
    return PriceList(f"{document['source']}, {document['date']}", entries)


def _vendored_entry(entry: dict[str, Any]) -> Dated:
    start = dt.date.fromisoformat(entry["from"]) if "from" in entry else dt.date.min
    tiers = tuple(Tier(tier["above"], _vendored_price(tier)) for tier in entry.get("tiers", ()))
    return start, Listing(_vendored_price(entry, tiers), context=entry.get("context"))


def _vendored_price(entry: dict[str, int], tiers: tuple[Tier, ...] = ()) -> Price:
    return Price(
        input=entry["input"],
        cached_input=entry.get("cached_input", entry["input"]),
        cache_write=entry.get("cache_write", entry["input"]),
        output=entry["output"],
        reasoning=entry["output"],
        tiers=tiers,
    )


def _read(document: Document) -> dict[tuple[str, str], tuple[Dated, ...]]:
    data = document.data
    for key in data:
        if key not in ("version", "prices"):
            document.report((key,), "unknown key", did_you_mean(key, ["version", "prices"]), show=False)
    if data.get("version") != 1 or isinstance(data.get("version"), bool):
        document.report(("version",), "not a version that can be read here", "write `version: 1`")
    hosts = data.get("prices")
    if not isinstance(hosts, dict):
        document.report(("prices",), "not a mapping", "write `prices: {HOST: {MODEL: {input: …, output: …}}}`")
        return {}
    entries: dict[tuple[str, str], tuple[Dated, ...]] = {}
    for host, models in hosts.items():
        if not _HOST.match(host):
            fix = "write the host of the provider's base_url alone, such as api.openai.com"
            document.report(("prices", host), "not a host", fix, show=False)
        if not isinstance(models, dict):
            document.report(("prices", host), "not a mapping", "write `MODEL: {input: …, output: …}`")
            continue
        for model, value in models.items():
            path = ("prices", host, model)
            listed = isinstance(value, list)
            dated: list[Dated] = []
            for number, each in enumerate(value if isinstance(value, list) else [value]):
                here = (*path, number) if listed else path
                part = validated(document, _DatedPrice, each, here)
                if part is None:
                    continue
                if part.output is None:
                    document.report(here, "no price of output", "add `output: $…/Mtok`, of $0/Mtok for embeddings")
                if dated and part.from_ <= dated[-1][0]:
                    document.report(here, "not later than the price before it", "sort by rising `from:`, each day once")
                dated.append((part.from_, Listing(to_price(part, document, here), context=part.context)))
            entries[host, model] = tuple(dated)
    return entries
