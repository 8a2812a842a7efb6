"""The engine process: a unix socket in front of an `Engine`. torch is imported only once the process is configured."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from local_engine.config import EngineConfig, configure_process, read_speculation
from local_engine.errors import EngineError
from local_engine.place import BACKLOG, take
from local_engine.probe_types import Prober, PromptReader
from local_engine.types import Event, Failed
from local_engine.wire import FrameError, decode_command, encode_frame, read_frame

if TYPE_CHECKING:
    from local_engine.engine import Engine

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES: Final = 16 * 1024 * 1024
"""A client with more than this waiting for it does not read; it is disconnected."""
_WATCH_S: Final = 0.5
_FAREWELL_S: Final = 2.0  # for a client to read what it is still owed


def run_engine(
    config: EngineConfig,
    prober: Prober | None,
    readers: Mapping[str, Sequence[PromptReader]] | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Load the models and serve them until SIGTERM, SIGINT or the end of the parent process. Blocking.

    `on_ready` is called once the socket is there. Raises ModelLoadError when a model cannot be served, ConfigError for
    a setting that cannot be used, EngineError when the engine itself breaks.
    """
    if not config.models and prober is None:
        from local_engine.errors import ModelLoadError

        raise ModelLoadError("nothing to serve: name at least one model, or pass a prober")
    parent = os.getppid()
    configure_process(config.threads)
    import torch

    from local_engine.engine import Engine
    from local_engine.model import load_model
    from local_engine.prefix_tiers import open_tiers
    from local_engine.spec.build import speculators

    torch.set_num_threads(config.threads)
    models = {name: load_model(name, source, config.dtype, config.device) for name, source in config.models.items()}
    loaded = {config.models[name]: model for name, model in models.items()}
    drafting = {read_speculation(how).draft for how in config.speculation.values()} - {None}
    drafters = {
        source: loaded.get(source) or load_model(source, source, config.dtype, config.device)
        for source in drafting
        if source is not None
    }
    engine = Engine(
        models,
        prober,
        readers=readers,
        max_running=config.max_running,
        prefill_chunk=config.prefill_chunk,
        kv_bytes=config.kv_bytes,
        prefix_bytes=config.prefix_bytes,
        make_speculator=speculators(config.speculation, drafters),
        prefix_tiers=open_tiers(config) if config.models and config.prefix_bytes else None,
    )
    asyncio.run(_run_until_told(engine, config, parent, on_ready))


async def _run_until_told(engine: "Engine", config: EngineConfig, parent: int, on_ready: Callable[[], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine.start()
    serving = asyncio.create_task(serve(engine, config.socket_path, on_ready))
    try:
        while not (stop.is_set() or serving.done()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _WATCH_S)
            # Polled, not PR_SET_PDEATHSIG: that fires when the starting *thread* ends, and only on Linux.
            if config.exit_with_parent and os.getppid() != parent:
                logger.warning("the parent process is gone; stopping")
                stop.set()
            if not engine.alive:
                raise EngineError("the engine's thread ended unexpectedly; its log has the reason")
    finally:
        await asyncio.to_thread(engine.stop)  # running commands end as cancelled, and still reach their clients
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def serve(engine: "Engine", socket_path: str, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve a started engine on a unix socket until cancelled, then close every connection and remove the socket.

    Only this user may connect. The socket appears once the engine is ready to answer; then `on_ready` is called. Raises
    ConfigError where the path is another's (`local_engine.place`).
    """
    connections: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await _serve_connection(engine, reader, writer)
        except asyncio.CancelledError:
            logger.debug("connection closed: the server stops")
        finally:
            connections.discard(task)

    place = take(socket_path)
    server = await asyncio.start_unix_server(accept, sock=place.listener, backlog=BACKLOG)
    try:
        on_ready()
        await asyncio.Event().wait()
    finally:
        place.remove()
        server.close()
        for task in tuple(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _serve_connection(engine: "Engine", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    link = engine.connect(lambda events: _hand_over(loop, writer, events))
    try:
        writer.write(encode_frame(engine.hello(os.getpid())))
        while (body := await read_frame(reader)) is not None:
            link.submit(decode_command(body))
    except (FrameError, msgspec.DecodeError) as error:
        logger.warning("closing a connection: %s", error)
    finally:
        link.close()
        writer.close()
        try:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), _FAREWELL_S)
        finally:
            writer.transport.abort()


def _hand_over(loop: asyncio.AbstractEventLoop, writer: asyncio.StreamWriter, events: list[Event]) -> None:
    """From the engine's thread to the loop's; one write per step."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
        loop.call_soon_threadsafe(_write, writer, b"".join(_frame(event) for event in events))


def _frame(event: Event) -> bytes:
    try:
        return encode_frame(event)
    except FrameError as error:
        assert not hasattr(event, "models"), "Hello is small"
        return encode_frame(Failed(event.id, "invalid_request", f"the answer is too large: {error}"))


def _write(writer: asyncio.StreamWriter, frames: bytes) -> None:
    if writer.transport.is_closing():
        return
    writer.write(frames)
    if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
        logger.warning("disconnecting a client that does not read")
        writer.transport.abort()
