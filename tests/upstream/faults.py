"""The faults of an upstream, numbered, and what each of them may cause: for the caller, the attempt's row, the bill.

An `Effect` says what one faulty attempt comes to; the rest follows from it. An attempt that fails `before` the first
byte is tried again: with the fault on the first attempt alone the caller gets a proper answer of the second, with it
on all of them the caller gets `status`. After the first byte nothing is tried again: the stream ends with an error
event (`after`). What is `served` is served by the first attempt, fault or no fault.
"""

from dataclasses import dataclass
from typing import Literal

When = Literal["served", "before", "after", "torn"]
"""`torn`: before or after, as the network has it: the end may overtake what was sent before it, or arrive with it."""
BillKind = Literal["exact", "nothing", "estimate"]


@dataclass(frozen=True)
class Effect:
    when: When
    bill: BillKind
    outcomes: frozenset[str] = frozenset()
    """The attempt's outcome in the ledger: one of these."""
    status: int = 200
    """The caller's status when every attempt fails like this."""


@dataclass(frozen=True)
class Variant:
    name: str
    plain: Effect | None
    """None: this fault has no meaning there."""
    stream: Effect | None


@dataclass(frozen=True)
class Fault:
    id: str
    words: str
    variants: tuple[Variant, ...]


def _before(bill: BillKind, status: int, *outcomes: str) -> Effect:
    return Effect("before", bill, frozenset(outcomes), status)


def _after(*outcomes: str) -> Effect:
    return Effect("after", "estimate", frozenset(outcomes))


def _same(name: str, effect: Effect) -> Variant:
    return Variant(name, effect, effect)


UNREACHABLE = _before("nothing", 502, "connect")
TIMED_OUT = _before("estimate", 504, "timeout")
FAILED = _before("nothing", 502, "status")
LIMITED = _before("nothing", 429, "rate_limit")
CUT = _before("estimate", 502, "cut")
BAD = _before("estimate", 502, "bad_answer")
UNUSABLE = _before("estimate", 502, "cut", "bad_answer")
BROKEN = _after("cut")
TORN = Effect("torn", "estimate", frozenset({"cut", "bad_answer"}), 502)
EXACT = Effect("served", "exact", frozenset({"ok"}))
ESTIMATED = Effect("served", "estimate", frozenset({"ok"}))


FAULTS = (
    Fault("F01", "refused", (_same("", UNREACHABLE),)),
    Fault("F02", "DNS fails", (_same("", UNREACHABLE),)),
    Fault("F03", "TLS fails", (_same("", UNREACHABLE),)),
    Fault("F04", "connecting takes too long", (_same("", UNREACHABLE),)),
    Fault("F05", "accepts, then says nothing", (_same("", TIMED_OUT),)),
    Fault("F06", "408", (_same("", FAILED),)),
    Fault("F07", "409", (_same("", FAILED),)),
    Fault("F08", "429 with Retry-After", tuple(_same(v, LIMITED) for v in ("seconds", "date", "milliseconds"))),
    Fault("F09", "429 bare", (_same("", LIMITED),)),
    Fault("F10", "500", (_same("", FAILED),)),
    Fault("F11", "502 with HTML", (_same("", FAILED),)),
    Fault("F12", "503", (_same("", FAILED),)),
    Fault("F13", "529", (_same("", FAILED),)),
    Fault(
        "F14",
        "redirect to another host",
        tuple(_same(v, _before("nothing", 502, "bad_answer")) for v in ("302", "307")),
    ),
    Fault(
        "F15",
        "200 with invalid JSON",
        (
            _same("truncated", BAD),
            Variant("empty", BAD, UNUSABLE),
            _same("array", BAD),
            Variant("error", BAD, UNUSABLE),
            _same("utf8", BAD),
        ),
    ),
    Fault("F16", "wrong content type", (Variant("text", EXACT, BAD), Variant("swapped", BAD, UNUSABLE))),
    Fault("F17", "wrong Content-Length", (Variant("long", CUT, EXACT), Variant("short", UNUSABLE, TORN))),
    Fault("F18", "truncated chunked body", (Variant("middle", CUT, TORN), _same("none", CUT))),
    Fault("F19", "reset before headers", (_same("", CUT),)),
    Fault("F20", "reset inside headers", (_same("", CUT),)),
    Fault("F21", "reset after events", (Variant("", CUT, TORN),)),
    Fault(
        "F22",
        "stall after events",
        (Variant("events", TIMED_OUT, _after("timeout")), Variant("headers", None, TIMED_OUT)),
    ),
    Fault(
        "F23",
        "one byte at a time",
        (Variant("start", TIMED_OUT, TIMED_OUT), Variant("tail", None, _after("timeout"))),
    ),
    Fault(
        "F24",
        "malformed events",
        (
            Variant("no-blank-line", None, UNUSABLE),
            *(Variant(v, None, EXACT) for v in ("cr", "crlf", "bom", "comments", "multi-line", "huge", "utf8-split")),
            Variant("utf8-invalid", None, TORN),
        ),
    ),
    Fault(
        "F25",
        "[DONE] missing, early, or followed by data",
        (
            Variant("missing", None, EXACT),
            Variant("unfinished", None, BROKEN),
            Variant("early", None, ESTIMATED),
            Variant("followed", None, EXACT),
        ),
    ),
    Fault(
        "F26",
        "usage missing, twice, zero, negative, inconsistent, cumulative",
        (
            *(_same(v, ESTIMATED) for v in ("missing", "zero", "negative", "negative-output")),
            *(_same(v, EXACT) for v in ("twice", "inconsistent")),
            Variant("cumulative", None, EXACT),
            Variant("cumulative-cut", None, TORN),
        ),
    ),
    Fault("F27", "duplicate tool-call indexes, unknown fields", (_same("", EXACT),)),
    Fault("F28", "gzip bomb", (Variant("", BAD, UNUSABLE),)),
)
