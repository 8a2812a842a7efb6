"""What the policy wants measured before it decides: asks the probe in the engine process, and remembers its answers."""

import asyncio
from collections import OrderedDict

import msgspec

from gateway.telemetry.logs import get_logger
from gateway.telemetry.metrics import Metrics
from gateway.upstream.local import EngineLink
from gateway.world import World
from local_engine.client import EngineClient
from local_engine.errors import EngineError
from local_engine.types import ProbeResult
from probes.types import Estimate
from routers.types import Query, Signals

NOT_ASKED = Signals()
log = get_logger(__name__)

REMEMBERED = 4096
"""Conversations whose probe result is kept; asking again about the same one costs nothing."""
MAX_PROBED_BYTES = 1 << 18
"""A longer conversation is not sounded: reading it would hold up everybody else's."""
MAX_REMEMBERED_BYTES = 1 << 14
"""A longer conversation is asked about each time."""


class SignalReader:
    def __init__(self, engine: EngineLink, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._remembered: OrderedDict[tuple[str, bytes], ProbeResult] = OrderedDict()

    async def read(self, query: Query, messages: bytes | msgspec.Raw, world: World) -> Signals:
        """The signals of one query. What cannot be measured in time is absent; nothing here fails a request."""
        difficulty = world.policy.difficulty
        if difficulty is None or query.endpoint != "chat.completions" or not (heads := world.policy.heads_for(query)):
            return NOT_ASKED
        messages = bytes(messages)
        if len(messages) > MAX_PROBED_BYTES:
            return Signals(probe="unavailable")
        client = self._engine.client
        if client is None:
            return Signals(probe="unavailable")
        result = await self._probe(client, query.tenant, messages, difficulty.timeout_ms / 1000)
        if result is None:
            return Signals(probe="unavailable")
        version = client.hello.probe_version or "probe"
        return Signals(
            p_success={
                model: Estimate(result.p_success[head], source=f"{version}/{head}", cost_us=result.cost_us)
                for model, head in heads.items()
                if head in result.p_success
            },
            input_tokens={
                name: tokens
                for wire_name, tokens in result.input_tokens.items()
                for name in world.local_models.get(wire_name, ())
            },
            probe="ok",
        )

    async def _probe(self, client: EngineClient, tenant: str, messages: bytes, timeout_s: float) -> ProbeResult | None:
        # The tenant is part of the key: how fast an answer comes must not tell one tenant what another has asked.
        memo = (tenant, messages)
        known = self._remembered.get(memo)
        if known is not None:
            self._remembered.move_to_end(memo)
            return known
        try:
            async with asyncio.timeout(timeout_s):
                result = await client.probe(messages)
        except (EngineError, TimeoutError) as error:
            self._metrics.probe_failures.inc()
            log.warning("probe.failed", error=type(error).__name__)
            return None
        if len(messages) <= MAX_REMEMBERED_BYTES:
            self._remembered[memo] = result
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return result
