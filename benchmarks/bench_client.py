"""Our HTTP client beside aiohttp's and pyreqwest's: what one call to an upstream costs. Results: results/client.json.

    python benchmarks/bench_client.py [--rounds 3] [--seconds 3] [--streams 200]

The servers (nginx with a canned answer, plain and with TLS; a paced SSE server, 54 events 10 ms apart) share the first
core, the client has the second to itself. Every client has its timeouts set, as in production. Rounds are interleaved;
medians, with the lowest and highest. pyreqwest takes part where it is installed (`pip install pyreqwest`).
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import uvloop
from results_file import Row, write
from rich.console import Console
from rich.table import Table

SERVER_CORE, CLIENT_CORE = 0, 1
CONNECTIONS = 64
EVENTS, GAP_S = 54, 0.01
BODY = b'{"model":"mock","messages":[{"role":"user","content":"' + b"which planets have rings? " * 10 + b'"}]}'
ANSWER = json.dumps({"id": "chatcmpl-mock", "choices": [{"message": {"content": "Saturn. " * 80}}], "usage": {}})
EVENT = (
    b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1,"model":"mock","choices":[{"index":0,'
)
EVENT += b'"delta":{"content":" planet"},"logprobs":null,"finish_reason":null}]}\n\n'
CONTENDERS = ["leadline", "aiohttp", "pyreqwest"]

Call = Callable[[], Awaitable[int]]
"""One whole call; the bytes of its answer."""
Stream = Callable[[], Awaitable[tuple[float, int]]]
"""One whole stream; seconds to its first event, and its bytes."""


async def leadline(url: str) -> tuple[Call, Stream]:
    from gateway.upstream.connection import Timeouts
    from gateway.upstream.http import HttpClient, RequestHead

    client, timeouts = HttpClient(), Timeouts(10, 60, 60, 60)
    head = RequestHead("POST", url, [("Content-Type", "application/json"), ("Authorization", "Bearer sk-bench")])

    async def call() -> int:
        response = await client.request(head, BODY, timeouts)
        size = len(await response.read(1 << 20))
        response.release()
        return size

    async def stream() -> tuple[float, int]:
        started = time.perf_counter()
        response = await client.request(head, BODY, timeouts)
        size = len(await response.read_some())
        first_s = time.perf_counter() - started
        while part := await response.read_some():
            size += len(part)
        response.release()
        return first_s, size

    return call, stream


async def with_aiohttp(url: str) -> tuple[Call, Stream]:
    import aiohttp

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept-Encoding"),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=60, sock_connect=10, sock_read=60),
    )
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench", "Accept-Encoding": "identity"}

    async def call() -> int:
        async with session.post(url, data=BODY, headers=headers, allow_redirects=False) as response:
            return len(await response.read())

    async def stream() -> tuple[float, int]:
        started = time.perf_counter()
        async with session.post(url, data=BODY, headers=headers, allow_redirects=False) as response:
            size = len(await response.content.readany())
            first_s = time.perf_counter() - started
            while part := await response.content.readany():
                size += len(part)
        return first_s, size

    return call, stream


async def with_pyreqwest(url: str) -> tuple[Call, Stream]:
    from pyreqwest.client import ClientBuilder

    builder = ClientBuilder().error_for_status(False).no_proxy().http1_only().tcp_nodelay(True)
    builder = builder.timeout(timedelta(seconds=60)).connect_timeout(timedelta(seconds=10))
    builder = builder.read_timeout(timedelta(seconds=60)).pool_idle_timeout(timedelta(seconds=30))
    if "SSL_CERT_FILE" in os.environ:
        builder = builder.add_root_certificate_pem(
            await asyncio.to_thread(Path(os.environ["SSL_CERT_FILE"]).read_bytes)
        )
    client = builder.build()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench", "Accept-Encoding": "identity"}

    async def call() -> int:
        response = await client.post(url).headers(headers).body_bytes(BODY).build().send()
        return len(await response.bytes())

    async def stream() -> tuple[float, int]:
        started = time.perf_counter()
        asked = client.post(url).headers(headers).body_bytes(BODY)
        async with asked.streamed_read_buffer_limit(0).build_streamed() as response:  # else it reads 64 KiB ahead
            size = len(await response.body_reader.read_chunk() or b"")
            first_s = time.perf_counter() - started
            while part := await response.body_reader.read_chunk():
                size += len(part)
        return first_s, size

    return call, stream


MAKE = {"leadline": leadline, "aiohttp": with_aiohttp, "pyreqwest": with_pyreqwest}


async def measure(name: str, url: str, seconds: float, streams: int) -> dict[str, float]:
    """One contender in this process. `streams`: that many paced streams, 100 at a time, instead of plain calls."""
    call, stream = await MAKE[name](url)
    if streams:
        return await _measure_streams(stream, streams)
    for _ in range(100):
        assert await call() == len(ANSWER)
    counts = [0] * CONNECTIONS
    until = 0.0

    async def loop(place: int) -> None:
        while time.perf_counter() < until:
            await call()
            counts[place] += 1

    await asyncio.gather(*[call() for _ in range(CONNECTIONS)])  # connected
    started, cpu = time.perf_counter(), time.process_time()
    until = started + seconds
    await asyncio.gather(*[loop(place) for place in range(CONNECTIONS)])
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {"rps": sum(counts) / wall_s, "cpu_us": cpu_s / sum(counts) * 1e6}


async def _measure_streams(stream: Stream, streams: int) -> dict[str, float]:
    firsts: list[float] = []

    async def loop(place: int, count: int, gap_s: float) -> None:
        await asyncio.sleep(place * gap_s)
        for _ in range(count):
            first_s, size = await stream()
            assert size == EVENTS * len(EVENT)
            firsts.append(first_s)

    width = min(100, streams)
    await asyncio.gather(*[loop(place, 1, 0.001) for place in range(width)])  # connected
    firsts.clear()
    cpu = time.process_time()
    await asyncio.gather(*[loop(place, streams // width, EVENTS * GAP_S / width) for place in range(width)])
    cpu_s = time.process_time() - cpu
    return {"cpu_ms": cpu_s / len(firsts) * 1e3, "first_us": statistics.median(firsts) * 1e6}


class Paced(asyncio.Protocol):
    """Answers any request with a stream of events, one write each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self.send(EVENTS)

    def send(self, left: int) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT) + (b"0\r\n\r\n" if left == 1 else b""))
        if left > 1:
            asyncio.get_running_loop().call_later(GAP_S, self.send, left - 1)


async def serve_paced(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Paced, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """URL by kind: plain, tls, stream. Their authority is `folder`/ca.crt."""
    plain, tls, paced = free_port(), free_port(), free_port()
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    ca = [*new, "-subj", "/CN=bench", "-keyout", f"{folder}/ca.key", "-out", f"{folder}/ca.crt"]
    leaf = [*new, "-CA", f"{folder}/ca.crt", "-CAkey", f"{folder}/ca.key", "-subj", "/CN=localhost"]
    leaf += ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    leaf += ["-keyout", f"{folder}/tls.key", "-out", f"{folder}/tls.crt"]
    for command in (ca, leaf):
        subprocess.run(command, check=True, capture_output=True)
    (folder / "nginx.conf").write_text(
        f"""
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; default_type application/json;
  server {{
    listen 127.0.0.1:{plain} backlog=4096; listen 127.0.0.1:{tls} ssl backlog=4096;
    ssl_certificate {folder}/tls.crt; ssl_certificate_key {folder}/tls.key; ssl_protocols TLSv1.3;
    location / {{ return 200 '{ANSWER}'; }}
  }}
}}
"""
    )
    commands = [
        ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")],
        [sys.executable, __file__, "--serve-paced", str(paced)],
    ]
    running = [
        subprocess.Popen(["taskset", "-c", str(SERVER_CORE), *command], stderr=subprocess.DEVNULL)
        for command in commands
    ]
    try:
        for port in (plain, tls, paced):
            _wait_for(port)
        yield {
            "plain": f"http://127.0.0.1:{plain}/v1/chat/completions",
            "tls": f"https://localhost:{tls}/v1/chat/completions",
            "stream": f"http://127.0.0.1:{paced}/v1/chat/completions",
        }
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(10)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


def one_run(name: str, kind: str, url: str, folder: Path, seconds: float, streams: int) -> dict[str, float]:
    command = ["taskset", "-c", str(CLIENT_CORE), sys.executable, __file__, "--measure", name, "--url", url]
    command += ["--seconds", str(seconds), "--streams", str(streams if kind == "stream" else 0)]
    env = {**os.environ, "SSL_CERT_FILE": str(folder / "ca.crt")} if kind == "tls" else None
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"{name}, {kind}: {out.stderr[-2000:]}")
    found: dict[str, float] = json.loads(out.stdout)
    return found


METRICS = [
    ("plain", "rps", "requests_per_s", "1/s"),
    ("plain", "cpu_us", "cpu_per_request", "us"),
    ("tls", "rps", "tls_requests_per_s", "1/s"),
    ("tls", "cpu_us", "tls_cpu_per_request", "us"),
    ("stream", "cpu_ms", "cpu_per_paced_stream", "ms"),
    ("stream", "first_us", "first_event_p50", "us"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--serve-paced", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_paced:
        uvloop.run(serve_paced(args.serve_paced))
    elif args.measure:
        print(json.dumps(uvloop.run(measure(args.measure, args.url, args.seconds, args.streams))))
    else:
        compare(args.rounds, args.seconds, args.streams)


def compare(rounds: int, seconds: float, streams: int) -> None:
    names = [name for name in CONTENDERS if name == "leadline" or importlib.util.find_spec(name)]
    samples: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="leadline-bench-") as folder, servers(Path(folder)) as urls:
        for _ in range(rounds):
            for kind, url in urls.items():
                for name in names:
                    for metric, value in one_run(name, kind, url, Path(folder), seconds, streams).items():
                        samples.setdefault((name, kind, metric), []).append(value)
    rows, table = [], Table("client", *[f"{metric}, {unit}" for _, _, metric, unit in METRICS])
    for name in names:
        cells = []
        for kind, key, metric, unit in METRICS:
            found = samples[name, kind, key]
            rows.append(Row(name, metric, statistics.median(found), min(found), max(found), unit))
            cells.append(f"{rows[-1].value:,.0f}" if rows[-1].value > 20 else f"{rows[-1].value:.2f}")
        table.add_row(name, *cells)
    Console().print(table)
    command = f"python benchmarks/bench_client.py --rounds {rounds} --seconds {seconds:g} --streams {streams}"
    packages = ("leadline", "aiohttp", "pyreqwest", "httptools", "uvloop")
    path = write("client", command, packages, rows, openssl=ssl.OPENSSL_VERSION)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
