"""The HTTP server of one worker: uvicorn with our limits, and a stop that drops nothing.

Stopping is draining. New connections are no longer taken; what is under way ends as it would have; each further answer
on a connection kept alive says `Connection: close`, so that its client goes elsewhere without an error. A connection
on which nothing happens for `IDLE_GRACE_S` is closed. What is still running after the drain window is cancelled, which
bills it, and then the application stops in order.
"""

import asyncio
import contextlib
import ctypes
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from gateway.edge.protocol import GuardedProtocol
from gateway.telemetry.logs import get_logger

log = get_logger(__name__)

IDLE_GRACE_S = 2.0
"""How long a draining worker leaves an idle connection open: a client that uses it meets `Connection: close` first."""
CANCEL_S = 5.0
"""How long a request that was cancelled at the end of the drain may take to book what it cost."""
POLL_S = 0.02
_CLOSE = (b"connection", b"close")


class HttpServer(uvicorn.Server):
    """Ends in order, with status 0, on SIGTERM (drains up to `drain_s`) and on Ctrl-C (idle connections at once)."""

    def __init__(self, app: Any, drain_s: float, on_drain: Callable[[], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=GuardedProtocol, ws="none", lifespan="on", access_log=False, log_level="warning",
                log_config=None, proxy_headers=False, timeout_keep_alive=75, server_header=False, date_header=False,
            )
        )  # fmt: skip
        self._drain_s = drain_s
        self._on_drain = on_drain
        self._grace_s = IDLE_GRACE_S

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but for the signal that it raises again when all is over."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._told_to_stop, number)
        yield

    async def serve_on(self, listener: socket.socket) -> None:
        """Returns when the server has stopped; `started` says whether it ever ran."""
        with contextlib.suppress(SystemExit):  # uvicorn's way to say that the start failed; it has printed why
            await self.serve(sockets=[listener])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then stop the application."""
        if self._on_drain is not None:
            self._on_drain()
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        state = self.server_state
        state.default_headers = [*state.default_headers, _CLOSE]
        for connection in state.connections:
            if (cycle := getattr(connection, "cycle", None)) is not None:
                cycle.default_headers = state.default_headers  # an answer that is still to begin says it too
        await self._drain()
        if state.tasks:
            log.warning("drain.cancelled", requests=len(state.tasks))
            for task in state.tasks:
                task.cancel()
            await asyncio.wait(state.tasks, timeout=CANCEL_S)
        for connection in list(state.connections):
            connection.shutdown()
        await self.lifespan.shutdown()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        connections = self.server_state.connections
        deadline = loop.time() + self._drain_s
        quiet_since: dict[Any, float] = {}
        while (connections or self.server_state.tasks) and loop.time() < deadline:
            now = loop.time()
            for connection in list(connections):
                cycle = getattr(connection, "cycle", None)
                if cycle is not None and not cycle.response_complete:
                    quiet_since.pop(connection, None)
                elif now - quiet_since.setdefault(connection, now) >= self._grace_s:
                    connection.shutdown()
            await asyncio.sleep(POLL_S)
            if self.force_exit:
                return

    def _told_to_stop(self, number: int) -> None:
        if number == signal.SIGINT:
            self._grace_s = 0.0
        self.force_exit = self.should_exit and number == signal.SIGINT  # a second Ctrl-C waits for nobody
        self.should_exit = True


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


M_ARENA_MAX = -8
"""mallopt(3)."""


def share_heap() -> None:
    """One heap for all threads; call it before there are any. glibc gives each a heap of its own, 1 to 3 MB, so that
    they need not wait for each other: ours wait for the interpreter anyway."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


YOUNG_OBJECTS = 10_000
"""Objects made, less those gone, before the cycle collector looks at them."""


def settle_memory() -> None:
    """Collect from here on. What lives as long as the process is not looked at again by the cycle
    collector, which otherwise walks all of it every few hundred requests.

    A request leaves no cycles behind: all of it goes when its last reference does. With Python's own threshold of 700,
    what 64 requests under way hold is walked several times for each of them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    gc.enable()
