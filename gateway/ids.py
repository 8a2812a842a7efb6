"""Names and seeds that a worker makes for its requests."""

import os
import random

_ids = random.Random(os.urandom(32))
os.register_at_fork(after_in_child=lambda: _ids.seed(os.urandom(32)))

_last_id = (0, 0)
"""Millisecond and random part."""


def new_ledger_id(now_ms: int) -> str:
    """Sorts by time, and within a millisecond by the order in which this worker made them (RFC 9562, 6.2, method 2).
    Unique, not secret: whose request it is decides who may see it."""
    global _last_id
    ms, random = _last_id
    random = random + 1 + _ids.getrandbits(32) if ms == now_ms else _ids.getrandbits(63)
    _last_id = (now_ms, random)
    return f"req_{now_ms:011x}{random:016x}"


def new_seed() -> int:
    """Of one decision: its ledger row has it. Any JSON reader holds it exactly."""
    return _ids.getrandbits(53)
