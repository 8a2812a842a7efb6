"""The data plane: `POST /v1/chat/completions`, `/v1/completions` and `/v1/embeddings`, by path."""

import asyncio
import time
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from gateway.admission.idempotency import IdempotencyStore, Replay
from gateway.admission.keys import Principal
from gateway.edge.asgi import AsgiReply, ClientGone, Receive, Scope, Send, new_request_id, read_body, until_gone
from gateway.edge.headers import read_headers
from gateway.edge.prompts import read_completion, read_embedding
from gateway.edge.recorded import RecordedReply, replay
from gateway.edge.wire import read_chat
from gateway.errors import InvalidRequest, LeadlineError, MethodNotAllowed
from gateway.ids import new_ledger_id
from gateway.lifecycle import Lifecycle
from gateway.upstream.types import CallHeaders, ChatCall

LONG_BODY_BYTES = 64 << 10
"""Reading a longer one takes 0.05 ms and more: whoever else waits for the loop has a turn before it and after."""
Reader = Callable[[bytes, CallHeaders], ChatCall]


class Endpoint:
    """One path: reads its requests and hands them to the lifecycle."""

    def __init__(self, lifecycle: Lifecycle, idempotency: IdempotencyStore, read: Reader, max_body_bytes: int) -> None:
        self._lifecycle = lifecycle
        self._idempotency = idempotency
        self._read = read
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = AsgiReply(send)
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['method']} {scope['path']}: send a POST.", allowed=["POST"])
            headers = read_headers(scope["headers"])
            principal = await self._lifecycle.keys.recognise(headers.token)  # before a byte of the body is kept
            body = await read_body(scope, receive, self._max_body_bytes)
            if len(body) > LONG_BODY_BYTES:
                call = await self._read_between(body, headers)
            else:
                call = self._read(body, headers)
            if headers.idempotency_key is not None:
                await self._once(principal, headers.idempotency_key, scope["path"], body, call, send)
            else:
                await until_gone(receive, reply, self._lifecycle.chat(call, principal, reply))
        except LeadlineError as error:
            # Not admitted: no row, no cost. What was admitted answers for itself, in lifecycle.
            await reply.fail(error, b"x-request-id: %b\r\n" % new_request_id())
        except ClientGone:
            return

    async def _read_between(self, body: bytes, headers: CallHeaders) -> ChatCall:
        """In a turn of the loop of its own."""
        await asyncio.sleep(0)
        call = self._read(body, headers)
        await asyncio.sleep(0)
        return call

    async def _once(
        self, caller: Principal, idempotency_key: str, path: str, body: bytes, call: ChatCall, send: Send
    ) -> None:
        """Run it, or repeat what came of it. Raises what a claim raises.

        It runs to its end even when its caller hangs up: the repetition that follows finds the answer.
        """
        request_id = new_ledger_id(time.time_ns() // 1_000_000)
        claim = await self._idempotency.claim(
            caller.key_id, idempotency_key, path=path, body=body, request_id=request_id
        )
        if isinstance(claim, Replay):
            await replay(AsgiReply(send), claim)
            return
        reply = RecordedReply(send, self._idempotency, claim)
        try:
            await self._lifecycle.chat(replace(call, request_id=request_id), caller, reply)
        except LeadlineError as error:
            await reply.fail(error, b"x-request-id: %b\r\n" % new_request_id())
        finally:
            await reply.release()


def _read_chat(body: bytes, headers: CallHeaders) -> ChatCall:
    """An engine takes a plan with a call; here the policy states it, and what it may cost is held before it runs."""
    call = read_chat(body, headers)
    if "plan" in call.fields:
        raise InvalidRequest(
            "plan: how a model works on an answer is the policy's to say (`models.NAME.plan`); leave it out. "
            "x-leadline-effort asks for less thought.",
            param="plan",
        )
    return call


def data_plane(lifecycle: Lifecycle, idempotency: IdempotencyStore, max_body_bytes: int) -> Mapping[str, Endpoint]:
    """Path → who answers it."""
    readers: dict[str, Reader] = {
        "/v1/chat/completions": _read_chat,
        "/v1/completions": read_completion,
        "/v1/embeddings": read_embedding,
    }
    return {path: Endpoint(lifecycle, idempotency, read, max_body_bytes) for path, read in readers.items()}
