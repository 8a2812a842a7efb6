"""Routers: pure decisions. Same query, signals, policy, state and seed: same decision. No I/O here."""
