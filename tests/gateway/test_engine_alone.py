"""`leadline engine` as who starts it meets it: processes of its own, what lies at the path, what cannot start."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.engine_alone import run_alone
from gateway.policies import CannotServe
from local_engine.client import EngineClient
from tests.conftest import free_port, stop
from tests.gateway.alone import wait

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]
COMMAND = [sys.executable, "-m", "gateway", "engine", "--model", "small=bundled/nano"]


def ended(*options: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run([*COMMAND, *options], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def listening(listens: bool) -> list[str]:
    return ["--listen", f"127.0.0.1:{free_port()}"] if listens else []


@contextmanager
def engine(place: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """One that is ready, until it is left; then it has to end well."""
    with log.open("wb") as out:
        process = subprocess.Popen([*COMMAND, "--socket", str(place)], stdout=out, stderr=out)
        try:
            wait(lambda: process.poll() is not None or "engine.ready" in log.read_text())
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            stop(process)
    assert process.returncode == 0, log.read_text()


@contextmanager
def listener(place: Path) -> Iterator[None]:
    """Something that listens there until it is left; its socket stays."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(place))
        made.listen()
        yield


async def pid_at(place: Path) -> int:
    client = EngineClient(str(place))
    try:
        return (await client.connect()).pid
    finally:
        await client.close()


@pytest.mark.parametrize("listens", [False, True], ids=["socket alone", "listens too"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("notes.txt", "notes.txt is a file, not a socket; it is left as it is: choose another path"),
        ("folder", "folder is a folder, not a socket; name a file in it, e.g. "),
        ("nowhere/e.sock", "nowhere/e.sock: there is no folder "),
        ("notes.txt/e.sock", "notes.txt/e.sock: there is no folder "),
        ("x" * 120, f"{'x' * 120} has "),
    ],
)
async def test_what_cannot_be_a_socket_is_refused_in_words_and_left_as_it_is(
    given: str, words: str, listens: bool, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("all that I know")
    (tmp_path / "folder").mkdir()
    end = await asyncio.to_thread(ended, "--socket", given, *listening(listens), cwd=tmp_path)
    assert end.returncode == os.EX_DATAERR
    assert "Traceback" not in end.stderr
    assert end.stderr.startswith(f"--socket: {tmp_path}/")
    assert words in end.stderr
    assert (tmp_path / "notes.txt").read_text() == "all that I know"
    assert (tmp_path / "folder").is_dir()


async def test_what_a_killed_engine_left_is_replaced_and_the_log_says_when_it_is_ready(tmp_path: Path) -> None:
    place, log = tmp_path / "e.sock", tmp_path / "log"
    with listener(place):
        pass
    with engine(place, log) as process:
        assert await pid_at(place) == process.pid
        said = [json.loads(line) for line in log.read_text().splitlines()]
        (ready,) = [line for line in said if line["event"] == "engine.ready"]
        assert (ready["pid"], ready["models"], ready["socket"]) == (process.pid, ["small"], str(place))
        assert place.stat().st_mode & 0o777 == 0o600
    assert not place.exists()


async def test_a_second_engine_leaves_the_first_its_socket(tmp_path: Path) -> None:
    place = tmp_path / "e.sock"
    with engine(place, tmp_path / "log") as first:
        for listens in (False, True):
            end = await asyncio.to_thread(ended, "--socket", str(place), *listening(listens), cwd=tmp_path)
            assert end.returncode == os.EX_DATAERR
            assert end.stderr.startswith(f"--socket: an engine already listens at {place}; ")
            assert await pid_at(place) == first.pid
        first.send_signal(signal.SIGSTOP)  # one that hangs has its socket, too
        try:
            end = await asyncio.to_thread(ended, "--socket", str(place), cwd=tmp_path)
            assert f"an engine already listens at {place}" in end.stderr
        finally:
            first.send_signal(signal.SIGCONT)
        assert await pid_at(place) == first.pid


async def test_one_that_listens_leaves_the_socket_to_whoever_took_it_meanwhile(tmp_path: Path) -> None:
    """Its engine dies, and another one comes to the socket before it is started again."""
    place, log = tmp_path / "e.sock", tmp_path / "listens.log"
    with log.open("wb") as out:
        command = [*COMMAND, "--socket", str(place), "--listen", f"127.0.0.1:{free_port()}"]
        listens = await asyncio.to_thread(subprocess.Popen, command, stdout=out, stderr=out)
        try:
            await asyncio.to_thread(wait, lambda: "engine.ready" in log.read_text())
            pid = await pid_at(place)
            place.unlink()
            with listener(place):
                os.kill(pid, signal.SIGKILL)
                taken = f"an engine already listens at {place}"
                await asyncio.to_thread(wait, lambda: taken in log.read_text())
                assert place.exists()
            await asyncio.to_thread(wait, lambda: log.read_text().count('"engine.ready"') == 2)
        finally:
            stop(listens)


async def test_its_own_words_say_that_the_socket_was_taken_while_it_loaded(tmp_path: Path) -> None:
    place = tmp_path / "e.sock"
    needs: dict[str, Any] = {
        "models": {"small": "bundled/nano"}, "speculation": {}, "probe": None, "encoder": "default", "embeds": False,
        "readers": {}, "exit_with_parent": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "gateway.engine_main", json.dumps(needs), str(place)]
    with listener(place):
        late = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=100)
        assert late.returncode == 1
        assert f"engine: --socket: an engine already listens at {place}; " in late.stderr
        assert place.exists()


@pytest.mark.parametrize(
    ("socket", "listen", "models", "words"),
    [
        (None, None, [], "say where to listen"),
        (None, "8100", [], "write HOST:PORT"),
        (None, "0.0.0.0:8100", ["base=bundled/base"], "LEADLINE_ENGINE_TOKEN is not set"),
        (None, "127.0.0.1:8100", ["base"], "write NAME=SOURCE"),
        (
            None,
            "127.0.0.1:8100",
            ["a=bundled/base", "a=bundled/nano"],
            r"more than once \(bundled/base, bundled/nano\)",
        ),
        (None, "127.0.0.1:8100", ["a=bundled/nano", "a=bundled/nano"], "more than once"),
        (None, "127.0.0.1:8100", ["base=bundled/nope"], "there is no model 'bundled/nope'"),
    ],
)
async def test_what_cannot_be_served_is_said(
    socket: Path | None, listen: str | None, models: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEADLINE_ENGINE_TOKEN", raising=False)
    with pytest.raises(CannotServe, match=words):
        run_alone(socket, listen, None, models, None)


@pytest.mark.parametrize(
    ("source", "words"), [("bundled/base", "is no encoder"), ("./none", "no folder"), (".", "no config.json")]
)
async def test_an_encoder_that_is_not_there_is_said_before_anything_starts(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotServe, match=f"--encoder: .*{words}"):
        run_alone(Path("e.sock"), None, None, [], source)


def test_an_engine_that_cannot_start_ends_the_command() -> None:
    command = [
        sys.executable, "-m", "gateway", "engine", "--listen", f"127.0.0.1:{free_port()}", "--model",
        "base=bundled/base",
    ]  # fmt: skip
    ended = subprocess.run(
        command, env={**os.environ, "LEADLINE_KV_DISK": os.devnull}, capture_output=True, text=True, timeout=150
    )
    assert ended.returncode not in (0, -signal.SIGTERM)
    assert f"{os.devnull} cannot be used" in ended.stderr
    assert "the engine did not come up" in ended.stderr
    assert "engine.failed" in ended.stderr
    assert "engine.restarting" not in ended.stderr
