"""No caller and no provider leads the gateway to a host that the policy does not name (T20)."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from routers.errors import PolicyError
from routers.load import parse
from tests.edge.conftest import PROVIDER_KEY, StartEdge, post
from tests.edge.provider import Provider
from tests.gateway.conftest import Gateway

anyio = pytest.mark.anyio

GOOD = [
    "https://api.openai.com/v1", "http://127.0.0.1:8000/v1", "http://localhost:11434/v1", "http://10.1.2.3/v1",
    "http://192.168.0.7:8000", "http://[::1]:8000/v1", "http://[fd12:3456::1]/v1", "https://vllm.internal/v1/",
    "https://example.com:8443/openai/deployments/gpt-4o", "https://xn--mnchen-3ya.example/v1", "http://vllm:8000/v1",
    "https://a-b.example.com/v1beta/openai", "https://[2606:4700::1111]/v1", "https://host.example/a%20b",
    "http://172.16.0.1/v1", "https://eu.aihubmix.com/v1",
]  # fmt: skip
BAD = [
    # other schemes
    "ftp://h/v1", "file:///etc/passwd", "file://localhost/etc/passwd", "gopher://127.0.0.1:6379/_x", "dict://h:11211/",
    "ldap://h/", "jar:http://h!/", "javascript:alert(1)", "data:text/plain,x", "ws://h/v1", "unix:///run/x.sock",
    "http:/h/v1", "http:h", "//h/v1", "h/v1", "HTTPS:h", "http+unix://%2Frun%2Fx/", "ssh://h", "https:///v1", "https://",
    "", "/v1", "blob:https://h/x", "view-source:https://h/v1",
    # who is the host?
    "https://user@h/v1", "https://user:pw@h/v1", "https://@h/v1", "https://h@evil.example/v1",
    "https://api.openai.com@evil.example/v1", "https://api.openai.com%40evil.example/v1", "https://h:80@evil.example/",
    "https://h\\@evil.example/v1", "https://evil.example\\.h/v1", "https://h\\v1", "https:\\\\h\\v1", "https://h;evil/v1",
    "https://h,evil/v1", "https://h evil/v1", "https://h\tevil/v1", "https://h\nevil/v1", "https://h\r\nx: y/v1",
    "https://h\x00evil/v1", "https://h\u200bevil/v1", "https://%68/v1", "https://h%00.evil/v1", "https://h%2eevil/v1",
    "https://h#@evil/v1", "https://h?@evil/v1", "https://h/v1#x", "https://h/v1?x=y", "https://h/v1#", "https://h/v1?",
    "https://*/v1", "https://h*/v1", "https://{host}/v1", "https://$HOST/v1", "https://<h>/v1", "https://h|x/v1",
    "https://h'x/v1", 'https://h"x/v1', "https://h`x`/v1", "https://h^x/v1", "https://_h/v1", "https://-h/v1",
    "https://h-/v1", "https://h../v1", "https://.h/v1", "https://h..x/v1", "https://" + "a" * 64 + ".x/v1",
    "https://" + "a." * 130 + "x/v1", "https://!/v1", "https://h!/v1", "https://~h/v1",
    # which port?
    "https://h:/v1", "https://h:0/v1", "https://h:65536/v1", "https://h:-1/v1", "https://h:80:80/v1", "https://h:8o/v1",
    "https://h:+80/v1", "https://h: 80/v1", "https://h:８０/v1",
    # other forms of one address
    "http://127.1/v1", "http://127.0.1/v1", "http://2130706433/v1", "http://0x7f000001/v1", "http://0x7f.1/v1",
    "http://0x7f.0x0.0x0.0x1/v1", "http://0177.0.0.1/v1", "http://017700000001/v1", "http://127.0.0.01/v1",
    "http://127.0.0.1./v1", "http://127.0.0.256/v1", "http://1.2.3.4.5/v1", "http://0/v1", "http://0x/v1",
    "http://1/v1", "http://①②⑦.⓪.⓪.①/v1", "http://127。0。0。1/v1", "http://１２７.0.0.1/v1", "http://0.0.0.0/v1",
    "http://255.255.255.255/v1", "http://224.0.0.1/v1",
    "http://[::ffff:127.0.0.1]/v1", "http://[::ffff:7f00:1]/v1", "http://[::127.0.0.1]/v1", "http://[::7f00:1]/v1",
    "http://[64:ff9b::7f00:1]/v1", "http://[64:ff9b::169.254.169.254]/v1", "http://[2002:7f00:1::]/v1",
    "http://[2001:0:7f00:1::]/v1", "http://[::]/v1", "http://[ff02::1]/v1", "http://[::1%25lo]/v1",
    "http://[fe80::1%25eth0]/v1", "http://[fe80::1]/v1", "http://[fec0::1]/v1", "http://[::1/v1", "http://::1/v1",
    "http://[::1]evil/v1", "http://[v1.x]/v1", "http://[]/v1", "http://[127.0.0.1]/v1", "http://[:::1]/v1",
    # where clouds keep credentials
    "http://169.254.169.254/latest/meta-data", "http://169.254.170.2/v2", "http://metadata.google.internal/v1",
    "http://METADATA.google.internal/v1", "http://metadata/v1", "http://[fd00:ec2::254]/latest",
    "http://100.100.100.200/latest", "http://192.0.0.192/latest", "http://instance-data/latest",
    "http://169.254.1.1/v1", "http://metadata.tencentyun.com/v1",
    # letters that look like others
    "https://аpi.openai.com/v1", "https://api.оpenai.com/v1", "https://münchen.example/v1", "https://ｈ/v1",
    "https://api.openai.com․evil.example/v1", "https://api.openai.com／evil/v1", "https://ⓗ.example/v1", "https://ß/v1",
    # paths that are not what they say
    "https://h/v1/../admin", "https://h/v1/..", "https://h/./v1", "https://h/v1/%2e%2e/admin", "https://h/v1/%2E./x",
    "https://h/v1%2f..%2fadmin", "https://h/v1%5cadmin", "https://h/v1%00", "https://h/v 1", "https://h/v1\r\nx: y",
    "https://h/v1\\..\\admin", "https://h/v1;x", "https://h/<v1>", "https://h/\u202ev1", "https://h/v1|x",
]  # fmt: skip


def policy_at(url: str) -> str:
    return (
        f"version: 1\nproviders: {{p: {{base_url: {json.dumps(url)}}}}}\n"
        "models: {m: {provider: p, model: x, price: free}}\n"
    )


def test_the_corpus_is_large_enough() -> None:
    assert len(set(BAD)) >= 140


@pytest.mark.parametrize("url", GOOD)
def test_an_address_of_a_model_server_is_taken(url: str) -> None:
    assert parse(policy_at(url)).providers["p"].base_url == url.rstrip("/")


@pytest.mark.parametrize("url", BAD, ids=lambda url: ascii(url)[:60])
def test_an_address_that_can_be_read_in_two_ways_is_no_base_url(url: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(policy_at(url))
    assert [problem.field for problem in caught.value.problems] == ["providers.p.base_url"]


@pytest.fixture
async def evil() -> AsyncIterator[Provider]:
    """A server that nobody has any business with."""
    server = await Provider().start()
    yield server
    await server.stop()


HONEST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "chat", "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"model": "chat", "prompt": "x"},
    "/v1/embeddings": {"model": "vectors", "input": "x"},
}


@anyio
@pytest.mark.parametrize("path", HONEST)
async def test_a_body_never_says_where_it_goes(edge: Gateway, provider: Provider, evil: Provider, path: str) -> None:
    for name in (
        "base_url",
        "api_base",
        "api_key",
        "api_url",
        "api_version",
        "azure_endpoint",
        "extra_headers",
        "proxy",
    ):
        for value in (evil.url, "", None, {"x": evil.url}):
            status, _, answer = await post(edge, path, {**HONEST[path], name: value})
            assert (status, answer["error"]["param"]) == (400, name)
    assert (provider.bodies, evil.paths) == ([], [])
    assert await edge.rows() == []


@anyio
async def test_a_header_or_a_hidden_field_leads_nowhere(edge: Gateway, provider: Provider, evil: Provider) -> None:
    where = {
        "X-Base-Url": evil.url, "X-Forwarded-Host": evil.url, "Host": evil.url.removeprefix("http://"),
        "X-Api-Base": evil.url, "Openai-Base-Url": evil.url, "X-Upstream": evil.url, "Proxy": evil.url,
        "X-Original-Url": evil.url, "Forwarded": f"host={evil.url}",
    }  # fmt: skip
    body = {**HONEST["/v1/chat/completions"], "leadline": {"base_url": evil.url}, "metadata": {"base_url": evil.url}}
    assert (await post(edge, "/v1/chat/completions", body, **where))[0] == 200
    image = {"type": "image_url", "image_url": {"url": f"{evil.url}/cat.png"}}
    file = {"type": "file", "file": {"file_data": f"{evil.url}/x.pdf"}}
    for part in (image, file, {"type": "input_audio", "input_audio": {"data": evil.url, "format": "wav"}}):
        seen = {"model": "chat", "messages": [{"role": "user", "content": [part]}], "max_tokens": 5}
        status, _, _ = await post(edge, "/v1/chat/completions", seen)
        assert status == 200
        assert json.loads(provider.bodies[-1])["messages"][0]["content"] == [part], "the provider's to fetch, or not"
    assert evil.paths == []


@anyio
@pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308])
async def test_a_provider_leads_nowhere_either(
    start_edge: StartEdge, provider: Provider, evil: Provider, status: int
) -> None:
    host = evil.url.removeprefix("http://")
    async with start_edge() as edge:
        for number, target in enumerate(
            (evil.url, f"//{host}", f"http://u:p@{host}", f"http:/\\{host}", "file:///etc/passwd",
             f"{provider.url}@{host}", "http://169.254.169.254/latest/meta-data", "/v1/elsewhere", "")
        ):  # fmt: skip
            headers = {"Location": target, "Refresh": f"0; url={evil.url}", "Content-Location": evil.url}
            provider.fail_next = (status, headers, "")
            body = {"model": "chat", "messages": [{"role": "user", "content": f"{number}"}]}
            answered, _, answer = await post(edge, "/v1/chat/completions", body)
            assert answered == 502
            assert PROVIDER_KEY not in json.dumps(answer)
    assert evil.paths == []
    assert set(provider.paths) == {"/v1/chat/completions"}
    assert all(dict(headers)["Authorization"] == f"Bearer {PROVIDER_KEY}" for headers in provider.headers)
