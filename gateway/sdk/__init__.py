"""The Python SDK: `openai.OpenAI` with the gateway's address, and typed receipts."""
