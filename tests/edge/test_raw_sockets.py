"""Malformed and ambiguous HTTP: refused, or read in one way only (T11), by the server that `leadline serve` runs."""

import asyncio
import json
from dataclasses import dataclass

import pytest

from gateway.edge.protocol import GuardedProtocol
from tests.edge.conftest import StartEdge
from tests.edge.provider import Provider
from tests.edge.raw import Response, exchange, responses_of
from tests.gateway.conftest import Gateway

pytestmark = pytest.mark.anyio

CHAT = b"/v1/chat/completions"


class Hasty(GuardedProtocol):
    """What waits for bytes that do not come is over soon."""

    HEADERS_TIMEOUT_S = 0.5
    BODY_GRACE_S = 0.5


def body_of(text: str) -> bytes:
    return json.dumps({"model": "chat", "messages": [{"role": "user", "content": text}]}).encode()


BODY = body_of("honest")
SMUGGLED = body_of("SMUGGLED")
HUGE = GuardedProtocol.MAX_HEADER_BYTES


def request(
    *lines: bytes, start: bytes = b"POST " + CHAT + b" HTTP/1.1", body: bytes = BODY, close: bool = True
) -> bytes:
    """A request; KEY stands for the authorization line. Its length is stated unless `lines` state one."""
    head = [start, b"host: gateway", b"authorization: Bearer KEY", *lines]
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in lines):
        head.append(b"content-length: %d" % len(body))
    if close:
        head.append(b"connection: close")
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunked(body: bytes, size: bytes | None = None, tail: bytes = b"0\r\n\r\n") -> bytes:
    return (size or b"%x" % len(body)) + b"\r\n" + body + b"\r\n" + tail


INNER = request(body=SMUGGLED)
LENGTH = b"content-length: %d" % len(BODY)
TE = b"transfer-encoding: chunked"

REFUSED: dict[str, bytes] = {
    # two readings of where the body ends
    "two-different-lengths": request(LENGTH, b"content-length: 5"),
    "two-equal-lengths": request(LENGTH, LENGTH),
    "length-list": request(b"content-length: %d, %d" % (len(BODY), len(BODY))),
    "length-list-differing": request(b"content-length: 5, %d" % len(BODY)),
    "length-and-chunked": request(LENGTH, TE, body=chunked(BODY)),
    "chunked-and-length": request(TE, LENGTH, body=chunked(BODY)),
    "chunked-with-smuggled-tail": request(b"content-length: 4", TE, body=b"0\r\n\r\n" + INNER),
    "length-with-smuggled-chunks": request(TE, b"content-length: 6", body=b"0\r\n\r\nX"),
    "length-negative": request(b"content-length: -1"),
    "length-plus": request(b"content-length: +%d" % len(BODY)),
    "length-hex": request(b"content-length: 0x10"),
    "length-words": request(b"content-length: ten"),
    "length-empty": request(b"content-length:"),
    "length-space-inside": request(b"content-length: 1 0"),
    "length-beyond-64-bits": request(b"content-length: 99999999999999999999999"),
    "length-fraction": request(b"content-length: 10.0"),
    "length-underscore": request(b"content-length: 1_0"),
    "chunk-size-negative": request(TE, body=chunked(BODY, b"-5")),
    "chunk-size-empty": request(TE, body=chunked(BODY, b" ")),
    "chunk-size-words": request(TE, body=chunked(BODY, b"zz")),
    "chunk-size-0x": request(TE, body=chunked(BODY, b"0x%x" % len(BODY))),
    "chunk-size-overflow": request(TE, body=chunked(BODY, b"fffffffffffffffff0")),
    "chunk-size-bare-lf": request(TE, body=b"%x\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
    "chunk-longer-than-said": request(TE, body=chunked(BODY, b"%x" % (len(BODY) - 4))),
    "chunk-shorter-than-said": request(TE, body=chunked(BODY, b"%x" % (len(BODY) + 1))),
    "chunk-extension-lf": request(TE, body=b"%x;a=\n1\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
    "te-identity-then-body": request(b"transfer-encoding: identity"),
    "te-unknown": request(b"transfer-encoding: cow"),
    "te-xchunked": request(b"transfer-encoding: xchunked", body=chunked(BODY)),
    "te-chunked-then-gzip": request(b"transfer-encoding: chunked, gzip", body=chunked(BODY)),
    "te-gzip-chunked": request(b"transfer-encoding: gzip, chunked", body=chunked(BODY)),
    "te-twice-chunked-identity": request(TE, b"transfer-encoding: identity", body=chunked(BODY)),
    "te-chunked-quoted": request(b'transfer-encoding: "chunked"', body=chunked(BODY)),
    "te-vertical-tab": request(b"transfer-encoding: \x0bchunked", body=chunked(BODY)),
    "te-space-before-colon": request(b"transfer-encoding : chunked", body=chunked(BODY)),
    "te-folded": request(b"transfer-encoding:\r\n chunked", body=chunked(BODY)),
    "te-in-http-1.0": request(TE, start=b"POST " + CHAT + b" HTTP/1.0", body=b"0\r\n\r\n" + INNER),
    # header syntax
    "obs-fold": request(b"x-a: 1\r\n folded"),
    "obs-fold-tab": request(b"x-a: 1\r\n\tfolded"),
    "obs-fold-first": request(start=b"POST " + CHAT + b" HTTP/1.1\r\n x: 1"),
    "space-before-colon": request(b"x-a : 1"),
    "no-colon": request(b"x-a 1"),
    "empty-name": request(b": 1"),
    "nul-in-name": request(b"x\x00a: 1"),
    "nul-in-value": request(b"x-a: 1\x002"),
    "cr-in-value": request(b"x-a: 1\r2"),
    "control-in-name": request(b"x\x01a: 1"),
    "control-in-value": request(b"x-a: \x01"),
    "bracket-in-name": request(b"x[a]: 1"),
    "name-not-ascii": request(b"x-\xc3\xa9: 1"),
    "bare-lf-lines": request().replace(b"\r\n", b"\n"),
    "bare-lf-at-end": request().replace(b"\r\n\r\n", b"\r\n\n", 1),
    "bare-cr-lines": request().replace(b"\r\n", b"\r"),
    "two-keys": request(b"authorization: Bearer another"),
    "compressed": request(b"content-encoding: gzip"),
    "compressed-br": request(b"content-encoding: br"),
    "compressed-list": request(b"content-encoding: identity, gzip"),
    # request line
    "method-unknown": request(start=b"BREW " + CHAT + b" HTTP/1.1"),
    "method-lower": request(start=b"post " + CHAT + b" HTTP/1.1"),
    "method-override": request(b"x-http-method-override: DELETE", start=b"GET " + CHAT + b" HTTP/1.1", body=b""),
    "version-0.9": request(start=b"POST " + CHAT),
    "version-9.9": request(start=b"POST " + CHAT + b" HTTP/9.9"),
    "version-words": request(start=b"POST " + CHAT + b" HTTP/one"),
    "other-protocol": request(start=b"POST " + CHAT + b" ICY/1.1"),
    "http2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls-hello": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "upgrade-upper": request(b"UpGraDe: h2c", b"connection: upGRade"),
    "two-spaces": request(start=b"POST  " + CHAT + b"  HTTP/1.1 x"),
    "nul-in-path": request(start=b"POST " + CHAT + b"\x00 HTTP/1.1"),
    "space-in-path": request(start=b"POST " + CHAT + b" x HTTP/1.1"),
    "path-not-ascii": request(start="POST /v1/chät HTTP/1.1".encode()),
    "connect": request(start=b"CONNECT gateway:443 HTTP/1.1", body=b""),
    "options-star": request(start=b"OPTIONS * HTTP/1.1", body=b""),
    "trace": request(start=b"TRACE " + CHAT + b" HTTP/1.1", body=b""),
    "path-dot-dot": request(start=b"POST /v1/../v1/chat/completions HTTP/1.1"),
    "path-double-slash": request(start=b"POST //v1/chat/completions HTTP/1.1"),
    "path-matrix": request(start=b"POST " + CHAT + b";a=b HTTP/1.1"),
    "path-trailing-slash": request(start=b"POST " + CHAT + b"/ HTTP/1.1"),
    # too much
    "header-64k": request(b"x-a: " + b"a" * HUGE),
    "header-without-end": b"POST " + CHAT + b" HTTP/1.1\r\nx-a: " + b"a" * (8 * HUGE),
    "name-without-end": b"POST " + CHAT + b" HTTP/1.1\r\n" + b"a" * (8 * HUGE),
    "path-without-end": b"POST /" + b"a" * (8 * HUGE),
    "headers-100000": b"POST " + CHAT + b" HTTP/1.1\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
    "headers-101": request(*[b"x-%d: 1" % number for number in range(GuardedProtocol.MAX_HEADERS)]),
    "path-64k": request(start=b"POST " + CHAT + b"?" + b"a" * HUGE + b" HTTP/1.1"),
    # never ends
    "headers-stop": b"POST " + CHAT + b" HTTP/1.1\r\nhost: gateway\r\n",
    "request-line-stops": b"POST /v1/ch",
    "body-stops": request(b"content-length: %d" % (len(BODY) + 10)),
    "chunks-stop": request(TE, body=b"%x\r\n" % len(BODY) + BODY + b"\r\n"),
}

ANSWERED: dict[str, bytes] = {
    "plain": request(),
    "chunked": request(TE, body=chunked(BODY)),
    "chunked-many": request(TE, body=b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"),
    "chunked-extension": request(TE, body=chunked(BODY, b"%x;name=value" % len(BODY))),
    "chunked-trailers": request(TE, body=chunked(BODY, tail=b"0\r\nx-leadline-scope: SMUGGLED\r\n\r\n")),
    "chunked-upper": request(b"Transfer-Encoding: CHUNKED", body=chunked(BODY, b"%X" % len(BODY))),
    "chunked-leading-zeros": request(TE, body=chunked(BODY, b"000%x" % len(BODY))),
    "length-leading-zeros": request(b"content-length: 000%d" % len(BODY)),
    "absolute-form": request(start=b"POST http://elsewhere.example" + CHAT + b" HTTP/1.1"),
    "absolute-form-userinfo": request(start=b"POST http://a:b@elsewhere.example" + CHAT + b" HTTP/1.1"),
    "query": request(start=b"POST " + CHAT + b"?api_key=x&a=b HTTP/1.1"),
    "percent-path": request(start=b"POST /v1/chat%2Fcompletions HTTP/1.1"),
    "leading-blank-lines": b"\r\n\r\n" + request(),
    "http-1.0": request(start=b"POST " + CHAT + b" HTTP/1.0"),
    "expect-continue": request(b"expect: 100-continue"),
    "upgrade-h2c": request(b"upgrade: h2c", b"http2-settings: AAMAAABkAARAAAAAAAIAAAAA", close=False).replace(
        b"content-length", b"connection: upgrade, http2-settings, close\r\ncontent-length"
    ),
    "upgrade-websocket": request(b"upgrade: websocket", b"sec-websocket-version: 13", close=False).replace(
        b"content-length", b"connection: upgrade, close\r\ncontent-length"
    ),
    "two-hosts": request(b"host: other"),
    "no-host": request().replace(b"host: gateway\r\n", b""),
    "value-latin-1": request(b"x-a: \xe9\xff"),
    "hop-by-hop": request(b"te: trailers", b"proxy-authorization: SMUGGLED", b"keep-alive: timeout=5"),
    "forwarded": request(b"x-forwarded-for: SMUGGLED", b"forwarded: for=SMUGGLED", b"x-real-ip: SMUGGLED"),
    "accept-encoding": request(b"accept-encoding: gzip, br"),
    "cookies": request(b"cookie: SMUGGLED=1", b"x-api-key: SMUGGLED", b"openai-organization: SMUGGLED"),
    "identity-encoding": request(b"content-encoding: identity"),
    "100-headers": request(*[b"x-%d: 1" % number for number in range(GuardedProtocol.MAX_HEADERS - 5)]),
    "after-close": request() + INNER,
    "garbage-after": request() + b"\x00\x01SMUGGLED",
}


@dataclass
class Outcome:
    name: str
    responses: list[Response]

    @property
    def statuses(self) -> list[int]:
        return [response.status for response in self.responses]


async def play(gateway: Gateway, cases: dict[str, bytes]) -> list[Outcome]:
    gate = asyncio.Semaphore(12)

    async def one(name: str, raw: bytes) -> Outcome:
        async with gate:
            heard = await exchange(gateway, raw.replace(b"KEY", gateway.key.encode()))
        return Outcome(name, responses_of(heard))

    return await asyncio.gather(*(one(name, raw) for name, raw in cases.items()))


def test_the_corpus_is_large_enough() -> None:
    assert len(REFUSED) + len(ANSWERED) >= 100


async def test_what_is_malformed_or_ambiguous_is_refused(start_edge: StartEdge, provider: Provider) -> None:
    async with start_edge(http=Hasty) as edge:
        wrong = [
            f"{outcome.name}: {outcome.statuses}"
            for outcome in await play(edge, REFUSED)
            if len(outcome.responses) > 1 or any(not 400 <= status < 500 for status in outcome.statuses)
        ]
        assert wrong == []
        assert provider.bodies == [], "nothing of a refused request goes anywhere"
        assert await edge.rows() == []
        (still,) = await play(edge, {"plain": ANSWERED["plain"]})
        assert still.statuses == [200]


async def test_what_is_odd_but_clear_is_answered_once_and_forwarded_clean(
    start_edge: StartEdge, provider: Provider
) -> None:
    async with start_edge("routes: [{name: plain, when: {tenant: default}, use: [chat], cache: off}]") as edge:
        for outcome in await play(edge, ANSWERED):
            assert outcome.statuses == [200], outcome.name
    assert len(provider.bodies) == len(ANSWERED)
    for body, headers in zip(provider.bodies, provider.headers, strict=True):
        assert json.loads(body)["messages"][0]["content"] == "honest"
        assert "SMUGGLED" not in str(headers)
        assert {name.lower() for name, _ in headers} <= {
            "host", "content-type", "content-length", "authorization", "accept", "accept-encoding", "user-agent",
        }  # fmt: skip


async def test_what_follows_an_upgrade_is_no_request_of_its_own(start_edge: StartEdge, provider: Provider) -> None:
    start = request(b"UpGraDe: x", b"connection: upGRade", b"content-length: %d" % len(INNER), body=b"", close=False)
    async with start_edge() as edge:
        heard = await exchange(edge, *(part.replace(b"KEY", edge.key.encode()) for part in (start, INNER)), pause_s=0.2)
    assert [response.status for response in responses_of(heard)] == [400]
    assert provider.bodies == []


async def test_pipelined_requests_are_answered_in_order(start_edge: StartEdge, provider: Provider) -> None:
    async with start_edge() as edge:
        first, second = request(body=body_of("first"), close=False), request(body=body_of("second"))
        heard = await exchange(edge, (first + second).replace(b"KEY", edge.key.encode()))
    assert [response.status for response in responses_of(heard)] == [200, 200]
    assert [json.loads(body)["messages"][0]["content"] for body in provider.bodies] == ["first", "second"]


HOSTILE = "x\r\nset-cookie: a=b\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize("field", ["model", "metadata", "user", "scope", "session", "tags", "idempotency"])
async def test_no_answer_is_split_by_what_a_caller_wrote(start_edge: StartEdge, provider: Provider, field: str) -> None:
    body = json.loads(BODY)
    headers: list[bytes] = []
    if field in ("model", "metadata", "user"):
        body[field] = {"a": HOSTILE} if field == "metadata" else HOSTILE
    else:
        name = {"scope": b"x-leadline-scope", "session": b"x-session-id", "tags": b"x-leadline-tags",
                "idempotency": b"idempotency-key"}[field]  # fmt: skip
        headers.append(name + b": x%0d%0aset-cookie:a=b")
    async with start_edge() as edge:
        raw = request(*headers, body=json.dumps(body).encode()).replace(b"KEY", edge.key.encode())
        (response,) = responses_of(await exchange(edge, raw))
    assert response.status in (200, 400)
    assert not any(name == "set-cookie" for name, _ in response.headers)
    assert b"set-cookie: a=b\r\n" not in response.body


async def test_a_provider_cannot_split_the_answer_either(start_edge: StartEdge, provider: Provider) -> None:
    async with start_edge() as edge:
        provider.fail_next = (400, {}, json.dumps({"error": {"message": HOSTILE, "type": HOSTILE, "code": HOSTILE}}))
        (response,) = responses_of(await exchange(edge, request().replace(b"KEY", edge.key.encode())))
    assert response.status == 400
    assert not any(name == "set-cookie" for name, _ in response.headers)
    assert json.loads(response.body)["error"]["message"].endswith("\r\n\r\n")
