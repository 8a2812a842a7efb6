"""Who may do what (T21): every route of the running app × every kind of caller, and each tenant's objects its own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlmodel import Session, select
from structlog.testing import capture_logs

from gateway.edge import monitoring
from gateway.edge.dataplane import Endpoint
from gateway.ledger.tables import ApiKey
from tests.edge.conftest import StartEdge, post
from tests.gateway.conftest import Gateway

pytestmark = pytest.mark.anyio
Route = tuple[str, str]

MESSAGES = [{"role": "user", "content": "hello"}]
CALLERS = ("nobody", "stranger", "user", "neighbour", "reader", "admin")
"""`stranger` has a key that is none; `neighbour` is a user of another tenant."""


@dataclass(frozen=True)
class Rule:
    """The status that each caller meets. `body` makes the request a good one, so that only rights decide."""

    statuses: tuple[int, ...]
    body: Any = None
    path: str = ""
    """Where the path has parameters: with `{own}`, `{victim}` and `{request}` filled in."""


def everyone(status: int, **more: Any) -> Rule:
    return Rule((status,) * 6, **more)


def keyed(status: int = 200, **more: Any) -> Rule:
    return Rule((401, 401, status, status, status, status), **more)


def running(**more: Any) -> Rule:
    return Rule((401, 401, 200, 200, 403, 200), **more)


def admin_only(status: int = 200, **more: Any) -> Rule:
    return Rule((401, 401, 403, 403, 403, status), **more)


MATRIX: dict[Route, Rule] = {
    ("POST", "/v1/chat/completions"): running(body={"model": "chat", "messages": MESSAGES}),
    ("POST", "/v1/completions"): running(body={"model": "chat", "prompt": "x"}),
    ("POST", "/v1/embeddings"): running(body={"model": "vectors", "input": "x"}),
    ("GET", "/v1/models"): keyed(),
    ("GET", "/v1/models/{name:path}"): keyed(path="/v1/models/chat"),
    ("GET", "/leadline/v1/requests/{request_id}"): Rule(
        (401, 401, 200, 404, 200, 200), path="/leadline/v1/requests/{request}"
    ),
    ("POST", "/leadline/v1/requests/{request_id}/feedback"): Rule(
        (401, 401, 200, 404, 403, 200), path="/leadline/v1/requests/{request}/feedback", body={"accept": True}
    ),
    ("GET", "/leadline/v1/spend"): keyed(),
    ("GET", "/leadline/v1/budgets"): keyed(),
    ("POST", "/leadline/v1/explain"): running(body={"model": "chat", "messages": MESSAGES}),
    ("GET", "/leadline/v1/admin/keys"): admin_only(),
    ("POST", "/leadline/v1/admin/keys"): admin_only(201, body={"name": "made"}),
    ("PATCH", "/leadline/v1/admin/keys/{key_id}"): admin_only(
        body={"budget": "$1/day"}, path="/leadline/v1/admin/keys/{victim}"
    ),
    ("DELETE", "/leadline/v1/admin/keys/{key_id}"): admin_only(204, path="/leadline/v1/admin/keys/{victim}"),
    ("GET", "/leadline/v1/admin/budgets"): admin_only(),
    ("GET", "/leadline/v1/admin/spend"): admin_only(),
    ("GET", "/leadline/v1/admin/prices"): admin_only(),
    ("GET", "/leadline/v1/admin/policy"): admin_only(),
    ("GET", "/"): everyone(307),
    ("GET", "/openapi.json"): everyone(200),
    ("GET", "/health/liveness"): everyone(200),
    ("GET", "/health/readiness"): everyone(200),
    ("GET", "/metrics"): everyone(200),
    # An API key in a header opens no page: those take the cookie that the sign-in gives.
    ("GET", "/dashboard"): everyone(303),
    ("GET", "/dashboard/requests"): everyone(303),
    ("GET", "/dashboard/requests.csv"): everyone(303),
    ("GET", "/dashboard/requests/{request_id}"): everyone(303, path="/dashboard/requests/{request}"),
    ("GET", "/dashboard/login"): everyone(200),
    ("POST", "/dashboard/login"): everyone(401),
    ("POST", "/dashboard/logout"): everyone(303),
    ("GET", "/dashboard/static/{name}"): everyone(200, path="/dashboard/static/style.css"),
}


def served(routes: Any) -> Iterator[Route]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from served(inner.routes)
            continue
        for method in route.methods - {"HEAD"}:
            yield method, route.path


@dataclass
class Cast:
    edge: Gateway
    tokens: dict[str, str] = field(default_factory=dict)

    def headers(self, who: str) -> dict[str, str]:
        token = self.tokens.get(who)
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    async def ask(self, who: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.edge.session.request(
            method, self.edge.url + path, json=body, headers=self.headers(who), allow_redirects=False
        ) as response:
            raw = await response.read()
            return response.status, json.loads(raw) if response.content_type == "application/json" and raw else None

    def key_id(self, who: str) -> str:
        return self.tokens[who].split("-")[2]


def cast_of(edge: Gateway) -> Cast:
    keys = edge.app.state.lifecycle.keys
    made = {
        "stranger": "sk-ll-000000000000-nothing",
        "user": keys.create("user", tenant="a", team="red", budget_nanousd=5 * 10**9, budget_window="day"),
        "neighbour": keys.create("neighbour", tenant="b", budget_nanousd=7 * 10**9, budget_window="day"),
        "reader": keys.create("reader", tenant="a", role="reader"),
        "admin": edge.key,
    }
    return Cast(edge, made)


async def test_every_route_has_its_rule(edge: Gateway) -> None:
    data_plane = edge.app._data_plane
    assert all(isinstance(endpoint, Endpoint) for endpoint in data_plane.values())
    found = {("POST", path) for path in data_plane} | {("GET", path) for path in monitoring.PATHS}
    found |= set(served((await edge.app.web()).routes))
    assert found == MATRIX.keys(), "a route without a rule, or a rule without a route"


async def test_each_caller_meets_what_the_matrix_says(edge: Gateway) -> None:
    cast = cast_of(edge)
    keys = edge.app.state.lifecycle.keys
    async with edge.session.post(
        f"{edge.url}/v1/chat/completions", json={"model": "chat", "messages": MESSAGES}, headers=cast.headers("user")
    ) as response:
        request_id = response.headers["x-request-id"]
    wrong = []
    for number, ((method, path), rule) in enumerate(MATRIX.items()):
        for who, expected in zip(CALLERS, rule.statuses, strict=True):
            victim = keys.create(f"victim-{number}-{who}").split("-")[2]
            concrete = (rule.path or path).format(victim=victim, request=request_id)
            status, _ = await cast.ask(who, method, concrete, rule.body)
            if status != expected:
                wrong.append(f"{method} {path} as {who}: {status}, not {expected}")
    assert wrong == []


async def test_a_tenant_sees_its_own_and_nothing_else(edge: Gateway) -> None:
    cast = cast_of(edge)
    ids = {}
    for who in ("user", "neighbour"):
        async with edge.session.post(
            f"{edge.url}/v1/chat/completions", json={"model": "chat", "messages": MESSAGES}, headers=cast.headers(who)
        ) as response:
            assert response.status == 200
            ids[who] = response.headers["x-request-id"]
    assert (await cast.ask("neighbour", "GET", f"/leadline/v1/requests/{ids['user']}"))[0] == 404
    assert (await cast.ask("user", "GET", f"/leadline/v1/requests/{ids['neighbour']}"))[0] == 404
    assert (await cast.ask("admin", "GET", f"/leadline/v1/requests/{ids['user']}"))[0] == 200
    for who in ("user", "neighbour"):
        _, spend = await cast.ask(who, "GET", "/leadline/v1/spend")
        assert (spend["requests"], spend["tenant"]) == (1, "a" if who == "user" else "b")
        _, budgets = await cast.ask(who, "GET", "/leadline/v1/budgets")
        (own,) = budgets["data"]
        assert own["scope"] == f"key:{cast.key_id(who)}"
        assert own["remaining_nanousd"] == own["limit_nanousd"] - own["spent_nanousd"] - own["reserved_nanousd"]
        assert own["spent_nanousd"] > 0
    _, all_budgets = await cast.ask("admin", "GET", "/leadline/v1/admin/budgets")
    assert {budget["label"] for budget in all_budgets["data"]} == {"key:user", "key:neighbour"}


async def test_no_answer_shows_a_secret_twice_or_a_hash_ever(edge: Gateway) -> None:
    cast = cast_of(edge)
    with capture_logs() as lines:
        status, made = await cast.ask("admin", "POST", "/leadline/v1/admin/keys", {"name": "new", "budget": "$2/week"})
        assert (status, made["role"], made["budget_nanousd"], made["budget_window"]) == (201, "user", 2 * 10**9, "week")
        token = made["key"]
        key_id = made["key_id"]
        edited = {"role": "reader", "team": "blue", "budget": None}
        assert (await cast.ask("admin", "PATCH", f"/leadline/v1/admin/keys/{key_id}", edited))[0] == 200
        answers = [
            await cast.ask("admin", "GET", path) for method, path in MATRIX if method == "GET" and "{" not in path
        ]
        assert (await cast.ask("admin", "DELETE", f"/leadline/v1/admin/keys/{key_id}"))[0] == 204
    with Session(edge.app.state.lifecycle.ledger.engine) as session:
        hashes = list(session.exec(select(ApiKey.hash)))
    said = json.dumps(answers) + repr(lines)
    assert hashes
    for secret in (token.split("-")[3], *hashes):
        assert secret not in said
    events = {line["event"]: line for line in lines}
    for event in ("admin.key_created", "admin.key_changed", "admin.key_revoked"):
        assert (events[event]["actor"], events[event]["key_id"]) == (cast.key_id("admin"), key_id)
    assert events["admin.key_changed"]["before"]["role"] == "user"
    cast.tokens["new"] = token
    assert (await cast.ask("new", "GET", "/v1/models"))[0] == 401, "revoked"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "x", "role": "root"}, "role"),
        ({"name": "x", "hash": "00"}, "hash"),
        ({"name": "x", "id": "000000000000"}, "id"),
        ({"name": "x", "routes": ["*"]}, "routes"),
        ({"name": "x", "base_url": "http://x"}, "base_url"),
        ({"name": "x", "budget": "lots"}, "budget"),
        ({"name": "x", "budget": 5}, "budget"),
        ({"name": "a b"}, None),
        ({"name": "x", "tenant": "../b"}, None),
        ({}, "name"),
    ],
)
async def test_a_key_is_made_of_known_fields_alone(edge: Gateway, body: dict[str, Any], param: str | None) -> None:
    status, _, answer = await post(edge, "/leadline/v1/admin/keys", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert len(edge.app.state.lifecycle.keys) == 1


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ("text/plain", "`text/plain`"),
        ("application/x-www-form-urlencoded", "`application/x-www-form-urlencoded`"),
        (None, "missing"),
    ],
)
async def test_a_body_that_is_not_sent_as_json_is_told_so(edge: Gateway, sent: str | None, named: str) -> None:
    headers = edge.headers(**({"Content-Type": sent} if sent else {}))
    for path, body in (("admin/keys", b'{"name": "made"}'), ("explain", b'{"messages": []}')):
        async with edge.session.post(
            f"{edge.url}/leadline/v1/{path}", data=body, headers=headers, skip_auto_headers=("Content-Type",)
        ) as answer:
            error = (await answer.json())["error"]
        assert answer.status == 400
        assert error["message"] == (
            f"Content-Type: {named}, so the body is not read as JSON; send the header `Content-Type: application/json`."
        )


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("admin/keys", b'{"name": "made", "budgte": "$5/day"}', "budgte: unknown field; did you mean `budget`?"),
        ("admin/keys", b'{"name": "made", "colour": 1}', "colour: unknown field; leave it out."),
        ("admin/keys", b'{"name": "made", "role": "king"}',
         "role: Input should be 'admin', 'user' or 'reader', got 'king'."),
        ("admin/keys", b'{"name": "sk-ll-abcdefghijkl-mnop", "role": "sk-ll-abcdefghijkl-mnop"}',
         "role: Input should be 'admin', 'user' or 'reader', got 'sk-ll-a…'."),
        ("admin/keys", b'{"name": ', "body: not valid JSON at character 9: Expecting value; send a JSON object."),
        ("explain", b'{"messages": [{"role": "user"}], "max_tokens": "9"}',
         "max_tokens: Input should be a valid integer, got '9'."),
        ("explain", b'{"messages": {"a": 1}}', "messages: Input should be a valid list."),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_told_with_its_value_and_the_one_that_was_meant(
    edge: Gateway, path: str, body: bytes, said: str
) -> None:
    headers = edge.headers(**{"Content-Type": "application/json"})
    async with edge.session.post(f"{edge.url}/leadline/v1/{path}", data=body, headers=headers) as answer:
        assert (answer.status, (await answer.json())["error"]["message"]) == (400, said)


async def test_an_admin_cannot_lock_itself_out(edge: Gateway) -> None:
    cast = cast_of(edge)
    own = f"/leadline/v1/admin/keys/{cast.key_id('admin')}"
    assert (await cast.ask("admin", "DELETE", own))[0] == 409
    assert (await cast.ask("admin", "PATCH", own, {"role": "user"}))[0] == 409
    assert (await cast.ask("admin", "GET", "/leadline/v1/admin/keys"))[0] == 200


async def test_an_edit_leaves_what_it_does_not_name(edge: Gateway) -> None:
    cast = cast_of(edge)
    path = f"/leadline/v1/admin/keys/{cast.key_id('user')}"
    _, after = await cast.ask("admin", "PATCH", path, {"role": "reader"})
    assert (after["role"], after["team"], after["budget"]) == ("reader", "red", "$5/day")
    _, after = await cast.ask("admin", "PATCH", path, {"team": None})
    assert (after["role"], after["team"], after["budget"]) == ("reader", None, "$5/day")
    _, after = await cast.ask("admin", "PATCH", path, {"budget": "$9/month"})
    assert (after["budget_nanousd"], after["budget_window"]) == (9 * 10**9, "month")


async def test_minting_keys_is_rate_limited(edge: Gateway) -> None:
    cast = cast_of(edge)
    statuses = [(await cast.ask("admin", "DELETE", "/leadline/v1/admin/keys/none"))[0] for _ in range(61)]
    assert statuses == [404] * 60 + [429]
    status, _, answer = await post(edge, "/leadline/v1/admin/keys", {"name": "one-more"})
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    assert (await cast.ask("admin", "GET", "/leadline/v1/admin/keys"))[0] == 200, "looking is not changing"


async def test_spend_is_exact_whatever_it_is_summed_by(start_edge: StartEdge, database_url: str) -> None:
    async with start_edge(database_url=database_url) as edge:
        cast = cast_of(edge)
        for who, run in (("user", "run1"), ("user", "run1/sub"), ("neighbour", "run1")):
            async with edge.session.post(
                f"{edge.url}/v1/chat/completions",
                json={"model": "chat", "messages": [{"role": "user", "content": f"{who} {run}"}]},
                headers={**cast.headers(who), "x-leadline-scope": run},
            ) as response:
                assert response.status == 200
        rows = await edge.rows()
        total = sum(row["cost_nanousd"] for row in rows)
        for by in ("key", "team", "tenant", "model", "run"):
            _, answer = await cast.ask("admin", "GET", f"/leadline/v1/admin/spend?by={by}")
            assert sum(group["cost_nanousd"] for group in answer["data"]) == total
            assert sum(group["requests"] for group in answer["data"]) == 3
        _, one = await cast.ask("admin", "GET", "/leadline/v1/admin/spend?by=run&tenant=b")
        assert [(group["key_id"], group["run"]) for group in one["data"]] == [(cast.key_id("neighbour"), "run1")]
        last = max(row["created_at_ms"] for row in rows)
        _, before = await cast.ask("admin", "GET", f"/leadline/v1/admin/spend?until_ms={last}&by=key")
        assert sum(group["requests"] for group in before["data"]) < 3
        assert (await cast.ask("admin", "GET", "/leadline/v1/admin/spend?by=password"))[0] == 400
