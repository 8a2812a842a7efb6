"""docker/: linted, and the very commands that its files run are run here, outside a container, on real servers."""

import ast
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gateway.policies import load_policy
from gateway.settings import Settings
from gateway.workers import KILL_AFTER_S
from routers.units import parse_duration_ms
from tests.conftest import free_port, stop, wait_for_port
from tests.deploy.conftest import PATIENCE_S, ROOT, environment

DOCKER = ROOT / "docker"
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))
BIN = Path(sys.executable).parent


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(words[0], words[1]) for line in lines if len(words := line.split(None, 1)) == 2]


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def manifests() -> dict[str, Any]:
    """By kind and name."""
    found = [part for file in MANIFESTS for part in yaml.safe_load_all(file.read_text())]
    return {f"{part['kind']}/{part['metadata']['name']}": part for part in found}


def pod() -> Any:
    return manifests()["Deployment/leadline"]["spec"]["template"]["spec"]


# linted -------------------------------------------------------------------------------------------------------------


def lint(tool: str, *arguments: object) -> None:
    found = shutil.which(tool, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{tool} is not installed; the dev extra brings it")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_linted() -> None:
    lint("hadolint", DOCKER / "Dockerfile")


def test_every_yaml_is_linted() -> None:
    lint("yamllint", "--strict", "-c", DOCKER / ".yamllint", DOCKER)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifests_are_what_kubernetes_takes(manifest: Path) -> None:
    lint("kubernetes-validate", "--strict", manifest)


# what holds between the files ---------------------------------------------------------------------------------------


def test_what_the_dockerfile_copies_is_there_and_reaches_it() -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        name
        for kind, words in instructions()
        if kind == "COPY" and "--from" not in words
        for name in words.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_images_run_as_nobody_and_hold_no_tools() -> None:
    found = instructions()
    stages = [words.split(" AS ") for kind, words in found if kind == "FROM"]
    assert [base for base, name in stages if name in ("remote", "cpu", "gpu")] == ["base"] * 3
    base = found[found.index(("FROM", "${PYTHON_IMAGE} AS base")) :]
    assert ("USER", "10001:10001") in base
    assert ("EXPOSE", "8080") in base
    installed = [words for kind, words in base if kind == "RUN"]
    assert installed
    assert all("pip" not in words and "build-essential" not in words for words in installed)


def test_compose_names_only_what_it_declares() -> None:
    whole = compose()
    targets = {words.split(" AS ")[1] for kind, words in instructions() if kind == "FROM"}
    for name, service in whole["services"].items():
        for wanted in service.get("depends_on", {}):
            assert wanted in whole["services"], name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in whole["volumes"], name
        if "build" in service:
            assert service["build"]["target"] in targets
            assert service["read_only"], f"{name} writes nowhere but to its volumes"


def test_the_policies_that_ship_load(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(manifests()["ConfigMap/leadline-policy"]["data"]["policy.yaml"])
    in_kubernetes, in_compose = load_policy(tmp_path / "policy.yaml"), load_policy(DOCKER / "policy.yaml")
    assert in_kubernetes.version_hash == in_compose.version_hash


def test_kubernetes_waits_for_the_drain() -> None:
    gateway = pod()["containers"][0]
    drain_s = parse_duration_ms(gateway["args"][gateway["args"].index("--drain") + 1]) / 1000
    before_s = float(gateway["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod()["terminationGracePeriodSeconds"] >= before_s + drain_s + KILL_AFTER_S
    service = compose()["services"]["gateway"]
    drain_s = parse_duration_ms(service["command"][service["command"].index("--drain") + 1]) / 1000
    assert parse_duration_ms(service["stop_grace_period"]) / 1000 >= drain_s + KILL_AFTER_S


def test_kubernetes_confines_every_container() -> None:
    names = {volume["name"]: volume for volume in pod()["volumes"]}
    for container in (*pod()["containers"], *pod()["initContainers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(names)
    assert pod()["securityContext"]["runAsNonRoot"]
    labels = manifests()["Deployment/leadline"]["spec"]["template"]["metadata"]["labels"]
    for policy in ("PodDisruptionBudget/leadline", "NetworkPolicy/leadline"):
        spec = manifests()[policy]["spec"]
        assert (spec.get("selector") or spec.get("podSelector"))["matchLabels"].items() <= labels.items()
    assert manifests()["Service/leadline"]["spec"]["selector"].items() <= labels.items()


# the very commands, run ---------------------------------------------------------------------------------------------

PLACES = ("compose", "kubernetes")


def commands(place: str) -> tuple[list[str], list[str], dict[str, str]]:
    """(the gateway's arguments, the engine's, the gateway's environment), as the file says."""
    if place == "compose":
        services = compose()["services"]
        gateway, engine = services["gateway"], services["engine"]
        return gateway["command"], engine["command"], gateway["environment"]
    gateway, engine = pod()["containers"][0], pod()["initContainers"][0]
    return gateway["args"], engine["args"], {entry["name"]: entry["value"] for entry in gateway["env"]}


def probes(place: str) -> list[str]:
    """The paths that are asked whether the gateway is well."""
    if place == "compose":
        return []  # it takes the image's own HEALTHCHECK
    gateway = pod()["containers"][0]
    return [gateway[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]


def health_check(port: int) -> int:
    """The exit status of the image's own HEALTHCHECK."""
    (words,) = [words for kind, words in instructions() if kind == "HEALTHCHECK"]
    command: list[str] = ast.literal_eval(words.split("CMD", 1)[1].strip())
    assert command[0] == "python"
    command = [sys.executable, *(part.replace(":8080", f":{port}") for part in command[1:])]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE_S).returncode


@pytest.mark.engine
@pytest.mark.timeout(240)
@pytest.mark.parametrize("place", PLACES)
def test_what_the_containers_run_runs(place: str, tmp_path: Path, redis_url: str, postgres_url: str) -> None:
    assert [words for kind, words in instructions() if kind == "ENTRYPOINT"] == ['["leadline"]']
    serve, engine, said = commands(place)
    port, run, etc = free_port(), tmp_path / "run", tmp_path / "etc"
    for folder in (run, etc):
        folder.mkdir()
    shutil.copy(DOCKER / "policy.yaml", etc / "policy.yaml")

    def here(text: str) -> str:
        return (
            text.replace("/run/leadline", str(run)).replace("/etc/leadline", str(etc)).replace("0.0.0.0", "127.0.0.1")
        )

    env = environment(
        tmp_path / "home",
        **{name: here(value) for name, value in said.items() if name.startswith("LEADLINE_")},
        DATABASE_URL=postgres_url, REDIS_URL=redis_url, OPENAI_API_KEY="none",
    )  # fmt: skip
    assert Settings.from_env(env).shared
    leadline = [sys.executable, "-m", "gateway"]
    processes = [subprocess.Popen([*leadline, *map(here, engine)], env=env, cwd=ROOT)]
    try:
        command = [*leadline, *map(here, serve), "--port", str(port)]
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL))
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE_S
        while health_check(port) != 0:  # as in its start period
            assert processes[-1].poll() is None
            assert time.monotonic() < deadline
        for path in probes(place):
            with urllib.request.urlopen(url + path, timeout=PATIENCE_S) as answer:
                assert answer.status == 200
        assert asyncio.run(_answer_of_the_local_model(url, tmp_path / "home" / "key")) == "The answer is 64."
    finally:
        for process in reversed(processes):
            stop(process)
    assert [process.returncode for process in processes] == [0, 0]
    assert health_check(port) != 0


async def _answer_of_the_local_model(url: str, key: Path) -> str:
    body = {"model": "local", "temperature": 0, "messages": [{"role": "user", "content": "What is 23 + 48 - 7?"}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(),
        {"Authorization": f"Bearer {key.read_text()}", "Content-Type": "application/json"},
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE_S):
        while True:  # the engine comes up beside the gateway
            try:
                answer = await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=PATIENCE_S).read())
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                await asyncio.sleep(0.1)
            else:
                return str(json.loads(answer)["choices"][0]["message"]["content"])


# the remote image has no torch --------------------------------------------------------------------------------------


def installed_by(extra: str) -> set[str]:
    """The distributions that `pip install .[extra]` brings, by their own metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"][extra])]
    found: dict[str, set[str]] = {}
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), {"", *wanted.extras}
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if extras <= found.get(name, set()):
            continue
        found.setdefault(name, set()).update(extras)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # for another platform
        for line in lines:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": one}) for one in extras):
                needed.marker = None
                waiting.append(needed)
    return set(found)


def test_the_remote_image_installs_all_that_a_gateway_needs_and_no_torch(tmp_path: Path) -> None:
    (line,) = [words for kind, words in instructions() if kind == "RUN" and words.endswith("'.[server]'")]
    assert "-c constraints.txt" in line
    brought = installed_by("server")
    assert not brought & {"torch", "transformers", "numpy"}
    beside = sorted(
        module
        for module, sources in packages_distributions().items()
        if module.isidentifier() and not {canonicalize_name(source) for source in sources} & (brought | {"leadline"})
    )
    assert "torch" in beside
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nproviders: {p: {base_url: 'http://127.0.0.1:9/v1'}}\n"
        "models: {m: {provider: p, model: m, price: {input: $1/Mtok, output: $1/Mtok}}}\n"
        "routes: [{name: r, when: {model: auto}, use: [m]}]\n"
    )
    port = free_port()
    code = (
        f"import sys\nfor name in {beside!r}: sys.modules[name] = None\n"
        f"sys.argv = ['leadline', 'serve', '--port', '{port}', '--policy', {str(policy)!r}]\n"
        "from gateway.cli import main\nmain()"
    )
    env = environment(tmp_path / "home")
    process = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port, process, PATIENCE_S)
        for path in ("/health/readiness", "/metrics", "/dashboard/login"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S) as answer:
                assert answer.status == 200
    finally:
        stop(process)
    assert process.returncode == 0
