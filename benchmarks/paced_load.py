"""Callers of paced streams, at a steady rate whatever comes back (open loop), or one after the other.

    BENCH_KEY=… python benchmarks/paced_load.py PORT SECONDS STREAMS_PER_S|one SEED

Prints one line of JSON. Requests are built beforehand, each with a prompt of its own; connections are kept and used
again. A stream counts when it began with status 200 and its last event before the end of its body is `[DONE]`.
"""

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from typing import cast

import uvloop

TICK_S = 0.001
GIVE_UP_S = 20.0
"""After the last start: what has not ended by then is broken."""
END = b"\r\n0\r\n\r\n"


def requests(port: int, key: str, seed: int, count: int, max_tokens: int) -> list[bytes]:
    built = []
    for number in range(count):
        body = (
            f'{{"model":"mock","messages":[{{"role":"system","content":"You are a helpful assistant."}},'
            f'{{"role":"user","content":"Question {seed}-{number}: which planets have rings, and what of?"}}],'
            f'"max_tokens":{max_tokens},"stream":true,"stream_options":{{"include_usage":true}}}}'
        )
        built.append(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
    return built


class Caller(asyncio.Protocol):
    """One connection; one stream at a time."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._busy:
            self._load.ended(broken=True)
        if self in self._load.free:
            self._load.free.remove(self)

    def ask(self, request: bytes) -> None:
        assert self._transport is not None
        self._busy = True
        self._reads = 0
        self._tail = b""
        self._began_ns = time.perf_counter_ns()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._reads:
            self._first_ns = time.perf_counter_ns()
            self._ok = data.startswith(b"HTTP/1.1 200")
        self._reads += 1
        self._tail = tail = (self._tail + data)[-400:]
        if tail.endswith(END) or (not self._ok and self._reads == 1):
            self._end(tail)

    def _end(self, tail: bytes) -> None:
        load = self._load
        self._busy = False
        if not self._ok or b"data: [DONE]" not in tail:
            load.ended(broken=True)
            return
        now_ns = time.perf_counter_ns()
        load.first_us.append((self._first_ns - self._began_ns) / 1000)
        load.lasted_ms.append((now_ns - self._first_ns) / 1e6)
        load.reads += self._reads
        load.free.append(self)
        load.ended()


class Load:
    def __init__(self, port: int) -> None:
        self._port = port
        self.free: list[Caller] = []
        self.broken = 0
        self.reads = 0
        self.first_us: list[float] = []
        self.lasted_ms: list[float] = []
        self.late_s: list[float] = []
        self._left = 0
        self._all_ended = asyncio.Event()

    def ended(self, broken: bool = False) -> None:
        self.broken += broken
        self._left -= 1
        if not self._left:
            self._all_ended.set()

    async def all_ended(self) -> None:
        """Those that have not ended after a while are broken."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_ended.wait(), GIVE_UP_S)
        self.broken += self._left
        self._all_ended.clear()

    async def connect(self) -> Caller:
        loop = asyncio.get_running_loop()
        _, caller = await loop.create_connection(lambda: Caller(self), "127.0.0.1", self._port)
        return caller

    async def steady(self, built: list[bytes], per_s: float) -> float:
        """Start them at this rate, wait for all; seconds from the first start to the last."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        opening: set[asyncio.Task[None]] = set()
        self._left = len(built)
        began = loop.time()
        sent = 0

        async def fresh(request: bytes) -> None:
            (await self.connect()).ask(request)

        def turn() -> None:
            nonlocal sent
            now = loop.time()
            while sent < len(built) and began + sent / per_s <= now:
                self.late_s.append(now - (began + sent / per_s))
                if self.free:
                    self.free.pop().ask(built[sent])
                else:
                    task = asyncio.ensure_future(fresh(built[sent]))
                    opening.add(task)
                    task.add_done_callback(opening.discard)
                sent += 1
            if sent < len(built):
                loop.call_later(TICK_S, turn)
            else:
                done.set_result(None)

        turn()
        await done
        took = loop.time() - began
        await self.all_ended()
        return took

    async def one_after_another(self, built: list[bytes], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        caller = await self.connect()
        ends = loop.time() + seconds
        for request in built:
            self._left = 1
            caller.ask(request)
            await self.all_ended()
            if self.broken or loop.time() > ends:
                return


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


async def main(port: int, seconds: float, rate: str, seed: int) -> None:
    key, load = os.environ.get("BENCH_KEY", "none"), Load(port)
    took = 0.0
    if rate == "one":
        built = requests(port, key, seed, int(seconds * 1000), max_tokens=100)
        gc.freeze()
        await load.one_after_another(built, seconds)
    else:
        built = requests(port, key, seed, max(1, round(seconds * float(rate))), max_tokens=256)
        gc.freeze()
        took = await load.steady(built, float(rate))
    ended = len(load.first_us)
    result = {
        "streams": ended,
        "broken": load.broken,
        "started_per_s": (len(load.late_s) - 1) / took if took else 0.0,
        "start_late_p99_ms": quantile(load.late_s, 0.99) * 1000,
        "first_p50_us": quantile(load.first_us, 0.5),
        "first_p99_us": quantile(load.first_us, 0.99),
        "lasted_p50_ms": quantile(load.lasted_ms, 0.5),
        "lasted_p99_ms": quantile(load.lasted_ms, 0.99),
        "reads_per_stream": load.reads / ended if ended else 0.0,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
