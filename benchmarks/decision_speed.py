"""Decisions of a policy of 20 rules x 10 candidates: the query is taken by the last of the rules, with every signal
that its objective reads."""

from collections.abc import Callable

from probes.types import Estimate
from routers.decide import decide
from routers.load import parse
from routers.policy import Policy
from routers.types import Query, Signals, State

RULES = 20
CANDIDATES = 10

NAMES = tuple(f"m{index}" for index in range(CANDIDATES))


def policy(objective: str) -> Policy:
    """Twenty routes over ten models; `objective` is the YAML of the last one's choice."""
    models = "\n".join(
        f"  {name}: {{provider: remote, model: {name}, context: 128000, max_output: 8000, "
        f"price: {{input: ${0.1 * (index + 1):.2f}/Mtok, output: ${0.4 * (index + 1):.2f}/Mtok}}}}"
        for index, name in enumerate(NAMES)
    )
    heads = ", ".join(f"{name}: {name}" for name in NAMES)
    rules = "\n".join(
        f"  - {{name: r{index}, when: {{tag: t{index}, tenant: [a{index}, b{index}]}}, use: [{NAMES[index % 10]}]}}"
        for index in range(RULES - 1)
    )
    text = f"""\
version: 1
providers:
  remote: {{base_url: https://h/v1}}
models:
{models}
signals:
  difficulty: {{probe: default, heads: {{{heads}}}}}
routes:
{rules}
  - {{name: last, when: {{model: auto}}, candidates: [{", ".join(NAMES)}], {objective}}}
"""
    return parse(text)


OBJECTIVES = {
    "plain": "objective: cheapest",
    "cheapest": 'objective: cheapest, subject_to: {p_success: ">= 0.80", cost: "<= $0.05"}',
    "utility": "objective: utility, worth: {point: $0.0001}",
    "explored": 'objective: cheapest, subject_to: {p_success: ">= 0.50"}, explore: {share: 5%}',
    "best": 'objective: best, subject_to: {p_success_gap: "<= 0.1", cost: "<= $0.05"}',
}


def signals() -> Signals:
    return Signals({name: Estimate(0.5 + 0.05 * index, "p@1/x", 0.4, 0.99) for index, name in enumerate(NAMES)})


def decision(objective: str) -> Callable[[], object]:
    """One decision by this objective, to be taken again and again."""
    made, said, state = policy(OBJECTIVES[objective]), signals(), State()
    query = Query("auto", "someone", 900, 500, frozenset({"other"}), input_tokens_max=4000)
    return lambda: decide(query, said, made, state, 7)
