"""Write gateway/ledger/prices.json from the genai-prices package (MIT): `python scripts/vendor_prices.py`.

With their history (the day each price began) and their tiers (dearer for long prompts). Discounts by the time of day
are left out, so that the standard price is billed; so is a model whose prices the ledger cannot hold: finer than a
nano-dollar per million tokens, or cheaper for longer prompts.
"""

import datetime as dt
import json
from decimal import Decimal
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import StartDateConstraint, TieredPrices

HOSTS = {
    "openai": "api.openai.com",
    "anthropic": "api.anthropic.com",
    "mistral": "api.mistral.ai",
    "deepseek": "api.deepseek.com",
    "groq": "api.groq.com",
    "cerebras": "api.cerebras.ai",
    "x-ai": "api.x.ai",
    "google": "generativelanguage.googleapis.com",
}
OUT = Path(__file__).parent.parent / "gateway" / "ledger" / "prices.json"


def nanousd(dollars: object) -> int | None:
    """Nano-dollars per million tokens; None for what is no flat price of that precision."""
    if not isinstance(dollars, Decimal):
        return None
    value = dollars * 10**9
    return int(value) if value == int(value) else None


CLASSES = {
    "input": "input_mtok",
    "cached_input": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "output": "output_mtok",
}


def classes(price: object, above: int | None) -> dict[str, int] | None:
    """The price of each class in the tier that starts at `above` (None: below all tiers); None: not to be held."""
    found = {}
    for name, attribute in CLASSES.items():
        value = getattr(price, attribute, None)
        if value is None:
            continue
        if isinstance(value, TieredPrices):
            reached = [tier.price for tier in value.tiers if above is not None and tier.start <= above]
            value = reached[-1] if reached else value.base
        amount = nanousd(value)
        if amount is None:
            return None
        found[name] = amount
    return found if "input" in found and "output" in found else None


def entry(price: object) -> dict[str, object] | None:
    """One price with its tiers, as the ledger reads it; None for one that it cannot hold."""
    values = [getattr(price, attribute, None) for attribute in CLASSES.values()]
    starts = sorted({tier.start for value in values if isinstance(value, TieredPrices) for tier in value.tiers})
    levels = [classes(price, above) for above in (None, *starts)]
    if any(level is None for level in levels):
        return None
    for lower, upper in pairwise(levels):
        if any(upper[name] < lower[name] for name in upper):
            return None
    tiers = [{"above": above, **level} for above, level in zip(starts, levels[1:], strict=True)]
    return {**levels[0], **({"tiers": tiers} if tiers else {})}


def history(prices: object) -> list[tuple[dt.date | None, object]]:
    """The standard prices of a model, oldest first, each with the day it began."""
    if not isinstance(prices, list):
        return [(None, prices)]
    dated = {}
    for conditional in prices:
        constraint = conditional.constraint
        if constraint is None:
            dated[dt.date.min] = conditional.prices
        elif isinstance(constraint, StartDateConstraint):
            dated[constraint.start_date] = conditional.prices
    return [(None if day == dt.date.min else day, dated[day]) for day in sorted(dated)]


def names(match: object) -> list[str]:
    if hasattr(match, "or_"):
        return [name for clause in match.or_ for name in names(clause)]
    return [match.equals] if hasattr(match, "equals") else []


def main() -> None:
    today = dt.datetime.now(dt.UTC).date()
    hosts = {}
    for provider in get_snapshot().providers:
        if provider.id not in HOSTS:
            continue
        models = {}
        for model in provider.models:
            entries = [(day, entry(price)) for day, price in history(model.prices)]
            if not entries or any(found is None for _, found in entries):
                continue
            context = {"context": model.context_window} if model.context_window is not None else {}
            for name in sorted({model.id, *names(model.match)}):
                models[name] = [
                    {**({"from": day.isoformat()} if day else {}), **(found or {}), **context} for day, found in entries
                ]
        hosts[HOSTS[provider.id]] = dict(sorted(models.items()))
    document = {
        "source": f"genai-prices {version('genai-prices')} (MIT)",
        "date": today.isoformat(),
        "unit": "nano-dollars per million tokens",
        "hosts": hosts,
    }
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{OUT.name}: {sum(map(len, hosts.values()))} names at {len(hosts)} hosts")


if __name__ == "__main__":
    main()
