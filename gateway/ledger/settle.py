"""From tokens to money: usage in disjoint classes, one rounding per attempt.

A provider's counts overlap (OpenAI's `prompt_tokens` contains the cached ones, `completion_tokens` the reasoning
ones); ours do not, so that a bill is a plain sum. Streamed, unstreamed, cancelled and failed calls all come here.
"""

from typing import overload

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


class _InputDetails(msgspec.Struct):
    cached_tokens: int | None = 0
    cache_write_tokens: int | None = 0
    """OpenRouter's name; `created_cache_tokens` is another for the same."""
    created_cache_tokens: int | None = 0


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = 0


class _CacheCreation(msgspec.Struct):
    ephemeral_5m_input_tokens: int | None = 0
    ephemeral_1h_input_tokens: int | None = 0


_NO_INPUT_DETAILS, _NO_OUTPUT_DETAILS = _InputDetails(), _OutputDetails()


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
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _InputDetails | None = None
    output_tokens_details: _OutputDetails | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: _CacheCreation | None = None
    prompt_cache_hit_tokens: int | None = None

    def split(self, cache_n: int | None = None) -> Usage | None:
        """Disjoint classes; `cache_n` is what llama.cpp says beside the usage, of the prompt's tokens that it had.

         None for counts that no call can have (too many, none, below none): as good as none given.

        A part larger than its whole is cut to the whole: the bill never goes negative. Where the provider gives a
        total that is not below its parts, the classes sum to it.
        """
        for whole in (self.prompt_tokens, self.completion_tokens, self.input_tokens, self.output_tokens):
            if whole is not None and whole < 0:
                return None
        details = self.prompt_tokens_details or self.input_tokens_details or _NO_INPUT_DETAILS
        cached = _first(details.cached_tokens, self.cache_read_input_tokens, self.prompt_cache_hit_tokens, cache_n)
        written = _first(details.cache_write_tokens, details.created_cache_tokens, self._cache_creation())
        thought = self.completion_tokens_details or self.output_tokens_details or _NO_OUTPUT_DETAILS
        reasoning = _first(thought.reasoning_tokens)
        prompt = _first(self.prompt_tokens, self.input_tokens)
        completion = _first(self.completion_tokens, self.output_tokens)
        total = _first(self.total_tokens)
        beside = self.prompt_tokens is None and self.input_tokens_details is None  # Anthropic's own
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

    def _cache_creation(self) -> int | None:
        parts = self.cache_creation
        if self.cache_creation_input_tokens is not None or parts is None:
            return self.cache_creation_input_tokens
        return _first(parts.ephemeral_5m_input_tokens) + _first(parts.ephemeral_1h_input_tokens)


def _first(*counts: int | None) -> int:
    """The first that was given and is above zero."""
    for count in counts:
        if count is not None and count > 0:
            return count
    return 0


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
