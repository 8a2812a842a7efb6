from tests.gateway.conftest import upstream  # noqa: F401
