"""OpenTelemetry: what a real OTLP receiver decodes of a request, and what happens while there is none."""

import gzip
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.edge.conftest import PROVIDER_KEY, StartEdge, post
from tests.edge.provider import Provider
from tests.edge.test_canaries import CANARY, EMAIL, FAULTS, POSITIONS, send
from tests.gateway.conftest import until

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Receiver:
    spans: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    url: str = ""

    async def take(self, request: web.Request) -> web.Response:
        raw = await request.read()
        body = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if request.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    self.spans += scope.spans
        else:
            for group in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for of_scope in group.scope_metrics:
                    self.metrics |= {metric.name: metric for metric in of_scope.metrics}
        return web.Response(content_type="application/x-protobuf")


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    found = Receiver()
    app = web.Application()
    app.router.add_post("/{path:.*}", found.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
    yield found
    await runner.cleanup()


def attributes(item: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in item.attributes}


def body(text: str = "x") -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": text}]}


@pytest.mark.anyio
async def test_a_request_is_one_span_with_its_attempts_below(
    start_edge: StartEdge, provider: Provider, receiver: Receiver
) -> None:
    async with start_edge() as edge:
        _, headers, _ = await post(edge, "/v1/chat/completions", body(), traceparent=CALLER)
        provider.fail_next = (500, {}, "{}")
        failed, failed_headers, _ = await post(edge, "/v1/chat/completions", body("fails"))
        await post(edge, "/v1/chat/completions", body("unsampled"), traceparent=CALLER[:-1] + "0")
        await post(edge, "/v1/embeddings", {"model": "vectors", "input": "x"}, traceparent="nonsense")
    assert failed == 502
    roots = {attributes(span)["leadline.request_id"]: span for span in receiver.spans if span.kind == 2}
    assert len(roots) == 3, "the caller that does not sample is obeyed"
    root = roots[headers["x-request-id"]]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (CALLER[3:35], CALLER[36:52])
    assert root.name == "chat chat"
    assert root.end_time_unix_nano > root.start_time_unix_nano
    seen = attributes(root)
    assert (seen["gen_ai.operation.name"], seen["gen_ai.request.model"], seen["gen_ai.provider.name"]) == (
        "chat", "chat", "fake",
    )  # fmt: skip
    assert (seen["gen_ai.usage.input_tokens"], seen["gen_ai.usage.output_tokens"]) == (1, 3)
    assert seen["leadline.cost_nanousd"] == int(headers["x-leadline-cost-nanousd"])
    assert seen["server.address"] == "127.0.0.1"
    (attempt,) = [span for span in receiver.spans if span.parent_span_id == root.span_id]
    assert (attempt.kind, attempt.trace_id) == (3, root.trace_id)
    broken = roots[failed_headers["x-request-id"]]
    assert broken.trace_id.hex().lstrip("0") == failed_headers["x-request-id"].removeprefix("req_").lstrip("0")
    assert (broken.status.code, attributes(broken)["error.type"]) == (2, "upstream_failed")
    assert set(receiver.metrics) == {
        "gen_ai.client.token.usage", "gen_ai.client.operation.duration", "gen_ai.server.time_to_first_token",
    }  # fmt: skip
    points = receiver.metrics["gen_ai.client.operation.duration"].histogram.data_points
    assert sum(point.count for point in points) == 4
    assert not any("traceparent" in {name.lower() for name, _ in headers} for headers in provider.headers)


@pytest.mark.anyio
async def test_what_did_not_fail_is_no_error(start_edge: StartEdge, provider: Provider, receiver: Receiver) -> None:
    more = """\
  third: {provider: fake, model: wire-third, context: 16000, max_output: 1000, price: free}
routes: [{name: two, when: {model: two}, candidates: ["chat&talker>third"], accept: agree, cache: off}]
"""
    async with start_edge(more) as edge:
        _, headers, _ = await post(edge, "/v1/chat/completions", {**body(), "model": "two"})
        assert headers["x-leadline-plan"] == "cascade; stages=3; asked=2; agreed=2"
        provider.fail_next = (500, {}, "{}")
        await post(edge, "/v1/chat/completions", body("fails"))
        outcomes = [a["outcome"] for row in await edge.rows() for a in row["attempt_rows"]]
    assert sorted(outcomes) == ["agreed", "ok", "status"]
    told = [(span.status.code, attributes(span).get("error.type")) for span in receiver.spans if span.kind == 3]
    assert sorted(told, key=str) == [(0, None), (0, None), (2, "status")]
    points = receiver.metrics["gen_ai.client.operation.duration"].histogram.data_points
    failed = [point for point in points if any(pair.key == "error.type" for pair in point.attributes)]
    assert [point.count for point in failed] == [1]


@pytest.mark.anyio
async def test_nothing_confidential_is_traced(start_edge: StartEdge, provider: Provider, receiver: Receiver) -> None:
    async with start_edge() as edge:
        for fault, make in itertools.product(FAULTS, POSITIONS.values()):
            provider.echo = fault
            for canary in (CANARY, EMAIL):
                await send(edge, make(canary), stream=canary is EMAIL)
        own_secret = edge.key.split("-")[3]
    assert len(receiver.spans) > 400
    told = f"{receiver.spans} {receiver.metrics}"
    assert "gen_ai.request.model" in told
    for secret in (CANARY, PROVIDER_KEY, own_secret):
        assert secret not in told


@pytest.mark.anyio
async def test_a_receiver_that_is_away_costs_no_request(start_edge: StartEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    async with start_edge() as edge:
        for number in range(5):
            assert (await post(edge, "/v1/chat/completions", body(str(number))))[0] == 200
        dropped = edge.app.state.lifecycle.metrics.telemetry_dropped
        await until(lambda: dropped._value.get() == 5)  # in one export or two, each tried for some seconds
    assert dropped._value.get() == 5


def test_who_configures_no_endpoint_loads_nothing_of_it() -> None:
    code = "import gateway.app, sys; print(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
