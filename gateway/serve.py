"""`leadline serve`: all that can be wrong is said before anything listens; then one worker runs in this process, or a
light parent takes this process's place and runs several (`gateway.workers`).

Each refusal is a `CannotServe` whose message names the field, the value and the fix.
"""

import asyncio
import fcntl
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from gateway.admission.keys import KeyStore, PepperError, load_pepper
from gateway.app import App, make_first_key
from gateway.banner import announce, url_of
from gateway.http_server import HttpServer, loop_factory, settle_memory, share_heap
from gateway.ledger.store import LedgerUnreachable, connect
from gateway.policies import CannotServe, checked_policy, engine_needs
from gateway.settings import Settings, SettingsError, engine_socket
from gateway.telemetry.logs import configure_logs
from gateway.workers import Plan

ENGINE_WAIT_S = 60.0
BACKLOG = 4096


def serve(host: str, port: int, policy: Path | None, workers: int, drain_s: float) -> int:
    """Run the gateway until SIGTERM or Ctrl-C; returns the exit status, or never when a parent takes over.

    Raises CannotServe.
    """
    configure_logs()
    loaded, folder = checked_policy(policy)
    try:
        settings = Settings.from_env()
        if workers > 1:
            settings.require_shared(f"--workers {workers}")
        settings.prepare_home()
    except SettingsError as error:
        raise CannotServe(str(error)) from error
    lock = _hold(settings.home)
    listeners = _listen(host, port, workers)
    if workers == 1:
        share_heap()
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve_here(App(settings, loaded, folder, policy), listeners[0], drain_s))
    needs, socket_path = None, engine_socket(settings.home)
    state = "not needed by this policy"
    if settings.engine is not None:
        state = f"kept up by somebody else, at {settings.engine}"
    else:
        needs = engine_needs(loaded, folder)
        if needs is not None:
            state = "one for all workers; it is ready when the log says so"
    plan = Plan(
        listeners=[listener.fileno() for listener in listeners],
        policy=str(policy.absolute()) if policy is not None else None,
        drain_s=drain_s,
        home=str(settings.home),
        peers=str(_peers(settings.home)),
        made_first_key=_prepare(settings),
        engine=needs,
        engine_socket=str(socket_path),
        engine_state=state,
    )
    for fd in (lock, *plan["listeners"]):
        os.set_inheritable(fd, True)
    # The same process from here on, with the same number, and none of what was loaded to check and to prepare.
    os.execv(sys.executable, [sys.executable, "-m", "gateway.workers", json.dumps(plan)])


def _hold(home: Path) -> int:
    """The state folder is this gateway's alone for as long as the descriptor stays open."""
    fd = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CannotServe(
            f"another gateway is running on {home}; stop it, or give this one its own LEADLINE_HOME"
        ) from error
    return fd


def _listen(host: str, port: int, workers: int) -> list[socket.socket]:
    """A listening socket per worker. On Linux each has its own queue, among which the kernel spreads connections
    evenly; where it does not (macOS), all workers take from one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if workers == 1 or not sys.platform.startswith("linux"):
            return [socket.create_server((host, port), family=family, backlog=BACKLOG)] * workers
        with socket.socket(family) as alone:  # shows that nobody listens there, which SO_REUSEPORT would not notice
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))
            address = alone.getsockname()[:2]
        return [socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=True) for _ in range(workers)]
    except OSError as error:
        raise CannotServe(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another with --port"
        ) from error


def _prepare(settings: Settings) -> bool:
    """The tables and the first key, made once before several workers look for them; whether a key was made."""
    try:
        database = connect(settings.database_url, settings.durability)
    except LedgerUnreachable as error:
        raise CannotServe(str(error)) from error
    try:
        return make_first_key(KeyStore(database, load_pepper(settings.home)), settings.home) is not None
    except PepperError as error:
        raise CannotServe(str(error)) from error
    finally:
        database.dispose()


def _peers(home: Path) -> Path:
    """Where the workers' sockets lie: in the state folder, or, as a socket's path holds 100 bytes, elsewhere."""
    folder = home / "peers"
    if len(os.fsencode(folder)) > 70:
        return Path(tempfile.mkdtemp(prefix="leadline-"))
    folder.mkdir(exist_ok=True, mode=0o700)
    for left in folder.glob("*.sock"):
        left.unlink()
    return folder


async def _serve_here(gateway: App, listener: socket.socket, drain_s: float) -> int:
    server = HttpServer(gateway, drain_s, gateway.drain)
    serving = asyncio.create_task(server.serve_on(listener))
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reload_policy)
    while not server.started and not serving.done():
        await asyncio.wait((serving,), timeout=0.01)
    if server.started:
        settle_memory()
        if gateway.engine is not None and gateway.engine.started:
            events = [asyncio.create_task(gateway.engine.ready.wait())]
            if gateway.engine_process is not None:
                events.append(asyncio.create_task(gateway.engine_process.failed.wait()))
            await asyncio.wait((*events, serving), timeout=ENGINE_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            for event in events:
                event.cancel()
        if not serving.done():
            url = url_of(listener.getsockname())
            state, away = _engine_state(gateway)
            announce(gateway.settings.home, url, first_key=gateway.first_key, engine=state, engine_away=away)
    await serving
    if gateway.start_failed is not None:
        raise CannotServe(gateway.start_failed)
    return 0 if server.started else 1


def _engine_state(gateway: App) -> tuple[str, bool]:
    """In words, and whether there is to be one that does not answer yet."""
    engine = gateway.engine
    if engine is None or not engine.started:
        return "not needed by this policy", False
    if engine.client is not None:
        return ", ".join(card.name for card in engine.client.hello.models) or "probes only", False
    if gateway.engine_process is not None and gateway.engine_process.failed.is_set():
        return "failed, see the log; it is being started again", True
    return "still starting", True
