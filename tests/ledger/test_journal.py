"""The journal: what it acknowledged is there after power loss, after an upgrade, and after its worker has died."""

import asyncio
import os
import random
import resource
import time
from pathlib import Path

import msgspec
import pytest

from gateway.errors import Unavailable
from gateway.ledger import browse, reconcile, report
from gateway.ledger.journal import Closed, Dispatched, Journal, JournalError, Opened, recovered, segments
from gateway.ledger.reconcile import adopt_orphans
from gateway.ledger.store import LedgerStore, connect
from gateway.settings import Settings
from tests.gateway.test_ledger import a_request, an_attempt

anyio = pytest.mark.anyio
RELEASED = Path(__file__).parent / "released"


def crash(journal: Journal) -> None:
    """As the end of a process does: nothing is closed or deleted, and the lock is gone."""
    os.close(journal._lock_fd)


# what an older version wrote -------------------------------------------------------------------------------------


def test_records_of_the_first_release_still_decode() -> None:
    lines = (line.split() for line in (RELEASED / "journal.0001.txt").read_text().splitlines())
    written = {name: bytes.fromhex(content) for name, content in lines}
    decode = msgspec.msgpack.Decoder(Opened | Dispatched | Closed).decode
    opened, dispatched, closed = (decode(written[name]) for name in ("Opened", "Dispatched", "Closed"))
    assert isinstance(opened, Opened)
    assert (opened.request.session, opened.request.cost_nanousd, opened.request.overhead_us) == ("s", 7, 3)
    assert (opened.request.team, opened.request.trace_id) == (None, None)
    assert isinstance(dispatched, Dispatched)
    assert (dispatched.attempt.cost_nanousd, dispatched.attempt.kind) == (7, "first")
    assert isinstance(closed, Closed)
    assert closed == Closed(opened.request, [dispatched.attempt])


# power loss ------------------------------------------------------------------------------------------------------


class Disk:
    """A disk that keeps what was synced and nothing else: of a file the bytes, of a folder the names."""

    def __init__(self, *, seed: int = 0, fails_after: int = 1 << 30) -> None:
        self._files: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._random = random.Random(seed)
        self._fails_after = fails_after
        self.syncs = 0

    def sync(self, fd: int) -> None:
        self.syncs += 1
        if self.syncs > self._fails_after:
            raise OSError(5, "Input/output error")
        path = f"/proc/self/fd/{fd}"
        node = os.fstat(fd).st_ino
        if os.path.isdir(path):
            names = {entry.name: entry.inode() for entry in os.scandir(path)}
            time.sleep(self._random.uniform(0, 0.003))
            self._names.update(names)
        else:
            content = Path(path).read_bytes()  # what is written while the disk works is not covered
            time.sleep(self._random.uniform(0, 0.003))
            self._files[node] = content

    def after_power_loss(self, folder: Path, where: Path) -> list[str]:
        """The requests that a start would find: (id:outcome)."""
        where.mkdir(exist_ok=True)
        for old in where.iterdir():
            old.unlink()
        for name, node in dict(self._names).items():
            if name.startswith("journal-"):
                (where / name).write_bytes(self._files.get(node, b""))
        return [f"{request.id}:{request.outcome}" for request, _ in recovered(segments(where))]


@anyio
@pytest.mark.parametrize("seed", range(3))
async def test_what_was_acknowledged_survives_power_loss(tmp_path: Path, seed: int) -> None:
    disk = Disk(seed=seed)
    journal = Journal(tmp_path / "journal" / "0", segment_bytes=800, sync=disk.sync)
    acknowledged: set[str] = set()

    def look() -> None:
        found = set(disk.after_power_loss(tmp_path / "journal" / "0", tmp_path / "after"))
        lost = {
            word
            for word in acknowledged
            if word not in found and not (word.endswith("interrupted") and word.replace("interrupted", "ok") in found)
        }
        assert not lost

    async def one(number: int) -> None:
        request = a_request(number)
        await asyncio.sleep(number / 3000)
        journal.opened(request)
        journal.dispatched(an_attempt(number, 5))
        await journal.synced()
        acknowledged.add(f"{request.id}:interrupted")
        look()
        await asyncio.sleep(random.Random(seed * 100 + number).uniform(0, 0.005))
        request.outcome = "ok"
        journal.closed(request, [an_attempt(number, 5)])
        await journal.synced()
        acknowledged.add(f"{request.id}:ok")
        look()

    await asyncio.gather(*[one(number) for number in range(30)])
    assert len(segments(tmp_path / "journal" / "0")) > 3
    assert len(acknowledged) == 60
    journal.close()


@anyio
async def test_requests_that_wait_together_share_the_disks_turns(tmp_path: Path) -> None:
    disk = Disk()
    journal = Journal(tmp_path / "journal" / "0", sync=disk.sync)

    async def one(number: int) -> None:
        journal.opened(a_request(number))
        await journal.synced()
        journal.closed(a_request(number), [])
        await journal.synced()

    await asyncio.gather(*[one(number) for number in range(200)])
    assert disk.syncs <= 20
    before = disk.syncs
    await journal.synced()
    assert disk.syncs == before, "nothing new, nothing to wait for"
    journal.close()


@anyio
async def test_a_cancelled_wait_harms_nobody(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal" / "0", sync=Disk().sync)
    journal.opened(a_request(1))
    waits = [asyncio.create_task(journal.synced()) for _ in range(3)]
    await asyncio.sleep(0)
    waits[1].cancel()
    done = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(each) for each in done] == [type(None), asyncio.CancelledError, type(None)]
    journal.close()


@anyio
async def test_a_disk_that_fails_a_sync_is_never_believed_again(tmp_path: Path, database_url: str) -> None:
    engine = connect(database_url, "full")
    disk = Disk(fails_after=2)
    store = LedgerStore(engine, Journal(tmp_path / "journal" / "0", sync=disk.sync), durability="full")
    assert store.full
    store.journal.opened(a_request(1))
    disk.syncs = 2
    with pytest.raises(Unavailable):
        await store.durable()
    disk.syncs = -100
    with pytest.raises(OSError, match="does not keep"):
        store.journal.opened(a_request(2))
    with pytest.raises(Unavailable):
        await store.durable()
    store.journal.close()
    engine.dispose()


@anyio
async def test_a_process_without_descriptors_refuses_and_recovers(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal" / "0", sync=Disk().sync)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    journal.opened(a_request(1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))  # none beside 0, whatever other threads close meanwhile
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await asyncio.wait_for(journal.synced(), 30)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await asyncio.wait_for(journal.synced(), 30)
    journal.close()


@anyio
async def test_mode_process_never_waits_for_the_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal" / "0")
    journal.opened(a_request(1))
    with pytest.raises(StopIteration):
        journal.synced().send(None)
    journal.close()


def test_a_tail_of_zeros_is_a_torn_record(tmp_path: Path) -> None:
    """As some file systems leave a file that grew just before the power went."""
    journal = Journal(tmp_path)
    journal.opened(a_request(1))
    with journal._current.path.open("ab") as file:
        file.write(bytes(4096))
    crash(journal)
    assert [request.id for request, _ in Journal(tmp_path).recover()] == ["req_1"]


@pytest.mark.parametrize(("mode", "sqlite_level"), [("process", 1), ("full", 2)])
def test_sql_commits_as_durably_as_the_mode_says(database_url: str, mode: str, sqlite_level: int) -> None:
    engine = connect(
        database_url, Settings.from_env({"DATABASE_URL": database_url, "LEADLINE_DURABILITY": mode}).durability
    )
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == sqlite_level
        else:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
    engine.dispose()


# dead workers ----------------------------------------------------------------------------------------------------


def left_behind(root: Path, number: int, folder: str) -> Journal:
    """A worker's journal with one request answered and one in flight."""
    journal = Journal(root / folder)
    for each in (2 * number, 2 * number + 1):
        journal.opened(a_request(each))
        journal.dispatched(an_attempt(each, 10))
    done = a_request(2 * number)
    done.outcome = "ok"
    done.cost_nanousd = 3
    journal.closed(done, [an_attempt(2 * number, 3)])
    return journal


@anyio
async def test_a_worker_adopts_the_journals_of_the_dead_and_of_nobody_else(tmp_path: Path, database_url: str) -> None:
    root = tmp_path / "journal"
    crash(left_behind(root, 1, "3"))
    crash(left_behind(root, 2, "."))  # as the version before workers left it
    crash(left_behind(root, 3, "0"))
    alive = left_behind(root, 4, "1")
    engine = connect(database_url)
    store = LedgerStore(engine, Journal(root / "0"), journals=root)
    assert store.replay() == 6
    rows = {row["id"]: (row["outcome"], row["cost_nanousd"]) for row in browse.page(engine, browse.Slice(), limit=100)}
    assert rows == {
        "req_2": ("ok", 3), "req_3": ("interrupted", 10), "req_4": ("ok", 3), "req_5": ("interrupted", 10),
        "req_6": ("ok", 3), "req_7": ("interrupted", 10),
    }  # fmt: skip
    assert store.reconcile() == []
    assert sorted(path.name for path in root.iterdir()) == ["0", "1", "lock"]
    crash(alive)
    assert [request.id for request in store.reconcile()] == ["req_8", "req_9"]
    assert len(browse.page(engine, browse.Slice(), limit=100)) == 8
    store.journal.close()
    engine.dispose()


@anyio
async def test_a_running_worker_finds_a_journal_whose_worker_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ledger.store.INTERVAL_S", 0.02)
    root = tmp_path / "journal"
    engine = connect(f"sqlite:///{tmp_path / 'ledger.db'}")
    store = LedgerStore(engine, Journal(root / "0"), journals=root)
    store.start()
    other = left_behind(root, 1, "1")
    await asyncio.sleep(0.1)
    assert report.summary(engine, since_ms=0)["requests"] == 0
    crash(other)
    async with asyncio.timeout(60):
        while report.summary(engine, since_ms=0)["requests"] < 2:
            await asyncio.sleep(0.01)
    await store.stop()
    engine.dispose()


@anyio
async def test_an_adopter_that_dies_or_fails_leaves_the_orphan_to_the_next(tmp_path: Path) -> None:
    root = tmp_path / "journal"
    crash(left_behind(root, 1, "5"))
    (orphan,) = adopt_orphans(root)
    assert adopt_orphans(root) == [], "it is held"
    orphan.release()  # as its death would
    engine = connect(f"sqlite:///{tmp_path / 'ledger.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE request RENAME TO elsewhere")
    store = LedgerStore(engine, Journal(root / "0"), journals=root)
    with pytest.raises(store._writer.away):
        store.reconcile()
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO request")
    assert len(store.reconcile()) == 2
    store.journal.close()
    engine.dispose()


def test_a_worker_whose_folder_was_just_adopted_gets_a_new_one(tmp_path: Path) -> None:
    root = tmp_path / "journal"
    crash(left_behind(root, 1, "0"))
    (orphan,) = adopt_orphans(root)
    journal = Journal(root / "0")
    assert journal.recover() == []
    with pytest.raises(JournalError):
        Journal(root / "0")
    journal.close()
    assert len(orphan.rows()) == 2
    orphan.forget()
    assert reconcile.adopt_orphans(root) == []
