"""Plans of the engine on the same questions, one question at a time: who is right, and what it costs."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from gateway.tune.choose import Measured, measured
from local_engine.engine import Engine
from local_engine.plan_types import ModelUse, Plan
from local_engine.reason.trajectories import Question, ask, is_right
from local_engine.types import Finished, SamplingParams
from routers.policy import FREE, Price

_PER_PRICE_UNIT = 1_000_000


def measure(
    engine: Engine,
    model: str,
    questions: Sequence[Question],
    sampling: SamplingParams,
    plans: Mapping[str, Plan | None],
    prices: Mapping[str, Price],
    progress: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """The first plan is what the others are measured against. `prices` by the engine's names of the models; where all
    are free, a question costs the processor time that it takes. `progress` hears of every answer."""
    right: dict[str, list[bool]] = {name: [] for name in plans}
    cost: dict[str, list[float]] = {name: [] for name in plans}
    tokens = dict.fromkeys(plans, 0.0)
    priced = any(price != FREE for price in prices.values())
    for turn, question in enumerate(questions):
        for name in _in_turns(list(plans), turn):  # none of them is always the first to read a question
            began = time.process_time()
            ((_, said, end),) = ask(engine, model, [question], sampling, plans[name], together=1)
            seconds = time.process_time() - began
            used = uses(model, end)
            right[name].append(end.finish_reason == "stop" and is_right(said, question.answer))
            tokens[name] += sum(use.computed_tokens for use in used)
            cost[name].append(sum(_money(use, prices[use.model]) for use in used) if priced else seconds)
            progress()
    return measured(right, tokens, cost)


def uses(model: str, end: Finished) -> list[ModelUse]:
    """What each model did for one answer."""
    if end.plan is not None and end.plan.models:
        return end.plan.models
    read, output = end.input_tokens - end.cached_tokens, end.output_tokens
    return [ModelUse(model, end.input_tokens, end.cached_tokens, output, end.reasoning_tokens, read, read + output)]


def _money(use: ModelUse, price: Price) -> float:
    paid = use.read_tokens * price.input + use.cached_tokens * price.cached_input + use.output_tokens * price.output
    return paid / _PER_PRICE_UNIT


def _in_turns(names: Sequence[str], turn: int) -> Iterator[str]:
    at = turn % len(names)
    yield from (*names[at:], *names[:at])
