"""Prometheus metrics of one worker. No label carries an id, a key or a prompt."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.ledger.records import AttemptRecord, RequestRecord

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = Gauge("leadline_requests_in_flight", "Admitted requests under way.", registry=self.registry)
        self.engine_up = Gauge("leadline_engine_up", "1 while the engine process answers.", registry=self.registry)
        self.engine_restarts = Counter(
            "leadline_engine_restarts", "Times the engine process was started again.", registry=self.registry
        )
        self.probe_failures = Counter(
            "leadline_probe_failures", "Probes that did not answer in time.", registry=self.registry
        )
        self._requests = Counter(
            "leadline_requests", "Admitted requests.", ["route", "model", "outcome", "cache"], registry=self.registry
        )
        self._duration = Histogram(
            "leadline_request_duration_seconds", "Admission to end of answer.", buckets=_SECONDS, registry=self.registry
        )
        self._overhead = Histogram(
            "leadline_overhead_seconds", "Time added to the upstream's.", buckets=_SECONDS, registry=self.registry
        )
        self._attempts = Counter(
            "leadline_attempts", "Upstream calls.", ["provider", "model", "outcome"], registry=self.registry
        )
        self._tokens = Counter("leadline_tokens", "Tokens billed.", ["model", "class"], registry=self.registry)
        self._cost = Counter("leadline_cost_nanousd", "Nano-dollars spent.", ["model"], registry=self.registry)

    def request(self, record: RequestRecord) -> None:
        self._requests.labels(record.route or "-", record.model_served or "-", record.outcome, record.cache).inc()
        self._duration.observe(record.duration_us / 1e6)
        self._overhead.observe(record.overhead_us / 1e6)

    def attempt(self, attempt: AttemptRecord) -> None:
        self._attempts.labels(attempt.provider, attempt.model, attempt.outcome).inc()
        for kind, tokens in (
            ("input", attempt.input_tokens),
            ("cached_input", attempt.cached_input_tokens),
            ("cache_write", attempt.cache_write_tokens),
            ("output", attempt.output_tokens),
            ("reasoning", attempt.reasoning_tokens),
        ):
            if tokens:
                self._tokens.labels(attempt.model, kind).inc(tokens)
        if attempt.cost_nanousd:
            self._cost.labels(attempt.model).inc(attempt.cost_nanousd)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
