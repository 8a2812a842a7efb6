"""`leadline engine --listen`: the engine alone on a host, for whoever speaks OpenAI's API, and for gateways elsewhere.

This process holds no model: it supervises the engine process and speaks HTTP. When the engine dies, what was in flight
ends with a typed error (`engine_gone`), what comes meanwhile is a 503 with `Retry-After`, and a new engine is started.
One that hangs is not started again: what comes meanwhile is told so (`engine_silent`), and what was in flight is when
it has said nothing for 30 s (`gateway.engine_link`).

Beside chat, embeddings and models: `/score` (how probable are these continuations), `/probe` (how likely is a good
answer), `/hidden` (hidden states of chosen layers at chosen tokens), `/prefix/…` (what is kept of prompts:
`gateway.engine_prefixes`), `/embed`, `/health`, `/metrics`, and the load of the engine in the answer's
`endpoint-load-metrics` header (ORCA) where a request asks for it. Chat takes a `plan` beside OpenAI's fields
(`local_engine.plan_types.Plan`, told apart by `type`), and `usage.plan` says what each of its models did.
`/v1/completions` is read as a gateway reads it, and refused as by a gateway's local models: they take no raw prompt.
"""

import asyncio
import base64
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from gateway import __version__
from gateway.decode_errors import misread
from gateway.edge.asgi import Receive, Scope, Send
from gateway.edge.prompts import read_completion, read_embedding
from gateway.edge.refused import TextRoute, tell_refusals
from gateway.edge.wire import read_chat
from gateway.engine_answers import answered, attempted, bytes_of, error_of, gone, silent, until_gone
from gateway.engine_door import Door
from gateway.engine_link import EngineConnection
from gateway.engine_metrics import EngineMetrics
from gateway.engine_names import ModelNames
from gateway.engine_needs import EngineNeeds
from gateway.engine_prefixes import add_prefix_routes
from gateway.engine_process import EngineProcess
from gateway.errors import InvalidRequest, LeadlineError
from gateway.upstream.begun import read_begun
from gateway.upstream.engines import LOAD_HEADER
from gateway.upstream.local import LocalUpstream
from gateway.upstream.local_params import EFFORTS, MAX_SEED
from gateway.upstream.local_plans import planned_for, unplanned
from gateway.upstream.sse import write_event
from gateway.upstream.types import AnswerStream, CallHeaders, ChatCall, Planned, Target, UpstreamError
from local_engine.client import EngineClient
from local_engine.errors import EngineGone
from local_engine.plan_types import Cascade, Plan, SpeculateSteps
from local_engine.types import Delta, EngineStats, Finished, ModelCard, SamplingParams, TapSpec
from routers.policy import PRIORITIES

ANSWER_TIMEOUT_S = 600.0
"""The whole of one answer."""
MAX_HIDDEN_STATES = 8192
"""In one answer: tokens times layers."""
_json = msgspec.json.Encoder().encode
_T = TypeVar("_T")
_Small = Annotated[int, Field(ge=0, lt=1 << 31)]


class EngineService:
    """The HTTP side. `token`: what callers must send as a bearer; None: nothing, for loopback addresses alone.

    `by_policy`: what a policy calls the engine's models → the engine's names.
    """

    def __init__(self, needs: EngineNeeds, socket: Path, token: str | None, by_policy: Mapping[str, str]) -> None:
        self._token = token
        self._names = ModelNames(self._client, by_policy)
        self._process = EngineProcess(needs, socket, alone=True)
        registry = CollectorRegistry()
        self._metrics = EngineMetrics(registry)
        self._registry = registry
        self._link = EngineConnection(socket, self._metrics)
        self._upstream = LocalUpstream(self._link)
        self.never_up = False
        """The engine failed before it ever answered: what it was told to load or to use is wrong."""
        self.app = self._routes()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._process.start()
        self._link.start()
        starting = asyncio.create_task(self._give_up_on_a_false_start(), name="engine-first-start")
        try:
            yield
        finally:
            starting.cancel()
            await self._link.stop()
            await self._process.stop()

    async def _give_up_on_a_false_start(self) -> None:
        """Stop the server if the engine's first start fails; one that has answered once is started again for ever."""
        waits = [asyncio.create_task(event.wait()) for event in (self._link.ready, self._process.failed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not self._link.ready.is_set():
                self.never_up = True
                signal.raise_signal(signal.SIGTERM)
        finally:
            for wait in waits:
                wait.cancel()

    def _routes(self) -> FastAPI:
        app = FastAPI(
            title="Leadline engine", version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None
        )
        app.router.route_class = TextRoute
        app.add_middleware(Door, token=self._token)
        app.add_api_route("/health", self._health)
        app.add_api_route("/metrics", self._show_metrics)
        app.add_api_route("/v1/models", self._models)
        app.add_api_route("/v1/models/{name:path}", self._model)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        app.add_api_route("/v1/completions", self._completions, methods=["POST"])
        app.add_api_route("/v1/embeddings", self._embeddings, methods=["POST"])
        app.add_api_route("/embed", self._embeddings, methods=["POST"])
        app.add_api_route("/score", self._score, methods=["POST"])
        app.add_api_route("/probe", self._probe, methods=["POST"])
        app.add_api_route("/hidden", self._hidden, methods=["POST"])
        add_prefix_routes(app, self._client, self._names)
        tell_refusals(app)
        return app

    # what there is -------------------------------------------------------------------------------------------------

    async def _health(self) -> Response:
        """200 while the engine answers; `silent` where there is one that does not."""
        if await self._stats() is not None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "silent" if self._link.pid is not None else "starting"}, status_code=503)

    async def _show_metrics(self) -> Response:
        self._metrics.stats = stats = await self._stats()
        self._metrics.engine_up.set(stats is not None)
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    async def _stats(self) -> EngineStats | None:
        """None where there is no engine, or it does not answer: a process may hang without ending."""
        client = self._link.client
        try:
            return await client.stats() if client is not None else None
        except EngineGone:
            return None

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [_entry(name, card) for name, card in self._names.known().items()]}

    async def _model(self, name: str) -> dict[str, Any]:
        return _entry(name, self._names.find(name))

    # OpenAI's API --------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, read_begun(await self._read(request, read_chat)))

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, await self._read(request, read_completion))

    async def _answer(self, request: Request, call: ChatCall) -> Response:
        target = _planned(self._target(call.model), call, self._names.known())
        headers = await self._load_headers(request)
        if call.stream:
            stream = await until_gone(request, attempted(self._upstream.stream(target, call), self._explain))
            return EventStream(stream, self._explain, include_usage=call.include_usage, headers=headers)
        answer = await until_gone(request, attempted(self._upstream.complete(target, call), self._explain))
        return Response(answer.body, media_type="application/json", headers=headers)

    async def _embeddings(self, request: Request) -> Response:
        call = await self._read(request, read_embedding)
        target = Target(call.model, "engine", call.model, None, 0, 0, ANSWER_TIMEOUT_S, 0)
        self._client()
        answer = await attempted(self._upstream.complete(target, call), self._explain)
        return Response(answer.body, media_type="application/json")

    async def _read(self, request: Request, read: Callable[[bytes, CallHeaders], ChatCall]) -> ChatCall:
        call = read(await request.body(), CallHeaders(token=""))
        salt = call.fields.get("cache_salt")
        if salt is not None:
            try:
                call.tenant = msgspec.json.decode(salt, type=str | None) or ""
            except msgspec.ValidationError as error:
                raise InvalidRequest(f"cache_salt: {error}.", param="cache_salt") from error
        return call

    # what no other server offers -----------------------------------------------------------------------------------

    async def _score(self, asked: "ScoreRequest", request: Request) -> dict[str, Any]:
        """Logprobs and entropies of each candidate's tokens, after the conversation."""
        target = self._target(asked.model)
        result = await answered(
            until_gone(
                request,
                self._client().score(
                    target.wire_model, bytes_of(asked.messages), asked.candidates,
                    prefix=asked.prefix, priority=asked.priority, deadline_s=ANSWER_TIMEOUT_S,
                    salt=asked.cache_salt or "",
                ),
            )
        )  # fmt: skip
        return {
            "model": asked.model,
            "scores": [
                {
                    "tokens": score.tokens, "logprobs": score.logprobs, "entropies": score.entropies,
                    "logprob": sum(score.logprobs),
                }
                for score in result.candidates
            ],
            "usage": {
                "prompt_tokens": result.input_tokens, "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
            },
        }  # fmt: skip

    async def _probe(self, asked: "ProbeRequest") -> dict[str, Any]:
        """Calibrated chances of a good answer, and the prompt's length for each model."""
        client = self._client()
        if not client.hello.probe_heads:
            raise InvalidRequest(
                "this engine has no probe; start it with `--policy FILE`, a policy that names one as "
                "`signals.difficulty.probe` (e.g. `default`)."
            )
        result = await answered(client.probe(bytes_of(asked.messages)))
        return {"p_success": result.p_success, "prompt_tokens": result.input_tokens, "cost_us": result.cost_us}

    async def _hidden(self, asked: "HiddenRequest", request: Request) -> dict[str, Any]:
        """Hidden states as base64 of float16, little endian, row major: [tokens, layers, width]."""
        target = self._target(asked.model)
        tokens = 1 if asked.where == "prompt" else asked.max_tokens
        if tokens * len(asked.layers) > MAX_HIDDEN_STATES:
            raise InvalidRequest(
                f"max_tokens: {tokens} tokens of {len(asked.layers)} layers are more than {MAX_HIDDEN_STATES} hidden "
                "states; ask for fewer tokens or layers.",
                param="max_tokens",
            )
        taps = TapSpec(layers=tuple(asked.layers), where=asked.where, tokens=tuple(asked.tokens))
        sampling = SamplingParams(
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            seed=asked.seed & MAX_SEED if asked.seed is not None else None,
        )

        async def gather() -> dict[str, Any]:
            content = reasoning = ""
            tapped: list[dict[str, Any]] = []
            async with aclosing(
                self._client().generate(
                    target.wire_model, bytes_of(asked.messages), sampling, priority=asked.priority,
                    deadline_s=ANSWER_TIMEOUT_S, salt=asked.cache_salt or "", taps=taps,
                )
            ) as events:  # fmt: skip
                async for event in events:
                    if isinstance(event, Delta):
                        content, reasoning = content + event.content, reasoning + event.reasoning
                        tapped += [
                            {"positions": t.positions, "shape": t.shape, "data": base64.b64encode(t.data).decode()}
                            for t in event.tapped
                        ]
                    else:
                        end: Finished = event
            return {
                "model": asked.model, "content": content, "reasoning_content": reasoning,
                "finish_reason": end.finish_reason, "layers": asked.layers, "hidden": tapped,
            }  # fmt: skip

        return await answered(until_gone(request, gather()))

    # the engine ----------------------------------------------------------------------------------------------------

    def _client(self) -> EngineClient:
        client = self._link.client
        if client is None:
            raise silent() if self._link.silent else gone("The engine is being started; retry shortly.")
        return client

    def _explain(self, error: UpstreamError) -> LeadlineError:
        return silent() if error.cause == "engine_gone" and self._link.silent else error_of(error)

    def _target(self, model: str) -> Target:
        """Raises UnknownModel, and Unavailable while there is no engine."""
        card = self._names.find(model)
        context = card.context_window
        return Target(
            model, "engine", card.name, None, context, context, ANSWER_TIMEOUT_S, 0,
            first_byte_timeout_s=ANSWER_TIMEOUT_S, idle_timeout_s=ANSWER_TIMEOUT_S,
        )  # fmt: skip

    async def _load_headers(self, request: Request) -> dict[str, str]:
        if request.headers.get("endpoint-load-metrics-format", "").upper() != "JSON":
            return {}
        stats = await self._stats()
        return {LOAD_HEADER.decode(): f"JSON {_json(load_of(stats)).decode()}"} if stats is not None else {}


class EventStream(StreamingResponse):
    """An answer as server-sent events. Closes `stream` however it ends, even before the first event is asked for."""

    def __init__(
        self,
        stream: AnswerStream,
        explain: Callable[[UpstreamError], LeadlineError],
        *,
        include_usage: bool,
        headers: dict[str, str],
    ) -> None:
        """`explain`: what the caller is told of what ends it early."""
        self._stream = stream
        self._explain = explain
        self._include_usage = include_usage
        super().__init__(
            self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", **headers}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for group in self._stream:
                for event in group:
                    if not event.usage_only or self._include_usage:
                        yield write_event(event.data)
        except UpstreamError as error:
            yield write_event(_json(self._explain(error).body()))
        else:
            yield b"data: [DONE]\n\n"


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    cache_salt: str | None = None
    priority: Annotated[int, Field(ge=PRIORITIES.start, lt=PRIORITIES.stop)] = 0


class ScoreRequest(_Asked):
    model: str
    candidates: Annotated[list[str], Field(min_length=1, max_length=256)]
    prefix: str = ""


class ProbeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]


class HiddenRequest(_Asked):
    model: str
    layers: Annotated[list[_Small], Field(min_length=1, max_length=256)]
    where: Literal["prompt", "generated", "tokens"] = "prompt"
    tokens: list[_Small] = []
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None


def _entry(name: str, card: ModelCard) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "leadline", "root": card.name,
        "max_model_len": card.context_window, "dtype": card.dtype, "device": card.device,
    }  # fmt: skip


def _planned(target: Target, call: ChatCall, models: Mapping[str, ModelCard]) -> Target:
    """The target with the plan that the caller asks for, whatever the effort. `models`: by all of their names."""
    given = call.fields.get("plan")
    if given is None:
        return target
    try:
        plan = msgspec.json.decode(given, type=Plan | None)
    except msgspec.ValidationError as error:
        path, problem = misread(error, Plan | None, "plan")
        raise InvalidRequest(f"{path}: {problem}.", param="plan") from error
    if plan is None:
        return target
    if isinstance(plan, SpeculateSteps | Cascade) and plan.draft in models:
        plan = msgspec.structs.replace(plan, draft=models[plan.draft].name)
    with_plan = replace(target, plans=dict.fromkeys(EFFORTS.values(), Planned(plan)))
    if planned_for(with_plan, call) is None:
        if unplanned(with_plan, call, "first") == "temperature":
            raise InvalidRequest(
                "plan: at temperature 0 all samples of a vote are alike; send a temperature above 0.", param="plan"
            )
        raise InvalidRequest(
            "plan: it is for one choice of plain text from its beginning; leave out n, tools, response_format, logprobs"
            " and a prefix, or the plan.",
            param="plan",
        )
    return with_plan


def load_of(stats: EngineStats) -> dict[str, dict[str, float]]:
    """The ORCA named metrics, by vLLM's names."""
    share = stats.kv_bytes / stats.kv_bytes_limit if stats.kv_bytes_limit else 0.0
    return {
        "named_metrics": {
            "num_requests_running": stats.running, "num_requests_waiting": stats.waiting, "kv_cache_usage_perc": share,
        }
    }  # fmt: skip
