"""Serve as a process of its own: the first line printed is the base URL."""

import argparse
import asyncio
import signal
from pathlib import Path

import uvloop

from tests.upstream.server import Upstream


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--truth", type=Path, required=True, help="one JSON line per call is appended here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    upstream = await Upstream(options.truth, seed=options.seed).start(options.port)
    print(upstream.url, flush=True)  # noqa: T201
    await stop.wait()
    await upstream.stop()


uvloop.run(main())
