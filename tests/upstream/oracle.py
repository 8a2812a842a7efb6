"""What a call costs at this provider: tokens are words, money is Decimal dollars, rounded once to nano-dollars."""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

WORDS_PER_MESSAGE = 3
"""Tokens that each message adds to its own words, as chat templates do."""
WORDS_PER_TOOL = 7


@dataclass(frozen=True)
class Tokens:
    """One call's tokens, each in one class."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0

    @property
    def prompt(self) -> int:
        return self.input + self.cached_input + self.cache_write

    @property
    def completion(self) -> int:
        return self.output + self.reasoning

    def wire(self) -> dict[str, Any]:
        """As OpenAI reports them: the cached and written ones within the prompt, the reasoning within the answer."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_input, "created_cache_tokens": self.cache_write, "audio_tokens": 0,
            },
            "completion_tokens_details": {"reasoning_tokens": self.reasoning, "audio_tokens": 0},
        }  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Dollars per million tokens."""

    input: Decimal
    cached_input: Decimal
    cache_write: Decimal
    output: Decimal
    reasoning: Decimal

    @classmethod
    def of(cls, input: str, cached_input: str, cache_write: str, output: str, reasoning: str) -> "Rates":
        return cls(Decimal(input), Decimal(cached_input), Decimal(cache_write), Decimal(output), Decimal(reasoning))


@dataclass(frozen=True)
class PriceList:
    """`high` holds for all tokens of a call whose prompt has more than `above` tokens."""

    base: Rates
    above: int | None = None
    high: Rates | None = None


PRICES = {
    "small": PriceList(Rates.of("0.15", "0.0755555", "0.1875", "0.60", "0.60")),
    "large": PriceList(Rates.of("2.5", "1.25", "3.125", "10", "12.3456789")),
    "tiered": PriceList(
        Rates.of("1.25", "0.31", "1.25", "10", "10"), 40, Rates.of("2.5", "0.625", "2.5", "15", "15")
    ),
    "embed": PriceList(Rates.of("0.02", "0.02", "0.02", "0", "0")),
}  # fmt: skip
"""By the provider's names of its models. The policies of the tests say the same in their own words."""


def nanousd(model: str, tokens: Tokens) -> int:
    prices = PRICES[model]
    rates = prices.base
    if prices.above is not None and prices.high is not None and tokens.prompt > prices.above:
        rates = prices.high
    dollars = (
        rates.input * tokens.input
        + rates.cached_input * tokens.cached_input
        + rates.cache_write * tokens.cache_write
        + rates.output * tokens.output
        + rates.reasoning * tokens.reasoning
    ) / 10**6
    return int((dollars * 10**9).quantize(Decimal(1), rounding=ROUND_HALF_UP))


def prompt_tokens(body: dict[str, Any]) -> int:
    """Words of a chat's messages, of a completion's prompt, or of an embedding's input."""
    if "messages" in body:
        words = sum(len(_text(message.get("content")).split()) + WORDS_PER_MESSAGE for message in body["messages"])
        return words + WORDS_PER_TOOL * len(body.get("tools") or ())
    return sum(max(1, len(text.split())) if isinstance(text, str) else len(text) for text in texts(body))


def texts(body: dict[str, Any]) -> list[Any]:
    """The texts of a prompt or an input, each a string or a list of token ids."""
    given = body["prompt"] if "prompt" in body else body.get("input", "")
    return given if isinstance(given, list) and isinstance(given[0], str | list) else [given]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content)
    return content or ""
