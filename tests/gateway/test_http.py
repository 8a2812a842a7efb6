"""The HTTP client against servers that send bytes by script, on asyncio's own loop and on uvloop."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.upstream import http_errors as errors
from gateway.upstream.connection import HIGH_WATER, Timeouts
from gateway.upstream.http import HttpClient, RequestHead, Statistics
from tests.gateway.conftest import until
from tests.gateway.raw_server import Play, RawServer, in_pieces, raw_server, then_close, then_reset

pytestmark = pytest.mark.anyio
PATIENT = Timeouts(connect_s=30, first_byte_s=30, idle_s=30, total_s=30)
NOTHING = Statistics(open=0, idle=0, in_use=0, connecting=0)
HELLO = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: t\r\n\r\n"
START = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    """After each test: everything closed, nothing forgotten."""
    client = HttpClient()
    yield client
    await client.close()
    assert client.statistics() == NOTHING


def to(server: RawServer, method: str = "POST", scheme: str = "http", host: str = "127.0.0.1") -> RequestHead:
    return RequestHead(method, f"{scheme}://{host}:{server.port}/v1/x", [("X-A", "b")])


async def whole(client: HttpClient, head: RequestHead, body: bytes = b"{}", timeouts: Timeouts = PATIENT) -> bytes:
    response = await client.request(head, body, timeouts)
    try:
        return await response.read(1 << 30)
    finally:
        response.release()


async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


# answers -------------------------------------------------------------------------------------------------------------


async def test_a_connection_serves_again(client: HttpClient) -> None:
    async with raw_server(HELLO) as server:
        for _ in range(3):
            assert await whole(client, to(server)) == b"hello"
        assert server.connections == 1
        assert client.statistics() == Statistics(open=1, idle=1, in_use=0, connecting=0)
        host = b"Host: 127.0.0.1:%d\r\n" % server.port
        fixed = b"X-A: b\r\nAccept-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}"
        assert server.requests == [b"POST /v1/x HTTP/1.1\r\n" + host + fixed] * 3


@pytest.mark.parametrize(
    "answer", [HELLO, b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" + CHUNKED], ids=["plain", "chunked"]
)
async def test_an_answer_cut_anywhere_is_the_same_answer(client: HttpClient, answer: bytes) -> None:
    plays = [in_pieces(answer[:cut], answer[cut:]) for cut in range(1, len(answer))]
    async with raw_server(*plays, in_pieces(*[answer[i : i + 1] for i in range(len(answer))], pause_s=0)) as server:
        for _ in range(len(answer)):
            assert await whole(client, to(server)) == b"hello"
        assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "body", "kept"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno", b"no", True),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 3 + HELLO, b"hello", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", b"hi", False),
        (then_close(b"HTTP/1.1 200 OK\r\n\r\nto the end"), b"to the end", False),
        (HELLO + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"hello", False),
        (HELLO + b"garbage", b"hello", False),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Length: 2\r\n\r\nhi", b"hi", True),
    ],
    ids=["204", "500", "interim", "1.0", "close", "to the end", "pipelined", "garbage", "identity"],
)
async def test_how_an_answer_ends(client: HttpClient, answer: Play, body: bytes, kept: bool) -> None:
    async with raw_server(answer, HELLO) as server:
        assert await whole(client, to(server)) == body
        assert await whole(client, to(server)) == b"hello"
        assert server.connections == (1 if kept else 2)


async def test_a_head_request_has_no_body_to_wait_for(client: HttpClient) -> None:
    async with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", HELLO) as server:
        assert await whole(client, to(server, "HEAD"), b"") == b""
        assert await whole(client, to(server)) == b"hello"


async def test_headers_are_found_whatever_their_case(client: HttpClient) -> None:
    answer = (
        b"HTTP/1.1 429 Slow\r\nx-content-type: no\r\nRETRY-After:  7 \r\nContent-Type:a/b\r\nContent-Length: 0\r\n\r\n"
    )
    async with raw_server(answer) as server:
        response = await client.request(to(server), b"", PATIENT)
        response.release()
        assert response.status == 429
        assert response.header(b"retry-after") == "7"
        assert response.header(b"content-type") == "a/b"
        assert response.header(b"after") is None
        with pytest.raises(RuntimeError, match="released"):
            await response.read_some()


# what goes wrong -----------------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
INTERIM = b"HTTP/1.1 102 Wait\r\n\r\n"
MANY = b"".join(b"X-%d: y\r\n" % i for i in range(300))


@pytest.mark.parametrize(
    ("play", "error"),
    [
        (then_close(b""), errors.ClosedBeforeHeaders),
        (then_reset(b""), errors.ClosedBeforeHeaders),
        (then_close(OK + b"Content-Le"), errors.ClosedInHeaders),
        (then_close(b"HTTP/1.1 100 Continue\r\n\r\n" + OK), errors.ClosedInHeaders),
        (then_close(OK + b"Content-Length: 5\r\n\r\nhell"), errors.TruncatedBody),
        (then_close(START), errors.TruncatedBody),
        (then_close(START + b"0\r\n"), errors.TruncatedBody),
        (then_reset(OK + b"\r\nhalf"), errors.TruncatedBody),
        (b"SSH-2.0-OpenSSH_9.2\r\n", errors.MalformedResponse),
        (b"HTTP/2 200\r\n\r\n", errors.MalformedResponse),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi", errors.MalformedResponse),
        (OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi", errors.MalformedResponse),
        (OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nhi", errors.MalformedResponse),
        (OK + b"Content-Length: -1\r\n\r\n", errors.MalformedResponse),
        (OK + b"X: a\r\n folded\r\nContent-Length: 0\r\n\r\n", errors.MalformedResponse),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", errors.MalformedResponse),
        (START + b"zz\r\n", errors.MalformedResponse),
        (OK + b"X: " + b"y" * (70 << 10), errors.HeadersTooLarge),
        (OK + b"X: " + b"y" * (70 << 10) + b"\r\nContent-Length: 0\r\n\r\n", errors.HeadersTooLarge),
        (OK + MANY + b"Content-Length: 0\r\n\r\n", errors.HeadersTooLarge),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", errors.UnsupportedEncoding),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", errors.UnsupportedEncoding),
        (then_close(OK + b"Transfer-Encoding: gzip\r\n\r\nx"), errors.UnsupportedEncoding),
    ],
)
async def test_each_broken_answer_has_its_own_error(
    client: HttpClient, play: Play, error: type[errors.HttpError]
) -> None:
    async with raw_server(HELLO, play) as server:
        await whole(client, to(server))
        with pytest.raises(error) as caught:
            await whole(client, to(server))
        assert type(caught.value) is error
        assert (caught.value.may_be_billed, caught.value.reused) == (True, True)
        assert server.connections == 1
        assert client.statistics() == NOTHING


@pytest.mark.parametrize(
    ("play", "timeouts", "error"),
    [
        (hangs, Timeouts(30, 0.1, 30, 30), errors.FirstByteTimeout),
        (in_pieces(OK + b"\r\n", b"", pause_s=2), Timeouts(30, 0.1, 30, 30), errors.FirstByteTimeout),
        (in_pieces(START, b"", pause_s=2), Timeouts(30, 30, 0.1, 30), errors.IdleTimeout),
        (in_pieces(START, *[b"1\r\nx\r\n"] * 200, pause_s=0.01), Timeouts(30, 30, 30, 0.3), errors.DeadlineExceeded),
        (in_pieces(*[INTERIM] * 200, pause_s=0.01), Timeouts(30, 0.2, 30, 30), errors.FirstByteTimeout),
        (hangs, Timeouts(30, 30, 30, 0.1), errors.DeadlineExceeded),
    ],
    ids=["silence", "no body", "idle", "trickle", "interim for ever", "deadline"],
)  # fmt: skip
async def test_each_patience_ends_in_its_own_error(
    client: HttpClient, play: Play, timeouts: Timeouts, error: type[errors.HttpError]
) -> None:
    async with raw_server(play) as server:
        with pytest.raises(error) as caught:
            await whole(client, to(server), timeouts=timeouts)
        assert (type(caught.value), caught.value.may_be_billed, caught.value.reused) == (error, True, False)
        assert client.statistics() == NOTHING


async def test_a_steady_stream_outlives_its_idle_and_first_byte_limits(client: HttpClient) -> None:
    async with raw_server(in_pieces(START, *[b"1\r\nx\r\n"] * 30, b"0\r\n\r\n", pause_s=0.05)) as server:
        body = await whole(client, to(server), timeouts=Timeouts(30, 1, 1, 30))
        assert body == b"hel" + b"x" * 30


async def test_what_was_never_sent_is_never_billed(client: HttpClient) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        refused = RequestHead("POST", f"http://127.0.0.1:{port}/")
        with pytest.raises(errors.ConnectRefused, match="refuses") as caught:
            await whole(client, refused)
        assert not caught.value.may_be_billed
    with pytest.raises(errors.NameNotFound) as unnamed:
        await whole(client, RequestHead("POST", "http://no-such-host.invalid/"))
    assert not unnamed.value.may_be_billed


async def test_a_body_beyond_the_bound_is_refused(client: HttpClient) -> None:
    async with raw_server(HELLO) as server:
        response = await client.request(to(server), b"", PATIENT)
        with pytest.raises(errors.BodyTooLarge):
            await response.read(4)
        assert client.statistics() == NOTHING
        response = await client.request(to(server), b"", PATIENT)
        assert await response.read(5) == b"hello"
        response.release()


def test_a_head_is_checked_when_it_is_made() -> None:
    for url in ("ftp://x/", "http:///x", "x", "https://user:secret@host/"):
        with pytest.raises(ValueError, match="URL"):
            RequestHead("POST", url)
    with pytest.raises(ValueError, match="Authorization") as caught:
        RequestHead("POST", "http://x/", [("Authorization", "Bearer canary\n")])
    assert "canary" not in str(caught.value)
    assert b"Host: [::1]:81\r\n" in RequestHead("POST", "http://[::1]:81/x?y=z").data
    assert b"Host: xn--bcher-kva.example\r\n" in RequestHead("POST", "https://bücher.example").data


# the pool ------------------------------------------------------------------------------------------------------------


async def test_a_connection_that_its_server_closed_is_not_used_again(client: HttpClient) -> None:
    async with raw_server(HELLO) as server:
        await whole(client, to(server))
        server.writers[0].close()
        await until(lambda: client.statistics() == NOTHING)
        assert await whole(client, to(server)) == b"hello"
        assert server.connections == 2


async def test_an_idle_connection_that_speaks_is_not_used_again(client: HttpClient) -> None:
    async with raw_server(HELLO) as server:
        await whole(client, to(server))
        server.writers[0].write(HELLO)
        await until(lambda: client.statistics() == NOTHING)
        assert await whole(client, to(server)) == b"hello"
        assert server.connections == 2


async def test_a_goodbye_that_the_loop_has_not_read_yet_is_noticed(client: HttpClient) -> None:
    """The loop was busy while the server closed: without a look at the socket, a paid call would be lost."""
    answered, served = threading.Event(), 0
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            nonlocal served
            for _ in range(2):
                connection = listening.accept()[0]
                connection.recv(1 << 16)
                connection.sendall(HELLO)
                served += 1
                answered.wait(30)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        head = RequestHead("POST", f"http://127.0.0.1:{listening.getsockname()[1]}/")
        assert await whole(client, head) == b"hello"
        answered.set()
        time.sleep(1.2)  # noqa: ASYNC251 - it is the loop that must not run
        assert await whole(client, head) == b"hello"
        assert served == 2
        await asyncio.to_thread(thread.join)


async def test_idle_connections_grow_old_and_few() -> None:
    client = HttpClient(keep_alive_s=0.2, max_idle=2)
    async with raw_server(HELLO) as server:
        await asyncio.gather(*[whole(client, to(server)) for _ in range(5)])
        assert client.statistics() == Statistics(open=2, idle=2, in_use=0, connecting=0)
        await until(lambda: client.statistics() == NOTHING)
        await until(lambda: server.left == 5)
    await client.close()


async def test_the_rest_of_a_stream_is_read_beside_its_reader(client: HttpClient) -> None:
    async with raw_server(in_pieces(START, b"0\r\n\r\n", pause_s=0.1)) as server:
        for _ in range(2):
            response = await client.request(to(server), b"", PATIENT)
            assert await response.read_some() == b"hel"
            response.release(linger_s=30)
            await until(lambda: client.statistics().idle == 1)
        assert server.connections == 1
    async with raw_server(in_pieces(START, START * 20_000, b"", pause_s=0.1)) as endless:
        response = await client.request(to(endless), b"", PATIENT)
        await response.read_some()
        response.release(linger_s=30)
        await until(lambda: client.statistics().in_use == 0 and endless.left == 1)
    async with raw_server(in_pieces(START, b"", pause_s=30)) as silent:
        response = await client.request(to(silent), b"", PATIENT)
        await response.read_some()
        response.release(linger_s=0.05)
        await until(lambda: client.statistics().in_use == 0)


async def test_closing_the_client_ends_what_is_under_way() -> None:
    client = HttpClient()
    async with raw_server(hangs) as server:
        call = asyncio.ensure_future(whole(client, to(server)))
        await until(lambda: server.requests)
        await client.close()
        with pytest.raises(errors.ConnectionCut):
            await call
        with pytest.raises(RuntimeError):
            await whole(client, to(server))
    assert client.statistics() == NOTHING


# bounds --------------------------------------------------------------------------------------------------------------


async def test_a_slow_reader_makes_a_fast_server_wait(client: HttpClient) -> None:
    size, sent = 64 << 20, 0
    block = bytes(1 << 18)

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(block)
            sent += len(block)
            await writer.drain()

    async with raw_server(flood) as server:
        response = await client.request(to(server), b"", PATIENT)
        before = -1
        while before != sent:  # until the server is stuck
            before = sent
            await asyncio.sleep(0.2)
        assert sent < size // 2
        largest = total = 0
        while part := await response.read_some():
            largest, total = max(largest, len(part)), total + len(part)
        response.release()
        assert total == size
        assert largest <= HIGH_WATER + (1 << 18)
        assert client.statistics().idle == 1


async def test_what_arrives_is_handed_over_in_the_read_itself_as_long_as_it_is_taken(client: HttpClient) -> None:
    pieces = [b"%d," % number for number in range(40)]
    asked = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for number, piece in enumerate(pieces):
            if number == 20:
                await asked.wait()
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")

    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return b"9," not in data

    async with raw_server(drip) as server:
        response = await client.request(to(server), b"", PATIENT)
        while not b"".join(taken).endswith(b"19,"):
            await response.hand_over(take)
        asked.set()
        taken.append(await response.read_some())  # by turns with reads of the other kind
        while rest := await response.read_some():
            taken.append(rest)
            await response.hand_over(take)
        response.release()
        assert b"".join(taken) == b"".join(pieces)
        assert client.statistics().idle == 1


async def test_who_takes_and_fails_or_leaves_costs_the_connection(client: HttpClient) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.001)

    taken = 0

    def fails(data: bytes) -> bool:
        raise KeyError("no place for it")

    def counts(data: bytes) -> bool:
        nonlocal taken
        taken += len(data)
        return True

    async with raw_server(drip) as server:
        response = await client.request(to(server), b"", PATIENT)
        with pytest.raises(KeyError, match="no place for it"):
            await response.hand_over(fails)
        response.release()
        response = await client.request(to(server), b"", PATIENT)
        handing = asyncio.create_task(response.hand_over(counts))
        await until(lambda: taken > 3)
        handing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handing
        at_the_end = taken
        await until(lambda: server.left == 2)
        assert taken == at_the_end
        assert client.statistics() == NOTHING


async def test_a_body_that_breaks_off_is_handed_over_up_to_there(client: HttpClient) -> None:
    taken: list[bytes] = []

    def take(data: bytes) -> bool:
        taken.append(data)
        return True

    async with raw_server(then_close(START)) as server:
        response = await client.request(to(server), b"", PATIENT)
        await response.hand_over(take)
        with pytest.raises(errors.TruncatedBody):
            await response.read_some()
        response.release()
        assert taken == [b"hel"]


async def test_a_long_request_goes_out_whole(client: HttpClient) -> None:
    body, seen = bytes(range(256)) * (1 << 15), b""

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await asyncio.sleep(0.1)
        seen = await reader.readexactly(len(body))
        writer.write(HELLO)

    async with raw_server(slowly) as server:
        for _ in range(2):
            assert await whole(client, to(server), body) == b"hello"
            assert seen == body
        assert server.connections == 1


async def test_an_answer_before_the_end_of_the_request_costs_the_connection(client: HttpClient) -> None:
    too_large = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
    async with raw_server(in_pieces(too_large, b"", pause_s=0.5), HELLO) as server:
        response = await client.request(to(server), bytes(64 << 20), PATIENT)
        assert response.status == 413
        response.release()
        assert client.statistics() == NOTHING


# cancellation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["connecting", "uploading", "waiting", "reading"])
async def test_a_call_that_is_cancelled_closes_its_connection_at_once(client: HttpClient, phase: str) -> None:
    async def takes_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await reader.read()

    play = in_pieces(START, b"", pause_s=0.3) if phase == "reading" else takes_nothing
    async with raw_server(play) as server:
        head = to(server, scheme="https" if phase == "connecting" else "http")
        call = asyncio.ensure_future(whole(client, head, bytes(64 << 20) if phase == "uploading" else b""))
        if phase == "connecting":
            await until(lambda: server.connections)
            assert client.statistics().connecting == 1
        else:
            await until(lambda: server.requests)
            assert client.statistics().in_use == 1
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert client.statistics() == NOTHING
        await until(lambda: server.left == 1)


async def test_a_call_cancelled_at_any_moment_leaks_nothing(client: HttpClient) -> None:
    async with raw_server(in_pieces(CHUNKED[:50], CHUNKED[50:], pause_s=0)) as server:
        for turns in range(40):
            call = asyncio.ensure_future(whole(client, to(server)))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            assert client.statistics().in_use == 0
            assert client.statistics().connecting == 0
        assert await whole(client, to(server)) == b"hello"


# TLS -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost, signed by itself, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", path, "-out", f"{path}.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_tls_with_an_authority_of_ones_own(
    client: HttpClient, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    stream = in_pieces(START, b"2\r\nlo\r\n0\r\n\r\n", pause_s=0.05)
    async with raw_server(HELLO, stream, HELLO, then_close(b""), tls=server_tls(certificate)) as server:
        for _ in range(3):
            assert await whole(client, to(server, scheme="https", host="localhost")) == b"hello"
        assert server.connections == 1
        with pytest.raises(errors.ClosedBeforeHeaders):
            await whole(client, to(server, scheme="https", host="localhost"))
        with pytest.raises(errors.TlsFailed, match=r"127\.0\.0\.1") as caught:
            await whole(client, to(server, scheme="https"))
        assert not caught.value.may_be_billed


async def test_what_is_no_trusted_tls_gets_no_request(client: HttpClient, certificate: Path) -> None:
    async with raw_server(HELLO, tls=server_tls(certificate)) as server:
        with pytest.raises(errors.TlsFailed, match="CERTIFICATE_VERIFY_FAILED"):
            await whole(client, to(server, scheme="https", host="localhost"))
        assert server.requests == []

    async def speaks_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        writer.close()

    listening = await asyncio.start_server(speaks_first, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    with pytest.raises(errors.TlsFailed):
        await whole(client, RequestHead("POST", f"https://127.0.0.1:{port}/"))
    listening.close()


async def test_a_server_that_never_shakes_hands_is_a_connect_timeout(client: HttpClient) -> None:
    async with raw_server(hangs) as server:
        with pytest.raises(errors.ConnectTimeout) as caught:
            await whole(client, to(server, scheme="https"), timeouts=Timeouts(0.2, 30, 30, 30))
        assert not caught.value.may_be_billed
        with pytest.raises(errors.DeadlineExceeded) as late:
            await whole(client, to(server, scheme="https"), timeouts=Timeouts(30, 30, 30, 0.2))
        assert not late.value.may_be_billed
        assert client.statistics() == NOTHING


async def test_the_next_address_is_tried_beside_a_dead_one(client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 is an address that nobody has (RFC 5737); what the resolver says is all that is arranged."""
    async with raw_server(HELLO) as server:
        monkeypatch.setattr("gateway.upstream.http._addresses", _found(["192.0.2.1", "127.0.0.2", "127.0.0.1"]))
        assert await whole(client, to(server, host="three.example"), timeouts=PATIENT) == b"hello"
        assert client.statistics() == Statistics(open=1, idle=1, in_use=0, connecting=0)


def _found(addresses: list[str]) -> Any:
    async def find(host: str, port: int) -> list[str]:
        return addresses

    return find
