"""A provider whose streams come at a pace: 54 server-sent events, one write each, as a model's words come.

    python benchmarks/paced_upstream.py PORT

`max_tokens` in the body picks the pace: 256: the first event at once and 10 ms between events; 100: at once and 1 ms;
64: the first after 20 ms and 1 ms between. One timer ticks every millisecond and writes to all streams that are due, so
streams that began at different times stay apart. SIGUSR1 prints, as a line of JSON, how late the ticks were and starts
the count again.
"""

import asyncio
import json
import signal
import sys
from typing import cast

import uvloop

TICK_S = 0.001
SLOTS = 32
PACES = {b'"max_tokens":256': (0, 10), b'"max_tokens":100': (0, 1), b'"max_tokens":64': (20, 1)}
"""Field → ticks before the first event, ticks between events."""
WORDS = 50
EVENTS = WORDS + 4


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(choices: list[dict[str, object]], **more: object) -> bytes:
    event = {"id": "chatcmpl-paced", "object": "chat.completion.chunk", "created": 1, "model": "mock", **more}
    return b"data: " + json.dumps({**event, "choices": choices}, separators=(",", ":")).encode() + b"\n\n"


def _choice(delta: dict[str, str], finish: str | None = None) -> list[dict[str, object]]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]


def writes() -> list[bytes]:
    """The writes of one stream: head and first event, the words, the finish, the usage, `[DONE]` and the end."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    usage = {"prompt_tokens": 40, "completion_tokens": WORDS, "total_tokens": 40 + WORDS}
    events = [_chunk(_event(_choice({"content": f" word{number}"}))) for number in range(WORDS)]
    return [
        head + _chunk(_event(_choice({"role": "assistant", "content": ""}))),
        *events,
        _chunk(_event(_choice({}, "stop"))),
        _chunk(_event([], usage=usage)),
        _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    ]


WRITES = writes()


class Wheel:
    """Streams by the tick at which their next event is due."""

    def __init__(self) -> None:
        self._slots: list[list[Exchange]] = [[] for _ in range(SLOTS)]
        self._tick = 0
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self.late_s: list[float] = []
        self._loop.call_at(self._began, self._turn)

    def add(self, stream: "Exchange", ticks: int) -> None:
        self._slots[(self._tick + ticks) % SLOTS].append(stream)

    def _turn(self) -> None:
        now = self._loop.time()
        while (due := self._began + self._tick * TICK_S) <= now:
            slot = self._tick % SLOTS
            streams, self._slots[slot] = self._slots[slot], []
            if streams:
                self.late_s.append(now - due)
            for stream in streams:
                if stream.step():
                    self.add(stream, stream.gap)
            self._tick += 1
        self._loop.call_at(self._began + self._tick * TICK_S, self._turn)

    def report(self) -> None:
        late = sorted(self.late_s) or [0.0]
        self.late_s = []
        found = {"ticks": len(late), "late_p99_ms": late[len(late) * 99 // 100] * 1000, "late_max_ms": late[-1] * 1000}
        print(json.dumps(found), flush=True)


class Exchange(asyncio.Protocol):
    """One connection: a request, its stream, the next request."""

    def __init__(self, wheel: Wheel) -> None:
        self._wheel = wheel
        self._transport: asyncio.Transport | None = None
        self._got = b""
        self._next = 0
        self.gap = 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._got += data
        at = self._got.find(b"\r\n\r\n")
        if at < 0:
            return
        head = self._got[:at].lower()
        if not head.startswith(b"post "):  # LiteLLM looks at what else there is
            self._got = b""
            assert self._transport is not None
            self._transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(self._got) < at + 4 + int(length):
            return
        compact = self._got.replace(b'": ', b'":')
        first, self.gap = next((pace for field, pace in PACES.items() if field in compact), (0, 10))
        self._got = b""
        self._next = 0
        if first:
            self._wheel.add(self, first)
        elif self.step():
            self._wheel.add(self, self.gap)

    def step(self) -> bool:
        """Write the next event; False after the last."""
        if self._transport is None:
            return False
        self._transport.write(WRITES[self._next])
        self._next += 1
        return self._next < EVENTS


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    wheel = Wheel()
    loop.add_signal_handler(signal.SIGUSR1, wheel.report)
    server = await loop.create_server(lambda: Exchange(wheel), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
