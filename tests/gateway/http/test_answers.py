"""How an answer ends, and how each broken one fails."""

import socket

import pytest

from gateway.upstream import http_errors as errors
from gateway.upstream.connection import Timeouts
from gateway.upstream.http import HttpClient, RequestHead, Statistics
from tests.gateway.http.conftest import CHUNKED, HELLO, NOTHING, OK, PATIENT, START, hangs, to, whole
from tests.gateway.raw_server import Play, in_pieces, raw_server, then_close, then_reset

pytestmark = pytest.mark.anyio


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
        assert client.statistics().idle == server.connections, "none was given up"


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
        (in_pieces(START, *[b"1\r\nx\r\n"] * 1000, pause_s=0.01), Timeouts(30, 30, 30, 1), errors.DeadlineExceeded),
        (in_pieces(*[INTERIM] * 200, pause_s=0.01), Timeouts(30, 0.2, 30, 30), errors.FirstByteTimeout),
        (hangs, Timeouts(30, 30, 30, 1), errors.DeadlineExceeded),
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
    async with raw_server(in_pieces(START, *[b"1\r\nx\r\n"] * 70, b"0\r\n\r\n", pause_s=0.05)) as server:
        body = await whole(client, to(server), timeouts=Timeouts(30, 3, 3, 30))
        assert body == b"hel" + b"x" * 70


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
