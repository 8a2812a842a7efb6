"""T1: every fault of an upstream, streamed and not, on the first attempt and on all: what the caller, the ledger and
the upstream's books say of it agrees, nothing leaks, and nothing broken is passed off as served."""

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.conftest import Size
from tests.faults.books import Call, join, tokens_of
from tests.faults.transcript import Transcript
from tests.gateway.conftest import Gateway, running, until
from tests.upstream.faults import EXACT, FAULTS, Effect
from tests.upstream.oracle import nanousd
from tests.upstream.process import upstream_process
from tests.upstream.truth import Row

pytestmark = pytest.mark.anyio

POLICY = """
version: 1
providers:
  first: {{base_url: "{url}", timeout: 6s, connect_timeout: 6s, first_byte_timeout: 3s, idle_timeout: 3s,
          retries: 1, breaker: off}}
  second: {{base_url: "{url}", timeout: 6s, connect_timeout: 6s, first_byte_timeout: 3s, idle_timeout: 3s,
           retries: 1, breaker: off}}
  refused: {{base_url: "http://127.0.0.1:{closed}/v1", timeout: 6s, retries: 1, breaker: off}}
  unresolved: {{base_url: "http://fathom.invalid/v1", timeout: 1s, retries: 1, breaker: off}}
  plaintext: {{base_url: "{tls}", timeout: 6s, retries: 1, breaker: off}}
  crowded: {{base_url: "http://127.0.0.1:{full}/v1", timeout: 1s, connect_timeout: 300ms, retries: 1, breaker: off}}
models:
  cheap: {{provider: first, model: small, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.0755555/Mtok, cache_write: $0.1875/Mtok, output: $0.60/Mtok}}}}
  dear: {{provider: second, model: large, context: 128000, max_output: 4000,
         price: {{input: $2.50/Mtok, cached_input: $1.25/Mtok, cache_write: $3.125/Mtok, output: $10/Mtok,
                 reasoning: $12.3456789/Mtok}}}}
  F01: {{provider: refused, model: x, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
  F02: {{provider: unresolved, model: x, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
  F03: {{provider: plaintext, model: x, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
  F04: {{provider: crowded, model: x, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
routes:
  - {{name: matrix, when: {{model: matrix}}, use: [cheap], on_failure: [dear]}}
  - {{name: f01, when: {{model: F01-first}}, use: [F01], on_failure: [cheap]}}
  - {{name: f02, when: {{model: F02-first}}, use: [F02], on_failure: [cheap]}}
  - {{name: f03, when: {{model: F03-first}}, use: [F03], on_failure: [cheap]}}
  - {{name: f04, when: {{model: F04-first}}, use: [F04], on_failure: [cheap]}}
limits: [{{key: "*", budget: $1000/month}}]
"""
UNREACHED = ("F01", "F02", "F03", "F04")
AT_A_TIME = 32
SOAK_ROUNDS = 10
MAX_GROWTH_KIB = 512 << 10
"""Of peak resident memory, over a run with eight gzip bombs of a gigabyte each."""


@dataclass(frozen=True)
class Case:
    fault: str
    variant: str
    stream: bool
    on: Literal["first", "all"]
    effect: Effect

    @property
    def call(self) -> str:
        return "-".join((self.fault, self.variant, "stream" if self.stream else "plain", self.on))

    def body(self, bait: str) -> dict[str, Any]:
        metadata = {"call": self.call, "words": "12", "reasoning": "2"}
        model = "matrix"
        if self.fault in UNREACHED:
            model = f"{self.fault}-first" if self.on == "first" else self.fault
        else:
            metadata |= {"fault": self.fault, "variant": self.variant, "on": self.on}
        if self.fault == "F14":
            metadata["location"] = bait
        if self.fault == "F23":
            metadata["pace_ms"] = "50"
        # The name in the words: the exact cache leaves metadata out of its keys.
        messages = [{"role": "user", "content": f"how deep is the water under {self.call}"}]
        return {"model": model, "messages": messages, "stream": self.stream, "max_tokens": 100, "metadata": metadata}


def cases() -> Iterator[Case]:
    for fault in FAULTS:
        for variant in fault.variants:
            for stream, effect in ((False, variant.plain), (True, variant.stream)):
                if effect is not None:
                    yield Case(fault.id, variant.name, stream, "first", effect)
                    yield Case(fault.id, variant.name, stream, "all", effect)


# what must hold ------------------------------------------------------------------------------------------------------


def problems(case: Case, told: Transcript, call: Call) -> Iterator[str]:
    """All that is wrong with one case, in words."""
    yield from told.problems()
    if len(call.requests) != 1:
        yield f"{len(call.requests)} request rows"
        return
    if call.request["id"] != told.request_id:
        yield "the row has another request id than the answer"
    if call.request["cost_nanousd"] != sum(attempt["cost_nanousd"] for attempt in call.attempts):
        yield "the request does not cost what its attempts cost"
    yield from _course(case, told, call)
    yield from _bills(case, told, call)


def _course(case: Case, told: Transcript, call: Call) -> Iterator[str]:
    """How often it was tried, and what became of it."""
    effect, tried = case.effect, len(call.attempts)
    broke_off = told.status == 200 and told.error is not None and case.stream
    if effect.when == "served":
        expected = tried == 1 and told.served
    elif effect.when == "after":
        expected = tried == 1 and broke_off
    elif effect.when == "torn" and broke_off:
        expected = tried == 1 or case.on == "all"
    elif case.fault in UNREACHED:  # by name, or with a fallback
        expected = told.served if case.on == "first" else told.status == effect.status
    elif case.on == "first":
        expected = tried == 2 and told.served
    else:
        expected = 2 <= tried <= 4 and told.status == effect.status
    if not expected:
        yield (
            f"{tried} attempts {[a['outcome'] for a in call.attempts]}, status {told.status}, error {told.error}; "
            f"it should be {effect.when} the first byte ({effect.status})"
        )
    if (call.request["outcome"] == "ok") != told.served:
        yield f"the ledger says {call.request['outcome']}"


def _bills(case: Case, told: Transcript, call: Call) -> Iterator[str]:
    """Each attempt has its call at the upstream, and the money for it."""
    reached = [attempt for attempt in call.attempts if attempt["outcome"] != "connect"]
    for attempt in call.attempts:
        if attempt["outcome"] == "connect" and (attempt["cost_nanousd"] or attempt["cost_estimated"]):
            yield "an attempt that never got through is billed"
    if len(reached) != len(call.truth):
        yield f"{len(reached)} attempts got through, and the upstream knows {len(call.truth)}"
        return
    for attempt, row in zip(reached, call.truth, strict=True):
        effect = case.effect if row.fault else EXACT
        if attempt["outcome"] not in effect.outcomes:
            yield f"outcome {attempt['outcome']}, not {sorted(effect.outcomes)} ({attempt['error']})"
        delivered = len(told.deltas()) if told.streamed and attempt is call.attempts[-1] else 0
        yield from _bill(effect, attempt, row, delivered, call.request["reserved_nanousd"])


def _bill(effect: Effect, attempt: dict[str, Any], row: Row, delivered: int, held: int) -> Iterator[str]:
    cost, estimated = attempt["cost_nanousd"], attempt["cost_estimated"]
    if effect.bill == "exact":
        if not row.reported or estimated or cost != row.nanousd or tokens_of(attempt) != row.tokens:
            yield f"billed {cost} for {tokens_of(attempt)}, the upstream {row.nanousd} for {row.tokens}"
        if row.stream and delivered != row.delivered_tokens:
            yield f"{delivered} pieces of text arrived of {row.delivered_tokens}"
    elif effect.bill == "nothing":
        if cost or estimated or row.nanousd:
            yield f"billed {cost} for nothing"
    else:
        least = nanousd(row.model, replace(row.tokens, output=delivered, reasoning=0))
        if not estimated or row.reported or not least <= cost <= held:
            yield f"estimated ({estimated}) at {cost}, not between {least} delivered and {held} held"
        if delivered > row.delivered_tokens:
            yield f"{delivered} pieces of text arrived of {row.delivered_tokens}"


# the run -------------------------------------------------------------------------------------------------------------


async def ask(gateway: Gateway, case: Case, bait: str) -> Transcript:
    async with gateway.session.post(
        f"{gateway.url}/v1/chat/completions",
        json=case.body(bait),
        headers=gateway.headers(**{"X-Session-Id": case.call}),
    ) as response:
        raw = await response.read()
        return Transcript(response.status, response.headers["x-request-id"], response.content_type, raw)


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Bound, so that nobody else takes it, and not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A listener that accepts nobody and whose queue is full: further connections hang in the kernel."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            queued = stack.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.asynccontextmanager
async def bait_host() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Where the redirects point: its URL, and what came."""
    came: list[bytes] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(await reader.read(1 << 16))
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat/completions", came
    server.close()


@contextlib.contextmanager
def nothing_unhandled() -> Iterator[None]:
    """Fails on an exception that nobody handled: in a task, in a callback, in the server."""
    seen: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: seen.append(repr(context)))
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        loop.set_exception_handler(None)
    assert not seen


def open_sockets() -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return count


@pytest.mark.timeout(600)
async def test_every_fault_leaves_books_that_agree(tmp_path: Path, size: Size) -> None:
    for number in range(size(1, SOAK_ROUNDS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        await run_matrix(folder)


async def run_matrix(folder: Path) -> None:
    """All cases on a gateway and an upstream of their own."""
    tasks_before, sockets_before = asyncio.all_tasks(), open_sockets()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    all_cases, truth = list(cases()), folder / "truth"
    with nothing_unhandled(), closed_port() as closed, full_backlog() as full, upstream_process(truth) as upstream:
        tls = upstream.url.replace("http", "https")
        policy = POLICY.format(url=upstream.url, tls=tls, closed=closed, full=full)
        async with bait_host() as (bait, came), running(policy, folder / "home") as gateway:
            tasks_idle = len(asyncio.all_tasks())
            gate = asyncio.Semaphore(AT_A_TIME)

            async def one(case: Case) -> Transcript:
                async with gate:
                    return await ask(gateway, case, bait)

            told = await asyncio.gather(*[one(case) for case in all_cases])
            await until(lambda: len(asyncio.all_tasks()) <= tasks_idle)
            lifecycle = gateway.app.state.lifecycle
            assert [budget.reserved_nanousd for budget in lifecycle.budgets.all()] == [0]
            assert lifecycle.metrics.in_flight.value == 0
            await lifecycle.ledger.flush(timeout_s=30)
            calls = join(upstream.rows(), lifecycle.ledger.engine)
    assert came == [], "a redirect was followed"
    assert set(calls) == {case.call for case in all_cases}, "a row without its partner"
    found = [
        f"{case.call}: {problem}"
        for case, transcript in zip(all_cases, told, strict=True)
        for problem in problems(case, transcript, calls[case.call])
    ]
    assert not found, "\n".join(found)
    await until(lambda: asyncio.all_tasks() <= tasks_before and open_sockets() <= sockets_before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < MAX_GROWTH_KIB
