"""A small policy whose one route is changed line by line, and decisions under it."""

import msgspec

from probes.types import Estimate
from routers.decide import decide
from routers.load import parse
from routers.policy import Policy
from routers.types import Decision, Query, Signals, State

HEAD = """\
version: 1
providers:
  home:   {engine: embedded}
  remote: {base_url: https://h/v1}
models:
  local:  {provider: home, model: base, context: 1024}
  weak:   {provider: remote, model: w, context: 8000, max_output: 2000, price: {input: $1/Mtok, output: $2/Mtok}}
  strong: {provider: remote, model: s, context: 100000, price: {input: $10/Mtok, output: $20/Mtok}}
  other:  {provider: remote, model: o, logprobs: false, price: {input: $5/Mtok, cache_write: $6/Mtok, output: $5/Mtok}}
signals:
  difficulty: {probe: default, heads: {local: local, weak: weak, strong: strong}}
routes:
"""


def policy(**route: str) -> Policy:
    """A policy with one route for `auto`, of the given lines."""
    lines = {"when": "{model: auto}", "candidates": "[local, weak, strong]"} | route
    if "use" in route:
        del lines["candidates"]
    return parse(HEAD + "  - name: auto\n" + "".join(f"    {key}: {value}\n" for key, value in lines.items()))


def routes(text: str) -> Policy:
    return parse(HEAD + text)


def query(model: str = "auto", **options: object) -> Query:
    base = Query(model, "tenant", input_tokens_estimate=100, max_output_tokens=None, input_tokens_max=100)
    return msgspec.structs.replace(base, **options)


def measured(**p: float) -> Signals:
    return Signals({name: Estimate(value, f"a@1/{name}", value / 2, 1.0) for name, value in p.items()}, {}, "ok")


def run(
    policy: Policy, query: Query = query(), signals: Signals = Signals(), state: State = State(), seed: int = 0
) -> Decision:
    return decide(query, signals, policy, state, seed)


def reasons(decision: Decision) -> dict[str, str]:
    return {candidate.model: candidate.rejected for candidate in decision.candidates}


P90 = '{p_success: ">= 0.90"}'
EASY = measured(local=0.95, weak=0.97, strong=0.99)
MIDDLING = measured(local=0.5, weak=0.92, strong=0.98)
HARD = measured(local=0.1, weak=0.3, strong=0.6)
