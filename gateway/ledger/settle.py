"""From tokens to money: usage in disjoint classes, one rounding per attempt.

A provider's counts overlap (OpenAI's `prompt_tokens` contains the cached ones, `completion_tokens` the reasoning
ones); ours do not, so that a bill is a plain sum. Streamed, unstreamed, cancelled and failed calls all come here.
"""

import msgspec

from routers.policy import Price

TOKENS_PER_PRICE_UNIT = 1_000_000
"""Prices are nano-dollars per million tokens."""

ESTIMATED_BYTES_PER_TOKEN = 3
"""For calls whose usage the provider never reported: rather too many tokens than too few."""


MAX_COUNT = 1 << 32
"""Tokens of one call beyond which a provider's count is not believed."""
PROMPT_MARGIN = 1024
"""Prompt tokens that a provider may add by itself: chat templates, tool preambles."""


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


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = 0
    created_cache_tokens: int | None = 0


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = 0


class WireUsage(msgspec.Struct):
    """The `usage` object of a chat completion or of a stream's last chunk."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None

    def split(self) -> Usage | None:
        """Disjoint classes; None for counts that no call can have (too many, or none at all): as good as none given.

        A part larger than its whole is cut to the whole: the bill never goes negative.
        """
        prompt = max(0, self.prompt_tokens)
        completion = max(0, self.completion_tokens)
        if max(prompt, completion) > MAX_COUNT or prompt + completion == 0:
            return None
        details = self.prompt_tokens_details
        cached = min(prompt, max(0, details.cached_tokens or 0)) if details else 0
        written = min(prompt - cached, max(0, details.created_cache_tokens or 0)) if details else 0
        thought = self.completion_tokens_details
        reasoning = min(completion, max(0, thought.reasoning_tokens or 0)) if thought else 0
        return Usage(prompt - cached - written, cached, written, completion - reasoning, reasoning)


def cost_nanousd(price: Price, usage: Usage) -> int:
    """Cost of one attempt in nano-dollars, rounded half up once, after the sum over the classes."""
    total = (
        usage.input * price.input
        + usage.cached_input * price.cached_input
        + usage.cache_write * price.cache_write
        + usage.output * price.output
        + usage.reasoning * price.reasoning
    )
    return (total + TOKENS_PER_PRICE_UNIT // 2) // TOKENS_PER_PRICE_UNIT


def worst_case_usage(
    price: Price, *, body_bytes: int, context: int, max_output: int, choices: int, text_only: bool
) -> Usage:
    """The dearest usage a request can have, for its reservation.

    No tokenizer makes more tokens of a text than it has bytes, and every byte of the prompt stands in the body, so
    the body's length, and a margin for what the provider's template adds, bounds the prompt; images and audio are not
    bounded by their bytes, so there the context window stands in. Prompt tokens are put into the dearest input class,
    output into the dearest output class.
    """
    prompt = min(body_bytes + PROMPT_MARGIN, context) if text_only else context
    output = max_output * choices
    dearest_is_write = price.cache_write > price.input
    dearest_is_reasoning = price.reasoning > price.output
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
