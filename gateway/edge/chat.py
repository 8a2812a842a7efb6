"""`POST /v1/chat/completions`."""

from gateway.edge.asgi import AsgiReply, ClientGone, Receive, Scope, Send, new_request_id, read_body, until_gone
from gateway.edge.wire import read_chat, read_headers
from gateway.errors import LeadlineError, MethodNotAllowed
from gateway.lifecycle import Lifecycle


class ChatEndpoint:
    def __init__(self, lifecycle: Lifecycle, max_body_bytes: int) -> None:
        self._lifecycle = lifecycle
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = AsgiReply(send)
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['method']} /v1/chat/completions: send a POST.")
            headers = read_headers(scope["headers"])
            await self._lifecycle.keys.recognise(headers.token)  # before a byte of the body is kept
            call = read_chat(await read_body(scope, receive, self._max_body_bytes), headers)
            await until_gone(receive, reply, self._lifecycle.chat(call, reply))
        except LeadlineError as error:
            # Not admitted: no row, no cost. What was admitted answers for itself, in lifecycle.
            await reply.fail(error, [(b"x-request-id", new_request_id())])
        except ClientGone:
            return
