"""kill -9 at twelve points of a gateway's life, twice each: what a caller was told is in the ledger, to the
nano-dollar; what was in flight is closed once, flagged, billed at the most it can have cost; a second look changes
nothing.

The points are reached from outside: by what the upstream sees, by what the caller has read, by a lock on the database.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.ledger import browse, report
from gateway.ledger.journal import Journal
from gateway.ledger.store import LedgerStore, connect
from tests.conftest import Size, free_port
from tests.gateway.conftest import ask, until
from tests.gateway.fake_upstream import FakeUpstream

KILLS, SOAK_KILLS = 2, 50
RELEASED = Path(__file__).parents[1] / "ledger" / "released"
POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 60s, retries: 0}}
  mute: {{base_url: "http://127.0.0.1:{mute}/v1", timeout: 60s, retries: 0}}
models:
  cheap: {{provider: fake, model: cheap, context: 16000, max_output: 1000,
          price: {{input: $0.15/Mtok, cached_input: $0.075/Mtok, output: $0.60/Mtok}}}}
  muted: {{provider: mute, model: cheap, context: 16000, max_output: 1000, price: {{input: $1/Mtok, output: $1/Mtok}}}}
routes:
  - {{name: kept, when: {{model: kept}}, use: [cheap]}}
  - {{name: uncached, when: {{model: uncached}}, use: [cheap], cache: off}}
  - {{name: unread, when: {{model: unread}}, use: [muted], cache: off}}
"""


@dataclass
class Scene:
    """A gateway process, the upstream before it, and all that its callers were told."""

    home: Path
    upstream: FakeUpstream
    mute: socket.socket
    session: aiohttp.ClientSession
    redis_url: str | None = None
    told: dict[str, int] = field(default_factory=dict)
    """Request id → cost, of each answer that a caller has had to its end."""
    process: "subprocess.Popen[bytes] | None" = None
    asked: int = 0
    read: bytes = b""
    """What the last caller has had of its answer so far."""
    hanging: "list[asyncio.Task[None]]" = field(default_factory=list)

    def spawn(self) -> "subprocess.Popen[bytes]":
        policy = self.home.parent / "policy.yaml"
        policy.write_text(POLICY.format(url=self.upstream.url, mute=self.mute.getsockname()[1]))
        (self.home / "url").unlink(missing_ok=True)
        env = {**os.environ, "LEADLINE_HOME": str(self.home)}
        if self.redis_url is not None:
            env["REDIS_URL"] = self.redis_url
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(free_port()), "--policy", str(policy)]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self.process

    async def start(self) -> None:
        process = self.spawn()

        def ready() -> bool:
            assert process.poll() is None, "the gateway ended before it was ready"
            return (self.home / "url").exists() and (self.home / "url").read_text() != ""

        await until(ready)

    async def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)
        await asyncio.gather(*self.hanging, return_exceptions=True)
        self.hanging.clear()

    @property
    def url(self) -> str:
        return (self.home / "url").read_text()

    async def call(self, model: str = "uncached", *, stream: bool = False, question: str | None = None) -> bytes:
        """One call to its end; noted as told once its last byte is here."""
        self.asked += 1
        headers = {"Authorization": f"Bearer {(self.home / 'key').read_text()}"}
        body = ask(question or f"question {self.asked}", model=model, stream=stream)
        async with self.session.post(f"{self.url}/chat/completions", json=body, headers=headers) as response:
            self.read = answer = b""
            async for piece in response.content.iter_any():
                self.read = answer = answer + piece
            assert response.status == 200
            if stream:
                assert answer.endswith(b"data: [DONE]\n\n")
                found = re.search(rb": leadline-cost-nanousd (\d+)", answer)
                assert found is not None
                cost = int(found[1])
            else:
                cost = int(response.headers["x-leadline-cost-nanousd"])
            self.told[response.headers["x-request-id"]] = cost
            return answer

    def begin(self, *args: Any, **options: Any) -> None:
        """A call that the kill will cut."""

        async def cut() -> None:
            await self.call(*args, **options)

        self.hanging.append(asyncio.create_task(cut()))

    def database(self) -> sqlite3.Connection:
        return sqlite3.connect(self.home / "ledger.db", isolation_level=None, timeout=30)


@dataclass(frozen=True)
class Left:
    """Requests whose caller never had the whole answer: so many rows at least and at most, each once."""

    least: int = 0
    most: int = 0


async def before_reserve(scene: Scene) -> Left:
    """Half a body is there; nothing has been admitted."""
    host, port = scene.url.removeprefix("http://").removesuffix("/v1").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    key = (scene.home / "key").read_text()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}"
    writer.write(f'{head}\r\nContent-Length: 5000\r\nContent-Type: application/json\r\n\r\n{{"model": "unc'.encode())
    await writer.drain()
    await scene.call()  # the gateway has had its turn on the other connection
    scene.hanging.append(asyncio.create_task(_until_closed(reader, writer)))
    return Left()


async def after_reserve(scene: Scene) -> Left:
    """Reserved, journalled, connected: to an upstream that reads nothing."""
    scene.begin("unread")
    connection, _ = await asyncio.get_running_loop().sock_accept(scene.mute)
    scene.hanging.append(asyncio.create_task(_close_later(connection, scene)))
    return Left(1, 1)


async def send(scene: Scene) -> Left:
    """The upstream has the whole request and says nothing."""
    for stream in (False, True):
        seen = _hold_after(scene, words=0)
        scene.begin(stream=stream)
        await seen.wait()
    return Left(2, 2)


async def first_byte(scene: Scene) -> Left:
    """The first event of a stream is with the caller."""
    _hold_after(scene, words=1)
    scene.begin(stream=True)
    await until(lambda: scene.read.count(b"held") == 1)
    return Left(1, 1)


async def last_byte(scene: Scene) -> Left:
    """All words are there, the usage and the end are not."""
    _hold_after(scene, words=12)
    scene.begin(stream=True)
    await until(lambda: scene.read.count(b"held") == 12)
    return Left(1, 1)


async def settle(scene: Scene) -> Left:
    """The upstream's last byte is out: the gateway is billing, or has just billed and told."""
    before = len(scene.upstream.truth)
    for stream in (False, True, False, True):
        scene.begin(stream=stream)
    await until(lambda: len(scene.upstream.truth) == before + 4)
    return Left(0, 4)


async def commit(scene: Scene) -> Left:
    """SQL is locked by somebody else: callers have their answers, the ledger's commit waits."""
    holder = scene.database()
    holder.execute("BEGIN IMMEDIATE")
    for stream in (False, True, False):
        await scene.call(stream=stream)
    scene.hanging.append(asyncio.create_task(_release_later(holder, scene)))
    return Left()


async def cache_write(scene: Scene) -> Left:
    """An answer is on its way into the cache, which outlives the gateway: what it keeps is whole or not there."""
    first = await scene.call("kept", question="the same each time")
    again = await scene.call("kept", question="the same each time")
    assert again == first
    scene.begin("kept", question=f"new {scene.asked}")
    seen = len(scene.upstream.truth)
    await until(lambda: len(scene.upstream.truth) > seen)
    return Left(0, 1)


async def checkpoint(scene: Scene) -> Left:
    """A reader keeps SQLite from folding its write-ahead log into the database; all rows since are in the log."""
    reader = scene.database()
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM request").fetchone()
    await asyncio.gather(*[scene.call(stream=i % 2 == 0) for i in range(30)])
    scene.hanging.append(asyncio.create_task(_release_later(reader, scene)))
    return Left()


async def shutdown(scene: Scene) -> Left:
    """Told to stop, it takes no more calls and waits for one that is under way."""
    seen = _hold_after(scene, words=1)
    scene.begin(stream=True)
    await seen.wait()
    assert scene.process is not None
    scene.process.terminate()
    host, port = scene.url.removeprefix("http://").removesuffix("/v1").split(":")

    def refuses() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) != 0

    await until(refuses)
    return Left(1, 1)


async def idle(scene: Scene) -> Left:
    """Nothing is under way, and SQL has everything."""
    database = scene.database()
    await until(lambda: database.execute("SELECT count(*) FROM request").fetchone()[0] >= len(scene.told))
    database.close()
    return Left()


POINTS: list[Callable[[Scene], Awaitable[Left]]] = [
    before_reserve, after_reserve, send, first_byte, last_byte, settle, commit, cache_write, checkpoint, shutdown, idle,
]  # fmt: skip


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    upstream = await FakeUpstream().start()
    mute = socket.create_server(("127.0.0.1", 0))
    mute.setblocking(False)
    (tmp_path / "home").mkdir()
    async with aiohttp.ClientSession() as session:
        made = Scene(tmp_path / "home", upstream, mute, session)
        yield made
        if made.process is not None and made.process.poll() is None:
            await made.kill()
    mute.close()
    await upstream.stop()


@pytest.mark.anyio
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__)
async def test_kill_9_at(point: Callable[[Scene], Awaitable[Left]], scene: Scene, request: Any, size: Size) -> None:
    if point is cache_write:
        scene.redis_url = request.getfixturevalue("redis_url")
    least = most = 0
    for _ in range(size(KILLS, SOAK_KILLS)):
        await scene.start()
        for stream in (False, True, False):
            await scene.call(stream=stream)
        left = await point(scene)
        await scene.kill()
        least, most = least + left.least, most + left.most
    rows = await asyncio.to_thread(reconciled, scene.home)
    check(scene, rows, least, most)
    assert await asyncio.to_thread(reconciled, scene.home) == rows, "a second look changes nothing"


def check(scene: Scene, rows: dict[str, dict[str, Any]], least: int, most: int) -> None:
    answered = {row["id"]: row["cost_nanousd"] for row in rows.values() if row["id"] in scene.told}
    assert answered == scene.told, "what a caller was told is in the ledger"
    assert all(rows[each]["outcome"] == "ok" for each in scene.told)
    others = [row for each, row in rows.items() if each not in scene.told]
    assert least <= len(others) <= most
    for row in others:
        if row["outcome"] == "ok":  # billed to its end, and killed before its caller had all of it
            assert most > least
        else:
            assert row["outcome"] == "interrupted"
            assert row["cost_estimated"]
            assert row["cost_nanousd"] > 0
    for row in rows.values():
        assert row["cost_nanousd"] == sum(attempt["cost_nanousd"] for attempt in row["attempt_rows"])
        assert all(attempt["outcome"] not in ("running", "") for attempt in row["attempt_rows"])


@pytest.mark.anyio
async def test_kill_9_at_migration(scene: Scene, size: Size) -> None:
    """The upgrade of a released database waits for its lock; what is left is the old schema, and then the new one."""
    with contextlib.closing(scene.database()) as old:
        old.executescript((RELEASED / "0001.sqlite.sql").read_text())
        for _ in range(size(KILLS, SOAK_KILLS)):
            old.execute("BEGIN IMMEDIATE")
            process = scene.spawn()
            await until(partial(_has_open, process.pid, scene.home / "ledger.db"))
            assert not (scene.home / "url").exists(), "it does not serve before its schema is there"
            await scene.kill()
            assert old.execute("SELECT name FROM sqlite_master WHERE name = 'alembic_version'").fetchall() == []
            old.execute("COMMIT")
    await scene.start()
    await scene.kill()
    rows = await asyncio.to_thread(reconciled, scene.home)
    assert {(row["id"], row["cost_nanousd"], row["team"]) for row in rows.values()} == {
        ("req_1", 12345, None),
        ("req_2", None, None),
    }


def reconciled(home: Path) -> dict[str, dict[str, Any]]:
    """What the next start makes of the state folder: every row with its attempts, from a database that is sound."""
    engine = connect(f"sqlite:///{home / 'ledger.db'}")
    store = LedgerStore(engine, Journal(home / "journal" / "0"), journals=home / "journal")
    store.replay()
    store.journal.close()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    rows = {}
    for row in browse.page(engine, browse.Slice(), limit=10_000):
        found = report.request(engine, row["id"])
        assert found is not None
        rows[row["id"]] = {**found[0], "attempt_rows": found[1]}
    engine.dispose()
    return rows


def _hold_after(scene: Scene, words: int) -> asyncio.Event:
    """The upstream's next answer stops after so many words; the event is set once they are written."""
    reached = asyncio.Event()

    async def play(upstream: FakeUpstream, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if words:
            await response.prepare(request)
        for _ in range(words):
            await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"held "}}]}\n\n')
        reached.set()
        await asyncio.sleep(600)
        return response

    scene.upstream.faults.append(play)
    return reached


def _has_open(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(f"/proc/{pid}/fd/{fd}") == str(path) for fd in os.listdir(f"/proc/{pid}/fd"))
    return False


async def _dead(scene: Scene) -> None:
    assert scene.process is not None
    await until(lambda: scene.process is None or scene.process.poll() is not None)


async def _until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def _close_later(connection: socket.socket, scene: Scene) -> None:
    await _dead(scene)
    connection.close()


async def _release_later(connection: sqlite3.Connection, scene: Scene) -> None:
    await _dead(scene)
    connection.close()
