"""/openapi.json names every route and says of the data plane what its readers check (API9)."""

import json
from typing import Any

import msgspec
import pytest

from gateway.edge import monitoring, prompts, schemas, wire
from gateway.edge.api import build_web
from gateway.edge.headers import read_headers
from gateway.edge.prompts import read_completion, read_embedding
from gateway.edge.wire import FOREIGN_FIELDS, read_chat
from gateway.errors import InvalidRequest
from gateway.upstream.types import CallHeaders
from tests.edge.conftest import post
from tests.edge.test_authorization import MATRIX, served
from tests.gateway.conftest import Gateway

NO_HEADERS = CallHeaders(token="")
GOOD: dict[str, dict[str, Any]] = {
    "ChatRequest": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "CompletionRequest": {"model": "m", "prompt": "x"},
    "EmbeddingRequest": {"model": "m", "input": "x"},
}
READERS = {"ChatRequest": read_chat, "CompletionRequest": read_completion, "EmbeddingRequest": read_embedding}
STRUCTS: dict[str, Any] = {
    "ChatRequest": wire._ChatRequest,
    "CompletionRequest": prompts._CompletionRequest,
    "EmbeddingRequest": prompts._EmbeddingRequest,
}
UNDESCRIBED = {("GET", "/"), ("GET", "/openapi.json")}
"""A redirect and the description itself. The dashboard's pages are for people, not for clients."""


@pytest.mark.anyio
async def test_every_served_route_is_described(edge: Gateway) -> None:
    document = build_web().openapi()
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    routes = {("POST", path) for path in edge.app._data_plane}
    routes |= {("GET", path) for path in monitoring.PATHS} | set(served((await edge.app.web()).routes))
    routes = {(method, path.replace(":path}", "}")) for method, path in routes if not path.startswith("/dashboard")}
    assert described == routes - UNDESCRIBED


def test_a_key_is_asked_for_where_the_description_says_so() -> None:
    document = build_web().openapi()
    for (method, path), rule in MATRIX.items():
        if path.startswith("/dashboard") or (method, path) in UNDESCRIBED:
            continue
        operation = document["paths"][path.replace(":path}", "}")][method.lower()]
        assert ("security" in operation) == (rule.statuses[0] == 401), path
        assert ("401" in operation["responses"]) == (rule.statuses[0] == 401), path
        assert ("403" in operation["responses"]) >= (403 in rule.statuses), path
        assert str(rule.statuses[-1]) in operation["responses"], path


@pytest.mark.parametrize("name", GOOD)
def test_every_field_that_is_read_is_described(name: str) -> None:
    fields = {field.name for field in msgspec.structs.fields(STRUCTS[name])}
    assert schemas.COMPONENTS[name]["properties"].keys() == fields | FOREIGN_FIELDS
    required = {field.name for field in msgspec.structs.fields(STRUCTS[name]) if field.required}
    assert set(schemas.COMPONENTS[name]["required"]) == required


def values(schema: Any) -> list[tuple[Any, bool]]:
    """Values at and beyond what a field's schema allows: (value, whether it is good)."""
    if schema is False:
        return [("x", False)]
    if "enum" in schema:
        return [("priority", False), *((value, True) for value in schema["enum"])]
    options = schema.get("anyOf", [schema])
    kinds = {option["type"] for option in options}
    found = [(value, False) for kind, value in WRONG.items() if kind not in kinds]
    if "null" in kinds:
        found.append((None, True))
    for option in options:
        step = 1 if option["type"] == "integer" else 0.001
        for key, sign in (("minimum", -1), ("maximum", 1)):
            if key in option:
                found += [(option[key], True), (option[key] + sign * step, False)]
        if "exclusiveMinimum" in option:
            found.append((option["exclusiveMinimum"], False))
    return found


WRONG = {"object": {"x": 1}, "boolean": True, "string": "x"}
CASES = [
    (name, field, value, good)
    for name in GOOD
    for field, schema in schemas.COMPONENTS[name]["properties"].items()
    for value, good in values(schema)
]


@pytest.mark.parametrize(("name", "field", "value", "good"), CASES)
def test_the_readers_take_what_is_described_and_nothing_else(name: str, field: str, value: Any, good: bool) -> None:
    more = {"logprobs": True} if field == "top_logprobs" else {}
    if (name, field) == ("CompletionRequest", "n"):
        more = {"best_of": value}
    body = json.dumps({**GOOD[name], **more, field: value}).encode()
    if good:
        READERS[name](body, NO_HEADERS)
    else:
        with pytest.raises(InvalidRequest):
            READERS[name](body, NO_HEADERS)


def test_every_header_that_is_described_is_read() -> None:
    described = {header["name"].lower() for header in schemas.HEADERS}
    refused = {
        "idempotency-key": b"\xe9", "x-leadline-scope": b"/", "x-leadline-timeout": b"0", "x-leadline-max-cost": b"-1",
        "x-leadline-priority": b"101", "x-leadline-min-quality": b"90%", "x-leadline-effort": b"huge",
        "x-leadline-models": b"a,,b",
    }  # fmt: skip
    assert described == {"x-leadline-tags", *refused}
    for name, bad in refused.items():
        with pytest.raises(InvalidRequest, match=name):
            read_headers([(name.encode(), bad)])


@pytest.mark.anyio
async def test_a_wrong_method_is_told_the_right_ones(edge: Gateway) -> None:
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/leadline/v1/admin/keys", "GET, POST"),
        ("GET", "/leadline/v1/admin/keys/x", "DELETE, PATCH"),
        ("POST", "/v1/models/a/b", "GET"),
    ):
        async with edge.session.request(method, edge.url + path, headers=edge.headers()) as response:
            assert (response.status, response.headers.getall("allow")) == (405, [allowed])


@pytest.mark.anyio
async def test_a_refusal_names_its_scheme_and_when_to_come_again(edge: Gateway) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
        async with edge.session.request(method, edge.url + path) as response:
            assert (response.status, response.headers["www-authenticate"]) == (401, "Bearer")
            assert response.headers["x-should-retry"] == "false"
    keys = "/leadline/v1/admin/keys"
    for expected in [404] * 60 + [429]:
        async with edge.session.delete(f"{edge.url}{keys}/none", headers=edge.headers()) as response:
            assert response.status == expected
    assert 1 <= int(response.headers["retry-after"]) <= 61
    assert response.headers["x-should-retry"] == "true"


@pytest.mark.anyio
async def test_a_name_that_is_taken_is_a_conflict(edge: Gateway) -> None:
    for expected in (201, 409):
        status, headers, answer = await post(edge, "/leadline/v1/admin/keys", {"name": "twice"})
        assert status == expected
    assert (answer["error"]["code"], answer["error"]["param"]) == ("conflict", "name")
    assert headers["x-should-retry"] == "false"
