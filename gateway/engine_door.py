"""Who may ask an engine that listens, and how much: settled before a framework reads a byte of a body."""

import hmac

from starlette.types import ASGIApp

from gateway.edge.asgi import Receive, Scope, Send, limited
from gateway.edge.refused import refusal
from gateway.errors import Unauthenticated

MAX_BODY_BYTES = 32 << 20


class Door:
    """Asks for the token before anything is read, and bounds what is read."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token.encode() if token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._token is None or scope["path"] == "/health" or self._knows(dict(scope["headers"]), self._token):
            await self._app(scope, limited(receive, MAX_BODY_BYTES), send)
        else:
            error = Unauthenticated("authorization: send `Bearer TOKEN`, the token that the engine was started with.")
            await refusal(error)(scope, receive, send)

    def _knows(self, headers: dict[bytes, bytes], token: bytes) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token)
