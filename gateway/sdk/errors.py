"""The one error that OpenAI's client has no name for; all others are `openai`'s own."""

from typing import Any

import openai


class BudgetExceeded(openai.RateLimitError):
    """A budget is spent, or this request might have overspent it. It did not run and is not retried."""


def named(error: openai.APIStatusError) -> openai.APIStatusError:
    """`error` under the most telling name there is."""
    body: Any = error.body
    if isinstance(error, openai.RateLimitError) and isinstance(body, dict) and body.get("code") == "budget_exceeded":
        return BudgetExceeded(error.message, response=error.response, body=body)
    return error
