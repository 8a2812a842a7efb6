"""The command line, as a person types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.policies import load_policy, unloadable
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]


def leadline(*arguments: str, home: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if k not in ("OPENAI_API_KEY", "DATABASE_URL", "REDIS_URL")}
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env={**clean, "LEADLINE_HOME": str(home), **env}, capture_output=True, text=True, timeout=100, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", sorted((ROOT / "policies").glob("*.yaml")), ids=lambda path: path.stem)
def test_check_accepts_every_recipe(recipe: Path, tmp_path: Path) -> None:
    done = leadline("check", str(recipe), home=tmp_path)
    if recipe.stem == "reference" and done.returncode != 0:  # it shows a guarantee, for which the user makes the proof
        (problem,) = done.stderr.splitlines()
        assert "leadline probe certify" in problem
        return
    assert done.returncode == 0, done.stderr
    assert ": ok, version " in done.stdout
    assert re.search(r"prices that it leaves out: genai-prices \S+ \(MIT\), 20\d\d-\d\d-\d\d", done.stdout)


def test_check_names_line_value_and_fix(tmp_path: Path) -> None:
    policy = tmp_path / "bad.yaml"
    policy.write_text(
        "version: 1\nproviders:\n  p: {base_url: 'http://127.0.0.1:9/v1', timout: 5s}\n"
        "models:\n  m: {provider: p, model: m}\nroutes:\n  - {name: r, when: {model: auto}, use: [n]}\n"
    )
    done = leadline("check", str(policy), home=tmp_path)
    assert done.returncode != 0
    assert "bad.yaml:3" in done.stderr
    assert "timout" in done.stderr
    assert "timeout" in done.stderr
    assert "Traceback" not in done.stderr
    policy.write_text(policy.read_text().replace("timout", "timeout").replace("[n]", "[m]"))
    done = leadline("check", str(policy), home=tmp_path)
    assert done.returncode != 0
    assert "bad.yaml:5: models.m: missing price" in done.stderr


@pytest.mark.parametrize(
    ("speculation", "words"),
    [
        ("exit:1", None),
        ("exit:99", "speculation: exit:99 must name a layer from 1 to "),
        ("exit:1+exit:2", "at most one of draft:SOURCE and exit:LAYER"),
        ("draft:./none", "there is no folder"),
    ],
)
def test_drafting_that_cannot_be_is_named_before_the_start(tmp_path: Path, speculation: str, words: str | None) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "version: 1\nproviders:\n  p: {engine: embedded}\n"
        f"models:\n  m: {{provider: p, model: bundled/base, speculation: '{speculation}'}}\n"
        "routes:\n  - {name: r, when: {model: auto}, use: [m]}\n"
    )
    loaded, folder = load_policy(policy), tmp_path
    problems = unloadable(loaded, folder)
    assert len(problems) == (words is not None), problems
    assert words is None or words in problems[0]


def test_check_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = leadline("check", str(tmp_path / "none.yaml"), home=tmp_path)
    assert done.returncode != 0
    assert "none.yaml: cannot be read" in done.stderr


def test_a_missing_provider_key_stops_the_start_and_is_named(tmp_path: Path) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "version: 1\nproviders:\n  p: {base_url: 'http://127.0.0.1:9/v1', api_key: env:NO_SUCH_KEY}\n"
        "models:\n  m: {provider: p, model: m, price: {input: $1/Mtok, output: $1/Mtok}}\n"
        "routes:\n  - {name: r, when: {model: auto}, use: [m]}\n"
    )
    done = leadline("serve", "--port", str(free_port()), "--policy", str(policy), home=tmp_path)
    assert done.returncode != 0
    assert "providers.p.api_key: the environment variable NO_SUCH_KEY is not set" in done.stderr
    assert "note: " in leadline("check", str(policy), home=tmp_path).stdout


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("  difficulty: {probe: default, heads: {local: loacl}}", "did you mean 'local'?"),
        ("  difficulty: {probe: ./nowhere, heads: {local: local}}", "no probe artifact in"),
        ("  difficulty: {probe: default, heads: {local: local}}", "there is no model 'bundled/bsae'"),
    ],
)
def test_what_the_engine_could_not_load_is_named_before_it_starts(tmp_path: Path, line: str, named: str) -> None:
    policy = tmp_path / "p.yaml"
    model = "bundled/bsae" if "bsae" in named else "bundled/base"
    policy.write_text(
        "version: 1\nproviders: {home: {engine: embedded}}\n"
        f"models: {{local: {{provider: home, model: {model}}}}}\n"
        f"signals:\n{line}\nroutes:\n  - {{name: r, when: {{model: auto}}, candidates: [local], objective: best}}\n"
    )
    for command in (("check", str(policy)), ("serve", "--port", "0", "--policy", str(policy))):
        done = leadline(*command, home=tmp_path)
        assert done.returncode != 0
        assert named in done.stderr
        assert "Traceback" not in done.stderr


def test_a_second_gateway_on_one_state_folder_says_so(tmp_path: Path) -> None:
    from gateway.ledger.journal import Journal

    first = Journal(tmp_path / "journal" / "0")
    done = leadline("serve", "--port", "0", home=tmp_path)
    first.close()
    assert done.returncode != 0
    assert "another gateway is running" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = leadline("serve", "--port", str(port), home=tmp_path)
    assert done.returncode != 0
    assert f"--port {port}: cannot listen there" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEADLINE_MAX_BODY_MIB", "lots"),
        ("DATABASE_URL", "mysql://x"),
        ("LEADLINE_CACHE_MIB", "0"),
        ("REDIS_URL", "garbage"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, name: str, value: str) -> None:
    done = leadline("serve", "--port", "0", home=tmp_path, **{name: value})
    assert done.returncode != 0
    assert done.stderr.startswith(name)


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("keys", "list")])
def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    done = leadline(*command, home=tmp_path / "file" / "home")
    assert done.returncode != 0
    assert done.stderr.startswith(f"LEADLINE_HOME: {tmp_path}/file/home cannot be made (Not a directory)")


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://me:canary@127.0.0.1:9/db"
    for command in (("serve", "--port", "0"), ("keys", "list")):
        done = leadline(*command, home=tmp_path, DATABASE_URL=url)
        assert done.returncode != 0
        assert "DATABASE_URL: postgresql+psycopg://me:***@127.0.0.1:9/db cannot be used" in done.stderr
        assert "canary" not in done.stderr
        assert "Traceback" not in done.stderr


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    made = leadline("keys", "create", "alice", "--tenant", "acme", "--budget", "$5/month", home=tmp_path)
    assert made.stdout.startswith("sk-ll-")
    listed = leadline("keys", "list", home=tmp_path).stdout
    assert "alice  tenant acme  user  $5/month (its own)" in listed
    assert made.stdout.strip() not in listed
    assert "a key of that name exists" in leadline("keys", "create", "alice", home=tmp_path).stderr
    assert "--budget" in leadline("keys", "create", "bob", "--budget", "5", home=tmp_path).stderr
    key_id = listed.split()[0]
    assert leadline("keys", "revoke", key_id, home=tmp_path).returncode == 0
    assert leadline("keys", "revoke", key_id, home=tmp_path).returncode != 0
    assert leadline("keys", "list", home=tmp_path).stdout == ""
    assert leadline("spend", home=tmp_path).stdout.startswith("0 requests, $0 spent")


def test_keys_are_listed_with_the_budgets_that_a_policy_gives_them(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nproviders: {home: {engine: embedded}}\n"
        "models: {local: {provider: home, model: bundled/nano}}\nlimits:\n"
        "  - {key: '*', budget: $50/month}\n  - {key: alice, budget: $2/day}\n  - {key: alice, rate: 5/min}\n"
        "  - {team: ops, budget: $9/week}\n  - {tenant: '*', budget: $100/month}\n  - {run: '*', budget: $1}\n"
    )
    leadline("keys", "create", "alice", "--team", "ops", "--budget", "$5/month", home=tmp_path)
    leadline("keys", "create", "bob", home=tmp_path)
    plain = leadline("keys", "list", home=tmp_path)
    assert [line.partition("  user  ")[2] for line in plain.stdout.splitlines()] == [
        "$5/month (its own)", "no budget of its own",
    ]  # fmt: skip
    assert "`--policy FILE` shows what a policy gives" in plain.stderr
    listed = leadline("keys", "list", "--policy", str(policy), home=tmp_path)
    assert listed.stderr == ""
    assert [line.partition("  user  ")[2] for line in listed.stdout.splitlines()] == [
        "$5/month (its own), $2/day (policy, key alice), $9/week (policy, team ops), $100/month (policy, tenant *)",
        "no budget of its own, $50/month (policy, key *), $100/month (policy, tenant *)",
    ]
    wrong = leadline("keys", "list", "--policy", str(tmp_path / "none.yaml"), home=tmp_path)
    assert wrong.returncode != 0
    assert "cannot be read" in wrong.stderr


@pytest.mark.engine
def test_explain_says_who_wins_and_why_the_others_lost(tmp_path: Path) -> None:
    recipe = str(ROOT / "policies" / "cheapest-at-quality.yaml")
    done = leadline("explain", recipe, "What is 12 + 7?", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "P(success)" in done.stdout
    assert "chosen" in done.stdout
    assert "probe default@" in done.stdout


@pytest.mark.engine
def test_an_engines_setting_is_named_as_the_operator_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    needs = {
        "models": {"bundled/nano": "bundled/nano"}, "speculation": {}, "probe": None, "encoder": "default",
        "embeds": False, "readers": {}, "exit_with_parent": False,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "gateway.engine_main", json.dumps(needs), str(tmp_path / "s")],
        capture_output=True, text=True, timeout=100,
        env={**os.environ, "LEADLINE_KV_DISK": str(tmp_path / "file" / "kv")}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"engine: LEADLINE_KV_DISK: {tmp_path}/file/kv cannot be used: Not a directory; name a folder" in done.stderr


@pytest.mark.engine
def test_a_device_that_is_not_there_is_named_by_the_bench(tmp_path: Path) -> None:
    bench = ("engine", "bench", "bundled/draft", "--device", "cuda")
    done = leadline(*bench, home=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == os.EX_DATAERR
    assert done.stderr.startswith("--device: torch sees no CUDA device here")
    assert "Traceback" not in done.stderr


def test_help_needs_nothing_installed(tmp_path: Path) -> None:
    done = leadline("--help", home=tmp_path)
    assert done.returncode == 0
    for command in ("serve", "check", "explain", "diff", "schema", "keys", "spend", "probe"):
        assert command in done.stdout
