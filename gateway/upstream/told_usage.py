"""Usage as OpenAI's API tells it."""

from typing import Any

from gateway.ledger.settle import Usage


def told_as(usage: Usage) -> dict[str, Any]:
    prompt, output = usage.input + usage.cached_input + usage.cache_write, usage.output + usage.reasoning
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
