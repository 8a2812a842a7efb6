"""What schemathesis cannot know from a schema. It loads this from its own venv, where nothing of ours is.

Each change turns a good request into another good one, which gets further; what is wrong with a request stays in it.
"""

import itertools
import os
from typing import Any

import schemathesis

SERVED = {
    "/v1/chat/completions": "small",
    "/v1/completions": "small",
    "/v1/embeddings": "embed",
    "/leadline/v1/explain": "small",
}
MOST = {"max_tokens": 1000, "max_completion_tokens": 1000}
"""That `small` can answer."""
MAIN, *OTHERS = os.environ["JUDGED_KEYS"].split()
OURS = {token.split("-")[2] for token in (MAIN, *OTHERS)}
ADMINS = itertools.cycle(OTHERS)
"""Each may change so many keys a minute; in turn, they may change enough to learn something."""
fresh = itertools.count()


@schemathesis.auth(refresh_interval=None)
class Caller:
    """An admin: the first one, but in turn all others for what changes keys."""

    def get(self, case: Any, context: Any) -> str:
        return next(ADMINS) if case.path.startswith("/leadline/v1/admin/keys") else MAIN

    def set(self, case: Any, key: str, context: Any) -> None:
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {key}"}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    headers = case.headers or {}
    if case.method in ("PATCH", "DELETE") and (case.path_parameters or {}).get("key_id") in OURS:
        case.path_parameters["key_id"] = "none"  # the judge's own keys stay as they are
    if case.path in SERVED and isinstance(case.body, dict):
        case.body = _servable(_whole(case.body), SERVED[case.path])
    key = headers.get("Idempotency-Key")
    if isinstance(key, str) and 0 < len(key) <= 255 and key.strip() == key:  # with another body it would be refused
        headers["Idempotency-Key"] = f"{key}-{next(fresh)}"[-255:]
    try:
        if 0 < float(headers.get("x-leadline-timeout", 30)) < 30:  # a 504 would be right
            headers["x-leadline-timeout"] = "30"
    except ValueError:
        pass


def _servable(body: dict[str, Any], model: str) -> dict[str, Any]:
    named = body.get("model")
    if isinstance(named, str) and 0 < len(named) <= 256:
        body["model"] = model
    for field, most in MOST.items():
        if type(body.get(field)) is int and most < body[field] <= 1 << 31:
            body[field] = most
    n, best_of = body.get("n"), body.get("best_of")
    if type(n) is int and type(best_of) is int and 0 < best_of < n:  # no schema can say: at least `n`
        body["best_of"] = n
    return body


def _whole(value: Any) -> Any:
    """JSON Schema counts 5.0 among the integers; here an integer is written as one, as every client does."""
    if isinstance(value, dict):
        return {name: _whole(field) for name, field in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
