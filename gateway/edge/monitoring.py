"""`GET /health/liveness`, `/health/readiness` and `/metrics`: what machines ask every few seconds, without FastAPI."""

from collections.abc import Awaitable, Callable, Mapping

import msgspec

from gateway import __version__
from gateway.edge.asgi import AsgiReply, Receive, Scope, Send, new_request_id
from gateway.edge.state import State
from gateway.errors import LeadlineError, MethodNotAllowed

JSON = b"application/json"
EXPOSITION = b"text/plain; version=0.0.4; charset=utf-8"
Answer = tuple[int, bytes, bytes]
"""Status, content type, body."""
_encode = msgspec.json.Encoder().encode


async def liveness(state: State) -> Answer:
    """The process runs its event loop. Asks nobody else."""
    return 200, JSON, _encode({"status": "alive", "version": __version__})


async def readiness(state: State) -> Answer:
    """200 while at least one model of the policy can serve; what is not available, and what is done without, is named.

    A database or a Redis that is away leaves the gateway ready: see docs/operations.md for what waits meanwhile.
    """
    lifecycle = state.lifecycle
    world = lifecycle.world
    degraded = {}
    if not await lifecycle.ledger.reachable():
        waiting = lifecycle.ledger.statistics()["pending"]
        degraded["database"] = f"does not answer; the journal keeps the rows for it ({waiting} now)"
    if state.redis is not None and not state.redis.up:
        degraded["redis"] = "does not answer; each worker holds the rates by itself, and answers are not cached"
    if state.reloader is not None and state.reloader.refused is not None:
        degraded["policy"] = "the policy file is not in force, as something is wrong with it; the log says what"
    elif state.reloader is not None and state.reloader.waits:
        degraded["policy"] = "a new version of the policy file waits for a fresh engine to load what it names"
    unavailable = world.unavailable()
    ready = len(unavailable) < len(world.targets) and lifecycle.ledger.accepts
    body = {
        "status": "ready" if ready else "not_ready",
        "unavailable": unavailable,
        "degraded": degraded,
        "policy": world.policy.version_hash,
    }
    return 200 if ready else 503, JSON, _encode(body)


async def metrics(state: State) -> Answer:
    """This worker's, or with several those of all, each sample labelled with its worker."""
    peers = state.peers
    text = await peers.exposition() if peers is not None else state.lifecycle.metrics.exposition()
    return 200, EXPOSITION, text


PATHS: Mapping[str, Callable[[State], Awaitable[Answer]]] = {
    "/health/liveness": liveness,
    "/health/readiness": readiness,
    "/metrics": metrics,
}


async def answer(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """One request of a path in PATHS."""
    request_id = new_request_id()
    if scope["method"] not in ("GET", "HEAD"):
        refused: LeadlineError = MethodNotAllowed(
            f"{scope['method']} {scope['path']}: this path takes GET alone.", allowed=["GET", "HEAD"]
        )
        await AsgiReply(send).fail(refused, b"x-request-id: %b\r\n" % request_id)
        return
    status, kind, body = await PATHS[scope["path"]](state)
    headers = [
        (b"content-type", kind),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"x-request-id", request_id),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
