"""A real gateway on a free port, its ledger filled with rows through the ledger's own writer."""

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import msgspec
import pytest
import uvicorn

from gateway.app import App
from gateway.ledger.records import AttemptRecord, RequestRecord
from gateway.policies import load_policy
from gateway.settings import Settings
from routers.explain import to_dict
from routers.types import Candidate, Decision, Single

POLICY = """
version: 1
providers:
  far: {base_url: "http://127.0.0.1:9/v1"}
models:
  small: {provider: far, model: small, context: 8000, price: {input: $0.25/Mtok, output: $2/Mtok}}
  large: {provider: far, model: large, context: 8000, price: {input: $1.25/Mtok, output: $10/Mtok}}
routes:
  - name: auto
    when: {model: auto}
    candidates: [small, large]
    objective: cheapest
"""
XSS = '<script>alert("x")</script>'
FORMULA = '=HYPERLINK("http://evil.example","click")'


@dataclass
class Running:
    """The gateway under test, and its keys by name."""

    url: str
    app: App
    loop: asyncio.AbstractEventLoop
    keys: dict[str, str]

    def record(self, *rows: tuple[RequestRecord, list[AttemptRecord]]) -> None:
        """Close these requests in the ledger, as the lifecycle would."""

        def close() -> None:
            for request, attempts in rows:
                self.app.state.lifecycle.ledger.close_request(request, attempts)

        self.loop.call_soon_threadsafe(close)

    @contextlib.contextmanager
    def client(self, key: str | None = None) -> Iterator[httpx2.Client]:
        """A browser without a screen, signed in with the key of that name."""
        with httpx2.Client(base_url=self.url, follow_redirects=True, timeout=60) as client:
            if key is not None:
                answer = client.post("/dashboard/login", data={"key": self.keys[key]})
                assert answer.status_code == 200, answer.text
            yield client


_numbers = itertools.count(1)


def row(
    *,
    age_s: float = 60,
    tenant: str = "default",
    model: str | None = "small",
    requested: str = "auto",
    outcome: str = "ok",
    cache: str = "off",
    stream: bool = False,
    cost: int | None = 1_234_567,
    estimated: bool = False,
    baseline: int | None = 6_000_001,
    decided: bool = True,
) -> tuple[RequestRecord, list[AttemptRecord]]:
    """One closed request with an attempt, unless no model served it or the cache did."""
    created_at_ms = int((time.time() - age_s) * 1000)
    request = RequestRecord(
        id=f"req_{created_at_ms:011x}{next(_numbers):016x}",
        created_at_ms=created_at_ms,
        tenant=tenant,
        key_id="0123456789ab",
        endpoint="chat.completions",
        stream=stream,
        model_requested=requested,
        policy_version="p1",
        route="auto",
    )
    request.outcome, request.cache = outcome, cache
    request.http_status = 200 if outcome == "ok" else 499 if outcome == "cancelled" else 502
    request.error_code = None if outcome == "ok" else "upstream_failed"
    request.model_served, request.provider = model, "far" if model else None
    request.duration_us, request.first_byte_us, request.overhead_us = 812_345, 204_000, 740
    attempts = []
    if model is not None and cache != "hit":
        attempt = AttemptRecord(f"{request.id}-0", request.id, 0, model, "far", created_at_ms + 1)
        attempt.outcome, attempt.duration_us, attempt.first_byte_us = outcome, 811_000, 203_000
        attempt.input_tokens, attempt.cached_input_tokens, attempt.output_tokens = 120, 30, 58
        attempt.cost_nanousd, attempt.cost_estimated = cost, estimated
        attempts = [attempt]
        request.decision = msgspec.json.encode(to_dict(decision(model))).decode() if decided else None
    request.total(attempts)
    request.baseline_nanousd = baseline
    return request, attempts


def decision(model: str) -> Decision:
    other = "large" if model != "large" else "small"
    return Decision(
        plan=Single(model),
        route="auto",
        rule="cheapest with p_success >= 0.9",
        candidates=(
            Candidate(model, 0.93, 0.88, 0.97, 700_000, 2_000_000),
            Candidate(other, 0.99, 0.97, 1.0, 3_500_000, 9_000_000, "dearer than the cheapest that will do"),
        ),
        fallbacks=(),
        policy_version="p1",
        probe_version="test-probe-1",
        seed=0,
        degraded="",
    )


def seed() -> list[tuple[RequestRecord, list[AttemptRecord]]]:
    """Every kind of row, spread over a day, a week and a year."""
    rows = [row(age_s=60 + 1700 * n, cost=1_000_003 * (n + 1), baseline=9_000_000 * (n + 1)) for n in range(28)]
    rows += [
        row(age_s=500 + 3000 * n, model="large", cost=7_777_777, baseline=7_777_777, stream=True) for n in range(9)
    ]
    rows += [row(age_s=90 + 800 * n, cache="hit", cost=0, baseline=2_000_000) for n in range(7)]
    rows += [row(age_s=95 + 900 * n, cache="miss") for n in range(4)]
    rows += [
        row(age_s=40, model=XSS, requested=XSS),
        row(age_s=41, requested=FORMULA, tenant="acme"),
        row(age_s=42, outcome="error", cost=0, baseline=None),
        row(age_s=43, outcome="cancelled", estimated=True),
        row(age_s=44, outcome="refused", model=None, baseline=None),
        row(age_s=45, cost=None, baseline=None),
        row(age_s=46, tenant="acme", model="large", cost=5),
        row(age_s=3 * 86400),
        row(age_s=20 * 86400, model="large"),
        row(age_s=300 * 86400, model="large", cost=123_456_789_012),
    ]
    return rows


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "policy.yaml").write_text(POLICY)
    with serve(folder) as gateway:
        gateway.record(*seed())
        yield gateway


class serve:
    """The gateway of `folder`, in a thread of its own for the length of a `with`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Running:
        home = self._folder / "home"
        settings = Settings.from_env({"LEADLINE_HOME": str(home)})
        app = App(settings, load_policy(self._folder / "policy.yaml", env={}))
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, http="httptools", ws="none", lifespan="on", access_log=False, log_level="error")
        self._server = uvicorn.Server(config)
        loops: list[asyncio.AbstractEventLoop] = []

        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await self._server.serve(sockets=[listener])

        self._thread = threading.Thread(target=lambda: asyncio.run(main()), name="gateway")
        self._thread.start()
        _wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started
        store = app.state.lifecycle.keys
        keys = {
            "admin": (home / "key").read_text(),
            "user": store.create("user"),
            "acme": store.create("acme", tenant="acme"),
        }
        return Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, loops[0], keys)

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


def _wait_until(true: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
