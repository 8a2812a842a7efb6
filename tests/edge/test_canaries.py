"""Prompts, keys and e-mail addresses reach no log, no metric, no table and no stranger's answer (T22)."""

import asyncio
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.telemetry.logs import configure_logs, strike
from tests.edge.conftest import PROVIDER_KEY, StartEdge
from tests.edge.provider import Provider
from tests.gateway.conftest import Gateway

CANARY = "xqcanaryxq"
SECRET = "sk-ll-abc123def456-" + "secret" * 2
EMAIL = f"{CANARY}@mail.example"
Sent = tuple[str, dict[str, Any] | bytes, dict[str, str]]
"""Path, body, headers."""


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": text}], **more}


def at_chat(body: dict[str, Any] | bytes, **headers: str) -> Sent:
    return "/v1/chat/completions", body, headers


POSITIONS: dict[str, Callable[[str], Sent]] = {
    "user-message": lambda c: at_chat(chat(c)),
    "system-message": lambda c: at_chat(chat(messages=[{"role": "system", "content": c}])),
    "content-part": lambda c: at_chat(chat(messages=[{"role": "user", "content": [{"type": "text", "text": c}]}])),
    "image-address": lambda c: at_chat(
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"https://x/{c}"}}]}])
    ),
    "tool": lambda c: at_chat(chat(tools=[{"type": "function", "function": {"name": "f", "description": c}}])),
    "tool-call": lambda c: at_chat(
        chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": c}}]}])
    ),
    "stop": lambda c: at_chat(chat(stop=[c])),
    "metadata": lambda c: at_chat(chat(metadata={"who": c})),
    "user-field": lambda c: at_chat(chat(user=c)),
    "schema": lambda c: at_chat(
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": c}}})
    ),
    "cookie": lambda c: at_chat(chat(), Cookie=f"session={c}"),
    "other-header": lambda c: at_chat(chat(), **{"X-Api-Key": c, "Referer": f"https://x/?q={c}"}),
    "query": lambda c: (f"/v1/chat/completions?prompt={c}", chat(), {}),
    "wrong-key": lambda c: at_chat(chat(), Authorization=f"Bearer sk-ll-{c}-{c}"),
    "broken-json": lambda c: at_chat(b'{"model":"chat","messages":[{"role":"user","content":"' + c.encode()),
    "wrong-type": lambda c: at_chat(chat(messages=[{"role": "user", "content": {"text": c}}])),
    "prompt": lambda c: ("/v1/completions", {"model": "chat", "prompt": c}, {}),
    "input": lambda c: ("/v1/embeddings", {"model": "vectors", "input": [c]}, {}),
    "explain": lambda c: ("/leadline/v1/explain", chat(c), {}),
}
FAULTS: tuple[int | str | None, ...] = (
    None,
    400,
    401,
    403,
    404,
    408,
    413,
    422,
    429,
    500,
    503,
    "stream",
    "whole",
    "text",
)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """All that the process says on its standard error, as `leadline serve` has it."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    configure_logs()
    yield said
    structlog.reset_defaults()


async def send(edge: Gateway, sent: Sent, stream: bool) -> str:
    path, body, headers = sent
    if isinstance(body, dict) and stream and path.startswith("/v1/") and path != "/v1/embeddings":
        body = {**body, "stream": True}
    async with edge.session.post(
        edge.url + path,
        data=body if isinstance(body, bytes) else json.dumps(body),
        headers={"Content-Type": "application/json", **edge.headers(), **headers},
    ) as response:
        return f"{dict(response.headers)} {await response.text()}"


def on_disk(folder: Path) -> bytes:
    """All that the gateway has written, but for the files that hold a secret on purpose."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("key", "pepper")]
    assert any(path.name.startswith("ledger.db") for path in files)
    return b"".join(path.read_bytes() for path in files)


@pytest.mark.anyio
@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_nothing_confidential_is_kept_or_told(
    start_edge: StartEdge,
    provider: Provider,
    logs: io.StringIO,
    fault: int | str | None,
) -> None:
    provider.echo = fault
    async with start_edge("routes: [{name: plain, when: {tenant: default}, use: [chat, vectors]}]") as edge:
        answers = [
            await send(edge, make(canary), stream)
            for make in POSITIONS.values()
            for canary in (CANARY, EMAIL)
            for stream in (False, True)
        ]
        async with edge.session.get(f"{edge.url}/metrics") as response:
            metrics = await response.text()
        rows = await edge.rows()
        home = edge.app.settings.home
        kept = await asyncio.to_thread(on_disk, home)
        structlog.get_logger().info("canary.check", reached=True)
    assert "canary.check" in logs.getvalue(), "the log is looked at"
    assert len(rows) > 20
    own_secret = edge.key.split("-")[3]
    for name, sink in {"log": logs.getvalue(), "metrics": metrics, "disk": kept.decode("latin-1")}.items():
        for secret in (CANARY, PROVIDER_KEY, own_secret):
            assert secret not in sink, f"{secret} in {name}"
    for answer in answers:
        assert PROVIDER_KEY not in answer
        assert own_secret not in answer


@pytest.mark.parametrize(
    ("text", "struck"),
    [
        ("key sk-ll-abc123def456-secretsecret is bad", "key sk-ll-a… is bad"),
        ("key sk-abcdefghijkl.me+x@example.com is bad", "key sk-abcd… is bad"),
        ("key sk-abcdefghijkl.me is bad", "key sk-abcd….me is bad"),
        ("Authorization: Bearer abc.def", "Authorization: …"),
        ("bearer abcdef", "bearer …"),
        ("postgresql://user:hunter2@db/ledger refused", "postgresql://user:…@db/ledger refused"),
        ('{"api_key": "0123456789"}', '{"api_key": "…"}'),
        ("mail to jane.doe+x@mail.example.org now", "mail to … now"),
        ("nothing to strike at 12:30, a@b", "nothing to strike at 12:30, a@b"),
    ],
)
def test_what_looks_like_a_secret_is_struck_out(text: str, struck: str) -> None:
    assert strike(text) == struck


def test_a_long_word_takes_no_longer_than_its_length_asks_for() -> None:
    """With the square of its length, as it was, these would take hours."""
    word = "x" * 2_000_000
    assert strike(word) == word
    assert strike(f"{word} {word}@example.com") == f"{word} …"
    assert strike(f"a@{word}") == f"a@{word}"
    assert strike("sk-abcdefghijkl." * 100_000) == "sk-abcd…." * 100_000
    assert strike(f"see ://{word}:{word}") == f"see ://{word}:{word}"


def test_a_log_line_is_struck_however_deep(logs: io.StringIO) -> None:
    try:
        raise ValueError(f"no such user {EMAIL}")
    except ValueError:
        structlog.get_logger().exception("x.failed", before={"key": [SECRET]}, who=EMAIL)
    line = logs.getvalue()
    assert "ValueError" in line
    assert CANARY not in line
    assert SECRET not in line
