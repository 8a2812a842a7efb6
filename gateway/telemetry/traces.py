"""OpenTelemetry traces and metrics of GenAI calls, by OTLP over HTTP. Loaded only where an endpoint is configured.

The request path pays for an append to a queue; spans are made afterwards, in a thread, from the ledger's records, whose
times are known. What cannot be exported is dropped and counted, and no request waits for it. Names and attributes are
those of the GenAI semantic conventions; a trace without a `traceparent` from its caller takes the request's id as its
own, so that a log line leads to it.
"""

import logging
import os
import random
import re
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode
from opentelemetry.util.types import AttributeValue

from gateway import __version__
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.telemetry.metrics import Metrics

MAX_WAITING = 10_000
"""Requests that may wait for the thread; beyond, the oldest is dropped."""
BATCH = 256
WAIT_S = 1.0
EXPORT_TIMEOUT_S = 5
METRICS_EVERY_MS = 15_000
STOP_TIMEOUT_S = 7.0
_OPERATIONS = {"chat.completions": "chat", "completions": "text_completion", "embeddings": "embeddings"}
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)

Finished = tuple[RequestRecord, Sequence[AttemptRecord], str | None]


class Traces:
    """One exporter of one worker, from `start` to `stop`. Where to: OTEL_EXPORTER_OTLP_ENDPOINT and its like."""

    def __init__(self, hosts: Mapping[str, str], metrics: Metrics) -> None:
        """`hosts`: the address of each provider."""
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # what is dropped is counted, not told each time
        self._hosts = hosts
        self._dropped = metrics.telemetry_dropped
        self._resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "leadline")})
        self._scope = InstrumentationScope("leadline", __version__)
        self._spans = OTLPSpanExporter(timeout=EXPORT_TIMEOUT_S)
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(timeout=EXPORT_TIMEOUT_S), export_interval_millis=METRICS_EVERY_MS
        )
        self._meters = MeterProvider(metric_readers=[reader], resource=self._resource)
        meter = self._meters.get_meter("leadline", __version__)
        self._tokens = meter.create_histogram("gen_ai.client.token.usage", "{token}", "Tokens of one call.")
        self._duration = meter.create_histogram("gen_ai.client.operation.duration", "s", "Duration of one call.")
        self._first = meter.create_histogram("gen_ai.server.time_to_first_token", "s", "Time to the first token.")
        self._waiting: deque[Finished] = deque(maxlen=MAX_WAITING)
        self._stopping = threading.Event()
        self._random = random.SystemRandom()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Export what waits, for a few seconds at most. Blocking."""
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)
        self._meters.shutdown(timeout_millis=STOP_TIMEOUT_S * 1000)
        self._spans.shutdown()  # type: ignore[no-untyped-call]  # the exporter has no annotation there

    def record(self, request: RequestRecord, attempts: Sequence[AttemptRecord], traceparent: str | None) -> None:
        """One settled request. Never blocks."""
        if len(self._waiting) == MAX_WAITING:
            self._dropped.inc()
        self._waiting.append((request, attempts, traceparent))

    def _run(self) -> None:
        while not self._stopping.wait(WAIT_S):
            self._export_waiting()
        self._export_waiting()

    def _export_waiting(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            spans = [span for finished in batch for span in self._spans_of(*finished)]
            try:
                sent = self._spans.export(spans) is SpanExportResult.SUCCESS
            except Exception:
                sent = False
            if not sent:
                self._dropped.inc(len(batch))
            for request, attempts, _ in batch:
                self._measure(request, attempts)

    def _spans_of(
        self, request: RequestRecord, attempts: Sequence[AttemptRecord], traceparent: str | None
    ) -> list[ReadableSpan]:
        caller = _caller_of(traceparent)
        if caller is not None and not caller.trace_flags.sampled:
            return []
        trace_id = caller.trace_id if caller is not None else int(request.id.removeprefix("req_")[:32], 16)
        context = self._context(trace_id)
        operation = _OPERATIONS[request.endpoint]
        start_ns = request.created_at_ms * 1_000_000
        attributes: dict[str, AttributeValue | None] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": request.model_requested,
            "gen_ai.response.model": request.model_served,
            "gen_ai.provider.name": request.provider,
            "gen_ai.usage.input_tokens": _input(request),
            "gen_ai.usage.output_tokens": _output(request),
            "server.address": self._hosts.get(request.provider or ""),
            "error.type": request.error_code,
            "leadline.request_id": request.id,
            "leadline.route": request.route,
            "leadline.cache": request.cache,
            "leadline.cost_nanousd": request.cost_nanousd,
        }
        root = self._span(
            f"{operation} {request.model_requested}", context, caller, attributes, SpanKind.SERVER,
            start_ns, start_ns + request.duration_us * 1000, failed=request.outcome != "ok",
        )  # fmt: skip
        return [root, *(self._attempt_span(attempt, operation, context) for attempt in attempts)]

    def _attempt_span(self, attempt: AttemptRecord, operation: str, parent: SpanContext) -> ReadableSpan:
        start_ns = attempt.started_at_ms * 1_000_000
        attributes: dict[str, AttributeValue | None] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": attempt.model,
            "gen_ai.provider.name": attempt.provider,
            "gen_ai.usage.input_tokens": _input(attempt),
            "gen_ai.usage.output_tokens": _output(attempt),
            "server.address": self._hosts.get(attempt.provider),
            "error.type": attempt.outcome if attempt.failed else None,
            "http.response.status_code": attempt.upstream_status,
            "leadline.cost_nanousd": attempt.cost_nanousd,
        }
        return self._span(
            f"{operation} {attempt.model}", self._context(parent.trace_id), parent, attributes, SpanKind.CLIENT,
            start_ns, start_ns + attempt.duration_us * 1000, failed=attempt.failed,
        )  # fmt: skip

    def _span(
        self, name: str, context: SpanContext, parent: SpanContext | None,
        attributes: Mapping[str, AttributeValue | None], kind: SpanKind, start_ns: int, end_ns: int, *, failed: bool,
    ) -> ReadableSpan:  # fmt: skip
        return ReadableSpan(
            name=name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes={key: value for key, value in attributes.items() if value is not None},
            kind=kind,
            status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
            start_time=start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )

    def _context(self, trace_id: int) -> SpanContext:
        return SpanContext(trace_id, self._random.getrandbits(64) or 1, is_remote=False, trace_flags=_SAMPLED)

    def _measure(self, request: RequestRecord, attempts: Sequence[AttemptRecord]) -> None:
        operation = _OPERATIONS[request.endpoint]
        for attempt in attempts:
            labels = {
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": attempt.model,
                "gen_ai.provider.name": attempt.provider,
            }
            failed = {"error.type": attempt.outcome} if attempt.failed else {}
            self._duration.record(attempt.duration_us / 1e6, {**labels, **failed})
            if attempt.first_byte_us is not None:
                self._first.record(attempt.first_byte_us / 1e6, labels)
            for kind, tokens in (("input", _input(attempt)), ("output", _output(attempt))):
                if tokens:
                    self._tokens.record(tokens, {**labels, "gen_ai.token.type": kind})


def _input(record: RequestRecord | AttemptRecord) -> int:
    return record.input_tokens + record.cached_input_tokens + record.cache_write_tokens


def _output(record: RequestRecord | AttemptRecord) -> int:
    return record.output_tokens + record.reasoning_tokens


def _caller_of(traceparent: str | None) -> SpanContext | None:
    """The caller's span (W3C Trace Context); None for none, and for one that is malformed."""
    found = _TRACEPARENT.match(traceparent or "")
    if found is None or found[0].startswith("ff"):
        return None
    context = SpanContext(
        int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=TraceFlags(int(found[3], 16))
    )
    return context if context.is_valid else None
