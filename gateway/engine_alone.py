"""`leadline engine`: one engine for other containers of this host (a socket), for other hosts (HTTP), or for both."""

import asyncio
import ipaddress
import json
import os
import socket as sockets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gateway.engine_needs import EngineNeeds
from gateway.policies import CannotServe, checked_policy, engine_needs, find_encoder, local_names, unloadable_models
from gateway.telemetry.logs import configure_logs, get_logger
from local_engine.errors import ConfigError, ModelLoadError
from local_engine.place import clear

log = get_logger(__name__)

TOKEN_VARIABLE = "LEADLINE_ENGINE_TOKEN"
DRAIN_S = 30.0


def run_alone(
    socket: Path | None, listen: str | None, policy: Path | None, models: list[str], encoder: str | None
) -> None:
    """Until it is told to stop. Raises CannotServe, in words for whoever typed the command."""
    configure_logs()
    if socket is None and listen is None:
        raise CannotServe("say where to listen: --socket PATH, --listen HOST:PORT, or both")
    if socket is not None:
        socket = socket.absolute()
        try:
            clear(str(socket))  # what a killed engine left; a gateway connects to the new one by itself
        except ConfigError as error:
            raise CannotServe(f"--socket: {error.why}") from error
    if listen is None:
        assert socket is not None
        _run_at(str(socket), _needs(policy, models, encoder, exit_with_parent=False)[0])
        return
    host, port = _address(listen)
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not _loopback(host):
        raise CannotServe(
            f"--listen {listen}: others could reach it there, and {TOKEN_VARIABLE} is not set; set it to a secret that "
            "gateways send as their api_key, or listen on 127.0.0.1"
        )
    with tempfile.TemporaryDirectory(prefix="leadline-engine-") as folder:
        place = socket or Path(folder) / "engine.sock"
        needs, names = _needs(policy, models, encoder, exit_with_parent=True)
        try:
            listener = sockets.create_server(
                (host, port), family=sockets.AF_INET6 if ":" in host else sockets.AF_INET, backlog=1024
            )
        except OSError as error:
            raise CannotServe(f"--listen {listen}: cannot listen there ({error.strerror})") from error
        from gateway.engine_service import EngineService
        from gateway.http_server import HttpServer

        service = EngineService(needs, place, token, names)
        asyncio.run(HttpServer(service.app, DRAIN_S).serve_on(listener))
        if service.never_up:
            raise CannotServe("the engine did not come up; its own words above say why")


def _run_at(place: str, needs: EngineNeeds) -> None:
    """The engine itself, in this process."""
    from gateway.engine_main import main

    def ready() -> None:
        log.info("engine.ready", pid=os.getpid(), models=list(needs["models"]), socket=place)

    main(json.dumps(needs), place, on_ready=ready)


def _needs(
    policy: Path | None, models: list[str], encoder: str | None, *, exit_with_parent: bool
) -> tuple[EngineNeeds, Mapping[str, str]]:
    """And what the policy calls the engine's models."""
    if models or encoder is not None:
        if policy is not None and models:
            raise CannotServe("--policy and --model both say what to load; give one of them")
        if policy is not None:
            raise CannotServe("--policy names the encoder, by a model that `embeds`; leave out --encoder")
        pairs = [_named(model) for model in models]
        named = dict(pairs)
        for name in named:
            sources = [source for other, source in pairs if other == name]
            if len(sources) > 1:
                given = ", ".join(sources)
                raise CannotServe(f"--model {name}: it is named more than once ({given}); give each model its own name")
        problems = [f"models: {name}: {why}" for name, why in unloadable_models(named).items()]
        if encoder is not None:
            try:
                find_encoder(encoder)
            except ModelLoadError as error:
                problems.append(f"--encoder: {error}")
        if problems:
            raise CannotServe("\n".join(problems))
        needs = EngineNeeds(
            models=named, speculation={}, probe=None, encoder=encoder or "default", embeds=encoder is not None,
            readers={}, exit_with_parent=exit_with_parent,
        )  # fmt: skip
        return needs, {}
    loaded, folder = checked_policy(policy, secrets=False)
    by_policy = engine_needs(loaded, folder, exit_with_parent=exit_with_parent)
    if by_policy is None:
        raise CannotServe("this policy needs no engine: it has neither a model with `engine: embedded` nor a probe")
    return by_policy, local_names(loaded)


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise CannotServe(f"--model {text}: write NAME=SOURCE, e.g. base=bundled/base or qwen=/models/qwen3")
    return name, source


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and port.isdigit() and int(port) < 65536):
        raise CannotServe(f"--listen {text}: write HOST:PORT, e.g. 127.0.0.1:8100")
    return host.strip("[]") or "127.0.0.1", int(port)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
