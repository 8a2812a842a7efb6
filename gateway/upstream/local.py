"""The local engine as an upstream: engine events in, OpenAI chunks out.

The engine runs in its own process; this side holds no torch. A call that its caller abandons is cancelled in the
engine within one step, because closing the iterator sends the cancel.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

from gateway.errors import InvalidRequest
from gateway.ledger.settle import Usage
from gateway.upstream.begun import read_begun
from gateway.upstream.embed import embed
from gateway.upstream.gather import Gathered, whole_of
from gateway.upstream.local_params import refused, sampling_params, tool_choice
from gateway.upstream.local_plans import planned_for, report_of
from gateway.upstream.told_usage import told_as
from gateway.upstream.types import Answer, Cause, ChatCall, Event, Hear, Progress, StreamState, Target, UpstreamError
from local_engine.client import EngineClient
from local_engine.errors import EngineFailure, EngineGone
from local_engine.types import Delta, Finished, TokenLogprob, ToolCallDelta

LATE = "the engine did not end its answer in time"
_encode = msgspec.json.Encoder().encode


class EngineLink(Protocol):
    """Where the running engine is; a supervisor may replace it at any time."""

    @property
    def client(self) -> EngineClient | None:
        """None while no engine is up."""
        ...


class LocalUpstream:
    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._seeds = itertools.count(time.time_ns() & 0x7FFFFFFF)

    def unavailable(self, target: Target) -> str | None:
        client = self._link.client
        if client is None:
            return "the engine process is not up"
        if all(card.name != target.wire_model for card in client.hello.models):
            return f"the engine has not loaded {target.wire_model}"
        return None

    async def stream(self, target: Target, call: ChatCall, progress: Progress | None = None) -> "LocalStream":
        return await self._begun(target, call, None)  # whoever relays it has its state

    async def _begun(self, target: Target, call: ChatCall, progress: Progress | None) -> "LocalStream":
        client = self._link.client
        if client is None:
            raise UpstreamError("engine_gone", "the engine process is not up")
        if call.endpoint == "completions":
            fix = "send it as `messages` to /v1/chat/completions"
            raise refused("prompt", f"{target.model} takes conversations only, no raw prompt; {fix}")
        try:
            call = read_begun(call)
        except InvalidRequest as error:
            field = error.param or "messages"
            raise refused(field, error.message.removeprefix(f"{field}: ")) from error
        stream = LocalStream(self._generation(client, target, call), target, call)
        if progress is not None:
            progress.state = stream.state
        try:
            await stream.read_first()
        except BaseException:
            await stream.close()
            raise
        return stream

    async def complete(self, target: Target, call: ChatCall, progress: Progress | None = None) -> Answer:
        """The stream, gathered: one code path, so that both are metered alike. Embeddings come whole."""
        if call.endpoint == "embeddings":
            client = self._link.client
            if client is None:
                raise UpstreamError("engine_gone", "the engine process is not up")
            try:
                return await embed(client, target, call)
            except (EngineFailure, EngineGone) as error:
                raise _upstream_error(error) from error
        stream = await self._begun(target, call, progress)
        return await whole_of(stream, Gathered(stream.completion_id, stream.created, target.model))

    def _generation(self, client: EngineClient, target: Target, call: ChatCall) -> AsyncIterator[Delta | Finished]:
        messages = bytes(call.fields["messages"])
        tools = call.fields.get("tools")
        choice = tool_choice(call)
        sampling = sampling_params(call, next(self._seeds))
        if target.max_output < (sampling.max_tokens or target.context):  # no more than was held for it
            sampling = msgspec.structs.replace(sampling, max_tokens=target.max_output)
        return client.generate(
            target.wire_model,
            messages,
            sampling,
            tools_json=bytes(tools) if tools is not None else None,
            prefix=call.prefix,
            n=call.choices,
            priority=call.priority or 0,
            deadline_s=target.timeout_s,
            salt=call.tenant,
            tool_choice=choice.mode,
            tool=choice.tool,
            plan=planned.plan if (planned := planned_for(target, call)) is not None else None,
            thought=call.thought,
            context=target.context,
        )


class LocalStream:
    """The choices of one call, as their tokens come."""

    def __init__(self, generation: AsyncIterator[Delta | Finished], target: Target, call: ChatCall) -> None:
        self.state = StreamState()
        self.completion_id = f"chatcmpl-{time.time_ns():x}"
        self.created = int(time.time())
        self._model = target.model
        self._deadline = time.monotonic() + target.timeout_s
        self._wait_s = target.first_byte_timeout_s
        self._idle_timeout_s = target.idle_timeout_s
        self._wants_logprobs = call.sampling.logprobs
        self._planned = planned_for(target, call)
        self._arrived: asyncio.Queue[Delta | Finished | Exception] = asyncio.Queue(maxsize=256)
        self._pumping = asyncio.create_task(self._pump(generation))
        self._choices = self._running = call.choices
        self._finished: list[Finished] = []
        self._first: list[Event] = []

    async def read_first(self) -> None:
        self._first = [self._chunk(choice, {"role": "assistant", "content": ""}) for choice in range(self._choices)]
        self._first.extend(await self._read_group())

    def listen(self, hear: Hear) -> None:
        """Its tokens come through a task of their own: all are yielded."""

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        yield self._first
        while self._running:
            yield await self._read_group()
        self.state.done = True

    async def close(self) -> None:
        self._pumping.cancel()
        await asyncio.gather(self._pumping, return_exceptions=True)

    async def _pump(self, generation: AsyncIterator[Delta | Finished]) -> None:
        try:
            async for item in generation:
                await self._arrived.put(item)
        except Exception as error:  # whoever reads the stream must hear of it, whatever it is
            await self._arrived.put(error)
        finally:
            close = getattr(generation, "aclose", None)
            if close is not None:
                await close()

    async def _read_group(self) -> list[Event]:
        """Waits for one event, then takes what else has arrived."""
        wait_s = min(self._wait_s, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(wait_s):
                waiting = [await self._arrived.get()]
        except TimeoutError as error:
            if wait_s < self._wait_s:
                raise UpstreamError("timeout", LATE) from error
            raise UpstreamError("timeout", f"the engine gave no token within {wait_s:g} s") from error
        self._wait_s = self._idle_timeout_s
        while not self._arrived.empty():
            waiting.append(self._arrived.get_nowait())
        events: list[Event] = []
        for item in waiting:
            if isinstance(item, Exception):
                raise _upstream_error(item)
            if isinstance(item, Delta):
                events.append(self._delta(item))
            elif item.finish_reason == "deadline":
                raise UpstreamError("timeout", LATE)
            elif item.finish_reason == "cancelled":  # not by us: our own cancels are never read back
                raise UpstreamError("engine_gone", "the engine stopped in the middle of its answer")
            else:
                self._running -= 1
                self._finished.append(item)
                events.append(self._end(item))
        if not self._running:
            events.append(self._usage())
        return events

    def _delta(self, delta: Delta) -> Event:
        fields: dict[str, Any] = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.content:
            fields["content"] = delta.content
        if delta.tool_calls:
            fields["tool_calls"] = _tool_calls(delta.tool_calls)
        self.state.delivered_bytes += len(delta.reasoning.encode()) + len(delta.content.encode())
        self.state.delivered_bytes += sum(len(call.arguments.encode()) for call in delta.tool_calls)
        self.state.deltas += delta.tokens
        self.state.thought += delta.reasoning_tokens
        if delta.input_tokens and self._planned is None:  # of what a plan's models did, its end tells
            cached = self.state.prompt[1] if self.state.prompt is not None else 0
            self.state.prompt = delta.input_tokens, max(cached, delta.cached_tokens)
        logprobs = {"content": [_logprob(token) for token in delta.logprobs]} if self._wants_logprobs else None
        return self._chunk(delta.choice, fields, logprobs=logprobs)

    def _chunk(self, choice: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None) -> Event:
        piece = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return Event(_encode({**self._frame(), "choices": [piece]}))

    def _end(self, item: Finished) -> Event:
        """Says which stop string ended it, as vLLM does."""
        piece: dict[str, Any] = {"index": item.choice, "delta": {}, "logprobs": None}
        piece |= {"finish_reason": item.finish_reason, "stop_reason": item.stopped_by or None}
        return Event(_encode({**self._frame(), "choices": [piece]}))

    def _usage(self) -> Event:
        # n choices of one prompt read it once: the prompt is counted once, as OpenAI does.
        prompt = self._finished[0].input_tokens
        cached = max(f.cached_tokens for f in self._finished)
        output = sum(f.output_tokens for f in self._finished)
        reasoning = sum(f.reasoning_tokens for f in self._finished)
        self.state.usage = Usage(prompt - cached, cached, output=output - reasoning, reasoning=reasoning)
        if self._planned is not None:
            self.state.plan, self.state.usage = report_of(self._planned.plan, self._finished[0], self.state.usage)
        usage = told_as(Usage(prompt - cached, cached, output=output - reasoning, reasoning=reasoning))
        if (use := self._finished[0].plan) is not None:
            usage["plan"] = msgspec.to_builtins(use)
        return Event(_encode({**self._frame(), "choices": [], "usage": usage}), usage_only=True)

    def _frame(self) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self._model,
        }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        **_token(token.token, token.logprob),
        "top_logprobs": [_token(alternative, logprob) for alternative, logprob in token.top],
        "entropy": token.entropy,
    }


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    """A part of a character has no text of its own; `bytes` has it exactly."""
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


def _tool_calls(pieces: list[ToolCallDelta]) -> list[dict[str, Any]]:
    """What arrived together of one call goes out together."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        call = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
        if piece.name:
            call |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
        call["function"]["arguments"] += piece.arguments
    return list(calls.values())


def _upstream_error(error: Exception) -> Exception:
    """What lifecycle understands of the engine's errors; any other error stays what it is."""
    if not isinstance(error, EngineFailure | EngineGone):
        return error
    if isinstance(error, EngineFailure):
        if error.code in ("context_length_exceeded", "invalid_request"):
            body: dict[str, object] = {
                "message": str(error), "type": "invalid_request_error", "param": error.param, "code": error.code,
            }  # fmt: skip
            cause: Cause = "context_length" if error.code == "context_length_exceeded" else "refused"
            return UpstreamError(cause, str(error), status=400, error=body)
        if error.code == "deadline":
            return UpstreamError("timeout", LATE)
        return UpstreamError("status", f"the engine failed: {error}", status=500)
    return UpstreamError("engine_gone", "the engine process went away")
