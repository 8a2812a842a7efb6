"""TLS, and what stands before a connection: handshakes and addresses."""

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway.upstream import http_errors as errors
from gateway.upstream.connection import AFTER_STREAM_S, Timeouts
from gateway.upstream.http import HttpClient, RequestHead, Statistics
from tests.gateway.http.conftest import HELLO, NOTHING, PATIENT, START, hangs, to, whole
from tests.gateway.raw_server import in_pieces, raw_server, then_close

pytestmark = pytest.mark.anyio


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
            await asyncio.sleep(2 * AFTER_STREAM_S)
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
