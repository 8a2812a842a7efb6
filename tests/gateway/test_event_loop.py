"""Nothing on the request path blocks the event loop."""

import pytest
from blockbuster import blockbuster_ctx

from tests.gateway.conftest import Gateway, ask

pytestmark = pytest.mark.anyio


async def test_no_blocking_call_on_the_request_path(gateway: Gateway) -> None:
    with blockbuster_ctx("gateway"):
        for body in (ask(), ask(), ask("two"), ask("three", model="auto"), ask("four", model="nope")):
            await gateway.chat(body)
        await gateway.stream(ask("five"))
        assert len(await gateway.rows()) == 6
