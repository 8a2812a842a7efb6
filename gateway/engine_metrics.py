"""What `leadline engine --listen` shows at /metrics: the engine's own counts, read when they are asked for."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from local_engine.types import EngineStats

_GAUGES = {
    "running": ("leadline_engine_requests_running", "Requests being computed."),
    "waiting": ("leadline_engine_requests_waiting", "Requests in line."),
    "kv_tokens": ("leadline_engine_kv_tokens", "Tokens in the caches of running sequences."),
    "kv_bytes": ("leadline_engine_kv_bytes", "What those caches take."),
    "kv_bytes_limit": ("leadline_engine_kv_bytes_limit", "What they may take."),
    "prefix_bytes": ("leadline_engine_prefix_bytes", "What stored prefixes take."),
}
_COUNTERS = {
    "steps": ("leadline_engine_steps", "Forward passes."),
    "computed_tokens": ("leadline_engine_computed_tokens", "Tokens read or written by the model, drafts included."),
    "output_tokens": ("leadline_engine_output_tokens", "Tokens written."),
    "prefix_asked_tokens": ("leadline_engine_prefix_asked_tokens", "Prompt tokens looked up among stored prefixes."),
    "prefix_hit_tokens": ("leadline_engine_prefix_hit_tokens", "Of those, the ones that were there."),
    "drafted_tokens": ("leadline_engine_drafted_tokens", "Tokens drafted and verified."),
    "accepted_tokens": ("leadline_engine_accepted_tokens", "Of those, the ones that were kept."),
    "preemptions": ("leadline_engine_preemptions", "Sequences that gave their cache back to compute it again later."),
    "cancelled": ("leadline_engine_cancelled", "Requests that ended because their caller left."),
}


class EngineMetrics(Collector):
    """`stats`: the engine's counts of now; None while there is no engine, and then nothing of it is shown."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stats: EngineStats | None = None
        self.engine_up = Gauge("leadline_engine_up", "1 while the engine process answers.", registry=registry)
        self.engine_restarts = Counter(
            "leadline_engine_restarts", "Times the engine process was started again.", registry=registry
        )
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        if self.stats is None:
            return
        for field, (name, words) in _GAUGES.items():
            yield GaugeMetricFamily(name, words, value=getattr(self.stats, field))
        for field, (name, words) in _COUNTERS.items():
            yield CounterMetricFamily(name, words, value=getattr(self.stats, field))
