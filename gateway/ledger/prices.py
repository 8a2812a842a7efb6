"""The vendored price list, by the host that bills. Dated; never fetched; a policy's own price overrides it."""

import json
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from routers.policy import Listing, Price, Provider


def lookup(provider: Provider, model: str) -> Listing | None:
    """What the list knows of `model` at this provider; None when it does not know it (which is not: free)."""
    host = urlsplit(provider.base_url or "").hostname or ""
    entry = _document()["hosts"].get(host, {}).get(model)
    if entry is None:
        return None
    price = Price(
        input=entry["input"],
        cached_input=entry.get("cached_input", entry["input"]),
        cache_write=entry.get("cache_write", entry["input"]),
        output=entry["output"],
        reasoning=entry["output"],
    )
    return Listing(price, context=entry.get("context"))


def source() -> str:
    """Where the list comes from and of which day it is."""
    document = _document()
    return f"{document['source']}, {document['date']}"


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(resources.files("gateway.ledger").joinpath("prices.json").read_text())
    return document
