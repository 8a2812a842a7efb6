"""What a call is expected to cost, and what it can cost at most: integers of nano-dollars, rounded up.

A model without a price has no cost that could be computed: None, which is not zero.
"""

from routers.policy import EnginePlan, Model, Policy
from routers.types import Decision, Query

EXPECTED_OUTPUT_TOKENS = 400
"""Assumed length of an answer, where the caller's cap and the model's are longer."""
ASSUMED_CONTEXT = 1 << 20
"""Assumed bound of a prompt where nothing else bounds it."""
ASSUMED_MAX_OUTPUT_TOKENS = 128_000
"""Assumed bound of an answer where neither the caller, the policy nor the price list states one."""
PROMPT_MARGIN = 1024
"""Prompt tokens that a provider may add by itself: chat templates, tool preambles."""
ESTIMATED_BYTES_PER_TOKEN = 4
"""What `Query.input_tokens_estimate` counts with."""

MOST_STEPS = 128
"""Turns that two models take in one thought that they share over calls; then it is closed."""
MOST_STEP_TOKENS = 512
"""Of one turn."""
MOST_LOOKS = 64
"""Answers that are forced to see whether a thought over calls may end."""

_PER_TOKENS = 1_000_000


def least_nanousd(model: Model, input_tokens: int = 1) -> int | None:
    """What no call with a prompt of so many tokens costs less than: its prompt from the cache, one token of answer."""
    if model.price is None:
        return None
    price = model.price.at(input_tokens)
    prompt = input_tokens * min(price.input, price.cached_input)
    return -(-(prompt + price.output) // _PER_TOKENS)


def least_input_tokens(query: Query) -> int:
    """No tokenizer in use makes fewer tokens of the prompt (of several texts: of their average) than this; 0: unknown.

    A token begins at a space that follows something else, so each run of spaces makes one. Two fast counts find those
    of odd length, which are all single ones: every word of prose, and few of an indented program's.
    """
    if query.text is None:
        return 0
    text = bytes(query.text)
    return (text.count(b" ") - 2 * text.count(b"  ")) // query.inputs


def costs_nanousd(
    model: Model,
    query: Query,
    input_tokens: int,
    output_tokens: int = EXPECTED_OUTPUT_TOKENS,
    cached_tokens: int = 0,
) -> tuple[int | None, int | None]:
    """Of all choices of one call, the expected and the worst cost; None, both of them: the price is not known.

    Expected: the prompt at the input price, but `cached_tokens` of it at the price of cached input, and per choice
    `output_tokens` (or the longest answer, if that is shorter) at the output price. Worst: the most tokens that the
    prompt can have, in their dearest class, and the longest answer in its dearest class; never below the expected cost.
    """
    price = model.price
    if price is None:
        return None, None
    inputs, asked, most = query.inputs, query.max_output_tokens, query.input_tokens_max
    longest = ASSUMED_MAX_OUTPUT_TOKENS if model.max_output is None else model.max_output
    if asked is not None and asked < longest:
        longest = asked
    if model.context is None:
        prompt, answer = input_tokens, longest
        if most is None or most > ASSUMED_CONTEXT * inputs:
            most = ASSUMED_CONTEXT * inputs
    else:
        whole = model.context * inputs
        prompt = input_tokens if input_tokens < whole else whole
        answer = model.context - prompt // inputs
        if longest < answer:
            answer = longest
        elif longest > model.context:
            longest = model.context
        if most is None or most > whole:
            most = whole
    if prompt > most:
        most = prompt
    at = price.at(prompt) if price.tiers else price
    cost = prompt * at.input + (answer if answer < output_tokens else output_tokens) * query.choices * at.output
    if cached_tokens:
        cost -= min(cached_tokens, prompt) * (at.input - at.cached_input)
    at = price.at(most) if price.tiers else price
    dearest_in = at.cached_input if at.cached_input > at.input else at.input
    if at.cache_write > dearest_in:
        dearest_in = at.cache_write
    dearest_out = at.reasoning if at.reasoning > at.output else at.output
    return -(-cost // _PER_TOKENS), -(-(most * dearest_in + longest * query.choices * dearest_out) // _PER_TOKENS)


def worst_nanousd(model: Model, query: Query, input_tokens: int | None = None) -> int | None:
    """The worst of `costs_nanousd`. `input_tokens`: the prompt, where it is known or estimated; None: as the query
    estimates."""
    return costs_nanousd(model, query, query.input_tokens_estimate if input_tokens is None else input_tokens)[1]


def _worst_with_plans(policy: Policy, model: Model, query: Query) -> int | None:
    """The worst of one attempt, by whichever plan it runs. Of the local engine: it may write each token as often as it
    has samples, else twice, reads again what it throws away, and its smaller model may do as much as it does. Over
    calls: each of them may read all that there is to read."""
    alone = worst_nanousd(model, query)
    if alone is None or not model.plans or query.choices > 1:
        return alone
    worst = alone
    for plan in dict(model.plans).values():
        times = max(2, int(str(plan.stated.get("most", 2)))) if plan.kind == "vote" else 2
        longest = ASSUMED_MAX_OUTPUT_TOKENS if model.max_output is None else model.max_output
        if query.max_output_tokens is not None:
            longest = min(longest, query.max_output_tokens)
        if model.context is not None:
            longest = min(longest, model.context)
        whole = (model.context or ASSUMED_CONTEXT) * query.inputs
        prompt = whole if query.input_tokens_max is None else min(query.input_tokens_max, whole)
        if over_calls(policy, model, plan):
            over = _worst_over_calls(policy, model, plan, prompt, longest)
            if over is None:
                return None
            worst = max(worst, -(-over // _PER_TOKENS))
            continue
        found = 0
        for name in (model.name, *([plan.draft] if plan.draft is not None else [])):
            price = policy.models[name].price
            if price is None:
                return None
            at = price.at(prompt + times * longest)
            dearest_in = max(at.input, at.cached_input, at.cache_write)
            found += (prompt + times * longest) * dearest_in + times * longest * max(at.output, at.reasoning)
        worst = max(worst, -(-found // _PER_TOKENS))
    return worst


def over_calls(policy: Policy, model: Model, plan: EnginePlan) -> bool:
    """Whether the gateway runs this plan of the model over calls, as no one engine has all of it."""
    at_home = policy.providers[model.provider].engine is not None
    return not at_home or (plan.draft is not None and policy.models[plan.draft].provider != model.provider)


def _worst_over_calls(policy: Policy, model: Model, plan: EnginePlan, prompt: int, longest: int) -> int | None:
    """In nano-dollars times `_PER_TOKENS`; None: one of the models has no price. Of a draft a turn is a look and a
    step, of the model a rating and a step; a thought that is left is written once, and answers are tried beside it."""
    turn = min(MOST_STEP_TOKENS, longest)
    calls, written = 2 * MOST_STEPS + 2, 2 * longest + MOST_STEPS * (turn + 1)
    if plan.draft is None:
        calls, written = MOST_LOOKS + 2, 2 * longest + MOST_LOOKS * turn
    total = 0
    for name in (model.name, *([plan.draft] if plan.draft is not None else [])):
        one = policy.models[name]
        if one.price is None:
            return None
        at = one.price.at(prompt + longest)
        dearest_in = max(at.input, at.cached_input, at.cache_write)
        once = calls * (prompt + longest) * dearest_in + written * max(at.output, at.reasoning)
        total += once * (1 if name == model.name else 1 + policy.providers[one.provider].retries)
    return total


def worst_case_nanousd(policy: Policy, decision: Decision, query: Query) -> int | None:
    """The most that this request can cost in all, whatever fails: the bound that `explain` states before it is sent.

    It counts every attempt that the policy allows, each billed at the most it can cost, as a timeout or a cut
    connection may be:

        each model that the decision may turn to (chosen, each stage of a cascade, fallbacks, fallbacks by cause),
        1 + `retries` times
        one hedge, at the dearest of the chosen model and its fallbacks for errors
        each model that may resume a broken stream, once, with its context filled: it reads the answer so far, too

    None: it may turn to a model whose price is not known. It holds for providers that honour `max_tokens`, and for
    an engine that turns to each model once and hedges once. More choices, more tokens, more retries or more fallbacks
    never make it smaller.
    """
    plan = decision.plan
    chosen = [stage.model for stage in plan.stages] if plan.kind == "cascade" else [plan.model]
    others = dict.fromkeys(decision.fallbacks)
    hedged = (*chosen, *others)
    for names in decision.on_cause.values():
        others.update(dict.fromkeys(names))
    total = 0
    for name in (*chosen, *(name for name in others if name not in chosen)):  # stages may be one model's, by effort
        worst = _worst_with_plans(policy, policy.models[name], query)
        if worst is None:
            return None
        total += worst * (1 + policy.providers[policy.models[name].provider].retries)
    route = next((route for route in policy.routes if route.name == decision.route), None)
    if route is not None and route.hedge is not None:
        total += max(_worst_with_plans(policy, policy.models[name], query) or 0 for name in hedged)
    for name in decision.resume:
        model = policy.models[name]
        context = (ASSUMED_CONTEXT if model.context is None else model.context) * query.inputs
        worst = worst_nanousd(model, query, context)
        if worst is None:
            return None
        total += worst
    return total
