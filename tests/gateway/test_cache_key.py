"""T17: two requests of which one may be answered otherwise never share a key of the exact cache."""

import base64
import copy
import json
import random
from collections.abc import Callable
from typing import Any

from gateway.cache.exact import cache_key, cache_secret
from gateway.edge.headers import read_headers
from gateway.edge.wire import read_chat

PAIRS = 100_000
SECRET = cache_secret(b"pepper")
HEADERS = read_headers([])
Request = dict[str, Any]
"""`tenant`, `policy_version`, `route` (what hints in headers come to), `endpoint` and `body`."""


def word(rng: random.Random) -> str:
    return "".join(rng.choices('ab" {}[]:,=1\\é\n', k=rng.randint(1, 6)))


def request(rng: random.Random) -> Request:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + _bytes(rng)}}
    body: dict[str, Any] = {
        "model": rng.choice(["auto", "cheap", "dear"]),
        "messages": [
            {"role": "system", "content": word(rng)},
            {"role": "user", "content": [{"type": "text", "text": word(rng)}, image]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": word(rng)}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": word(rng)}}},
        "temperature": rng.random(), "seed": rng.getrandbits(40), "top_p": rng.random(),
        "max_tokens": rng.randint(1, 9999), "stop": [word(rng)], "n": rng.randint(1, 8), "logprobs": True,
        "reasoning_effort": rng.choice(["low", "high"]), f"unknown_{rng.randint(0, 9)}": word(rng),
    }  # fmt: skip
    for name in rng.sample(sorted(body.keys() - {"model", "messages"}), rng.randint(0, 6)):
        del body[name]
    return {
        "tenant": word(rng), "policy_version": word(rng), "route": word(rng),
        "endpoint": rng.choice(["chat.completions", "completions", "embeddings"]), "body": body,
    }  # fmt: skip


def _bytes(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(9)).decode()


def _other(rng: random.Random, value: Any) -> Any:
    """Another value of the same kind, as near as it gets."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    at = rng.randrange(len(value) + 1)
    return value[:at] + rng.choice("abc ") + value[at:]


def _shift(rng: random.Random, changed: Request) -> None:
    """A character moves from the end of one name to the start of the next."""
    first, second = rng.choice([("tenant", "policy_version"), ("policy_version", "route"), ("tenant", "route")])
    changed[first], changed[second] = changed[first][:-1], changed[first][-1] + changed[second]


def _name(rng: random.Random, changed: Request) -> None:
    name = rng.choice(["tenant", "policy_version", "route", "endpoint"])
    changed[name] = _other(rng, changed[name])


def _message(rng: random.Random, changed: Request) -> None:
    system, user = changed["body"]["messages"]
    text, image = user["content"]
    place, name = rng.choice([(system, "content"), (system, "role"), (text, "text"), (user, "role")])
    if rng.random() < 0.25:
        image["image_url"]["url"] = image["image_url"]["url"][:22] + _bytes(rng)
    else:
        place[name] = _other(rng, place[name])


def _field(rng: random.Random, changed: Request) -> None:
    body = changed["body"]
    name = rng.choice(sorted(body.keys() - {"messages"}))
    if name == "tools":
        body[name][0]["function"]["description"] += " "
    elif name == "response_format":
        body[name]["json_schema"]["schema"]["title"] += " "
    elif name == "stop":
        body[name].append("b")
    else:
        body[name] = _other(rng, body[name])


def _presence(rng: random.Random, changed: Request) -> None:
    body = changed["body"]
    name = rng.choice(sorted(body.keys() - {"model", "messages"}) or ["seed"])
    if name in body:
        del body[name]
    else:
        body[name] = 1


CHANGES: list[Callable[[random.Random, Request], None]] = [_shift, _name, _message, _field, _presence]


def key_of(asked: Request, **more: Any) -> bytes:
    call = read_chat(json.dumps({**asked["body"], **more}, ensure_ascii=False).encode(), HEADERS)
    names = {name: asked[name] for name in ("tenant", "policy_version", "route", "endpoint")}
    return cache_key(SECRET, fields=call.fields, **names)


def test_a_change_of_anything_that_can_change_the_answer_changes_the_key() -> None:
    rng = random.Random(17)
    seen: dict[bytes, str] = {}
    for number in range(PAIRS):
        if number % 5 == 0:
            asked = request(rng)
        changed = copy.deepcopy(asked)
        CHANGES[number % len(CHANGES)](rng, changed)
        assert changed != asked
        for one in (asked, changed):
            told = json.dumps(one, sort_keys=True)
            assert seen.setdefault(key_of(one), told) == told
        if number % 100 == 0:
            assert key_of(asked, stream=True, user="somebody") == key_of(asked), "what cannot change it does not"
    assert len(seen) > PAIRS
