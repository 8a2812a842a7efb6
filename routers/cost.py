"""What a call is expected to cost, and what it can cost at most: integers of nano-dollars, rounded up.

A model without a price has no cost that could be computed: None, which is not zero.
"""

from routers.policy import Model, Policy
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

_PER_TOKENS = 1_000_000


def max_output_tokens(model: Model, query: Query, input_tokens: int) -> int:
    """The longest answer the model can give to this query: the least of the caller's cap, its own, its context."""
    longest = ASSUMED_MAX_OUTPUT_TOKENS if model.max_output is None else model.max_output
    if query.max_output_tokens is not None:
        longest = min(longest, query.max_output_tokens)
    if model.context is not None:
        longest = min(longest, model.context - input_tokens // query.inputs)
    return max(longest, 0)


def least_input_tokens(query: Query) -> int:
    """No tokenizer in use makes fewer tokens of the prompt (of several texts: of their average) than this; 0: unknown.

    A token begins at a space that follows something else, so each run of spaces makes one. Two fast counts find those
    of odd length, which are all single ones: every word of prose, and few of an indented program's.
    """
    if query.text is None:
        return 0
    text = bytes(query.text)
    return (text.count(b" ") - 2 * text.count(b"  ")) // query.inputs


def expected_nanousd(model: Model, query: Query, input_tokens: int) -> int | None:
    """Of all choices of one call: the prompt at the input price and, per choice, `EXPECTED_OUTPUT_TOKENS` (or the cap,
    if lower) at the output price."""
    if model.price is None:
        return None
    prompt = input_tokens if model.context is None else min(input_tokens, model.context * query.inputs)
    price = model.price.at(prompt)
    output = min(max_output_tokens(model, query, prompt), EXPECTED_OUTPUT_TOKENS) * query.choices
    return -(-(prompt * price.input + output * price.output) // _PER_TOKENS)


def worst_nanousd(model: Model, query: Query, input_tokens: int | None = None) -> int | None:
    """Of all choices of one call: the most tokens that the prompt can have, in their dearest class, and the longest
    answer in its dearest class. Never below the expected cost. `input_tokens`: the prompt, where it is known or
    estimated; None: as the query estimates."""
    context = _context(model, query)
    most = context if query.input_tokens_max is None else min(query.input_tokens_max, context)
    known = query.input_tokens_estimate if input_tokens is None else input_tokens
    if model.context is not None:
        known = min(known, context)
    return _dearest(model, query, max(most, known))


def worst_case_nanousd(policy: Policy, decision: Decision, query: Query) -> int | None:
    """The most that this request can cost in all, whatever fails: the bound that `explain` states before it is sent.

    It counts every attempt that the policy allows, each billed at the most it can cost, as a timeout or a cut
    connection may be:

        each model that the decision may turn to (chosen, fallbacks, fallbacks by cause), 1 + `retries` times
        one hedge, at the dearest of the chosen model and its fallbacks for errors
        each model that may resume a broken stream, once, with its context filled: it reads the answer so far, too

    None: it may turn to a model whose price is not known. It holds for providers that honour `max_tokens`, and for
    an engine that turns to each model once and hedges once. More choices, more tokens, more retries or more fallbacks
    never make it smaller.
    """
    running = dict.fromkeys((decision.plan.model, *decision.fallbacks))
    hedged = tuple(running)
    for names in decision.on_cause.values():
        running.update(dict.fromkeys(names))
    total = 0
    for name in running:
        worst = worst_nanousd(policy.models[name], query)
        if worst is None:
            return None
        total += worst * (1 + policy.providers[policy.models[name].provider].retries)
    route = next((route for route in policy.routes if route.name == decision.route), None)
    if route is not None and route.hedge is not None:
        total += max(worst_nanousd(policy.models[name], query) or 0 for name in hedged)
    for name in decision.resume:
        model = policy.models[name]
        worst = _dearest(model, query, _context(model, query))
        if worst is None:
            return None
        total += worst
    return total


def _context(model: Model, query: Query) -> int:
    return (ASSUMED_CONTEXT if model.context is None else model.context) * query.inputs


def _dearest(model: Model, query: Query, input_tokens: int) -> int | None:
    if model.price is None:
        return None
    price = model.price.at(input_tokens)
    worst = input_tokens * max(price.input, price.cached_input, price.cache_write)
    worst += max_output_tokens(model, query, 0) * query.choices * max(price.output, price.reasoning)
    return -(-worst // _PER_TOKENS)
