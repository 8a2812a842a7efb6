"""What routers do with a table: for each query the expected correctness and cost, and how often each model answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.simulate.table import Array, Outcomes
from probes.errors import TableError
from probes.types import Estimate
from routers.cost import ESTIMATED_BYTES_PER_TOKEN, EXPECTED_OUTPUT_TOKENS, PROMPT_MARGIN, costs_nanousd
from routers.decide import decide
from routers.errors import NoCandidate
from routers.policy import Policy
from routers.types import Cascade, Plan, Query, Signals, Single, State

NOT_IN_TABLE = "not in the table"


@dataclass(frozen=True, slots=True)
class Routed:
    """One router over n queries and m models."""

    name: str
    accuracy: Array
    """[n], expected correctness; 0 where the request was refused."""
    cost: Array | None
    """[n], nano-dollars; None: not known."""
    share: Array
    """[m], of the queries, by the model that answered; sums to 1 less the refused."""

    @classmethod
    def of(cls, name: str, weights: Array, table: Outcomes, cost: Array | None) -> "Routed":
        """`weights` [n, m]: the chance that each model answers each query; `cost` [n, m]."""
        spent = None if cost is None else (weights * cost).sum(1)
        return cls(name, (weights * table.correct).sum(1), spent, weights.mean(0))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what a policy's conditions look at."""

    model: str = "auto"
    tenant: str = "default"
    tags: frozenset[str] = frozenset()
    at_ms: int = 0
    """When it is asked, for schedules: milliseconds since 1970 UTC."""


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """The policy's choices."""

    routed: Routed
    rules: Mapping[str, int]
    """How often each rule decided; what was refused under its reason."""
    refused: int


def run_policy(
    policy: Policy,
    table: Outcomes,
    cost: Array | None,
    signals: Sequence[Signals],
    *,
    caller: Caller | None = None,
) -> PolicyRun:
    """Decide every query as the gateway would with these signals, one a query, and nothing down.

    A model that the policy offers and the table does not hold is not available.
    """
    caller = caller or Caller()
    held = {name.partition("+")[0] for name in table.models}
    missing = {name: NOT_IN_TABLE for name in policy.models if name not in held}
    state = State(unavailable=missing, now_ms=caller.at_ms)
    place = {model: index for index, model in enumerate(table.models)}
    answered = np.zeros(table.correct.shape)
    accuracy, spent = np.zeros(len(table.prompts)), np.zeros(len(table.prompts))
    rules: dict[str, int] = {}
    refused = 0
    for row, prompt in enumerate(table.prompts):
        query = query_for(prompt, caller, f"row-{row}")
        try:
            decision = decide(query, signals[row], policy, state, seed=row)
        except NoCandidate as error:
            if error.kind == "unknown_model":
                raise TableError(f"--ask {caller.model}: {error}") from None
            refused += 1
            rule = f"refused: {error.kind}"
        else:
            accuracy[row], spent[row] = play(decision.plan, place, table.correct[row], cost, row, answered[row])
            rule = decision.rule
        rules[rule] = rules.get(rule, 0) + 1
    return PolicyRun(Routed("policy", accuracy, None if cost is None else spent, answered.mean(0)), rules, refused)


def from_table(p_success: Mapping[str, Array], queries: int) -> list[Signals]:
    """The signals of each query that stand in a table: P(success) [queries] of some models, NaN where not known."""
    return [
        Signals(
            p_success={
                model: Estimate(float(values[row]), source=f"table/{model}")
                for model, values in p_success.items()
                if not np.isnan(values[row])
            },
            probe="ok" if p_success else "not_asked",
        )
        for row in range(queries)
    ]


def play(
    plan: Plan, place: Mapping[str, int], correct: Array, cost: Array | None, row: int, answered: Array
) -> tuple[float, float]:
    """(expected correctness, nano-dollars) of one query; adds to `answered` [m] the chance that each model answers.

    A cascade is taken at what its accept rule keeps of right and of wrong answers on average: the table has no answers
    to look at. Of agreement it knows all but whether wrong answers are the same: they are taken to be.
    """
    if isinstance(plan, Single):
        stages: tuple[Single, ...] = (plan,)
    elif isinstance(plan, Cascade):
        stages = plan.stages
    else:
        raise TableError(f"the policy chose {plan.name}: a table of single answers does not say what that would do")
    reached, accuracy, spent = 1.0, 0.0, 0.0
    agree = plan.accept.agree if isinstance(plan, Cascade) else 0
    all_right = all_wrong = asked = 1.0
    for number, stage in enumerate(stages, 1):
        if stage.name not in place:
            raise TableError(f"the policy chose {stage.name}; give its columns: --model {stage.name}=CORRECT")
        at = place[stage.name]
        right, wrong = reached * correct[at], reached * (1.0 - correct[at])
        asked = asked if stage.beside else reached
        if cost is not None:
            spent += asked * cost[row, at]
        if isinstance(plan, Cascade) and stage is not stages[-1]:
            if agree:
                all_right, all_wrong = all_right * float(correct[at]), all_wrong * (1.0 - float(correct[at]))
                right, wrong = (all_right, all_wrong) if number == agree else (0.0, 0.0)
            else:
                right, wrong = right * (plan.accept.keeps_right or 0.0), wrong * (plan.accept.keeps_wrong or 0.0)
        accuracy += right
        answered[at] += right + wrong
        reached -= right + wrong
    return accuracy, spent


def query_for(prompt: str, caller: Caller, request_id: str = "") -> Query:
    """A lone message as the gateway would see it. `request_id`: what shares of requests go by."""
    size = len(prompt.encode("utf-8", "surrogatepass"))
    return Query(
        model=caller.model,
        tenant=caller.tenant,
        input_tokens_estimate=-(-size // ESTIMATED_BYTES_PER_TOKEN),
        input_tokens_max=size + PROMPT_MARGIN,
        max_output_tokens=None,
        tags=caller.tags,
        id=request_id,
        at_ms=caller.at_ms,
    )


def costs(policy: Policy, table: Outcomes) -> tuple[Array | None, str]:
    """([n, m] nano-dollars, where they come from): the table's own; else the policy's prices of its output tokens; else
    the policy's prices of a usual answer. None where a model has no price."""
    if table.cost is not None:
        return table.cost, "the table"
    models = [policy.models[name.partition("+")[0]] for name in table.models]
    prices = [model.price for model in models]
    if any(price is None for price in prices):
        return None, "not known: the table has no cost column, and the policy no price for some model"
    out = np.zeros(table.correct.shape)
    for row, prompt in enumerate(table.prompts):
        query = query_for(prompt, Caller())
        for column, model in enumerate(models):
            written = EXPECTED_OUTPUT_TOKENS if table.tokens is None else int(table.tokens[row, column])
            out[row, column] = costs_nanousd(model, query, query.input_tokens_estimate, written)[0] or 0
    what = f"{EXPECTED_OUTPUT_TOKENS} tokens an answer" if table.tokens is None else "the table's output tokens"
    return out, f"the policy's prices, {what}"


def at_cost(name: str, quality: Array, predicted: Array, table: Outcomes, cost: Array | None, budget: float) -> Routed:
    """A router by predicted quality [n, m] that spends what another did: argmax(quality − λ · predicted cost).

    λ is the smallest that stays within `budget` (mean cost a query), mixed with the next smaller so that the mean cost
    is the same exactly. Where even λ = 0 costs less, that. `predicted` [m]; `cost` [n, m] is what is spent, else
    `predicted`.
    """
    spent = np.broadcast_to(predicted, table.correct.shape) if cost is None else cost

    def assigned(strength: float) -> tuple[npt.NDArray[np.intp], float]:
        choice = np.argmax(quality - strength * predicted, axis=1)
        return choice, float(spent[np.arange(len(choice)), choice].mean())

    dear, dear_cost = assigned(0.0)
    weight = 1.0
    cheap, cheap_cost = dear, dear_cost
    if dear_cost > budget:
        low, high = 0.0, _first_within(lambda strength: assigned(strength)[1], budget, predicted)
        cheap, cheap_cost = assigned(high)
        for _ in range(40):
            middle = (low + high) / 2
            choice, mean = assigned(middle)
            if mean > budget:
                low, dear, dear_cost = middle, choice, mean
            else:
                high, cheap, cheap_cost = middle, choice, mean
        weight = (budget - cheap_cost) / (dear_cost - cheap_cost) if cheap_cost < budget else 0.0
    rows = np.arange(len(dear))
    weights = np.zeros(table.correct.shape)
    np.add.at(weights, (rows, dear), weight)
    np.add.at(weights, (rows, cheap), 1.0 - weight)
    return Routed.of(name, weights, table, cost)


def sweep(
    quality: Array, predicted: Array, table: Outcomes, cost: Array, points: int = 41
) -> list[tuple[float, float]]:
    """(mean nano-dollars, mean correctness) of argmax(quality − λ · predicted cost), from λ = 0 to where only cost
    counts: what the same signals can reach at other prices of a mistake."""
    spread = float(predicted.max() - predicted.min())
    unit = 1.0 / spread if spread > 0 else 1.0
    found = []
    rows = np.arange(len(quality))
    for strength in (0.0, *np.geomspace(1e-3, 1e3, points - 1)):
        choice = np.argmax(quality - strength * unit * predicted, axis=1)
        found.append((float(cost[rows, choice].mean()), float(table.correct[rows, choice].mean())))
    return sorted(set(found))


def _first_within(mean: Callable[[float], float], budget: float, predicted: Array) -> float:
    """A λ at which the mean cost is within the budget, or so high that only cost counts."""
    spread = float(predicted.max() - predicted.min())
    strength = 1.0 / spread if spread > 0 else 1.0
    for _ in range(60):
        if mean(strength) <= budget:
            break
        strength *= 2
    return strength
