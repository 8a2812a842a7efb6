"""Ways of reasoning over the engine's primitives: who writes the next step, when to stop, whom to believe.

Each method is one small module; each plan is a `Controller` (`primitives.py`) that owns the sequences of one request.
"""
