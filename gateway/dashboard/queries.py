"""What each page shows, from the ledger's rows: plain data for the templates. Blocking: call it in a thread."""

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import msgspec
from sqlalchemy import Engine

from gateway.dashboard.charts import Chart, percent, stacked
from gateway.ledger import browse, outcomes, report
from gateway.ledger.browse import Cell, Cursor, Row, Slice
from routers.explain import from_dict, verdict
from routers.types import Candidate, Decision

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SPANS_MS = {"hour": HOUR_MS, "day": DAY_MS, "week": 7 * DAY_MS, "4 weeks": 28 * DAY_MS}
MAX_COLUMNS = 120
NAMED_SERIES = 5
"""Models with a colour of their own; the others share one."""
LAST_REQUESTS = 20
PAGE_ROWS = 50


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over cells: every number of a page that is not a row."""

    requests: int = 0
    cost_nanousd: int = 0
    savings_nanousd: int = 0
    unpriced: int = 0
    estimated: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cancelled: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> "Totals":
        listed = list(cells)
        return cls(**{field.name: sum(getattr(cell, field.name) for cell in listed) for field in fields(cls)})

    @property
    def hit_percent(self) -> float | None:
        """Of the requests that the cache was asked about; None when it was asked about none."""
        asked = self.cache_hits + self.cache_misses
        return percent(self.cache_hits, asked) if asked else None


@dataclass(frozen=True, slots=True)
class ModelShare:
    model: str | None
    series: int
    totals: Totals
    requests_percent: float
    cost_percent: float


@dataclass(frozen=True, slots=True)
class Overview:
    totals: Totals
    shares: list[ModelShare]
    span: str
    spend: Chart
    requests: Chart
    rows: list[Row]
    worth: dict[str, int | None]
    """Of the requests that were rated: see `outcomes.quality`."""


def overview(engine: Engine, of: Slice, *, now_ms: int) -> Overview:
    since_ms = of.since_ms or browse.oldest_ms(engine, of) or now_ms - DAY_MS
    span = _span(now_ms - since_ms)
    span_ms = SPANS_MS[span]
    cells = browse.cells(engine, of, span_ms=span_ms)
    totals = Totals.of(cells)
    shares = _shares(cells, totals)
    series = {share.model: share.series for share in shares}
    first = since_ms // span_ms
    last = max([now_ms // span_ms, *(cell.start_ms // span_ms for cell in cells)])
    width = 1 + max((share.series for share in shares), default=0)
    spend = [[0] * width for _ in range(last - first + 1)]
    requests = [[0] * width for _ in range(last - first + 1)]
    for cell in cells:
        at = cell.start_ms // span_ms - first
        spend[at][series[cell.model]] += cell.cost_nanousd
        requests[at][series[cell.model]] += cell.requests

    def label(index: int) -> str:
        start = dt.datetime.fromtimestamp((first + index) * span_ms / 1000, dt.UTC)
        return f"{start:%H:%M}" if span == "hour" else f"{start.day} {start:%b}"

    return Overview(
        totals,
        shares,
        span,
        stacked(spend, label),
        stacked(requests, label),
        browse.page(engine, of, limit=LAST_REQUESTS),
        outcomes.quality(engine, *of.conditions()),
    )


def _span(length_ms: int) -> str:
    if length_ms <= 2 * DAY_MS:
        return "hour"
    return next((name for name, ms in SPANS_MS.items() if ms > HOUR_MS and length_ms / ms <= MAX_COLUMNS), "4 weeks")


def _shares(cells: Iterable[Cell], totals: Totals) -> list[ModelShare]:
    """Per model, most requests first; together they are the totals."""
    by_model: dict[str | None, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_model[cell.model].append(cell)
    summed = [(model, Totals.of(of_model)) for model, of_model in by_model.items()]
    summed.sort(key=lambda pair: (-pair[1].requests, pair[0] or ""))
    return [
        ModelShare(
            model,
            min(rank, NAMED_SERIES),
            of_model,
            percent(of_model.requests, totals.requests),
            percent(of_model.cost_nanousd, totals.cost_nanousd),
        )
        for rank, (model, of_model) in enumerate(summed)
    ]


@dataclass(frozen=True, slots=True)
class Listing:
    totals: Totals
    """Of all rows that the filters let through, not of this page."""
    rows: list[Row]
    next: Cursor | None
    choices: dict[str, list[str]]


def listing(engine: Engine, of: Slice, *, everything: Slice, before: Cursor | None) -> Listing:
    """One page of the slice; `everything` is the slice without its filters, for what they can be set to."""
    rows = browse.page(engine, of, limit=PAGE_ROWS + 1, before=before)
    more = len(rows) > PAGE_ROWS
    rows = rows[:PAGE_ROWS]
    return Listing(
        Totals.of(browse.cells(engine, of, span_ms=28 * DAY_MS)),
        rows,
        browse.cursor(rows[-1]) if more else None,
        browse.choices(engine, everything),
    )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One upstream call, with its place on the request's time line in percent; a hundredth of it at the least."""

    row: Row
    start: float
    waiting: float
    running: float


@dataclass(frozen=True, slots=True)
class Considered:
    """One candidate of a decision, and its verdict in words."""

    candidate: Candidate
    verdict: str
    chosen: bool


@dataclass(frozen=True, slots=True)
class OneRequest:
    row: Row
    attempts: list[Attempt]
    decision: Decision | None
    considered: list[Considered]
    unreadable: bool
    """There is a decision, but another version of this program wrote it."""
    feedback: list[Row]
    plan: "PlanDone | None"


@dataclass(frozen=True, slots=True)
class PlanDone:
    """What a plan did for an answer."""

    kind: str
    counts: list[tuple[str, str]]
    """In words, each with its value."""
    by_kind: list[tuple[str, int, int, int | None]]
    """(why called, attempts, tokens written, nano-dollars or None) of each kind of attempt, in order of appearance."""


_NAMED = {
    "accepted_steps": "steps accepted",
    "accepted_tokens": "tokens saved: written by the draft, and kept",
    "by": "thought left by",
    "discarded_tokens": "tokens thrown away",
    "escalated_steps": "steps escalated",
    "p": "P(right) at the exit",
    "p_correct": "P(correct) of the draft's answer",
}


def plan_done(plan: str | None, attempts: list[Row]) -> PlanDone | None:
    """None: the row has none."""
    if plan is None:
        return None
    stated: dict[str, Any] = msgspec.json.decode(plan)
    kind = stated.pop("kind")
    counts = [(_NAMED.get(name, name.replace("_", " ")), _shown(value)) for name, value in stated.items()]
    groups: dict[str, list[Row]] = {}
    for attempt in attempts:
        groups.setdefault(attempt["kind"], []).append(attempt)
    by_kind = []
    for name, rows in groups.items():
        written = sum(row["output_tokens"] + row["reasoning_tokens"] for row in rows)
        costs = [row["cost_nanousd"] for row in rows]
        by_kind.append((name, len(rows), written, None if None in costs else sum(costs)))
    return PlanDone(kind, counts, by_kind)


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def one_request(engine: Engine, request_id: str, *, tenant: str | None) -> OneRequest | None:
    """None when there is no such request, or it is another tenant's."""
    found = report.request(engine, request_id, tenant=tenant)
    if found is None:
        return None
    row, attempts = found
    plan = row.pop("plan")
    decision, unreadable = _decision(row.pop("decision"))
    return OneRequest(
        row,
        time_line(row, attempts),
        decision,
        [
            Considered(candidate, told := verdict(candidate, decision), told == "chosen")
            for candidate in decision.candidates
        ]
        if decision
        else [],
        unreadable,
        outcomes.of_request(engine, request_id),
        plan_done(plan, attempts),
    )


def _decision(text: str | None) -> tuple[Decision | None, bool]:
    if not text:
        return None, False
    try:
        return from_dict(msgspec.json.decode(text, type=dict[str, Any])), False
    except ValueError:
        return None, True


def time_line(row: Row, attempts: list[Row]) -> list[Attempt]:
    """Each attempt placed between the request's admission and its end."""
    begun_ms = row["created_at_ms"]
    starts_us = [max(0, attempt["started_at_ms"] - begun_ms) * 1000 for attempt in attempts]
    ends_us = [start + attempt["duration_us"] for start, attempt in zip(starts_us, attempts, strict=True)]
    whole_us = max([1, row["duration_us"], *ends_us])
    placed = []
    for start, attempt in zip(starts_us, attempts, strict=True):
        first_byte = attempt["first_byte_us"]
        visible_us = max(attempt["duration_us"], whole_us // 100)
        waiting = visible_us if first_byte is None else min(first_byte, visible_us)
        running = visible_us - waiting
        start = min(start, whole_us - visible_us)
        placed.append(Attempt(attempt, *(percent(part, whole_us) for part in (start, waiting, running))))
    return placed
