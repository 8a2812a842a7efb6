"""Runs `conversation.py` on the gateway's core."""

import json
import os
import subprocess
import sys
import tempfile

from contenders import GATEWAY_CORE, HERE, PACED_PORT
from measured import Measured, show
from results_file import Row


def measure(seconds: float, into: Measured) -> None:
    with tempfile.TemporaryDirectory(prefix="leadline-bench-") as folder:
        script = str(HERE / "conversation.py")
        out = subprocess.run(
            ["taskset", "-c", GATEWAY_CORE, sys.executable, script, str(PACED_PORT), str(min(seconds, 3))],
            env={**os.environ, "LEADLINE_HOME": folder}, stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    found = json.loads(out.splitlines()[-1])
    into.add("leadline", "conversation_bytes", found["bytes"], "bytes")
    into.add("leadline", "conversation_read", found["read_us"] / 1000, "ms")
    into.add("leadline", "conversation_blocked", found["hot_longest_us"] / 1000, "ms")
    into.add("leadline", "conversation_all_steps", found["hot_all_us"] / 1000, "ms")
    into.add("leadline", "conversation_blocked_cold", found["cold_longest_us"] / 1000, "ms")
    into.add("leadline", "short_request_blocked", found["short_longest_us"] / 1000, "ms")
    blocked, steps = found["hot_longest_us"] / 1000, found["hot_all_us"] / 1000
    print(f"  leadline: blocked for {blocked:.3f} ms, {steps:.3f} in all; {found['requests']} requests", flush=True)


def tables(rows: list[Row]) -> None:
    columns = {
        "conversation_bytes": "bytes", "conversation_read": "read, checked, written anew, ms",
        "conversation_blocked": "loop blocked, ms", "conversation_all_steps": "all its steps, ms",
        "conversation_blocked_cold": "blocked after a pause, ms", "short_request_blocked": "by a short request, ms",
    }  # fmt: skip
    note = (
        "Loop blocked: the longest step of a request between two at which others have their turn. Steps: from the "
        "whole body in memory to the last byte handed to the socket, cache key and kernel included; 466 messages, tool "
        "calls, streamed. Not in them: receiving the body, whose pieces are turns of their own."
    )
    show(rows, "An agent's conversation", columns, note)
