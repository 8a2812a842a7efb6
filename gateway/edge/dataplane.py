"""The data plane: `POST /v1/chat/completions`, `/v1/completions` and `/v1/embeddings`, by path."""

from collections.abc import Callable, Mapping

from gateway.edge.asgi import AsgiReply, ClientGone, Receive, Scope, Send, new_request_id, read_body, until_gone
from gateway.edge.headers import read_headers
from gateway.edge.prompts import read_completion, read_embedding
from gateway.edge.wire import read_chat
from gateway.errors import LeadlineError, MethodNotAllowed
from gateway.lifecycle import Lifecycle
from gateway.upstream.types import CallHeaders, ChatCall

Reader = Callable[[bytes, CallHeaders], ChatCall]


class Endpoint:
    """One path: reads its requests and hands them to the lifecycle."""

    def __init__(self, lifecycle: Lifecycle, read: Reader, max_body_bytes: int) -> None:
        self._lifecycle = lifecycle
        self._read = read
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = AsgiReply(send)
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['method']} {scope['path']}: send a POST.")
            headers = read_headers(scope["headers"])
            await self._lifecycle.keys.recognise(headers.token)  # before a byte of the body is kept
            call = self._read(await read_body(scope, receive, self._max_body_bytes), headers)
            await until_gone(receive, reply, self._lifecycle.chat(call, reply))
        except LeadlineError as error:
            # Not admitted: no row, no cost. What was admitted answers for itself, in lifecycle.
            await reply.fail(error, [(b"x-request-id", new_request_id())])
        except ClientGone:
            return


def data_plane(lifecycle: Lifecycle, max_body_bytes: int) -> Mapping[str, Endpoint]:
    """Path → who answers it."""
    readers: dict[str, Reader] = {
        "/v1/chat/completions": read_chat,
        "/v1/completions": read_completion,
        "/v1/embeddings": read_embedding,
    }
    return {path: Endpoint(lifecycle, read, max_body_bytes) for path, read in readers.items()}
