"""The proof of money: client transcript, ledger and the upstream's own books, joined call by call."""

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_client import Call

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared, and every difference found."""

    calls: int
    upstream_calls: int
    nanousd: int
    differences: tuple[str, ...]

    def __str__(self) -> str:
        if self.differences:
            shown = "\n  ".join(self.differences[:10])
            return f"the books DIFFER in {len(self.differences)} places:\n  {shown}"
        return (
            f"ledger, upstream and client agree to the nano-dollar: {self.calls:,} calls "
            f"({self.upstream_calls:,} reached the upstream), ${self.nanousd // 10**9}.{self.nanousd % 10**9:09d}"
        )


def read_truth(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_ledger(home: Path) -> tuple[list[Row], list[Row]]:
    """(request rows, attempt rows) of a gateway that has written them all."""
    with contextlib.closing(sqlite3.connect(f"file:{home / 'ledger.db'}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        requests = [dict(row) for row in connection.execute("SELECT * FROM request")]
        attempts = [dict(row) for row in connection.execute("SELECT * FROM attempt ORDER BY request_id, seq")]
    return requests, attempts


def prove(
    calls: Sequence[Call], requests: Sequence[Row], attempts: Sequence[Row], truth: Sequence[Row], spent_nanousd: int
) -> Proof:
    """Join the three sides. `spent_nanousd` is the gateway's own total, as its API reports it."""
    differences = [
        *_unmatched("the ledger", (call.request_id for call in calls), (row["id"] for row in requests)),
        *_unmatched("the upstream", _completions(calls), (row["id"] for row in truth if row["status"] == 200)),
        *_refusals(calls, attempts, truth),
    ]
    rows = {row["id"]: row for row in requests}
    billed = {row["id"]: row for row in truth}
    by_request: dict[str, list[Row]] = {}
    for attempt in attempts:
        by_request.setdefault(attempt["request_id"], []).append(attempt)
    for call in calls:
        row = rows.get(call.request_id)
        if row is not None:
            differences += _compare(call, row, by_request.get(call.request_id, []), billed.get(call.completion_id))
    totals = {
        "client": sum(call.cost_nanousd or 0 for call in calls),
        "ledger": sum(row["cost_nanousd"] or 0 for row in requests),
        "upstream": sum(row["nanousd"] for row in truth),
        "spend API": spent_nanousd,
    }
    if len(set(totals.values())) != 1:
        differences.append(f"totals in nano-dollars: {totals}")
    return Proof(len(calls), len(truth), totals["upstream"], tuple(differences))


def _completions(calls: Sequence[Call]) -> Iterable[str]:
    """The upstream's answers that reached the client as fresh ones."""
    return (c.completion_id for c in calls if c.status == 200 and c.cache != "hit" and c.model != "local")


def _unmatched(side: str, ours: Iterable[str], theirs: Iterable[str]) -> list[str]:
    """Each id must be there once on both sides."""
    client, other = Counter(ours), Counter(theirs)
    return [
        f"{name or 'a call without an id'}: {client[name]} times in the transcript, {other[name]} times at {side}"
        for name in sorted(client.keys() | other.keys())
        if not client[name] == other[name] == 1
    ]


def _refusals(calls: Sequence[Call], attempts: Sequence[Row], truth: Sequence[Row]) -> list[str]:
    """Failed calls have no completion to be joined by: as many 404 on each side, and none of them billed."""
    counts = {
        "client": sum(call.status == 404 for call in calls),
        "ledger": sum(attempt["upstream_status"] == 404 for attempt in attempts),
        "upstream": sum(row["status"] == 404 for row in truth),
    }
    return [] if len(set(counts.values())) == 1 else [f"answers 404: {counts}"]


def _compare(call: Call, row: Row, attempts: Sequence[Row], billed: Row | None) -> list[str]:
    """Tokens and money of one call on every side that knows of it."""
    sides: dict[str, tuple[Any, ...]] = {}
    if call.status != 200:
        sides = {"client": (0,), "ledger": (row["cost_nanousd"],)}
    elif call.cache == "hit":
        sides = {"client": (call.cost_nanousd, 0), "ledger": (row["cost_nanousd"], len(attempts))}
        return _differing(call, sides | {"expected": (0, 0)})
    else:
        sides["client"] = (call.prompt_tokens, call.completion_tokens, call.cost_nanousd)
        sides["ledger"] = (*_tokens([row]), row["cost_nanousd"])
        sides["attempts"] = (*_tokens(attempts), sum(attempt["cost_nanousd"] or 0 for attempt in attempts))
        if call.model != "local" and billed is not None:
            sides["upstream"] = (billed["prompt_tokens"], billed["completion_tokens"], billed["nanousd"])
            if billed["streamed"] != call.streamed:
                sides["upstream"] += ("the other way of delivery",)
    return _differing(call, sides)


def _differing(call: Call, sides: dict[str, tuple[Any, ...]]) -> list[str]:
    return [] if len(set(sides.values())) == 1 else [f"{call.request_id}: {sides}"]


def _tokens(rows: Sequence[Row]) -> tuple[int, int]:
    """(prompt, completion) tokens over the ledger's disjoint classes."""
    prompt = ("input_tokens", "cached_input_tokens", "cache_write_tokens")
    completion = ("output_tokens", "reasoning_tokens")
    return sum(row[c] for row in rows for c in prompt), sum(row[c] for row in rows for c in completion)
