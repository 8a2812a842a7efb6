"""What the policy wants measured before it decides: asks its probes, from the cheapest on, and remembers their answers.

Each tier is asked only about what the one before it left open: a head that it abstained from, or is undecided about.
The words are read here; the encoder and the local models read in the engine process. An undecided word stands where
nobody has a better one.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from gateway.found import Found
from gateway.telemetry.logs import get_logger
from gateway.telemetry.metrics import Metrics
from gateway.upstream.local import EngineLink
from gateway.upstream.local_params import DEFAULT_EFFORT, EFFORTS
from gateway.world import World
from local_engine.client import EngineClient
from local_engine.errors import EngineError
from local_engine.types import ProbeResult
from probes.text import render
from routers.types import Query, Signals

NOT_ASKED = Signals()
log = get_logger(__name__)

REMEMBERED = 4096
"""Conversations whose probe result is kept; asking again about the same one costs nothing."""
MAX_PROBED_BYTES = 1 << 18
"""A longer conversation is not sounded: reading it would hold up everybody else's."""
MAX_REMEMBERED_BYTES = 1 << 14
"""A longer conversation is asked about each time."""
KEPT_S = 20.0
"""How long the engine keeps a prompt that it has read for a probe, for the local route that may go on from it."""

_read_messages = msgspec.json.Decoder(list[dict[str, Any]]).decode


class SignalReader:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._remembered: OrderedDict[tuple[EngineLink, str, str, bytes], ProbeResult] = OrderedDict()

    async def read(
        self,
        query: Query,
        messages: bytes | msgspec.Raw,
        world: World,
        tools: bytes | msgspec.Raw | None = None,
        effort: str | None = None,
    ) -> Signals:
        """The signals of one query. What cannot be measured in time is absent; nothing here fails a request.

        `tools` and `effort` as the caller sent them: a model's own reading of the prompt holds both.
        """
        difficulty = world.policy.difficulty
        if difficulty is None or query.endpoint != "chat.completions" or not (heads := world.policy.heads_for(query)):
            return NOT_ASKED
        messages = bytes(messages)
        found = Found(heads)
        if len(messages) > MAX_PROBED_BYTES:
            return found.signals()
        static = world.probes.static
        if static is not None:
            began = time.perf_counter_ns()
            reading = static.read(_text(messages))
            if reading.p_success:
                cost_us = (time.perf_counter_ns() - began) // 1000
                found.add(reading, static.version, cost_us, bands=world.probes.bands["static"])
        if found.open and (client := world.engine.client) is not None:
            try:
                async with asyncio.timeout(difficulty.timeout_ms / 1000):
                    await self._ask_engine(client, query.tenant, messages, world, found, tools, effort)
            except (EngineError, TimeoutError) as error:
                self._metrics.probe_failures.inc()
                log.warning("probe.failed", error=type(error).__name__)
        return found.signals()

    async def _ask_engine(
        self,
        client: EngineClient,
        tenant: str,
        messages: bytes,
        world: World,
        found: Found,
        tools: bytes | msgspec.Raw | None,
        effort: str | None,
    ) -> None:
        if world.probes.encoder:
            result = await self._asked(world.engine, tenant, "", messages, lambda: client.probe(messages))
            # Words and hidden states err differently: their mean routes better than either (docs/experiments.md).
            self._take(result, client.hello.probe_version or "probe", "encoder", found, world, beside=True)
        for name in world.probes.heard:
            version = client.hello.readers.get(name)
            if version is None or not found.open or not found.heads.keys() & world.local_models.get(name, ()):
                continue
            hear = partial(
                client.probe,
                messages,
                name,
                bytes(tools) if tools is not None else None,
                effort=EFFORTS.get(effort or DEFAULT_EFFORT, "low"),
                salt=tenant,
                ttl_s=KEPT_S,
            )
            heard = await self._asked(world.engine, tenant, f"{name} {effort} {tools!r}", messages, hear)
            self._take(heard, version, f"heard:{name}", found, world)

    async def _asked(
        self, engine: EngineLink, tenant: str, what: str, messages: bytes, ask: Callable[[], Awaitable[ProbeResult]]
    ) -> ProbeResult:
        # The tenant is part of the key: how fast an answer comes must not tell one tenant what another has asked.
        # So is the engine: another one may have another probe.
        memo = (engine, tenant, what, messages)
        known = self._remembered.get(memo)
        if known is not None:
            self._remembered.move_to_end(memo)
            return known
        result = await ask()
        if len(messages) <= MAX_REMEMBERED_BYTES:
            self._remembered[memo] = result
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return result

    def _take(
        self, result: ProbeResult, version: str, tier: str, found: Found, world: World, *, beside: bool = False
    ) -> None:
        """`tier`: whose word it is, as `Tiers.bands` has it."""
        bands = world.probes.bands[tier]
        found.add(result, version, result.cost_us, beside=beside, by=result.by, bands=bands)
        for name, tokens in result.input_tokens.items():
            for model in world.local_models.get(name, ()):
                found.input_tokens[model] = tokens


def _text(messages: bytes) -> str:
    """The conversation, whole; empty where it is none."""
    try:
        return render(_read_messages(messages))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
