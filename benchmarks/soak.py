"""Mixed traffic for a long time: does memory grow, do descriptors leak, do the books agree at the end?

    python -m benchmarks.soak [--minutes 30]

One gateway process before the tests' fake upstream, which keeps its own books. In each turn: healthy calls of all kinds
(whole, streamed, tools, several choices), calls whose first attempt meets a fault, and streams whose callers hang up in
the middle. At the end every call has one row in the ledger and what was billed for the healthy ones is, to the
nano-dollar, what the upstream billed and what the callers were told. Ends with status 1 and says what is wrong.
"""

import argparse
import asyncio
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.load import Told, chat_request, drive
from tests.faults.serving import Serving, serving
from tests.faults.test_ledger_oracle import POLICY, questions
from tests.upstream.process import upstream_process

HEALTHY, FAULTY, LEFT = 400, 8, 8
"""Calls of each kind in one turn."""
FAULTS = ("F10", "F12", "F19", "F21")
"""Of the first attempt: two statuses, a reset before the headers, a reset in the middle of an answer."""
SAMPLE_S = 1.0
MAX_GROWTH_MB = 20.0
MAX_MORE_FDS = 8
"""Both from the median of the middle third to that of the last."""


@dataclass
class Watch:
    """The gateway process over time."""

    process: psutil.Process
    at_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    fds: list[float] = field(default_factory=list)

    async def run(self) -> None:
        began = time.monotonic()
        while True:
            self.at_s.append(time.monotonic() - began)
            self.rss_mb.append(self.process.memory_info().rss / 1e6)
            self.fds.append(self.process.num_fds())
            await asyncio.sleep(SAMPLE_S)

    def growth(self, values: list[float]) -> tuple[float, float]:
        """From the median of the middle third to that of the last; per hour, by least squares over both."""
        third = len(values) // 3
        if third < 2:
            raise ValueError("too short a run to say anything of growth")
        middle, last = values[third : 2 * third], values[2 * third :]
        slope = statistics.linear_regression(self.at_s[third:], values[third:]).slope
        return statistics.median(last) - statistics.median(middle), slope * 3600


@dataclass
class Books:
    """What the callers know."""

    calls: set[str] = field(default_factory=set)
    told_nanousd: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def healthy(self, name: str, answer: Told) -> None:
        self.calls.add(name)
        self.statuses[answer.status] += 1
        if answer.status != 200 or answer.cost_nanousd is None:
            self.wrong.append(f"{name}: status {answer.status}, cost {answer.cost_nanousd}, {answer.body[-200:]!r}")
        else:
            self.told_nanousd += answer.cost_nanousd


async def turn(gateway: Serving, number: int, books: Books) -> None:
    bodies = questions(HEALTHY, seed=number)
    names = [f"healthy-{number}-{index}" for index in range(len(bodies))]
    requests = [chat_request(gateway.key, name, body) for name, body in zip(names, bodies, strict=True)]
    for name, answer in zip(names, await drive(gateway.port, requests, connections=16), strict=True):
        books.healthy(name, answer)
    faulty = [(f"faulty-{number}-{index}", FAULTS[index % len(FAULTS)], index % 2 == 0) for index in range(FAULTY)]
    requests = [
        chat_request(gateway.key, name, asked(name, stream, fault=fault, on="first")) for name, fault, stream in faulty
    ]
    for (name, _, _), answer in zip(faulty, await drive(gateway.port, requests, connections=FAULTY), strict=True):
        books.calls.add(name)
        books.statuses[answer.status] += 1
    await asyncio.gather(*[leave(gateway, f"left-{number}-{index}", books) for index in range(LEFT)])


def asked(name: str, stream: bool, **metadata: str) -> dict[str, object]:
    content = f"how deep is the water under {name}"
    return {
        "model": "cheap", "messages": [{"role": "user", "content": content}], "stream": stream,
        "metadata": {"words": "12", **metadata},
    }  # fmt: skip


async def leave(gateway: Serving, name: str, books: Books) -> None:
    """Hang up once the stream has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(chat_request(gateway.key, name, asked(name, True, pace_ms="20")))
    await reader.readuntil(b"data: ")
    books.calls.add(name)
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def audit(ledger: Path, books: Books, truth_nanousd: dict[str, int]) -> list[str]:
    """What disagrees, in words, when the gateway has stopped."""
    with contextlib.closing(sqlite3.connect(ledger)) as database:
        rows = database.execute("SELECT session, outcome, cost_nanousd FROM request").fetchall()
        open_attempts = database.execute("SELECT count(*) FROM attempt WHERE outcome IN ('', 'running')").fetchone()[0]
    wrong = books.wrong[:10]
    seen = Counter(session for session, _, _ in rows)
    if lost := books.calls - seen.keys():
        wrong.append(f"{len(lost)} calls without a row, {min(lost)} among them")
    if more := [session for session, count in seen.items() if count > 1 or session not in books.calls]:
        wrong.append(f"{len(more)} rows twice or of nobody, {more[0]} among them")
    billed = sum(cost or 0 for session, _, cost in rows if session.startswith("healthy-"))
    provider = sum(cost for call, cost in truth_nanousd.items() if call.startswith("healthy-"))
    if not billed == provider == books.told_nanousd:
        wrong.append(f"billed {billed}, the upstream {provider}, told {books.told_nanousd} nano-dollars")
    if open_attempts or any(outcome in ("", "running", "interrupted") for _, outcome, _ in rows):
        wrong.append("rows that were never closed")
    return wrong


async def traffic(gateway: Serving, seconds: float, watch: Watch) -> Books:
    books, ends, number = Books(), time.monotonic() + seconds, 0
    watching = asyncio.create_task(watch.run())
    said = time.monotonic()
    while time.monotonic() < ends:
        number += 1
        await turn(gateway, number, books)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(f"{len(books.calls)} calls; {watch.rss_mb[-1]:.0f} MB, {watch.fds[-1]:.0f} descriptors", flush=True)
    watching.cancel()
    return books


def gateway_process(port: int) -> psutil.Process:
    """The child of ours that listens there."""
    for child in psutil.Process().children():
        if any(link.status == psutil.CONN_LISTEN and link.laddr.port == port for link in child.net_connections("tcp")):
            return child
    raise RuntimeError(f"no child of ours listens on {port}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="leadline-soak-") as name:
        folder = Path(name)
        with upstream_process(folder / "truth") as upstream:
            with serving(
                POLICY.format(url=upstream.url).replace("retries: 0", "retries: 2, breaker: off"), folder
            ) as gateway:
                watch = Watch(gateway_process(gateway.port))
                books = asyncio.run(traffic(gateway, minutes * 60, watch))
            truth: Counter[str] = Counter()
            for row in upstream.rows():
                truth[row.call] += row.nanousd
        wrong = audit(folder / "home" / "ledger.db", books, truth)
    more_mb, mb_per_hour = watch.growth(watch.rss_mb)
    more_fds, fds_per_hour = watch.growth(watch.fds)
    print(f"{len(books.calls)} calls in {minutes:g} min, statuses {dict(books.statuses)}")
    print(f"resident memory {watch.rss_mb[0]:.0f} → {watch.rss_mb[-1]:.0f} MB, {mb_per_hour:+.1f} MB an hour")
    print(f"descriptors {watch.fds[0]:.0f} → {watch.fds[-1]:.0f}, {fds_per_hour:+.1f} an hour")
    if more_mb > MAX_GROWTH_MB:
        wrong.append(f"resident memory grew by {more_mb:.1f} MB from the middle third to the last")
    if more_fds > MAX_MORE_FDS:
        wrong.append(f"{more_fds:.0f} descriptors more in the last third than in the middle one")
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
