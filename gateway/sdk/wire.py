"""What both clients say on the wire: settings from the environment, paths, headers, request ids."""

import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai

DEFAULT_BASE_URL = "http://127.0.0.1:8080/v1"
SCOPE = "x-leadline-scope"
SCOPE_BUDGET = "x-leadline-scope-budget"
TAGS = "x-leadline-tags"
MAX_COST, MIN_QUALITY = "x-leadline-max-cost", "x-leadline-min-quality"
EFFORT, MODELS = "x-leadline-effort", "x-leadline-models"
EFFORTS = ("none", "low", "high")
_SCOPE = r"[A-Za-z0-9._:-]{1,64}(/[A-Za-z0-9._:-]{1,64}){0,7}"
ALL_HOURS = 1_000_000
"""Longer than any ledger: a scope's budget has no window."""

Prompt = str | Sequence[Mapping[str, Any]]
"""A user's words, or messages in OpenAI's shape."""
Money = Decimal | float | str
"""Dollars. A float counts as the decimal it prints as: 0.1 is ten cents."""


def find_key() -> str:
    """LEADLINE_API_KEY, else the key that a gateway of this machine left in its state folder. Raises OpenAIError."""
    from_env = os.environ.get("LEADLINE_API_KEY")
    if from_env:
        return from_env
    file = _home() / "key"
    try:
        return file.read_text().strip()
    except OSError as error:
        raise openai.OpenAIError(
            f"no API key: pass api_key, set LEADLINE_API_KEY, or start a gateway here (it leaves a key in {file})"
        ) from error


def find_base_url() -> str:
    """LEADLINE_BASE_URL, else where the gateway of this machine's state folder said that it listens, else port 8080."""
    from_env = os.environ.get("LEADLINE_BASE_URL")
    if from_env:
        return from_env
    try:
        return (_home() / "url").read_text().strip() or DEFAULT_BASE_URL
    except OSError:
        return DEFAULT_BASE_URL


def _home() -> Path:
    return Path(os.environ.get("LEADLINE_HOME") or Path.home() / ".leadline").expanduser()


def request_id_of(response: object) -> str:
    """The id of what any of openai's calls returned: a completion, a raw response, a stream; or the id itself.

    Raises ValueError for anything that carries none.
    """
    if isinstance(response, str):
        return response
    found = getattr(response, "_request_id", None) or getattr(response, "request_id", None)
    if found is None:  # a stream's last chunk carries its receipt
        found = (getattr(response, "leadline", None) or {}).get("request_id")
    if found is None:
        http = getattr(response, "response", None) or getattr(response, "_response", None)
        found = getattr(http, "headers", {}).get("x-request-id")
    if not isinstance(found, str) or not found:
        raise ValueError(f"a {type(response).__name__} carries no request id; pass a response of this gateway or an id")
    return found


def explain_body(prompt: Prompt, model: str, max_tokens: int | None, tags: Iterable[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "tags": list(tags)}


def feedback_body(accept: bool | None, score: float | None, comment: str | None, source: str | None) -> dict[str, Any]:
    """Raises ValueError where neither or both of `accept` and `score` are given."""
    if (accept is None) == (score is None):
        raise ValueError("feedback: give either accept=True or False, or score=0 to 1")
    said = {"accept": accept, "score": score, "comment": comment, "source": source}
    return {name: value for name, value in said.items() if value is not None}


def scope_headers(limit: Money, name: str | None) -> dict[str, str]:
    """Raises ValueError for a limit or a name that the gateway would not take."""
    dollars = Decimal(str(limit))
    if not dollars.is_finite() or dollars < 0 or dollars.scaleb(9) % 1:
        raise ValueError(f"budget {limit!r}: must be dollars, not negative, to the nano-dollar at the finest")
    name = f"scope-{uuid.uuid4().hex}" if name is None else name
    if not re.fullmatch(_SCOPE, name) or len(name) > 200:
        raise ValueError(
            f"scope {name!r}: use up to 8 names of 1 to 64 letters, digits, '.', '_', ':' or '-', with '/' between "
            "them, 200 characters in all"
        )
    return {SCOPE: name, SCOPE_BUDGET: f"{dollars:f}"}


def tag_headers(tags: Iterable[str], before: Mapping[str, str]) -> dict[str, str]:
    """These tags beside those that the client sends already. Raises ValueError for one that cannot be sent."""
    listed = [tag for tag in before.get(TAGS, "").split(",") if tag]
    for tag in tags:
        if not re.fullmatch(r"[!-+\--~]+", tag):
            raise ValueError(f"tag {tag!r}: use printable ASCII without spaces or commas")
        listed.append(tag)
    return {TAGS: ",".join(dict.fromkeys(listed))}


def hint_headers(
    before: Mapping[str, str],
    max_cost: Money | None,
    min_quality: float | None,
    effort: str | None,
    models: Iterable[str] | None,
) -> dict[str, str]:
    """These hints within those that the client sends already: of two bounds the narrower one. Raises ValueError for one
    that the gateway would not take, or that leaves no model."""
    headers: dict[str, str] = {}
    if max_cost is not None:
        dollars = Decimal(str(max_cost))
        if not dollars.is_finite() or dollars < 0 or dollars.scaleb(9) % 1:
            raise ValueError(f"max_cost {max_cost!r}: must be dollars, not negative, to the nano-dollar at the finest")
        headers[MAX_COST] = f"{min(dollars, Decimal(before.get(MAX_COST, 'Infinity'))):f}"
    if min_quality is not None:
        if not 0 <= min_quality <= 1:
            raise ValueError(f"min_quality {min_quality!r}: must be a probability, from 0 to 1")
        headers[MIN_QUALITY] = f"{max(min_quality, float(before.get(MIN_QUALITY, 0))):.9g}"
    if effort is not None:
        if effort not in EFFORTS:
            raise ValueError(f"effort {effort!r}: must be one of {', '.join(EFFORTS)}")
        headers[EFFORT] = min(effort, before.get(EFFORT, effort), key=EFFORTS.index)
    if models is not None:
        named = dict.fromkeys(models)
        if wrong := [name for name in named if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}", name)]:
            raise ValueError(f"models {wrong[0]!r}: is not the name of a model")
        allowed = [name for name in named if MODELS not in before or name in before[MODELS].split(",")]
        if not allowed:
            raise ValueError("models: none is left; name some of those that the client may use already")
        headers[MODELS] = ",".join(allowed)
    return headers
