"""`make judges`: what other people's suites say of a gateway before the fake upstream. Exit status 1 if one objects.

    python -m tests.judges VENV [schemathesis] [langchain]

VENV has what requirements.txt names; without names, all judges sit. What they do not try, and why: hooks.py and
langchain_chat.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from tests.faults.serving import Serving, serving
from tests.upstream.process import upstream_process

HERE = Path(__file__).parent
SEED = "20260101"
FUZZING_S = 240
ADMINS = 40
POLICY = """
version: 1
providers:
  fake: {{base_url: "{url}", timeout: 20s, retries: 0, breaker: off}}
models:
  small: {{provider: fake, model: small, context: 100000, max_output: 1000,
          price: {{input: $0.15/Mtok, output: $0.60/Mtok}}}}
  large: {{provider: fake, model: large, context: 100000, max_output: 1000,
          price: {{input: $2.50/Mtok, output: $10/Mtok}}}}
  embed: {{provider: fake, model: embed, context: 100000, embeds: true, price: {{input: $0.02/Mtok}}}}
routes: [{{name: auto, when: {{model: auto}}, use: [small]}}]
"""


def schemathesis(venv: Path, gateway: Serving, seconds: int) -> list[str | Path]:
    return [
        venv / "bin" / "schemathesis", "run", f"http://127.0.0.1:{gateway.port}/openapi.json",
        "--checks=all", "--phases=examples,coverage,fuzzing,stateful", "--mode=all",
        f"--seed={SEED}", f"--max-time={seconds}", "--generation-database=none", "--no-color",
    ]  # fmt: skip


def langchain(venv: Path, gateway: Serving, seconds: int) -> list[str | Path]:
    return [venv / "bin" / "python", "-m", "pytest", "-c", HERE / "pytest.ini", "--rootdir", HERE, HERE]


def admins(gateway: Serving) -> list[str]:
    """Admin keys beside the first one."""
    made = []
    for number in range(ADMINS):
        request = urllib.request.Request(
            f"http://127.0.0.1:{gateway.port}/leadline/v1/admin/keys",
            json.dumps({"name": f"judge-{number}", "role": "admin"}).encode(),
            {"Authorization": f"Bearer {gateway.key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            made.append(json.load(response)["key"])
    return made


JUDGES = {"schemathesis": schemathesis, "langchain": langchain}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.judges", description=__doc__)
    parser.add_argument("venv", type=Path)
    parser.add_argument("judges", nargs="*", choices=[*JUDGES, []], default=[])
    parser.add_argument("--seconds", type=int, default=FUZZING_S, help="how long schemathesis tries")
    options = parser.parse_args()
    objections = []
    for name in options.judges or JUDGES:
        with tempfile.TemporaryDirectory() as folder, upstream_process(Path(folder) / "truth.jsonl") as upstream:
            with serving(POLICY.format(url=upstream.url), Path(folder)) as gateway:
                env = {
                    **os.environ,
                    "SCHEMATHESIS_HOOKS": "hooks",
                    "PYTHONPATH": str(HERE),
                    "JUDGED_URL": f"http://127.0.0.1:{gateway.port}/v1",
                    "JUDGED_KEY": gateway.key,
                    "JUDGED_KEYS": " ".join([gateway.key, *admins(gateway)]),
                }
                command = JUDGES[name](options.venv.absolute(), gateway, options.seconds)
                judged = subprocess.run(command, env=env, cwd=folder)
            if judged.returncode:
                objections.append(name)
            print(f"{name}: {'objects' if judged.returncode else 'content'}", flush=True)  # noqa: T201
    return 1 if objections else 0


sys.exit(main())
