"""Several engines on one folder: none fails for what another does, and what one evicts none finds."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_engine.prefix_disk import DiskTier
from local_engine.prefix_tiers import SlowTiers
from tests.local_engine.prefix_harness import AMPLE_S, BLOCK, IDENTITY, commit, fetched, new_store, stored_files

A, B = b"tenant a", b"tenant b"
PROMPT = list(range(41))
DISK_BYTES = 1 << 20


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[SlowTiers]]:
    """The tiers of two engines, both started on an empty folder."""
    started = [SlowTiers([DiskTier(tmp_path, DISK_BYTES)], wait_s=AMPLE_S) for _ in range(2)]
    yield started
    for slow in started:
        slow.close(AMPLE_S)


def test_an_engine_starts_while_another_writes_and_forgets_in_its_folder(tmp_path: Path) -> None:
    root = IDENTITY.root(A, BLOCK)
    old = DiskTier(tmp_path, DISK_BYTES)
    store = new_store()
    commit(store, A, PROMPT)
    stop = threading.Event()
    failed: list[OSError] = []
    rounds = 0

    def serve() -> None:
        nonlocal rounds
        with store.lookup(A, PROMPT) as match:
            while not stop.is_set() and not failed:
                try:
                    for _ in old.keep(root, match.blocks, frozenset()):
                        pass
                    old.forget(root, None)
                except OSError as error:
                    failed.append(error)
                rounds += 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        starts = 0
        while (starts < 300 or rounds < 300) and not failed:
            DiskTier(tmp_path, DISK_BYTES).forget(root, None)
            starts += 1
    finally:
        stop.set()
        thread.join()
    assert failed == []


def test_what_another_engine_is_writing_is_left_alone_at_the_start(tmp_path: Path) -> None:
    DiskTier(tmp_path, DISK_BYTES)
    group = tmp_path / "leadline-kv-1" / ("0" * 32)
    group.mkdir()
    unfinished = group / f"{'1' * 32}.123.tmp"
    unfinished.write_bytes(b"half")
    DiskTier(tmp_path, DISK_BYTES)
    assert stored_files(tmp_path) == [unfinished]


def test_evicting_a_tenant_reaches_what_another_engine_wrote(tmp_path: Path, engines: list[SlowTiers]) -> None:
    old, fresh = engines
    for salt in (A, B):
        commit(new_store(slow=old), salt, PROMPT)
    assert old.flush(AMPLE_S)
    group = tmp_path / "leadline-kv-1" / IDENTITY.root(A, BLOCK).hex()[:32]
    assert len(list(group.iterdir())) == 10
    (group / f"{'1' * 32}.123.tmp").write_bytes(b"half")
    new_store(slow=fresh).evict(A)
    assert fresh.flush(AMPLE_S)
    assert list(group.iterdir()) == []
    assert fetched(new_store(slow=old), A, PROMPT) == 0
    assert fetched(new_store(slow=old), B, PROMPT) == 40
    assert old.stats()[0].failures == 0


def test_evicting_a_prefix_reaches_what_another_engine_wrote(tmp_path: Path, engines: list[SlowTiers]) -> None:
    old, fresh = engines
    commit(new_store(slow=old), A, PROMPT)
    assert old.flush(AMPLE_S)
    store = new_store()
    commit(store, A, PROMPT)
    store.slow = fresh
    store.evict(A, PROMPT[:40])
    assert fresh.flush(AMPLE_S)
    assert stored_files(tmp_path) == []
