"""What self-hosted engines say and take beside OpenAI's API, each in its own way.

Sources: vLLM's ORCA header `endpoint-load-metrics` and `cache_salt`; SGLang's `/v1/loads` and `cache_salt`; the server
README of llama.cpp (`/slots`, `timings.cache_n`).
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from routers.policy import Server

LOAD_HEADER = b"endpoint-load-metrics"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one kind of server offers. All of them end a generation when its caller's connection closes."""

    salt: bool = False
    """Takes `cache_salt`: prefixes are shared within one salt only. Without it, tenants of one engine share them."""
    load_header: bool = False
    """Tells its load with every answer that is asked for with `LOAD_HEADER`-format."""
    priority: int = 0
    """Takes `priority`: 1 where larger goes first, -1 where smaller does, 0 where it is not taken."""
    priority_if_told: bool = False
    """It does so only as it was started, and may refuse a priority otherwise: the policy has to say."""
    load_path: str | None = None
    """Where it tells its load, at its root."""


CAPABILITIES: dict[Server, Capabilities] = {
    "openai": Capabilities(),
    "leadline": Capabilities(salt=True, load_header=True, priority=1),
    "vllm": Capabilities(salt=True, load_header=True, priority=-1, priority_if_told=True),
    "sglang": Capabilities(salt=True, priority=1, load_path="/v1/loads?include=core"),
    "llamacpp": Capabilities(load_path="/slots"),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What a server says of its load."""

    requests: float = 0.0
    """That wait there; where the server is asked for its load, those that run, too."""
    kv: float = 0.0
    """Share of its KV that running requests hold, from 0 to 1; 0 where it does not say. Prefixes kept are no part."""


@lru_cache(maxsize=4096)
def tenant_salt(secret: bytes, tenant: str) -> str:
    """The `cache_salt` of a tenant: the same on every worker and host that has the secret."""
    return hashlib.blake2b(tenant.encode(), key=secret[:64], digest_size=16).hexdigest()


def load_of_header(value: str) -> Load | None:
    """The load of a vLLM server, by the `JSON {...}` form of its load header; None: it does not say."""
    kind, _, body = value.partition(" ")
    if kind.upper() != "JSON":
        return None
    try:
        metrics = msgspec.json.decode(body)["named_metrics"]
        return Load(float(metrics["num_requests_waiting"]), float(metrics.get("kv_cache_usage_perc", 0)))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None


def load_of_body(server: Server, body: bytes) -> Load | None:
    """The load of a SGLang or llama.cpp server, by what its load path answers; None: unreadable.

    Of SGLang's ranks, the emptiest says whether there is room.
    """
    try:
        if server == "llamacpp":
            slots = msgspec.json.decode(body, type=list[dict[str, Any]])
            return Load(float(sum(slot["is_processing"] for slot in slots)))
        told: Any = msgspec.json.decode(body)
        requests = sum(rank["num_running_reqs"] + rank["num_waiting_reqs"] for rank in told["loads"])
        return Load(float(requests), min((float(rank.get("token_usage", 0)) for rank in told["loads"]), default=0.0))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None
