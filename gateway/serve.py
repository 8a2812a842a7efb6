"""`leadline serve`: all that can be wrong is said before anything listens; then one worker runs, in this process.

Each refusal is a `CannotServe` whose message names the field, the value and the fix.
"""

import asyncio
import gc
import socket
import sys
from pathlib import Path

from gateway.app import App
from gateway.http_server import HttpServer, loop_factory
from gateway.policies import load_policy, missing_secrets, unloadable
from gateway.settings import Settings, SettingsError
from gateway.telemetry.logs import configure_logs
from routers.errors import PolicyError
from routers.policy import Policy

ENGINE_WAIT_S = 60.0


class CannotServe(RuntimeError):
    """Nothing was started; the message says why and what to do."""


def serve(host: str, port: int, policy: Path | None, drain_s: float) -> int:
    """Run the gateway until SIGTERM or Ctrl-C; returns the exit status. Raises CannotServe."""
    configure_logs()
    loaded, folder = checked_policy(policy)
    try:
        settings = Settings.from_env()
    except SettingsError as error:
        raise CannotServe(str(error)) from error
    listener = _listen(host, port)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve_here(App(settings, loaded, folder), listener, drain_s))


def checked_policy(file: Path | None) -> tuple[Policy, Path]:
    """The policy and the folder that its relative paths are relative to. Raises CannotServe."""
    try:
        policy = load_policy(file)
    except PolicyError as error:
        raise CannotServe(str(error)) from error
    except OSError as error:
        raise CannotServe(f"{file}: cannot be read ({error.strerror})") from error
    folder = file.parent.absolute() if file is not None else Path.cwd()
    wrong = missing_secrets(policy) + unloadable(policy, folder)
    if wrong:
        raise CannotServe("\n".join(wrong))
    return policy, folder


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=4096)
    except OSError as error:
        raise CannotServe(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another with --port"
        ) from error


async def _serve_here(gateway: App, listener: socket.socket, drain_s: float) -> int:
    server = HttpServer(gateway, drain_s)
    serving = asyncio.create_task(server.serve_on(listener))
    while not server.started and not serving.done():
        await asyncio.wait((serving,), timeout=0.01)
    if server.started:
        if gateway.engine is not None and gateway.engine.started:
            events = [asyncio.create_task(gateway.engine.ready.wait())]
            if gateway.engine_process is not None:
                events.append(asyncio.create_task(gateway.engine_process.failed.wait()))
            await asyncio.wait((*events, serving), timeout=ENGINE_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            for event in events:
                event.cancel()
        if not serving.done():
            _announce(gateway, listener)
            settle_memory()
    await serving
    return 0 if server.started else 1


def settle_memory() -> None:
    """What lives as long as the process is not looked at again by the cycle collector, which otherwise walks all of it
    every few hundred requests."""
    gc.collect()
    gc.freeze()


def _announce(gateway: App, listener: socket.socket) -> None:
    engine = gateway.engine
    if engine is None or not engine.started:
        state = "not needed by this policy"
    elif engine.client is None:
        failed = gateway.engine_process is not None and gateway.engine_process.failed.is_set()
        state = "failed, see the log; it is being started again" if failed else "still starting"
    else:
        state = ", ".join(card.name for card in engine.client.hello.models) or "probes only"
    announce(gateway.settings.home, listener, gateway.first_key, state)


def announce(home: Path, listener: socket.socket, first_key: str | None, engine: str) -> None:
    """Tell the operator where the gateway is, and the SDK on this machine too."""
    host, port = listener.getsockname()[:2]
    url = f"http://{host}:{port}"
    (home / "url").write_text(f"{url}/v1")  # where the SDK looks
    question = '{"model":"auto","messages":[{"role":"user","content":"What is 23 + 48 - 7?"}]}'
    code = f'from gateway.sdk import Leadline; print(Leadline(base_url="{url}/v1").explain("What is 2 + 2?"))'
    key_file = home / "key"
    sys.stdout.write(
        f"""
Leadline is ready.
  URL        {url}/v1
  Dashboard  {url}/dashboard
  Key        {first_key or f"made earlier, in {key_file}; another: leadline keys create NAME"}
  Engine     {engine}

Try next:
  curl -i {url}/v1/chat/completions -H "Authorization: Bearer $(cat {key_file})" -d '{question}'
  {sys.executable} -c '{code}'
  open {url}/dashboard and log in with the key

"""
    )
    sys.stdout.flush()
