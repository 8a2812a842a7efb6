"""From tokens to money: usage in disjoint classes, one rounding per attempt.

A provider's counts overlap (OpenAI's `prompt_tokens` contains the cached ones, `completion_tokens` the reasoning
ones); ours do not, so that a bill is a plain sum. Streamed, unstreamed, cancelled and failed calls all come here.
"""

from typing import Any, overload

import msgspec

from routers.cost import PROMPT_MARGIN
from routers.policy import Price

TOKENS_PER_PRICE_UNIT = 1_000_000
"""Prices are nano-dollars per million tokens."""

ESTIMATED_BYTES_PER_TOKEN = 3
"""For calls whose usage the provider never reported: rather too many tokens than too few."""


MAX_COUNT = 1 << 32
"""Tokens of one call beyond which a provider's count is not believed."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one attempt, in disjoint classes."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    estimated: bool = False
    """True when the provider did not report them."""


NO_USAGE = Usage()


class WireUsage(msgspec.Struct):
    """The `usage` object of an answer or of a stream's last chunk, in any of the vendors' conventions.

    | who | input | output |
    | --- | --- | --- |
    | OpenAI chat, Mistral, vLLM, OpenRouter | `prompt_tokens`, cached and written within | reasoning within |
    | OpenAI Responses | `input_tokens`, cached within | `output_tokens`, reasoning within |
    | Anthropic | `input_tokens` beside `cache_read_…` and `cache_creation_input_tokens` | `output_tokens` |
    | DeepSeek | `prompt_tokens`, `prompt_cache_hit_tokens` within | reasoning within |
    | xAI, Groq, Gemini | as OpenAI chat | reasoning beside `completion_tokens`, as the total shows |
    | embeddings | `prompt_tokens`, or the total alone | none |

    Any value may stand in any field: a part that cannot be read costs that part, not the counts beside it.
    """

    prompt_tokens: Any = None
    completion_tokens: Any = None
    total_tokens: Any = None
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None
    input_tokens: Any = None
    output_tokens: Any = None
    input_tokens_details: Any = None
    output_tokens_details: Any = None
    cache_read_input_tokens: Any = None
    cache_creation_input_tokens: Any = None
    cache_creation: Any = None
    prompt_cache_hit_tokens: Any = None

    def split(self, cache_n: Any = None) -> Usage | None:
        """Disjoint classes; `cache_n` is what llama.cpp says beside the usage, of the prompt's tokens that it had.

        None for counts that no call can have (too many, none, below none) or that cannot be read: as good as none
        given.

        A part larger than its whole is cut to the whole: the bill never goes negative. Where the provider gives a
        total that is not below its parts, the classes sum to it.
        """
        beside = self.prompt_tokens is None and self.input_tokens_details is None  # Anthropic's own
        wholes = [self.prompt_tokens, self.completion_tokens, self.input_tokens, self.output_tokens]
        if beside:
            wholes += [self.cache_read_input_tokens, self.cache_creation_input_tokens]
        if any(whole is not None and _count(whole) < 0 for whole in wholes):
            return None
        details = self.prompt_tokens_details or self.input_tokens_details
        cached = _first(
            _part(details, "cached_tokens"), self.cache_read_input_tokens, self.prompt_cache_hit_tokens, cache_n
        )
        # OpenRouter's name, and another for the same.
        written = _first(
            _part(details, "cache_write_tokens"), _part(details, "created_cache_tokens"), self._cache_creation()
        )
        reasoning = _first(_part(self.completion_tokens_details or self.output_tokens_details, "reasoning_tokens"))
        prompt = _first(self.prompt_tokens, self.input_tokens)
        completion = _first(self.completion_tokens, self.output_tokens)
        total = _first(self.total_tokens)
        if beside or (cached + written and total == prompt + cached + written + completion):
            prompt += cached + written
        cached = min(cached, prompt)
        written = min(written, prompt - cached)
        unlisted = max(0, total - prompt - completion)
        if unlisted and not prompt + completion:
            prompt = unlisted  # an embedding's total alone
        elif unlisted:
            completion += unlisted
            reasoning = max(reasoning, unlisted)
        reasoning = min(reasoning, completion)
        if max(prompt, completion) > MAX_COUNT or prompt + completion == 0:
            return None
        return Usage(prompt - cached - written, cached, written, completion - reasoning, reasoning)

    def _cache_creation(self) -> Any:
        if self.cache_creation_input_tokens is not None:
            return self.cache_creation_input_tokens
        return sum(_first(_part(self.cache_creation, f"ephemeral_{age}_input_tokens")) for age in ("5m", "1h"))


def _part(details: Any, name: str) -> Any:
    return details.get(name) if isinstance(details, dict) else None


def _first(*values: Any) -> int:
    """The first that is a count above zero."""
    return next((count for value in values if (count := _count(value)) > 0), 0)


def _count(value: Any) -> int:
    """A whole number, in either of the ways to write one (JSON does not tell 4 from 4.0); -1: it is none."""
    if type(value) is int or (type(value) is float and value.is_integer()):
        return int(value)
    return -1


@overload
def cost_nanousd(price: Price, usage: Usage) -> int: ...
@overload
def cost_nanousd(price: None, usage: Usage) -> None: ...
@overload
def cost_nanousd(price: Price | None, usage: Usage) -> int | None: ...
def cost_nanousd(price: Price | None, usage: Usage) -> int | None:
    """Cost of one attempt in nano-dollars, rounded half up once, after the sum over the classes.

    The whole call is billed in the tier that its input reaches. None where there is no price: unpriced is not zero.
    """
    if price is None:
        return None
    if price.tiers:
        price = price.at(usage.input + usage.cached_input + usage.cache_write)
    total = (
        usage.input * price.input
        + usage.cached_input * price.cached_input
        + usage.cache_write * price.cache_write
        + usage.output * price.output
        + usage.reasoning * price.reasoning
    )
    return (total + TOKENS_PER_PRICE_UNIT // 2) // TOKENS_PER_PRICE_UNIT


def worst_case_usage(
    price: Price | None, *, body_bytes: int, context: int, max_output: int, choices: int, text_only: bool
) -> Usage:
    """The dearest usage a request can have, for its reservation.

    No tokenizer makes more tokens of a text than it has bytes, and every byte of the prompt stands in the body, so
    the body's length, and a margin for what the provider's template adds, bounds the prompt; images and audio are not
    bounded by their bytes, so there the context window stands in. Prompt tokens are put into the dearest input class,
    output into the dearest output class, of the tier that the prompt can reach: no tier is cheaper than the one below.
    """
    prompt = min(body_bytes + PROMPT_MARGIN, context) if text_only else context
    output = max_output * choices
    at = price.at(prompt) if price is not None else None
    dearest_is_write = at is not None and at.cache_write > at.input
    dearest_is_reasoning = at is not None and at.reasoning > at.output
    return Usage(
        input=0 if dearest_is_write else prompt,
        cache_write=prompt if dearest_is_write else 0,
        output=0 if dearest_is_reasoning else output,
        reasoning=output if dearest_is_reasoning else 0,
        estimated=True,
    )


def estimated_usage(*, body_bytes: int, context: int, delivered_bytes: int, delivered_deltas: int) -> Usage:
    """Usage of a call that ended before its provider reported any (a cancelled stream, a cut connection)."""
    prompt = min(-(-body_bytes // ESTIMATED_BYTES_PER_TOKEN), context)
    output = max(delivered_deltas, -(-delivered_bytes // ESTIMATED_BYTES_PER_TOKEN))
    return Usage(input=prompt, output=output, estimated=True)
