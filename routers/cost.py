"""What a call is expected to cost, and what it can cost at most: integers of nano-dollars, rounded up."""

from routers.policy import Model
from routers.types import Query

EXPECTED_OUTPUT_TOKENS = 400
"""Assumed length of an answer, where the caller's cap and the model's are longer."""
ASSUMED_CONTEXT = 1 << 20
"""Assumed bound of a prompt where nothing else bounds it."""
ASSUMED_MAX_OUTPUT_TOKENS = 128_000
"""Assumed bound of an answer where neither the caller, the policy nor the price list states one."""

_PER_TOKENS = 1_000_000


def max_output_tokens(model: Model, query: Query, input_tokens: int) -> int:
    """The longest answer the model can give to this query: the least of the caller's cap, its own, its context."""
    longest = ASSUMED_MAX_OUTPUT_TOKENS if model.max_output is None else model.max_output
    if query.max_output_tokens is not None:
        longest = min(longest, query.max_output_tokens)
    if model.context is not None:
        longest = min(longest, model.context - input_tokens // query.inputs)
    return max(longest, 0)


def expected_and_worst_nanousd(model: Model, query: Query, input_tokens: int) -> tuple[int, int]:
    """(expected, worst) cost of all choices of one call.

    Expected: the prompt at the input price and `EXPECTED_OUTPUT_TOKENS` (or the cap, if lower) per choice. Worst: the
    most tokens that the prompt can have, in their dearest class, and the longest answer in its dearest class; never
    below expected.
    """
    price = model.price.at(input_tokens)
    longest = max_output_tokens(model, query, input_tokens)
    expected_output = min(longest, EXPECTED_OUTPUT_TOKENS) * query.choices
    expected = input_tokens * price.input + expected_output * price.output
    context = (ASSUMED_CONTEXT if model.context is None else model.context) * query.inputs
    most = context if query.input_tokens_max is None else min(query.input_tokens_max, context)
    most = max(most, input_tokens)
    price = model.price.at(most)
    worst = most * max(price.input, price.cached_input, price.cache_write)
    worst += max_output_tokens(model, query, 0) * query.choices * max(price.output, price.reasoning)
    return -(-expected // _PER_TOKENS), -(-worst // _PER_TOKENS)
