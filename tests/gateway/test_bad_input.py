"""Bad input gets an error that names the field, the value and the fix; what was admitted has its row."""

import io
from typing import Any

import aiohttp
import pytest

from gateway.edge.headers import read_headers
from gateway.edge.wire import read_chat
from gateway.errors import InvalidRequest
from gateway.upstream.types import CallHeaders
from tests.gateway.conftest import Gateway, ask
from tests.gateway.fake_upstream import FakeUpstream

anyio = pytest.mark.anyio
HELLO = '[{"role":"user","content":"x"}]'


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "is empty; send a JSON object"),
        (b" \n", None, "is empty; send a JSON object"),
        (b"{", None, "not valid JSON"),
        (b"[]", None, "Expected `object`"),
        (b'{"model":"m"}', "messages", "messages: is missing"),
        (f'{{"messages":{HELLO}}}'.encode(), "model", "model: is missing"),
        (b'{"model":"m","messages":[]}', "messages", "at least one message"),
        (b'{"model":"m","messages":"x"}', "messages", "Expected `array`"),
        (b'{"model":"m","messages":[{"content":"x"}]}', "messages[0].role", "messages[0].role: is missing"),
        (f'{{"model":7,"messages":{HELLO}}}'.encode(), "model", "Expected `str`, got `int`"),
        (f'{{"model":"","messages":{HELLO}}}'.encode(), "model", "1 to 256 printable"),
        (f'{{"model":"a\\u0000b","messages":{HELLO}}}'.encode(), "model", "1 to 256 printable"),
        (f'{{"model":"m","n":0,"messages":{HELLO}}}'.encode(), "n", "0 is not between"),
        (f'{{"model":"m","n":"2","messages":{HELLO}}}'.encode(), "n", "Expected `int"),
        (f'{{"model":"m","max_tokens":-1,"messages":{HELLO}}}'.encode(), "max_tokens", "-1 is not between"),
        (f'{{"model":"m","temperature":9,"messages":{HELLO}}}'.encode(), "temperature", "9 is not between"),
        (f'{{"model":"m","temperature":1e999,"messages":{HELLO}}}'.encode(), "temperature", "out of range"),
        (f'{{"model":"m","top_p":0,"messages":{HELLO}}}'.encode(), "top_p", "0 is not above 0"),
        (f'{{"model":"m","stop":[""],"messages":{HELLO}}}'.encode(), "stop", "none of them empty"),
        (f'{{"model":"m","top_logprobs":2,"messages":{HELLO}}}'.encode(), "top_logprobs", "needs logprobs"),
        (f'{{"model":"m","service_tier":"priority","messages":{HELLO}}}'.encode(), "service_tier", "priority"),
        (f'{{"model":"m","seed":18446744073709551616,"messages":{HELLO}}}'.encode(), "seed", "64 bits"),
        (f'{{"model":"m","max_tokens":99999999999999999999,"messages":{HELLO}}}'.encode(), "max_tokens", "not between"),
        (b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, ""),
        (b'{"model":"\xff","messages":[]}', None, "not valid JSON"),
    ],
)
def test_a_malformed_request_names_what_is_wrong(body: bytes, param: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_chat(body, CallHeaders(""))
    assert caught.value.param == param
    assert words in caught.value.message
    assert len(caught.value.message) < 300


@anyio
@pytest.mark.parametrize("plan", [{"type": "vote", "most": 16}, None, "exit"])
async def test_a_plan_is_the_policys_to_state(gateway: Gateway, upstream: FakeUpstream, plan: object) -> None:
    """An engine behind would run it, at a cost that nobody has held."""
    status, _, body = await gateway.chat({**ask(), "plan": plan})
    assert (status, body["error"]["param"]) == (400, "plan")
    assert "`models.NAME.plan`" in body["error"]["message"]
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (b"x-leadline-scope", b"a b", "letters"),
        (b"x-leadline-scope-budget", b"lots", "'lots' is not an amount"),
        (b"x-leadline-scope-budget", b"-1", "'-1'"),
        (b"x-leadline-scope-budget", b"1e-12", "1e-12"),
        (b"x-leadline-scope-budget", b"nan", "nan"),
    ],
)
def test_a_malformed_header_names_itself(name: bytes, value: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=name.decode()) as caught:
        read_headers({b"x-leadline-scope": b"ok", name: value}.items())
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"authorization", b"Bearer x"),
        (b"idempotency-key", b"k"),
        (b"x-leadline-priority", b"5"),
        (b"x-leadline-scope", b"run42"),
        (b"x-leadline-scope-budget", b"0.50"),
        (b"x-leadline-timeout", b"30"),
    ],
)
def test_a_header_of_one_value_that_is_sent_twice_is_refused(name: bytes, value: bytes) -> None:
    scope = [(b"x-leadline-scope", b"run42")] * (name == b"x-leadline-scope-budget")
    read_headers([*scope, (name, value)])
    with pytest.raises(InvalidRequest, match=rf"^{name.decode()}: was sent twice; send one\.$"):
        read_headers([*scope, (name, value), (name, value)])


def test_tags_in_several_headers_count_together() -> None:
    name = b"x-leadline-tags"
    sent = [(name, b"private, batch"), (name, b""), (name, b"batch,night")]
    assert read_headers(sent).tags == {"private", "batch", "night"}


@anyio
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_a_50_mb_body_is_refused(gateway: Gateway, declared: bool) -> None:
    huge = b'{"model":"cheap","messages":[{"role":"user","content":"' + b"x" * (50 << 20) + b'"}]}'

    async def chunks() -> Any:
        for at in range(0, len(huge), 1 << 20):
            yield huge[at : at + (1 << 20)]

    try:
        async with gateway.session.post(
            f"{gateway.url}/v1/chat/completions",
            data=io.BytesIO(huge) if declared else chunks(),
            headers=gateway.headers(),
        ) as response:
            assert response.status == 413
            error = (await response.json())["error"]
            assert error["code"] == "body_too_large"
            assert "16 MiB" in error["message"]
            assert "LEADLINE_MAX_BODY_MIB" in error["message"]
    except (ConnectionError, aiohttp.ClientConnectionError):  # the server may hang up while we are still sending
        pass
    assert await gateway.rows() == []
    assert (await gateway.chat(ask()))[0] == 200


@anyio
@pytest.mark.parametrize("path", ["/v1/chat/completions"])
@pytest.mark.parametrize(
    ("authorization", "said"),
    [
        ("", "No"),
        ("Bearer ", "No"),
        ("Bearer sk-ll-nope-nope", "Incorrect"),
        ("Bearer x", "Incorrect"),
        ("Basic x", "No"),
    ],
)
async def test_a_missing_or_wrong_key_is_a_401(gateway: Gateway, path: str, authorization: str, said: str) -> None:
    async with gateway.session.post(
        gateway.url + path, json=ask(), headers={"Authorization": authorization}
    ) as response:
        assert response.status == 401
        error = (await response.json())["error"]
        assert error["code"] == "invalid_api_key"
        assert error["message"].startswith(f"{said} API key provided. Send one of this gateway's keys")
        assert response.headers["x-request-id"].startswith("req_")
    assert await gateway.rows() == []


@anyio
@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/embeddings/", "/v1/embeddings"),
        ("/v1/audio/speech", None),
    ],
)
async def test_a_path_that_is_none_is_answered_with_the_one_that_was_meant(
    gateway: Gateway, path: str, meant: str | None
) -> None:
    async with gateway.session.post(gateway.url + path, json=ask(), headers=gateway.headers()) as response:
        error = (await response.json())["error"]
    assert response.status == 404
    hint = f"did you mean {meant}? " if meant else ""
    assert error["message"] == f"POST {path}: no such path; {hint}/openapi.json lists them."


@anyio
async def test_an_unknown_model_is_named_with_those_that_exist(gateway: Gateway) -> None:
    status, headers, body = await gateway.chat(ask(model="gpt-99"))
    assert (status, body["error"]["param"], headers["x-should-retry"]) == (404, "model", "false")
    assert "'gpt-99'" in body["error"]["message"]
    assert "auto, fragile, uncached, cheap, dear, gone, free" in body["error"]["message"]
    (row,) = await gateway.rows()
    assert (row["outcome"], row["error_code"], row["cost_nanousd"]) == ("error", "model_not_found", 0)


@anyio
async def test_a_prompt_beyond_the_context_is_told_before_it_is_sent(gateway: Gateway, upstream: FakeUpstream) -> None:
    status, _, body = await gateway.chat(ask("word " * 20_000))
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "16000" in body["error"]["message"]
    assert upstream.bodies == []
    status, headers, _ = await gateway.chat(ask("word " * 20_000, model="auto"))
    assert (status, headers["x-leadline-model"]) == (200, "dear"), "auto takes the model that it fits"


@anyio
async def test_other_methods_and_paths_are_refused_in_the_same_shape(gateway: Gateway) -> None:
    for method, path, status in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/nothing", 404)):
        async with gateway.session.request(method, gateway.url + path, headers=gateway.headers()) as response:
            assert response.status == status
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}


@anyio
async def test_a_misspelt_header_of_ours_is_refused(gateway: Gateway, upstream: FakeUpstream) -> None:
    status, _, answer = await gateway.chat(ask(), **{"x-leadline-scop": "run42", "x-leadline-scope-budget": "1"})
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    message = answer["error"]["message"]
    assert "x-leadline-scop: is no header that Leadline reads; those are x-leadline-" in message
    assert "x-leadline-scope, " in message
    assert upstream.bodies == []
