"""The gateway of tests/gateway, for the tests of admission."""

from tests.gateway.conftest import gateway, start_gateway, upstream

__all__ = ["gateway", "start_gateway", "upstream"]
