"""One scrape for all workers of a host: whichever worker is asked collects the others' metrics and answers for all.

Each worker answers on a unix socket of its own with what it counted since it started, labelled with its index. They
are not summed here: a counter that falls because one worker was replaced is a reset that Prometheus accounts for in
that worker's series, and would misread in a sum. Queries sum:
`sum without (worker) (rate(leadline_requests_total[1m]))`.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

PEER_TIMEOUT_S = 1.0


class Peers:
    """This worker's socket among its peers', from `start` to `stop`. `own` is this worker's exposition, labelled."""

    def __init__(self, folder: Path, worker: int, own: Callable[[], bytes]) -> None:
        self._folder = folder
        self._path = folder / f"metrics-{worker}.sock"
        self._own = own
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._answer, self._path)
        finally:
            os.umask(mask)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def exposition(self) -> bytes:
        """Everybody's metrics; a worker that does not answer in time is absent."""
        others = sorted(path for path in self._folder.glob("metrics-*.sock") if path != self._path)
        return merged([self._own(), *await asyncio.gather(*map(_ask, others))])

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(self._own())
            await writer.drain()
        writer.close()


async def _ask(path: Path) -> bytes:
    try:
        async with asyncio.timeout(PEER_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


def merged(expositions: list[bytes]) -> bytes:
    """Prometheus text with each family once: its HELP and TYPE, then every worker's samples of it."""
    families: dict[bytes, list[bytes]] = {}
    for text in expositions:
        for block in (b"\n" + text).split(b"\n# HELP ")[1:]:
            name = block.split(b" ", 1)[0]
            help_line, type_line, *samples = (line + b"\n" for line in block.splitlines())
            families.setdefault(name, [b"# HELP " + help_line, type_line]).extend(samples)
    return b"".join(line for lines in families.values() for line in lines)
