"""The HTTP/1.1 client towards upstreams: a pool for each origin, exact errors, and nothing that is not needed.

No redirects, cookies, proxies, nor decompression: an answer must come as it was asked for. Against aiohttp and
pyreqwest in docs/decisions.md. Cancelling any call here closes its connection at once.
"""

import asyncio
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from gateway.upstream.connection import WRITE_BYTES, Connection, Timeouts, find_header
from gateway.upstream.http_errors import (
    BodyTooLarge,
    ConnectError,
    ConnectionCut,
    ConnectRefused,
    ConnectTimeout,
    DeadlineExceeded,
    NameNotFound,
    TlsFailed,
)

KEEP_ALIVE_S = 30.0
MAX_IDLE = 512
"""Idle connections kept for one origin."""
NEXT_ADDRESS_AFTER_S = 0.25
"""How long an address may take before the next is tried beside it (RFC 8305, section 5)."""
FORGIVEN_AFTER_S = 60.0
"""So long no connection serves again after a stream, once a server left one under a request."""
_LINE_BREAKS = frozenset("\r\n\0")


class RequestHead:
    """All of a request that stays the same from call to call, as bytes. Raises ValueError for what is no URL."""

    __slots__ = ("data", "head_only", "host", "origin", "port", "tls")

    def __init__(self, method: str, url: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError(f"{url!r} is no http:// or https:// URL with a host and without credentials")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        self.port = parts.port or (443 if self.tls else 80)
        self.origin = f"{parts.scheme}://{self.host}:{self.port}"
        self.head_only = method == "HEAD"
        named = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {(parts.path or '/') + ('?' + parts.query if parts.query else '')} HTTP/1.1"]
        lines.append(f"Host: {named}" if parts.port is None else f"Host: {named}:{parts.port}")
        for name, value in (*headers, ("Accept-Encoding", "identity")):
            if _LINE_BREAKS & {*name, *value}:
                raise ValueError(f"the value of the header {name!r} holds a line break or a zero byte")
            lines.append(f"{name}: {value}")
        self.data = "\r\n".join(lines).encode("latin-1") + b"\r\nContent-Length: "


@dataclass(frozen=True, slots=True)
class Statistics:
    """Connections: `open` ones are `idle` or `in_use`; `connecting` ones are not open yet."""

    open: int
    idle: int
    in_use: int
    connecting: int


class HttpResponse:
    """An answer whose headers are here. Read it, then `release` it; `abort` closes its connection at once."""

    __slots__ = ("_connection", "_head", "_pool", "status")

    def __init__(self, connection: Connection, pool: "_Pool") -> None:
        self.status = connection.status
        self._head = connection.head
        self._connection: Connection | None = connection
        self._pool = pool

    def header(self, name: bytes) -> str | None:
        """The first value of a header, in lower case as `name` must be."""
        value = find_header(self._head, name)
        return value.decode("latin-1") if value is not None else None

    async def read_some(self) -> bytes:
        """What has arrived since the last read, waiting for it if need be; b"" at the true end. Raises HttpError."""
        connection = self._live()
        while not connection.parts:
            if connection.complete:
                return b""
            if connection.error is not None:
                raise connection.error
            try:
                await connection.wait()
            except BaseException:
                self.abort()
                raise
        return connection.take()

    async def hand_over(self, take: Callable[[bytes], bool]) -> None:
        """Have `take` called with what arrives, in the very callback that read it, until it returns False, the body
        ends or breaks off: `read_some` says which. Raises what `take` raises."""
        connection = self._live()
        while connection.parts:
            if not take(connection.take()):
                return
        if connection.complete or connection.error is not None:
            return
        try:
            await connection.hand_over(take)
        except BaseException:
            self.abort()
            raise
        finally:
            connection.taker = None

    async def read(self, max_bytes: int) -> bytes:
        """The whole body. Raises HttpError, BodyTooLarge (and closes the connection) beyond `max_bytes`."""
        connection = self._live()
        body = connection.take() if connection.parts else await self.read_some()
        if connection.complete and not connection.parts and len(body) <= max_bytes:
            return body
        parts, size = [body], len(body)
        while size <= max_bytes and (body := await self.read_some()):
            parts.append(body)
            size += len(body)
        if size > max_bytes:
            self.abort()
            raise BodyTooLarge(f"a body of more than {max_bytes} bytes", reused=connection.reused)
        return b"".join(parts)

    def release(self, linger_s: float = 0.0) -> None:
        """Give the connection back for the next request if the body has come to its end, else close it.

        `linger_s`: first wait so long for that end, beside the caller, who does not care for what comes until then.
        """
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if linger_s and not connection.complete and connection.error is None:
            connection.drain(linger_s)
        elif connection.finish():
            self._pool.put(connection)

    def abort(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def _live(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("this response was released or aborted before")
        return self._connection


class HttpClient:
    """All connections of one worker to all upstreams. To be made and used in one event loop."""

    def __init__(
        self,
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        max_idle: int = MAX_IDLE,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._keep_alive_s = keep_alive_s
        self._max_idle = max_idle
        self._make_tls = tls
        self._tls: ssl.SSLContext | None = None
        self._pools: dict[str, _Pool] = {}
        self._closed = False

    async def request(
        self, head: RequestHead, body: bytes, timeouts: Timeouts, on_sent: Callable[[], None] | None = None
    ) -> HttpResponse:
        """Send one request and wait for the headers of its answer. Raises HttpError.

        `on_sent` is called right before its first byte goes out: who leaves before has asked nobody for anything.
        """
        if self._closed:
            raise RuntimeError("the client is closed")
        pool = self._pools.get(head.origin)
        if pool is None:
            pool = self._pools[head.origin] = _Pool(self._keep_alive_s, self._max_idle)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeouts.total_s
        connection = pool.take()
        if connection is None:
            connection = await self._connect(head, pool, timeouts)
        try:
            data = head.data + b"%d\r\n\r\n" % len(body)
            more = len(body) > WRITE_BYTES
            first = data if more else data + body
            connection.start(
                first, timeouts, deadline,
                head_only=head.head_only, more=more, crowded=pool.crowded(), on_sent=on_sent,
            )  # fmt: skip
            if more:
                await connection.upload(body)
            while not connection.answered:
                if connection.error is not None:
                    raise connection.error
                await connection.wait()
            if connection.error is not None and not connection.parts:
                raise connection.error
        except BaseException:
            connection.abort()
            raise
        return HttpResponse(connection, pool)

    def statistics(self) -> Statistics:
        pools = self._pools.values()
        open_ = sum(len(pool.open) for pool in pools)
        idle = sum(len(pool.idle) for pool in pools)
        return Statistics(open_, idle, open_ - idle, sum(pool.connecting for pool in pools))

    async def close(self) -> None:
        """Close every connection; what is under way fails."""
        self._closed = True
        for pool in self._pools.values():
            for connection in tuple(pool.open):
                connection.fail(ConnectionCut("the client was closed", reused=connection.reused))
        await asyncio.sleep(0)  # the loop closes the sockets in its next round

    async def _connect(self, head: RequestHead, pool: "_Pool", timeouts: Timeouts) -> Connection:
        """A new connection of the pool, by the first address that answers. Raises ConnectError, DeadlineExceeded."""
        limit_s = min(timeouts.connect_s, timeouts.total_s)
        pool.connecting += 1
        try:
            async with asyncio.timeout(limit_s):
                tls = await self._tls_context() if head.tls else None
                connection = await pool.connect(head.host, head.port, tls)
        except TimeoutError as error:
            if timeouts.total_s <= timeouts.connect_s:
                late = DeadlineExceeded(f"not connected within the whole {limit_s:g} s")
                late.may_be_billed = False
                raise late from error
            raise ConnectTimeout(f"not connected within {limit_s:g} s") from error
        finally:
            pool.connecting -= 1
        if self._closed:
            connection.abort()
            raise ConnectRefused("the client was closed meanwhile")
        return connection

    async def _tls_context(self) -> ssl.SSLContext:
        """Certificates are checked against the system's authorities, or those of SSL_CERT_FILE; reading them blocks."""
        if self._tls is None:
            self._tls = await asyncio.to_thread(self._make_tls)
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


class _Pool:
    """The connections to one origin. The one used last is used next, so that the others can grow old and go."""

    def __init__(self, keep_alive_s: float, max_idle: int) -> None:
        self.open: set[Connection] = set()
        self.idle: list[Connection] = []
        self.connecting = 0
        self._stays = False
        """One of its connections has served again after a stream, and none has left since."""
        self._left_at = -math.inf
        """When one did under a request."""
        self._keep_alive_s = keep_alive_s
        self._max_idle = max_idle

    def take(self) -> Connection | None:
        for at in range(len(self.idle) - 1, -1, -1):
            connection = self.idle[at]
            if not self._stays and not connection.rested:
                continue
            del self.idle[at]
            if connection.usable(trusted=self._stays or not connection.streamed):
                return connection
            connection.abort()
        return None

    def crowded(self) -> bool:
        """Whether several exchanges are under way."""
        return len(self.open) - len(self.idle) > 1

    def put(self, connection: Connection) -> None:
        forgiven = time.monotonic() - self._left_at >= FORGIVEN_AFTER_S
        self._stays = self._stays or (forgiven and connection.after_stream)
        if len(self.idle) >= self._max_idle or (connection.streamed and not forgiven):
            connection.abort()
            return
        self.idle.append(connection)
        connection.rest(self._keep_alive_s)

    def gone(self, connection: Connection) -> None:
        self.open.discard(connection)
        if connection.left_after_stream:
            self._stays, self._left_at = False, time.monotonic()
        if not connection.exchanging and connection in self.idle:
            self.idle.remove(connection)
            if connection.left and not connection.rested:
                self._stays = False

    async def connect(self, host: str, port: int, tls: ssl.SSLContext | None) -> Connection:
        loop = asyncio.get_running_loop()

        async def connect_to(address: str) -> Connection:
            _, connection = await loop.create_connection(
                lambda: Connection(loop, self.put, self.gone),
                address,
                port,
                ssl=tls,
                server_hostname=host if tls is not None else None,
            )
            return connection

        try:
            connection = await _first(connect_to, await _addresses(host, port))
        except ssl.SSLError as error:
            raise TlsFailed(f"no TLS with {host}: {_why(error)}") from error
        except ConnectionRefusedError as error:
            raise ConnectRefused(f"{host}:{port} refuses connections") from error
        except TimeoutError:
            raise
        except OSError as error:
            if tls is not None and isinstance(error, ConnectionError):
                raise TlsFailed(f"{host} left in the middle of the TLS handshake: {_why(error)}") from error
            raise ConnectRefused(f"{host}:{port} cannot be reached: {_why(error)}") from error
        if connection.closed:
            raise ConnectRefused(f"{host}:{port} accepts connections and closes them at once")
        self.open.add(connection)
        return connection


async def _addresses(host: str, port: int) -> list[str]:
    """The host's addresses, families taking turns (RFC 8305, section 4). Raises NameNotFound."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NameNotFound(f"the name {host} has no address: {_why(error)}") from error
    by_family: dict[int, list[str]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, []).append(str(address[0]))
    turns = max((len(addresses) for addresses in by_family.values()), default=0)
    return [addresses[turn] for turn in range(turns) for addresses in by_family.values() if turn < len(addresses)]


async def _first(connect: Callable[[str], Awaitable[Connection]], addresses: list[str]) -> Connection:
    """Happy eyeballs (RFC 8305), which uvloop does not have: each address gets a head start over the next."""
    if len(addresses) == 1:
        return await connect(addresses[0])
    waiting = list(addresses)
    running: set[asyncio.Future[Connection]] = set()
    first_error: BaseException | None = None
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.ensure_future(connect(waiting.pop(0))))
            done, _ = await asyncio.wait(
                running,
                timeout=NEXT_ADDRESS_AFTER_S if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for attempt in done:
                running.discard(attempt)
                error = attempt.exception()
                if error is None:
                    running.update(done - {attempt})
                    return attempt.result()
                first_error = first_error or error
    finally:
        for attempt in running:
            attempt.add_done_callback(_abort_late)
            attempt.cancel()
    raise first_error or ConnectError("the name has no address")


def _abort_late(attempt: "asyncio.Future[Connection]") -> None:
    """Another address was faster."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().abort()


def _why(error: BaseException) -> str:
    return str(error)[:200] or type(error).__name__
