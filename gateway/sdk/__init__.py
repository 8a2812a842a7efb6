"""The Python SDK: `openai.OpenAI` with the gateway's address, and typed receipts.

from gateway.sdk import Leadline

client = Leadline()
answer = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": "Hello"}])
print(client.receipt(answer).cost_usd)
"""

from gateway.sdk.client import AsyncLeadline, AsyncScoped, Leadline, Scoped
from gateway.sdk.errors import BudgetExceeded
from gateway.sdk.types import Attempt, Candidate, Decision, Explanation, ModelSpend, Outcome, Plan, Receipt, Spend

__all__ = [
    "AsyncLeadline",
    "AsyncScoped",
    "Attempt",
    "BudgetExceeded",
    "Candidate",
    "Decision",
    "Explanation",
    "Leadline",
    "ModelSpend",
    "Outcome",
    "Plan",
    "Receipt",
    "Scoped",
    "Spend",
]
