"""What Prometheus scrapes: named by its own rules, explained, and free of anything that names a caller."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.telemetry.metrics import Metrics
from tests.edge.conftest import StartEdge, post
from tests.edge.provider import Provider

anyio = pytest.mark.anyio
LABELS = {"route", "model", "outcome", "cache", "provider", "class", "cause", "reason", "phase", "scope", "part", "le"}
BASE_UNITS = re.compile(r"_(seconds|nanousd)$")
NO_BASE_UNIT = re.compile(r"_(ms|us|milliseconds|microseconds|minutes|usd|kb|mb)(_|$)")


def every_metric() -> str:
    metrics = Metrics()
    request = RequestRecord("req_1", 1, "tenant-x", "key-x", "chat.completions", False, "auto", model_served="cheap")
    request.cost_nanousd = None
    attempt = AttemptRecord("req_1-0", "req_1", 0, "cheap", "fake", 1, input_tokens=3, output_tokens=2, cost_nanousd=7)
    metrics.request(request)
    metrics.attempt(attempt)
    metrics.degraded("redis")
    metrics.retried("cheap", "timeout")
    metrics.fell_back("cheap", "rate_limit")
    metrics.hedged("cheap", "lost")
    metrics.watch_breakers(lambda: {"cheap": "open"})
    metrics.slow_client("headers")
    return metrics.exposition().decode()


def test_names_units_and_help_follow_prometheus_rules() -> None:
    families = list(text_string_to_metric_families(every_metric()))
    assert len(families) > 15
    for family in families:
        assert re.fullmatch(r"leadline_[a-z0-9_]+", family.name), family.name
        assert not NO_BASE_UNIT.search(family.name), f"{family.name}: use base units"
        assert family.documentation.endswith("."), f"{family.name} does not say what it is"
        assert (family.type == "histogram") <= bool(BASE_UNITS.search(family.name)), f"{family.name} names no unit"
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS, sample
            if family.type == "counter" and not sample.name.endswith("_created"):
                assert sample.name.endswith("_total")


def test_what_happened_is_counted_under_its_labels() -> None:
    text = every_metric()
    for line in (
        'leadline_requests_total{cache="off",model="cheap",outcome="running",route="-"} 1.0',
        'leadline_tokens_total{class="output",model="cheap"} 2.0',
        'leadline_cost_nanousd_total{model="cheap"} 7.0',
        "leadline_unpriced_requests_total 1.0",
        'leadline_breaker_state{model="cheap"} 2.0',
        'leadline_retries_total{cause="timeout",model="cheap"} 1.0',
        'leadline_fallbacks_total{cause="rate_limit",model="cheap"} 1.0',
        'leadline_hedges_total{model="cheap",outcome="lost"} 1.0',
        'leadline_degraded_requests_total{reason="redis"} 1.0',
        'leadline_slow_clients_total{phase="headers"} 1.0',
    ):
        assert line in text


@anyio
async def test_budgets_are_shown_by_kind_and_never_by_name(start_edge: StartEdge, provider: Provider) -> None:
    async with start_edge('limits: [{key: "*", budget: $2/day}, {tenant: "*", budget: $3/day}]') as edge:
        body = {"model": "chat", "messages": [{"role": "user", "content": "x"}]}
        status, headers, _ = await post(edge, "/v1/chat/completions", body)
        assert status == 200
        async with edge.session.get(f"{edge.url}/metrics") as response:
            text = await response.text()
    spent = float(headers["x-leadline-cost-nanousd"])
    assert f'leadline_budget_nanousd{{part="spent",scope="key"}} {spent}' in text
    assert 'leadline_budget_nanousd{part="limit",scope="tenant"} 3e+09' in text
    assert 'leadline_budget_nanousd{part="reserved",scope="key"} 0.0' in text
    key_id = edge.key.split("-")[2]
    assert key_id not in text
