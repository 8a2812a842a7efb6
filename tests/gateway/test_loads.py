"""What a worker measures of its targets: the speed of prefill out of first tokens, and what other workers tell."""

import asyncio
import random
from pathlib import Path

import pytest

from gateway.ledger.records import AttemptRecord
from gateway.loads import LEAST_READ, Loads, Meter, Told, reading
from gateway.redis_link import RedisLink
from gateway.shared_loads import SharedLoads
from routers.decide import decide
from routers.load import parse
from routers.types import Query, Signals, State
from tests.gateway.conftest import ask, running, until
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.test_aims import MODELS

anyio = pytest.mark.anyio


def answered(meter: Meter, tokens: int, first_ms: float, *, out: int = 100, cached: int = 0, ms: float = 1000) -> None:
    attempt = AttemptRecord("a", "r", 0, "m", "p", 0)
    attempt.first_byte_us, attempt.duration_us = int(first_ms * 1000), int((first_ms + ms) * 1000)
    attempt.outcome, attempt.input_tokens, attempt.cached_input_tokens = "ok", tokens, cached
    attempt.output_tokens = out + 1
    meter.running += 1
    meter.ended(attempt, stream=True)


def test_the_speed_of_prefill_is_read_off_first_tokens_whatever_waited() -> None:
    """2 ms a token and 150 ms beside it, noise, and every eighth first token seconds late."""
    rng = random.Random(0)
    first = [(rng.randrange(50, 4000), 0.0) for _ in range(64)]
    first = [
        (tokens, 2 * tokens + 150 + rng.gauss(0, 20) + (9000 if at % 8 == 0 else 0))
        for at, (tokens, _) in enumerate(first)
    ]
    found = reading(first)
    assert found is not None
    assert found[0] == pytest.approx(2, rel=0.1)
    assert found[1] == pytest.approx(150, abs=150)


@pytest.mark.parametrize(
    "first",
    [[], [(5, 3.0)] * 2, [(500, 100.0), (510, 110.0), (530, 130.0)] * 9, [(1, 300.0), (900, 200.0), (2000, 100.0)]],
    ids=["none", "few", "prompts alike", "longer ones sooner"],
)
def test_what_first_tokens_do_not_tell_stays_unknown(first: list[tuple[int, float]]) -> None:
    assert reading(first) is None


def test_a_meter_counts_the_tokens_that_were_read_not_those_that_were_kept() -> None:
    meter = Meter()
    for at in range(LEAST_READ - 1):
        answered(meter, 100 * (1 + at), 50 + 100 * (1 + at) / 4, cached=9000)
    assert meter.load().prefill_tokens_per_s is None, "too few"
    answered(meter, 2000, 550, cached=9000)
    load = meter.load()
    assert load.prefill_tokens_per_s == pytest.approx(4000, rel=0.01)
    assert load.start_ms == pytest.approx(50, abs=1)
    assert load.tokens_per_s == pytest.approx(100)


def test_a_long_prompt_goes_to_the_target_that_reads_fast_and_a_short_one_to_the_one_that_starts_soon() -> None:
    """The same two targets, the same measured times: only the prompt's length decides."""
    near, far = Meter(), Meter()
    for at in range(16):
        tokens = 100 + 200 * at
        answered(near, tokens, 20 + tokens / 1)  # 1,000 tokens a second, at once
        answered(far, tokens, 400 + tokens / 20)  # 20,000 a second, far away
    load = {"first": near.load(), "second": far.load()}
    of = parse(
        MODELS.format(one="https://a/v1", two="https://b/v1")
        + "  - {name: auto, when: {model: auto}, candidates: [first, second], objective: fastest, cache: off}\n"
    )

    def taken(tokens: int, cached: dict[str, int]) -> tuple[str, dict[str, int | None]]:
        query = Query("auto", "t", tokens, 50, input_tokens_max=tokens)
        found = decide(query, Signals(cached_tokens=cached), of, State(load=load), 0)
        return found.plan.model, {c.model: c.expected_ms for c in found.candidates}

    short, times = taken(100, {})
    assert short == "first"
    assert times == {"first": pytest.approx(20 + 100 + 500, abs=2), "second": pytest.approx(400 + 5 + 500, abs=2)}
    assert taken(5000, {})[0] == "second"
    assert taken(5000, {"first": 4900})[0] == "first", "of which a kept prefix saves the reading"


def test_what_others_have_under_way_stands_in_the_queue_and_their_times_where_there_are_none() -> None:
    loads = Loads({"m": 4, "n": None})
    for _ in range(3):
        loads.began("m")
    loads.hear([{"m": Told(2, 50.0, 900.0, 10.0, 100.0, 200.0)}, {"m": Told(1, 70.0), "gone": Told(9)}])
    load = loads.of(["m"])["m"]
    assert (load.running, load.queue) == (4, 2)
    assert (load.tokens_per_s, load.prefill_tokens_per_s, load.start_ms) == (60.0, 900.0, 10.0)
    assert (load.ttft_ms_p50, load.ttft_ms_p95) == (100.0, 200.0)
    meter = Meter()
    meter.elsewhere = [Told(1, 50.0)]
    answered(meter, 10, 5)
    assert meter.load().tokens_per_s == pytest.approx(100), "what was measured here goes first"
    loads.hear([])
    assert loads.of(["m"])["m"].running == 3
    assert loads.told() == {"m": Told(3)}


@anyio
async def test_workers_tell_each_other_and_one_that_falls_silent_is_forgotten(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = [RedisLink(redis_url, lambda up: None, timeout_s=30) for _ in range(3)]
    of = [Loads({"m": 2}) for _ in links]
    workers = [SharedLoads(link, lambda loads=loads: loads) for link, loads in zip(links, of, strict=True)]  # type: ignore[misc]
    try:
        for loads in of:
            loads.began("m")
        for worker in (*workers, *workers):
            await worker.exchange()
        assert [loads.of(["m"])["m"].queue for loads in of] == [1, 1, 1]
        await workers[2].stop()  # it takes its line with it
        await workers[0].exchange()
        assert (of[0].of(["m"])["m"].running, of[0].of(["m"])["m"].queue) == (2, 0)
        monkeypatch.setattr("gateway.shared_loads.SILENT_S", -1.0)  # the second one tells nothing more, and is dead
        await workers[0].exchange()
        assert of[0].of(["m"])["m"].running == 1
    finally:
        for link in links:
            await link.close()


@anyio
async def test_without_redis_each_goes_by_its_own() -> None:
    away = RedisLink("redis://127.0.0.1:9/0", lambda up: None)
    loads = Loads({"m": 1})
    loads.hear([{"m": Told(5)}])
    await SharedLoads(away, lambda: loads).exchange()
    assert loads.of(["m"])["m"].running == 0
    await away.close()


@anyio
async def test_a_worker_sees_the_queue_that_another_one_made(
    upstream: FakeUpstream, redis_url: str, tmp_path: Path
) -> None:
    upstream.pace_s = 2.0  # longer than it takes to be told, however busy the machine is
    policy = MODELS.replace("model: cheap,", "model: cheap, slots: 1,").format(one=upstream.url, two=upstream.url) + (
        "  - {name: auto, when: {model: auto}, candidates: [first, second], objective: fastest, cache: off}\n"
    )
    async with (
        running(policy, tmp_path / "one", redis_url=redis_url) as one,
        running(policy, tmp_path / "two", redis_url=redis_url) as two,
    ):
        for gateway in (one, two):
            assert gateway.app.state.redis is not None
            gateway.app.state.redis.timeout_s = 30
        asked = [asyncio.create_task(one.stream(ask(model="first", max_tokens=50))) for _ in range(3)]
        seen = two.app.state.lifecycle.world.loads
        assert seen is not None
        await until(lambda: seen.of(["first"])["first"].queue == 2)
        upstream.pace_s = 0.0
        await asyncio.gather(*asked)
        await until(lambda: seen.of(["first"])["first"].running == 0)
