"""Prometheus metrics of one worker. No label carries an id, a key or a prompt.

What every request pays for (`request`, `attempt`) is counted in plain numbers, by one thread, and becomes metrics when
it is asked for: prometheus-client's own counters take a lock and several calls each time (measured: 8 µs of a request,
1.5 µs so).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gateway.ledger.records import AttemptRecord, RequestRecord

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BreakerState = Literal["closed", "half_open", "open"]
BREAKER_STATES: dict[BreakerState, int] = {"closed": 0, "half_open": 1, "open": 2}


class _Counters(Collector):
    """One counter per combination of label values. Written by the event loop's thread alone."""

    def __init__(self, name: str, words: str, labels: tuple[str, ...]) -> None:
        self._name, self._words, self._labels = name, words, labels
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, amount: int, *labels: str) -> None:
        counts = self._counts
        counts[labels] = counts.get(labels, 0) + amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._words, labels=self._labels)
        for labels, count in tuple(self._counts.items()):
            family.add_metric(labels, count)
        yield family


class Level(Collector):
    """A number that goes up and down. Written by the event loop's thread alone."""

    def __init__(self, name: str, words: str) -> None:
        self._name, self._words = name, words
        self.value = 0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(self._name, self._words, value=self.value)


class _Seconds(Collector):
    """A histogram of durations. Written by the event loop's thread alone."""

    def __init__(self, name: str, words: str) -> None:
        self._name, self._words = name, words
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*map(floatToGoString, _SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._words, buckets=buckets, sum_value=self._sum)


class _Labelled(Collector):
    """Everything in a registry, with one more label."""

    def __init__(self, registry: CollectorRegistry, worker: str) -> None:
        self._registry = registry
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "worker": self._worker}) for sample in family.samples
            ]
            yield family


class BudgetState(Protocol):
    """What the gauges read of a live budget."""

    @property
    def scope(self) -> str: ...

    @property
    def limit_nanousd(self) -> int: ...

    @property
    def reserved_nanousd(self) -> int: ...

    @property
    def spent_nanousd(self) -> int: ...


class TraceSink(Protocol):
    """Who makes spans of settled requests (`telemetry/traces.py`)."""

    def record(self, request: RequestRecord, attempts: Sequence[AttemptRecord], traceparent: str | None) -> None: ...


class _Budgets(Collector):
    """Sums over the live budgets, by kind of scope (`key`, `team`, `tenant`, …), made when they are asked for."""

    def __init__(self, live: Callable[[], Iterable[BudgetState]]) -> None:
        self._live = live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        sums: dict[tuple[str, str], int] = {}
        for budget in self._live():
            kind = budget.scope.partition(":")[0]
            for part, nanousd in (
                ("limit", budget.limit_nanousd),
                ("reserved", budget.reserved_nanousd),
                ("spent", budget.spent_nanousd),
            ):
                sums[kind, part] = sums.get((kind, part), 0) + nanousd
        family = GaugeMetricFamily(
            "leadline_budget_nanousd", "Nano-dollars of the budgets in use, by kind of scope.", labels=["scope", "part"]
        )
        for labels, nanousd in sums.items():
            family.add_metric(labels, nanousd)
        yield family


class _Breakers(Collector):
    """The breakers' states at the moment they are asked for: an open one becomes half open by the clock alone."""

    def __init__(self, live: Callable[[], Mapping[str, BreakerState]]) -> None:
        self._live = live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("leadline_breaker_state", "0 closed, 1 half open, 2 open.", labels=["model"])
        for model, state in self._live().items():
            family.add_metric([model], BREAKER_STATES[state])
        yield family


class CalibrationState(Protocol):
    """What the gauges read of a watched probe head."""

    @property
    def probe(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def by(self) -> str: ...

    @property
    def pairs(self) -> int: ...

    @property
    def evidence(self) -> float: ...

    @property
    def alarm(self) -> str: ...


class _Calibration(Collector):
    """Whether what a probe said still holds, by model and by who said what became of it."""

    def __init__(self, live: Callable[[], Iterable[CalibrationState]]) -> None:
        self._live = live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["probe", "model", "by"]
        alarm = GaugeMetricFamily(
            "leadline_calibration_alarm", "1 where a probe's probabilities have left the outcomes.", labels=labels
        )
        evidence = GaugeMetricFamily(
            "leadline_calibration_evidence", "Of that, as an e-value: the alarm is raised at 100.", labels=labels
        )
        pairs = GaugeMetricFamily(
            "leadline_calibration_pairs", "Answers with a probability and an outcome.", labels=labels
        )
        for state in self._live():
            values = [state.probe, state.model, state.by]
            alarm.add_metric(values, 1 if state.alarm else 0)
            evidence.add_metric(values, state.evidence)
            pairs.add_metric(values, state.pairs)
        yield from (alarm, evidence, pairs)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.traces: TraceSink | None = None
        self.in_flight = Level("leadline_requests_in_flight", "Admitted requests under way.")
        self.engine_up = self._gauge("leadline_engine_up", "1 while the engine process answers.")
        self.redis_up = self._gauge("leadline_redis_up", "1 while Redis answers; 0 also where none is used.")
        self.engine_restarts = self._counter("leadline_engine_restarts", "Times the engine process was started again.")
        self.probe_failures = self._counter("leadline_probe_failures", "Probes that did not answer in time.")
        self.telemetry_dropped = self._counter(
            "leadline_telemetry_dropped", "Requests whose trace was dropped because its receiver was away or slow."
        )
        self._policy_stale = self._gauge(
            "leadline_policy_stale", "1 while the policy file is not in force, because something is wrong with it."
        )
        self._policy_loads = self._children("leadline_policy_loads", "New versions of the policy file.", "outcome")
        self._unpriced = self._counter("leadline_unpriced_requests", "Requests whose cost is not known.")
        self._slow_clients = self._children(
            "leadline_slow_clients", "Connections cut because the client was too slow.", "phase"
        )
        self._requests = self._children("leadline_requests", "Admitted requests.", "route", "model", "outcome", "cache")
        self._degraded = self._children(
            "leadline_degraded_requests", "Requests answered with less than the policy wanted.", "reason"
        )
        self._attempts = self._children("leadline_attempts", "Upstream calls.", "provider", "model", "outcome")
        self._retries = self._children("leadline_retries", "Upstream calls tried again.", "model", "cause")
        self._fallbacks = self._children("leadline_fallbacks", "Models left for the next one.", "model", "cause")
        self._hedges = self._children("leadline_hedges", "Second calls beside a late first.", "model", "outcome")
        self._shadows = self._children("leadline_shadows", "Requests asked again of shadow models.", "fate")
        self._tokens = self._children("leadline_tokens", "Tokens billed.", "model", "class")
        self._cost = self._children("leadline_cost_nanousd", "Nano-dollars spent.", "model")
        self._duration = _Seconds("leadline_request_duration_seconds", "Admission to end of answer.")
        self._overhead = _Seconds("leadline_overhead_seconds", "Time added to the upstream's.")
        self.registry.register(self.in_flight)
        self.registry.register(self._duration)
        self.registry.register(self._overhead)

    def request(
        self, record: RequestRecord, attempts: Sequence[AttemptRecord] = (), traceparent: str | None = None
    ) -> None:
        """A settled request: counted here, and handed on to the traces where there are any."""
        if self.traces is not None:
            self.traces.record(record, attempts, traceparent)
        self._requests.add(1, record.route or "-", record.model_served or "-", record.outcome, record.cache)
        self._duration.observe(record.duration_us / 1e6)
        self._overhead.observe(record.overhead_us / 1e6)
        if record.cost_nanousd is None:
            self._unpriced.inc()

    def attempt(self, attempt: AttemptRecord) -> None:
        model = attempt.model
        self._attempts.add(1, attempt.provider, model, attempt.outcome)
        if attempt.input_tokens:
            self._tokens.add(attempt.input_tokens, model, "input")
        if attempt.cached_input_tokens:
            self._tokens.add(attempt.cached_input_tokens, model, "cached_input")
        if attempt.cache_write_tokens:
            self._tokens.add(attempt.cache_write_tokens, model, "cache_write")
        if attempt.output_tokens:
            self._tokens.add(attempt.output_tokens, model, "output")
        if attempt.reasoning_tokens:
            self._tokens.add(attempt.reasoning_tokens, model, "reasoning")
        if attempt.cost_nanousd:
            self._cost.add(attempt.cost_nanousd, model)

    def degraded(self, reason: str) -> None:
        """A request is answered with less than the policy wanted, e.g. `budget`, `probe_unavailable`, `redis`."""
        self._degraded.add(1, reason)

    def policy_loaded(self, *, refused: bool) -> None:
        """A new version of the policy file was put in force, or refused."""
        self._policy_loads.add(1, "refused" if refused else "loaded")
        self._policy_stale.set(refused)

    def retried(self, model: str, cause: str) -> None:
        """The same model is asked again, after a failure of this cause."""
        self._retries.add(1, model, cause)

    def fell_back(self, model: str, cause: str) -> None:
        """`model` is left for the next fallback, because of its last failure's cause."""
        self._fallbacks.add(1, model, cause)

    def hedged(self, model: str, outcome: Literal["won", "lost", "failed"]) -> None:
        """A second call went out beside a late first one, and this became of it."""
        self._hedges.add(1, model, outcome)

    def shadow(self, fate: Literal["judged", "unjudged", "failed", "dropped"]) -> None:
        """What became of a shadow: `dropped` where nothing went out."""
        self._shadows.add(1, fate)

    def slow_client(self, phase: Literal["headers", "body", "read"]) -> None:
        """A connection was cut: its headers or body did not come, or its answer was not taken."""
        self._slow_clients.add(1, phase)

    def watch_budgets(self, live: Callable[[], Iterable[BudgetState]]) -> None:
        """Show what the budgets in use hold. `live` is called at each scrape. Call once."""
        self.registry.register(_Budgets(live))

    def watch_breakers(self, live: Callable[[], Mapping[str, BreakerState]]) -> None:
        """Show the state of each model's breaker. `live` is called at each scrape. Call once."""
        self.registry.register(_Breakers(live))

    def watch_calibration(self, live: Callable[[], Iterable[CalibrationState]]) -> None:
        """Show whether probes still mean what they say. `live` is called at each scrape. Call once."""
        self.registry.register(_Calibration(live))

    def exposition(self, worker: int | None = None) -> bytes:
        """Prometheus text; with `worker`, each sample says whose it is."""
        return generate_latest(self.registry if worker is None else _Labelled(self.registry, str(worker)))

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(name, words, registry=self.registry)

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(name, words, registry=self.registry)

    def _children(self, name: str, words: str, *labels: str) -> _Counters:
        counters = _Counters(name, words, labels)
        self.registry.register(counters)
        return counters
