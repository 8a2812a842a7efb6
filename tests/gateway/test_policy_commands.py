"""`leadline check | explain | diff | schema` on files and on a ledger's history."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.policies import CannotServe, checked_policy, engine_needs, load_policy
from local_engine.config import locate
from probes.manifest import Certificate, default_artifact_path, read_manifest, write_manifest
from routers.aims import Bound
from tests.gateway.conftest import POLICY, StartGateway, ask

ROOT = Path(__file__).parents[2]
TEXT = POLICY.format(url="http://127.0.0.1:9/v1", limits="")
BATCH = '  - {name: night, when: {model: auto, key: [batch, first], schedule: {hours: "22:00-06:00"}}, use: [dear]}\n'


class Shell:
    """The command line, in a state folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *arguments: str) -> tuple[int, str]:
        """(exit status, everything printed)."""
        env = {"LEADLINE_HOME": str(self.home), "DATABASE_URL": None, "REDIS_URL": None, "OPENAI_API_KEY": None}
        done = CliRunner().invoke(app, arguments, env=env)
        return done.exit_code, done.output

    def policy(self, name: str, text: str) -> str:
        file = self.home.parent / name
        file.write_text(text)
        return str(file)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "home")


def test_check_tells_what_may_not_be_meant_with_its_line(shell: Shell) -> None:
    text = TEXT.replace("routes:\n", "routes:\n" + BATCH) + (
        "  - {name: cheap-only, when: {tag: x}, candidates: [cheap], subject_to: {cost: '<= $0.000001'}}\n"
    )
    file = shell.policy("p.yaml", text)
    status, out = shell.run("check", file)
    assert status == 0
    assert f"note: {file}:29: routes[4].subject_to.cost: met only by requests with a low max_tokens" in out
    assert "routes[0].when.key" not in out, "there is no ledger to ask"


def test_check_tells_where_a_model_answers_without_its_plan(shell: Shell) -> None:
    text = TEXT.replace("model: dear, context: 128000,", "model: dear, context: 128000, prefix: true,").replace(
        "output: $10/Mtok}}", "output: $10/Mtok}, plan: {exit: {rule: redundancy}}}"
    )
    accept = "{mean_logprob: 1, at_least: 0.4, keeps_right: 0.9, keeps_wrong: 0.2}"
    text += f'  - {{name: two, when: {{tag: x}}, candidates: ["cheap>dear"], accept: {accept}}}\n'
    status, out = shell.run("check", shell.policy("p.yaml", text))
    assert status == 0, out
    assert "routes[0].on_failure: dear answers without its plan here" in out
    assert "routes[3].candidates: dear answers without its plan in a cascade" in out
    assert out.count("without its plan") == 2


@pytest.mark.parametrize("path", sorted((ROOT / "policies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_policy_that_ships_can_be_served_as_it_is(shell: Shell, path: Path) -> None:
    status, out = shell.run("check", str(path))
    assert status == 0, out


EXITS = """
version: 1
providers: {home: {engine: embedded}}
models:
  local: {provider: home, model: bundled/MODEL, plan: {exit: {RULE}}}
routes:
  - {name: auto, when: {model: auto}, candidates: [local]}
"""


@pytest.mark.parametrize(
    ("model", "rule", "says"),
    [
        ("base", "rule: probe", ""),
        ("draft", "rule: convergence", ""),
        ("draft", "rule: budget, budget: 50", ""),
        ("draft", "rule: probe", "models.local.plan.exit.rule: `probe` is fitted on a model, and bundled/draft has no"),
        ("draft", "rule: budget", "run `leadline exits fit`, or write the `budget`"),
        ("base", "delta: 0.1%", "models.local.plan.exit.delta: delta 0.001 is not certified (expected, loss wrong)"),
    ],
)
def test_check_refuses_an_exit_that_would_refuse_every_request(shell: Shell, model: str, rule: str, says: str) -> None:
    file = shell.policy("p.yaml", EXITS.replace("MODEL", model).replace("RULE", rule))
    status, out = shell.run("check", file)
    assert (status != 0) == bool(says), out
    assert (f"{file}:5: " in out and says in out) if says else ": ok" in out


@pytest.mark.anyio
async def test_check_knows_the_keys_of_the_ledger(start_gateway: StartGateway, shell: Shell) -> None:
    async with start_gateway(home=shell.home):
        pass
    limits = "limits:\n  - {key: fisrt, rate: 1/s}\n  - {key: first, rate: 2/s}\n  - {team: red, rate: 1/s}\n"
    file = shell.policy("p.yaml", TEXT.replace("routes:\n", "routes:\n" + BATCH) + limits)
    _, out = shell.run("check", file)
    assert f"{file}:30: limits[0].key: no key that works has the name 'fisrt'; did you mean `first`?" in out
    assert "limits[2].team: no key that works has the team 'red'" in out
    assert "routes[0].when.key: no key that works has the name 'batch'" in out
    assert "'first'" not in out
    status, told = shell.run("check", file, "--json")
    assert (status, len(json.loads(told)["notes"])) == (0, 3)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "  fake: {base_url: \"http://127.0.0.1:9/v1\"",
            "  fake: {server: leadline, base_url: \"http://127.0.0.1:9\"",
            "p.yaml:4: providers.fake.base_url: an engine that listens answers below /v1. Fix: end the address with",
        ),
        (
            "models:\n",
            "  home: {engine: embedded}\nmodels:\n  a: {provider: home, model: bundled/base, speculation: off}\n"
            "  b: {provider: home, model: bundled/base}\n",
            "p.yaml:9: models.b.speculation: `a` is the same model and drafts another way: off. Fix: write the same",
        ),
        (
            "candidates: [cheap, dear]",
            "candidates: [cheap, dear]\n    subject_to: {cost: '<= $0.0000005'}",
            "routes[0].subject_to.cost: nothing can satisfy this: the shortest call of the cheapest, `cheap`, costs",
        ),
        (
            "models:\n",
            "  home: {engine: embedded}\nmodels:\n  a: {provider: home, model: ./none}\n",
            "p.yaml:8: models.a.model: ",
        ),
    ],
)  # fmt: skip
def test_check_refuses_what_cannot_work(shell: Shell, old: str, new: str, problem: str) -> None:
    assert old in TEXT
    status, out = shell.run("check", shell.policy("p.yaml", TEXT.replace(old, new, 1)))
    assert status != 0
    assert problem in out


OWN = """
version: 1
providers: {home: {engine: embedded}, far: {base_url: "http://127.0.0.1:9/v1"}}
models:
  base: {provider: home, model: bundled/base}
  small: {provider: home, model: bundled/nano}
  strong: {provider: far, model: s, price: free}
  vectors: {provider: home, model: default, embeds: true}
signals: {difficulty: {probe: default, encoder: default, heads: {base: local}}}
"""
BASE = "model: bundled/base"
SMALL = "model: bundled/nano"
VECTORS = "model: default"
ENCODER = "encoder: default"
READS = "signals.difficulty.encoder"
DRAFT = "models.base.speculation"


def drafting(how: str) -> str:
    return f"{BASE}, speculation: '{how}'"


@pytest.mark.parametrize(
    ("old", "new", "field", "problem"),
    [
        (ENCODER, "encoder: {at}/nope", READS, "there is no folder '{at}/nope'"),
        (ENCODER, "encoder: ./empty", READS, "the folder '{at}/empty' has no config.json and no model.safetensors"),
        (ENCODER, "encoder: ./parts", READS, "the folder '{at}/parts' has no model.safetensors"),
        (VECTORS, "model: {at}/nope", "models.vectors.model", "there is no folder '{at}/nope'"),
        (VECTORS, "model: ./parts", "models.vectors.model", "the folder '{at}/parts' has no model.safetensors"),
        (VECTORS, BASE, "models.vectors.model", "'bundled/base' answers conversations and is no encoder; write"),
        (SMALL, "model: ./none", "models.small.model", "there is no folder '{at}/none'"),
        (SMALL, "model: ./empty", "models.small.model", "'{at}/empty' has no config.json and no *.safetensors; name"),
        (SMALL, "model: ./config", "models.small.model", "has no *.safetensors; name the folder of a checkpoint"),
        (BASE, drafting("draft:./empty"), DRAFT, "the folder '{at}/empty' has no config.json and no *.safetensors"),
        (BASE, drafting("draft:bundled/nan"), DRAFT, "there is no model 'bundled/nan'; bundled are: "),
        (BASE, drafting("draft:smal"), DRAFT, "nor a folder; did you mean `small`?"),
        (BASE, drafting("auto+draft:nano"), DRAFT, "nor a folder; did you mean `bundled/nano`?"),
        (BASE, drafting("draft:nope"), DRAFT, "nor a folder; write the name of one, bundled/…, a folder, or a hub id"),
        (BASE, drafting("draft:strong"), DRAFT, "'strong' is no local model of this policy, nor a folder; write"),
        (BASE, drafting("draft:vectors"), DRAFT, "'vectors' is no local model of this policy, nor a folder; write"),
    ],
)
def test_check_refuses_what_the_engine_could_not_load(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, old: str, new: str, field: str, problem: str
) -> None:
    at = shell.home.parent
    for name in ("parts/config.json", "parts/model-00001-of-00002.safetensors", "config/config.json"):
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).touch()
    (at / "empty").mkdir()
    assert OWN.count(old) == 1
    file = shell.policy("p.yaml", OWN.replace(old, new.format(at=at)))
    line = OWN[: OWN.index(old)].count("\n") + 1
    status, out = shell.run("check", file)
    assert status != 0
    (told,) = out.splitlines()
    assert told.startswith(f"{file}:{line}: {field}: ")
    assert problem.format(at=at) in told
    with pytest.raises(CannotServe) as refused:
        checked_policy(Path(file))
    assert str(refused.value) == told, "as at a start"
    monkeypatch.chdir(at)
    status, near = shell.run("check", "p.yaml")
    assert status != 0, near
    assert near.replace("p.yaml:", f"{file}:", 1) == out, "wherever it is asked from"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (BASE, drafting("draft:small")),
        (BASE, drafting("auto+draft:someone/something")),
        (SMALL, "model: someone/something"),
        (VECTORS, "model: someone/something"),
        (ENCODER, "encoder: someone/something"),
        (VECTORS, "model: ./mine"),
        (ENCODER, "encoder: ./mine"),
    ],
)
def test_check_passes_what_is_there_and_what_a_hub_may_have(shell: Shell, old: str, new: str) -> None:
    shutil.copytree(locate("bundled/nano")[0], shell.home.parent / "mine")
    status, out = shell.run("check", shell.policy("p.yaml", OWN.replace(old, new)))
    assert status == 0, out


def test_a_model_that_drafts_is_loaded_from_where_the_policy_has_it(shell: Shell) -> None:
    folder = shell.home.parent
    shutil.copytree(locate("bundled/nano")[0], folder / "mine")
    text = OWN.replace(BASE, drafting("auto+draft:small")).replace(SMALL, "model: ./mine")
    needs = engine_needs(*checked_policy(Path(shell.policy("p.yaml", text))))
    assert needs is not None
    assert needs["speculation"]["bundled/base"] == f"auto+draft:{folder / 'mine'}"


def test_explain_tells_routes_hints_and_times(shell: Shell) -> None:
    file = shell.policy("p.yaml", TEXT.replace("routes:\n", "routes:\n" + BATCH))
    _, day = shell.run("explain", file, "hello", "--key", "batch", "--at", "2026-11-23T12:00")
    assert day.startswith("cheap, by route auto")
    assert "route night: not taken: at mon 12:00, asked: every day 22:00-06:00 UTC" in day
    _, night = shell.run("explain", file, "hello", "--key", "batch", "--at", "2026-11-23T21:30-01:00")
    assert night.startswith("dear, by route night")
    _, hinted = shell.run("explain", file, "hello", "--header", "x-leadline-models: dear")
    status, unknown = shell.run("explain", file, "hello", "--header", "x-leadline-models: deer")
    assert status != 0
    assert "x-leadline-models: 'deer' is no model of the policy; send some of cheap, dear, gone, free." in unknown
    assert hinted.startswith("dear, by route auto")
    status, refused = shell.run("explain", file, "hello", "--header", "x-leadline-effort: huge")
    assert (status != 0, "x-leadline-effort: 'huge' is no effort" in refused) == (True, True)
    for wrong in (["--at", "noon"], ["--header", "nonsense"], ["--request", "req_1"]):
        status, out = shell.run("explain", file, *([] if wrong[0] == "--request" else ["hello"]), *wrong)
        assert status != 0
        assert "Traceback" not in out
    status, told = shell.run("explain", file, "hello", "--json")
    data = json.loads(told)
    assert (data["decision"]["plan"]["model"], data["routes"][-1]["taken"]) == ("cheap", True)
    status, out = shell.run("explain", file, "hello", "--model", "nobody")
    assert (status != 0, "refused: `nobody` is neither a model nor an alias" in out) == (True, True)


@pytest.mark.anyio
async def test_explain_tells_a_past_request_and_what_would_be_now(start_gateway: StartGateway, shell: Shell) -> None:
    async with start_gateway(home=shell.home) as gateway:
        _, headers, _ = await gateway.chat(ask(model="auto"), **{"x-leadline-tags": "vip"})
        await gateway.rows()
    file = shell.policy(
        "p.yaml", TEXT.replace("routes:\n", "routes:\n" + BATCH.replace(', schedule: {hours: "22:00-06:00"}', ""))
    )
    status, out = shell.run("explain", file, "--request", headers["x-request-id"])
    assert status == 0, out
    then, now = out.split("now, by policy ")
    assert "ok (200), served by cheap" in then
    assert "cheap, by route auto" in then
    assert "dear, by route night" in now
    assert "the key is first" in now
    status, told = shell.run("explain", file, "--request", headers["x-request-id"], "--json")
    data: dict[str, Any] = json.loads(told)
    assert (data["then"]["plan"]["model"], data["now"]["decision"]["plan"]["model"]) == ("cheap", "dear")
    tagged = shell.policy(
        "t.yaml", TEXT.replace("routes:\n", "routes:\n  - {name: vip, when: {tag: vip}, use: [dear]}\n")
    )
    _, out = shell.run("explain", tagged, "--request", headers["x-request-id"])
    assert "by what the probe said and what was up and affordable then" in out
    assert "route vip: taken: tag vip" in out, "the row keeps what it was decided from"
    status, out = shell.run("explain", file, "--request", "req_none")
    assert (status != 0, "the ledger has no such request" in out) == (True, True)


@pytest.mark.anyio
async def test_explain_explores_a_past_request_as_it_was(start_gateway: StartGateway, shell: Shell) -> None:
    coin = "  - {name: coin, when: {model: coin}, candidates: [cheap, dear], explore: {share: 50%, method: uniform}}\n"
    async with start_gateway(coin, shell.home) as gateway:
        asked = [(await gateway.chat(ask(text=f"number {number}", model="coin")))[1] for number in range(8)]
        await gateway.rows()
    file = shell.policy("p.yaml", POLICY.format(url="http://127.0.0.1:9/v1", limits=coin))
    for headers in asked:
        status, told = shell.run("explain", file, "--request", headers["x-request-id"], "--json")
        assert status == 0, told
        data = json.loads(told)
        assert data["now"]["decision"]["seed"] == data["then"]["seed"] != 0
        assert data["now"]["decision"]["plan"]["model"] == headers["x-leadline-model"]


@pytest.mark.anyio
async def test_diff_decides_the_ledgers_history_anew(start_gateway: StartGateway, shell: Shell) -> None:
    async with start_gateway(home=shell.home) as gateway:
        for number in range(3):
            await gateway.chat(ask(text=f"number {number}", model="auto"))
        await gateway.chat(ask(model="cheap"))
        await gateway.rows()
    old = shell.policy("old.yaml", TEXT)
    new = shell.policy("new.yaml", TEXT.replace("candidates: [cheap, dear]", "candidates: [dear]"))
    status, out = shell.run("diff", old, new)
    assert status == 1
    assert "~ routes.auto.candidates: cheap, dear -> dear" in out
    assert "history: 3 of the newest 4 requests" in out
    assert "  3: cheap -> dear" in out
    status, told = shell.run("diff", old, new, "--json")
    data = json.loads(told)
    assert data["changes"] == [{"field": "routes.auto.candidates", "before": "cheap, dear", "after": "dear"}]
    assert data["history"] == {"requests": 4, "changed": [{"before": "cheap", "after": "dear", "requests": 3}]}
    assert shell.run("diff", old, old)[0] == 0


def test_the_schema_is_the_published_one(shell: Shell) -> None:
    status, out = shell.run("schema")
    assert status == 0
    assert out == (ROOT / "policies" / "schema.json").read_text(encoding="utf-8")


def test_nothing_is_written_by_looking(shell: Shell) -> None:
    file = shell.policy("p.yaml", TEXT)
    for command in (["check", file], ["explain", file, "hello"], ["diff", file, file], ["schema"]):
        shell.run(*command)
    assert not shell.home.exists()
    assert load_policy(Path(file)).aliases


GUARANTEED = """\
version: 1
providers: {{p: {{base_url: "http://127.0.0.1:9/v1"}}}}
models:
  local: {{provider: p, model: l, price: free}}
  strong: {{provider: p, model: s, price: {{input: $1/Mtok, output: $1/Mtok}}}}
signals: {{difficulty: {{probe: {artifact}}}}}
routes:
  - name: auto
    when: {{model: auto}}
    candidates: [local, strong]
    guarantee: {{loss: weak_wrong_strong_right, at_most: 0.05, confidence: {confidence}}}
"""


def test_a_guarantee_needs_its_certificate_and_check_says_how_to_make_one(shell: Shell) -> None:
    artifact = shell.home.parent / "probe"
    shutil.copytree(default_artifact_path(), artifact)
    manifest = read_manifest(artifact)
    write_manifest(manifest.model_copy(update={"certificates": ()}), artifact)
    file = shell.policy("p.yaml", GUARANTEED.format(artifact=artifact, confidence="95%"))
    status, out = shell.run("check", file)
    assert status != 0
    assert f"{file}:11: routes[0].guarantee: the probe has no certificate for weak_wrong_strong_right of local" in out
    assert f"leadline probe certify {artifact} TABLE --prompt COLUMN --head local=COLUMN --head strong=COLUMN" in out
    assert "--alpha 0.05 --method ltt --delta 0.05" in out
    certificate = Certificate(
        loss="weak_wrong_strong_right", heads=("local", "strong"), method="ltt", alpha=0.04, delta=0.05, horizon=None,
        threshold=-0.02, n=2000, risk=0.03, shares={"local": 0.5, "strong": 0.5}, rows="held_out",
        data_sha256=manifest.data_sha256, tensors_sha256=manifest.tensors_sha256,
        encoder_sha256=manifest.encoder_sha256, created="2026-11-21",
    )  # fmt: skip
    write_manifest(manifest.model_copy(update={"certificates": (certificate,)}), artifact)
    assert shell.run("check", file)[0] == 0
    policy, _ = checked_policy(Path(file))
    (route,) = policy.routes
    assert route.guarantee is not None
    assert route.guarantee.bound == Bound(("local", "strong"), -0.02, str(certificate))
    surer = shell.policy("surer.yaml", GUARANTEED.format(artifact=artifact, confidence="99%"))
    with pytest.raises(CannotServe, match=r"--delta 0\.01"):
        checked_policy(Path(surer))


def test_explain_tells_how_much_is_thought(shell: Shell) -> None:
    text = TEXT.replace("price: free}", "price: free, thinking: {field: reasoning_effort, high_tokens: 4096}}")
    text = text.replace("use: [cheap]\n    cache: off", "candidates: [free+high]\n    cache: off")
    _, out = shell.run("explain", shell.policy("p.yaml", text), "hello", "--model", "uncached")
    assert out.startswith("free+high, by route uncached")
    assert "thinks at most 4096 tokens (effort high)" in out
