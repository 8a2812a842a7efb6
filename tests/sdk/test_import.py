"""The SDK lives in other people's processes: it must be light and silent."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "fastapi", "starlette", "sqlalchemy", "sqlmodel", "jinja2", "gateway.app", "routers")


def test_importing_the_sdk_loads_nothing_heavy_and_warns_of_nothing() -> None:
    code = f"import sys; from gateway.sdk import Leadline; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_everything_that_is_exported_is_there() -> None:
    import gateway.sdk

    assert all(hasattr(gateway.sdk, name) for name in gateway.sdk.__all__)
