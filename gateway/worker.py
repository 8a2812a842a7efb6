"""One of several workers: `python -m gateway.worker ORDER`, ORDER being JSON from its parent (`gateway.workers.Order`).

It serves from a listening socket that its parent keeps open, and drains when told to, or when its parent is gone.
"""

# ruff: noqa: E402
import gc

gc.disable()  # a start makes nothing to collect, and looks at much; `settle_memory` puts it on again

import asyncio
import json
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

from gateway.app import App
from gateway.engine_keepers import EnginesOfParent
from gateway.http_server import HttpServer, loop_factory, settle_memory, share_heap
from gateway.policies import CannotServe, checked_policy
from gateway.settings import Settings
from gateway.telemetry.logs import configure_logs, get_logger
from gateway.workers import Order

log = get_logger(__name__)


def main(argument: str) -> int:
    order: Order = json.loads(argument)
    configure_logs(worker=order["worker"])
    share_heap()
    file = Path(order["policy"]) if order["policy"] is not None else None
    try:
        policy, folder = checked_policy(file)
    except CannotServe as error:
        log.error("worker.cannot_serve", error=str(error))
        return 1
    settings = replace(Settings.from_env(), worker=order["worker"], peers=Path(order["peers"]))
    listener, control = socket.socket(fileno=order["listener"]), socket.socket(fileno=order["control"])

    async def run() -> int:
        parent = EnginesOfParent(*await asyncio.open_unix_connection(sock=control))
        gateway = App(settings, policy, folder, file, parent)
        return await _serve(gateway, HttpServer(gateway, order["drain_s"], gateway.drain), listener, parent)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(run())


async def _serve(gateway: App, server: HttpServer, listener: socket.socket, parent: EnginesOfParent) -> int:
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reload_policy)
    serving = asyncio.create_task(server.serve_on(listener))
    while not server.started and not serving.done():
        await asyncio.wait((serving,), timeout=0.01)
    if not server.started:
        log.error("worker.cannot_serve", error=gateway.start_failed)
        return 1
    settle_memory()
    parent.serving()
    await asyncio.wait((serving, parent.orphaned), return_when=asyncio.FIRST_COMPLETED)
    if parent.orphaned.done():
        log.error("worker.orphaned")
        server.should_exit = True
    await serving
    parent.orphaned.cancel()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
