"""What callers say of answers: kept once per source, for their own tenant alone, and shown wherever the request is."""

import asyncio
from typing import Any

import pytest

from gateway.ledger import outcomes, report
from gateway.ledger.outcomes import MAX_SOURCES
from gateway.sdk import AsyncLeadline, Leadline
from tests.gateway.conftest import Gateway, StartGateway, ask

pytestmark = pytest.mark.anyio


async def say(gateway: Gateway, request_id: str, body: Any, key: str | None = None) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key or gateway.key}"}
    url = f"{gateway.url}/leadline/v1/requests/{request_id}/feedback"
    async with gateway.session.post(url, json=body, headers=headers) as response:
        return response.status, await response.json()


async def get(gateway: Gateway, path: str, key: str | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key or gateway.key}"}
    async with gateway.session.get(f"{gateway.url}{path}", headers=headers) as response:
        found: dict[str, Any] = await response.json()
        return found


async def served(gateway: Gateway, text: str = "hello") -> str:
    _, headers, _ = await gateway.chat(ask(text, model="uncached"))
    return str(headers["x-request-id"])


async def test_the_last_word_of_each_source_counts_and_is_shown(start_gateway: StartGateway, database_url: str) -> None:
    async with start_gateway(database_url=database_url) as gateway:
        request_id = await served(gateway)
        await served(gateway, "unrated")
        status, first = await say(gateway, request_id, {"accept": True, "comment": "näice"})
        assert (status, first["score"], first["source"], first["model"]) == (200, 1.0, "caller", "cheap")
        assert (await say(gateway, request_id, {"reject": True}))[1]["score"] == 0.0
        assert (await say(gateway, request_id, {"reject": True}))[0] == 200
        assert (await say(gateway, request_id, {"score": 0.75, "source": "qa:team-1"}))[0] == 200
        receipt = await get(gateway, f"/leadline/v1/requests/{request_id}")
        assert [(f["source"], f["score"], f["comment"]) for f in receipt["feedback"]] == [
            ("caller", 0.0, None),
            ("qa:team-1", 0.75, None),
        ]
        spend = await get(gateway, "/leadline/v1/spend")
        # (0 + 0.75) / 2 is rejected; what it cost is spent for nothing
        assert (spend["rated"], spend["accepted"], spend["cost_of_pass_nanousd"]) == (1, 0, None)
        assert spend["rated_cost_nanousd"] == receipt["cost_nanousd"] > 0
        await say(gateway, request_id, {"accept": True})
        spend = await get(gateway, "/leadline/v1/spend")
        assert (spend["accepted"], spend["cost_of_pass_nanousd"]) == (1, receipt["cost_nanousd"])


async def test_cost_of_pass_is_all_spend_of_the_rated_per_accepted(start_gateway: StartGateway) -> None:
    async with start_gateway() as gateway:
        ids = [await served(gateway, f"question {i} " + "word " * i) for i in range(4)]
        for request_id, verdict in zip(ids, ("accept", "accept", "reject"), strict=False):
            await say(gateway, request_id, {verdict: True})
        rows = {row["id"]: row["cost_nanousd"] for row in await gateway.rows()}
        spend = await get(gateway, "/leadline/v1/spend")
    paid = sum(rows[request_id] for request_id in ids[:3])
    assert spend["cost_of_pass_nanousd"] == -(-paid // 2)
    assert (spend["rated"], spend["accepted"], spend["requests"]) == (3, 2, 4)


async def test_a_judge_counts_only_where_nobody_else_spoke(start_gateway: StartGateway) -> None:
    async with start_gateway() as gateway:
        request_id = await served(gateway)
        await gateway.rows()
        engine = gateway.app.state.lifecycle.ledger.engine
        found = report.request(engine, request_id)
        assert found is not None
        with engine.begin() as connection:
            outcomes.judge_says(connection, found[0], [outcomes.Verdict("cheap", 1.0)], "against dear: tie", 1)
        assert report.worth(engine, since_ms=0)["accepted"] == 1
        await say(gateway, request_id, {"accept": False})
        assert report.worth(engine, since_ms=0)["accepted"] == 0


async def test_another_tenants_request_is_not_there(start_gateway: StartGateway) -> None:
    async with start_gateway() as gateway:
        keys = gateway.app.state.lifecycle.keys
        other, reader = keys.create("other", tenant="other"), keys.create("eyes", role="reader")
        request_id = await served(gateway)
        status, body = await say(gateway, request_id, {"accept": True}, other)
        assert (status, body["error"]["code"]) == (404, "not_found")
        assert (await say(gateway, request_id, {"accept": True}, reader))[0] == 403
        assert (await say(gateway, "req_none", {"accept": True}))[0] == 404
        assert (await get(gateway, f"/leadline/v1/requests/{request_id}"))["feedback"] == []
        assert (await say(gateway, request_id, {"accept": True}))[0] == 200
        assert (await get(gateway, "/leadline/v1/spend", other))["rated"] == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "0 of accept, reject and score"),
        ({"accept": True, "reject": False}, "2 of accept, reject and score"),
        ({"score": 1.5}, "score"),
        ({"score": "1"}, "score"),
        ({"score": True}, "score"),
        ({"accept": 1}, "accept"),
        ({"accept": True, "comment": "x" * 2001}, "comment"),
        ({"accept": True, "comment": "nul \x00"}, "comment"),
        ({"accept": True, "source": "judge"}, "source: 'judge' is the gateway's own"),
        ({"accept": True, "source": "x" * 65}, "source"),
        ({"accept": True, "source": "two words"}, "source"),
        ({"accept": True, "else": 1}, "else"),
        ([], "body"),
    ],
)
async def test_what_cannot_be_kept_is_refused_by_its_field(gateway: Gateway, body: Any, words: str) -> None:
    request_id = await served(gateway)
    status, answer = await say(gateway, request_id, body)
    assert status == 400
    assert words in answer["error"]["message"]
    assert (await get(gateway, f"/leadline/v1/requests/{request_id}"))["feedback"] == []


async def test_sources_are_bounded_however_many_race(start_gateway: StartGateway, database_url: str) -> None:
    async with start_gateway(database_url=database_url) as gateway:
        request_id = await served(gateway)
        racing = [say(gateway, request_id, {"accept": True, "source": f"s{i}"}) for i in range(2 * MAX_SOURCES)]
        statuses = sorted(status for status, _ in await asyncio.gather(*racing))
        assert statuses == [200] * MAX_SOURCES + [409] * MAX_SOURCES
        kept = (await get(gateway, f"/leadline/v1/requests/{request_id}"))["feedback"]
        assert len(kept) == MAX_SOURCES
        assert (await say(gateway, request_id, {"reject": True, "source": kept[0]["source"]}))[0] == 200


async def test_nothing_served_is_nothing_to_judge(start_gateway: StartGateway) -> None:
    async with start_gateway('limits: [{key: "*", budget: $0.0000001/day}]') as gateway:
        status, headers, _ = await gateway.chat(ask())
        assert status == 429
        status, body = await say(gateway, headers["x-request-id"], {"accept": True})
        assert (status, body["error"]["code"]) == (409, "conflict")


async def test_the_sdk_says_it(gateway: Gateway) -> None:
    def sync() -> None:
        with Leadline(api_key=gateway.key, base_url=f"{gateway.url}/v1") as client:
            answer = client.chat.completions.create(model="cheap", messages=[{"role": "user", "content": "hi"}])
            said = client.feedback(answer, accept=False, comment="wrong", source="test")
            assert (said.score, said.model) == (0.0, "cheap")
            assert client.receipt(answer).feedback == (said,)
            assert (client.spend().rated, client.spend().accepted) == (1, 0)
            with pytest.raises(ValueError, match="either accept"):
                client.feedback(answer)

    await asyncio.to_thread(sync)
    async with AsyncLeadline(api_key=gateway.key, base_url=f"{gateway.url}/v1") as client:
        answer = await client.chat.completions.create(model="cheap", messages=[{"role": "user", "content": "hi"}])
        assert (await client.feedback(answer, score=0.5)).score == 0.5
        assert (await client.spend()).accepted == 1
