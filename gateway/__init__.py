"""The gateway: an OpenAI-compatible endpoint that decides how much each query is worth, and keeps the receipts."""

__version__ = "0.1.0"
