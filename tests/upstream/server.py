"""The server: raw HTTP/1.1 over asyncio streams, so that nothing stands between a fault and its bytes."""

import asyncio
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.upstream.answers import ANSWERS
from tests.upstream.exchange import CallerGone, Exchange, Over, head
from tests.upstream.oracle import PRICES
from tests.upstream.play import PLAYERS
from tests.upstream.truth import Row, TruthFile

MAX_HEAD_BYTES = 1 << 16


class _Request(NamedTuple):
    method: str
    path: str
    body: bytes


class Upstream:
    """Serves on loopback from `start` to `stop`."""

    def __init__(self, truth: Path, *, seed: int = 0) -> None:
        self.url = ""
        self.running: dict[str, Row] = {}
        """Calls under way, by the id of their row."""
        self._truth = TruthFile(truth)
        self._seed = seed
        self._calls = 0
        self._attempts: Counter[str] = Counter()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> "Upstream":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, backlog=1024, limit=MAX_HEAD_BYTES)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._truth.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while (request := await _read_request(reader)) is not None:
                if not await self._answer(request, reader, writer):
                    break
        except (CallerGone, ConnectionError, asyncio.CancelledError):
            pass  # asyncio reports a cancelled connection handler as an error
        finally:
            writer.close()

    async def _answer(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may be used again."""
        if (request.method, request.path) == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model", "created": 1, "owned_by": "fake"} for name in PRICES]
            body = json.dumps({"object": "list", "data": models}).encode()
            writer.write(head(200, {"Content-Length": str(len(body))}) + body)
            return True
        if request.method != "POST" or request.path not in ANSWERS:
            writer.write(head(404, {"Content-Length": "2"}) + b"{}")
            return True
        body = json.loads(request.body)
        if body.get("model") not in PRICES:
            said = json.dumps({"error": {"message": f"no model {body.get('model')!r}; there are {', '.join(PRICES)}"}})
            writer.write(head(404, {"Content-Length": str(len(said)), "Content-Type": "application/json"}))
            writer.write(said.encode())
            return True
        try:
            answer = ANSWERS[request.path](body, self._seed)
        except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            said = json.dumps({"error": {"message": f"not understood: {error!r}", "type": "invalid_request_error"}})
            writer.write(head(400, {"Content-Length": str(len(said)), "Content-Type": "application/json"}))
            writer.write(said.encode())
            return True
        row = self._row(request.path, body)
        exchange = Exchange(reader, writer, self._truth, row, body, answer)
        self.running[row.id] = row
        try:
            if row.fault:
                return await PLAYERS[row.fault](exchange, row.variant)
            await exchange.answer_properly()
            return True
        except CallerGone:
            row.disconnected = True
            if row.phase != "complete":
                exchange.bill_delivered()
            exchange.note()
            return False
        except Over:
            return False
        finally:
            del self.running[row.id]

    def _row(self, path: str, body: dict[str, Any]) -> Row:
        meta = body.get("metadata") or {}
        self._calls += 1
        call = meta.get("call", "")
        self._attempts[call] += 1
        row = Row(
            id=f"{os.getpid()}-{self._calls}",
            call=call,
            attempt=self._attempts[call],
            path=path,
            model=body["model"],
            stream=bool(body.get("stream")),
        )
        if "fault" in meta and (meta.get("on", "all") == "all" or row.attempt == 1):
            row.fault, row.variant = meta["fault"], meta.get("variant", "")
        return row


async def _read_request(reader: asyncio.StreamReader) -> _Request | None:
    """None at the end of the connection, and for what is no HTTP (a TLS greeting)."""
    try:
        block = await reader.readexactly(1)
        if not block.isalpha():
            return None
        block += await reader.readuntil(b"\r\n\r\n")
        first, *lines = block.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
        return None
    return _Request(method, target, body)
