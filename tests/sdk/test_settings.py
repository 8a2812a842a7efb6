"""Where the key and the address come from, and what is refused before anything is sent."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from gateway.admission.limits import valid_run
from gateway.edge.headers import read_headers
from gateway.sdk import Leadline
from gateway.sdk.types import usd
from gateway.sdk.wire import request_id_of, scope_headers, tag_headers


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LEADLINE_API_KEY", "LEADLINE_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LEADLINE_HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-the-gateway")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://not.the.gateway/v1")


def test_the_key_is_the_argument_then_the_variable_then_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("from-file\n")
    assert Leadline().api_key == "from-file"
    monkeypatch.setenv("LEADLINE_API_KEY", "from-variable")
    assert Leadline().api_key == "from-variable"
    assert Leadline(api_key="from-argument").api_key == "from-argument"


def test_without_a_key_the_error_names_every_way_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(openai.OpenAIError, match="LEADLINE_API_KEY") as caught:
        Leadline()
    assert str(tmp_path / "key") in str(caught.value)


def test_the_address_is_the_argument_then_the_variable_then_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert str(Leadline(api_key="k").base_url) == "http://127.0.0.1:8080/v1/"
    (tmp_path / "url").write_text("http://127.0.0.1:8123/v1")  # as a running gateway leaves it
    assert str(Leadline(api_key="k").base_url) == "http://127.0.0.1:8123/v1/"
    monkeypatch.setenv("LEADLINE_BASE_URL", "http://gateway:1/v1")
    assert str(Leadline(api_key="k").base_url) == "http://gateway:1/v1/"
    assert str(Leadline(api_key="k", base_url="http://other/v1").base_url) == "http://other/v1/"


@pytest.mark.parametrize(
    ("limit", "sent"), [(0.1, "0.1"), ("0.50", "0.50"), (Decimal("1e-9"), "0.000000001"), (1e-05, "0.00001"), (3, "3")]
)
def test_a_budget_is_sent_as_exact_dollars(limit: Decimal | float | str, sent: str) -> None:
    assert scope_headers(limit, "s") == {"x-leadline-scope": "s", "x-leadline-scope-budget": sent}


@pytest.mark.parametrize("limit", [-1, "1e-10", float("nan"), float("inf")])
def test_a_budget_that_is_no_amount_is_refused(limit: float | str) -> None:
    with pytest.raises(ValueError, match="budget"):
        scope_headers(limit, None)


def test_a_scope_without_a_name_is_a_new_one() -> None:
    assert scope_headers(1, None)["x-leadline-scope"] != scope_headers(1, None)["x-leadline-scope"]


@pytest.mark.parametrize("name", ["run42/research/fetch", "/".join("a" * 24 for _ in range(8))])
def test_a_scope_may_be_a_path(name: str) -> None:
    assert scope_headers(1, name)["x-leadline-scope"] == name
    assert valid_run(name)


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "a b", "a//b", "a/b/c/d/e/f/g/h/i", "/".join("a" * 64 for _ in range(4))]
)
def test_a_scope_that_the_gateway_would_refuse_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="scope"):
        scope_headers(1, name)
    assert not valid_run(name)


def test_tags_add_up_and_cannot_smuggle_others() -> None:
    client = Leadline(api_key="k").tagged("private").tagged("batch", "private")
    assert client.default_headers["x-leadline-tags"] == "private,batch"
    with pytest.raises(ValueError, match="tag"):
        tag_headers(["a,b"], {})


def test_hints_only_ever_narrow() -> None:
    client = Leadline(api_key="k").narrowed(max_cost="0.05", min_quality=0.8, effort="high", models=["a", "b"])
    wider = client.narrowed(max_cost=1, min_quality=0.5, effort="high", models=["b", "c"])
    narrower = client.narrowed(max_cost=0.01, min_quality=0.9, effort="none")
    names = ("max-cost", "min-quality", "effort", "models")

    def sent(of: Leadline) -> list[str]:
        return [str(of.default_headers[f"x-leadline-{name}"]) for name in names]

    assert sent(client) == ["0.05", "0.8", "high", "a,b"]
    assert sent(wider) == ["0.05", "0.8", "high", "b"]
    assert sent(narrower) == ["0.01", "0.9", "none", "a,b"]
    for headers in map(lambda of: dict(zip(names, sent(of), strict=True)), (client, wider, narrower)):  # noqa: C417
        read = read_headers([(f"x-leadline-{name}".encode(), value.encode()) for name, value in headers.items()])
        assert read.hints is not None, "as the gateway reads them"


@pytest.mark.parametrize(
    "hint",
    [
        {"max_cost": -1},
        {"max_cost": "x"},
        {"min_quality": 1.1},
        {"effort": "huge"},
        {"models": ["a b"]},
        {"models": []},
    ],
)
def test_a_hint_that_the_gateway_would_not_take_is_refused(hint: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ArithmeticError)):
        Leadline(api_key="k").narrowed(**hint)


def test_a_streams_last_chunk_carries_its_receipt() -> None:
    frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    last = ChatCompletionChunk.model_validate({**frame, "leadline": {"request_id": "req_1"}})
    assert request_id_of(last) == "req_1"
    with pytest.raises(ValueError, match="no request id"):
        request_id_of(ChatCompletionChunk.model_validate(frame))


def test_no_money_is_a_plain_zero() -> None:
    assert str(usd(0)) == "0"
    assert str(usd(1_500_000_000)) == "1.500000000"


def test_what_carries_no_request_id_is_refused() -> None:
    with pytest.raises(ValueError, match="request id"):
        request_id_of(object())
