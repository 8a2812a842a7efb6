"""Keys: roles and teams, recognised cheaply, and every change seen by every process within a second."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from gateway.admission.keys import KeyNameError, KeyStore, load_pepper
from gateway.errors import Forbidden, Unauthenticated
from gateway.ledger.store import connect
from gateway.settings import Settings
from tests.gateway.conftest import StartGateway, ask, until

anyio = pytest.mark.anyio


@pytest.fixture
def url(database_url: str) -> str:
    return Settings.from_env({"DATABASE_URL": database_url}).database_url


@pytest.fixture
def stores(tmp_path: Path, url: str) -> Iterator[tuple[KeyStore, KeyStore]]:
    """Two processes' view of one database."""
    engines = connect(url), connect(url)
    pepper = load_pepper(tmp_path)
    yield KeyStore(engines[0], pepper), KeyStore(engines[1], pepper)
    for engine in engines:
        engine.dispose()


def test_every_change_is_seen_by_the_other_process_at_its_next_poll(stores: tuple[KeyStore, KeyStore]) -> None:
    ours, theirs = stores
    assert not theirs.poll()
    token = ours.create("alice", tenant="acme", team="blue", role="reader", budget_nanousd=5, budget_window="day")
    assert theirs.poll()
    alice = theirs.authenticate(token)
    assert (alice.team, alice.role, alice.budget_nanousd) == ("blue", "reader", 5)
    ours.change(alice.key_id, role="user", team=None, budget_nanousd=None, budget_window=None)
    assert theirs.poll()
    changed = theirs.authenticate(token)
    assert (changed.team, changed.role, changed.budget_nanousd, changed.budget_window) == (None, "user", None, None)
    assert changed == ours.authenticate(token) == ours.find(alice.key_id)
    assert ours.revoke(alice.key_id)
    assert theirs.poll()
    for store in stores:
        with pytest.raises(Unauthenticated):
            store.authenticate(token)
        assert store.find(alice.key_id) is None
        store.poll()
        assert not store.poll(), "no change, no work"
    assert ours.change(alice.key_id, role="user", team=None, budget_nanousd=None, budget_window=None) is None


def test_changes_of_both_processes_are_counted(stores: tuple[KeyStore, KeyStore]) -> None:
    ours, theirs = stores
    tokens = [store.create(f"{name}{i}") for i in range(3) for name, store in (("a", ours), ("b", theirs))]
    for store in stores:
        store.poll()
        assert {store.authenticate(token).key_name for token in tokens} == {"a0", "a1", "a2", "b0", "b1", "b2"}


def test_a_poll_without_a_change_reads_one_row(stores: tuple[KeyStore, KeyStore]) -> None:
    ours, theirs = stores
    for i in range(20):
        ours.create(f"k{i}")
    theirs.poll()
    statements: list[str] = []
    event.listen(theirs._engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    assert not theirs.poll()
    assert len(statements) == 1
    assert "api_key" not in statements[0]


def test_a_token_is_recognised_whole_and_not_kept(stores: tuple[KeyStore, KeyStore]) -> None:
    store, _ = stores
    tokens = [store.create(f"k{i}") for i in range(3)]
    for token in tokens * 2:
        principal = store.authenticate(token)
        assert store.authenticate(token) is principal
        for wrong in (token[:-1], token + "x", token[:-1] + chr(ord(token[-1]) ^ 1), token.upper()):
            with pytest.raises(Unauthenticated):
                store.authenticate(wrong)
    assert set(store._proven) == {hashlib.sha256(token.encode()).digest() for token in tokens}


@pytest.mark.parametrize("team", ["", "a b", "x" * 65])
def test_a_team_name_that_cannot_be_used_says_why(stores: tuple[KeyStore, KeyStore], team: str) -> None:
    store, _ = stores
    with pytest.raises(KeyNameError, match="team"):
        store.create("alice", team=team)
    key_id = store.authenticate(store.create("bob")).key_id
    with pytest.raises(KeyNameError, match="team"):
        store.change(key_id, role="user", team=team, budget_nanousd=None, budget_window=None)


def test_a_reader_is_told_what_it_may_do(stores: tuple[KeyStore, KeyStore]) -> None:
    store, _ = stores
    with pytest.raises(Forbidden, match="reader"):
        store.authenticate(store.create("eve", role="reader")).must_run()
    store.authenticate(store.create("bob")).must_run()
    store.authenticate(store.create("root", role="admin")).must_run()


@anyio
async def test_a_reader_sees_and_runs_nothing(start_gateway: StartGateway) -> None:
    async with start_gateway() as gateway:
        served = await gateway.chat(ask())
        token = gateway.app.state.lifecycle.keys.create("eve", role="reader")
        reader = {"Authorization": f"Bearer {token}"}
        for stream in (False, True):
            status, _, body = await gateway.chat(ask(stream=stream), **reader)
            assert (status, body["error"]["code"]) == (403, "forbidden")
        explain = f"{gateway.url}/leadline/v1/explain"
        async with gateway.session.post(explain, json={"messages": [{"role": "user"}]}, headers=reader) as response:
            assert response.status == 403
        for path in ("/v1/models", f"/leadline/v1/requests/{served[1]['x-request-id']}", "/leadline/v1/spend"):
            async with gateway.session.get(gateway.url + path, headers=reader) as response:
                assert response.status == 200
        assert len(await gateway.rows()) == 1


@anyio
async def test_a_key_revoked_at_one_gateway_is_refused_by_the_other(
    start_gateway: StartGateway, tmp_path: Path, postgres_url: str, redis_url: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pepper").write_bytes(b"p" * 32)
        (tmp_path / name / "key").write_text("the first gateway makes the first key")
    async with (
        start_gateway(home=tmp_path / "a", database_url=postgres_url, redis_url=redis_url) as one,
        start_gateway(home=tmp_path / "b", database_url=postgres_url, redis_url=redis_url) as two,
    ):
        keys = one.app.state.lifecycle.keys
        token = keys.create("mallory")
        headers = {"Authorization": f"Bearer {token}"}
        assert (await two.chat(ask(), **headers))[0] == 200
        keys.revoke(keys.authenticate(token).key_id)
        others = two.app.state.lifecycle.keys
        # by itself: a poll each half second
        await until(lambda: all(principal.key_name != "mallory" for principal in others.all()))
        assert (await two.chat(ask(), **headers))[0] == 401


def test_a_slow_read_never_brings_a_revoked_key_back(stores: tuple[KeyStore, KeyStore]) -> None:
    """Two threads read the keys, and the one that read before the revocation ends after the one that read it."""
    here, there = stores
    token = there.create("doomed")
    here.poll()
    principal = here.authenticate(token)
    read, go_on = threading.Event(), threading.Event()

    @event.listens_for(here._engine, "after_cursor_execute")
    def wait(*call: object) -> None:
        if "FROM api_key" in str(call[2]) and threading.current_thread().name == "slow":
            read.set()
            go_on.wait(30)

    slow = threading.Thread(target=here.reload, name="slow")
    slow.start()
    assert read.wait(30)
    there.revoke(principal.key_id)
    quick = threading.Thread(target=here.reload)
    quick.start()
    quick.join(0.3)  # without an order it is done by now
    go_on.set()
    slow.join(30)
    quick.join(30)
    event.remove(here._engine, "after_cursor_execute", wait)
    with pytest.raises(Unauthenticated):
        here.authenticate(token)
