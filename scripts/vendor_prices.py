"""Write gateway/ledger/prices.json from the genai-prices package (MIT): `python scripts/vendor_prices.py`.

Only flat prices are taken: a model whose price depends on the length of its prompt is left out, and has to be priced
in the policy by hand, because this version of the ledger would bill it wrongly.
"""

import datetime as dt
import json
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

from genai_prices.data_snapshot import get_snapshot

HOSTS = {
    "openai": "api.openai.com",
    "anthropic": "api.anthropic.com",
    "mistral": "api.mistral.ai",
    "deepseek": "api.deepseek.com",
    "groq": "api.groq.com",
    "cerebras": "api.cerebras.ai",
    "x-ai": "api.x.ai",
}
OUT = Path(__file__).parent.parent / "gateway" / "ledger" / "prices.json"


def nanousd(dollars: object) -> int | None:
    """Nano-dollars per million tokens; None for what is no flat price of that precision."""
    if not isinstance(dollars, Decimal):
        return None
    value = dollars * 10**9
    return int(value) if value == int(value) else None


def current(prices: object, today: dt.date) -> object:
    """The price in force today, of a model whose prices have changed over time."""
    if not isinstance(prices, list):
        return prices
    in_force = None
    for conditional in prices:
        constraint = conditional.constraint
        if constraint is None or (getattr(constraint, "start_date", None) and constraint.start_date <= today):
            in_force = conditional.prices
    return in_force


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
            price = current(model.prices, today)
            entry = {
                "input": nanousd(getattr(price, "input_mtok", None)),
                "cached_input": nanousd(getattr(price, "cache_read_mtok", None)),
                "cache_write": nanousd(getattr(price, "cache_write_mtok", None)),
                "output": nanousd(getattr(price, "output_mtok", None)),
                "context": model.context_window,
            }
            raw = [getattr(price, f"{kind}_mtok", None) for kind in ("input", "cache_read", "cache_write", "output")]
            if (
                entry["input"] is None
                or entry["output"] is None
                or any(r is not None and nanousd(r) is None for r in raw)
            ):
                continue
            for name in sorted({model.id, *names(model.match)}):
                models[name] = {kind: value for kind, value in entry.items() if value is not None}
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
