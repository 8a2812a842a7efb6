"""A local journal before the SQL ledger: what a caller was told survives the death of any process.

Every admitted request writes `Opened` before anything else happens, `Dispatched` before each upstream call, and
`Closed` with the final rows before its answer ends. A record is copied into a shared mapping of a file that has its
disk blocks already (where a `write(2)` took 6 µs): the pages are the kernel's, so kill -9 loses nothing; power loss may
(that is durability mode `process`). In mode `full`, `synced` waits for the disk. The SQL ledger is fed from memory in
batches, and a segment of the journal is deleted once all it holds is in SQL. After a crash, `recovered` gives back what
SQL may lack; SQL inserts ignore ids that they already have, so replay is idempotent.

Each worker has a journal of its own, in a folder that it keeps locked; `reconcile` takes over those of the dead.

Frame: length (4 bytes, big endian), CRC-32 of the payload (4 bytes), msgpack payload. A torn last frame, or the zeros
after the last one, end a segment.
"""

import asyncio
import fcntl
import mmap
import os
import stat
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from gateway.ledger.records import AttemptRecord, RequestRecord

SEGMENT_BYTES = 1 << 20
LIFE = "life-"
"""Begins the name of the file that names a process's holds."""
LOCK_WAIT_S = 1.0
"""How long a starting worker waits for its folder: a reconciler holds one for the moment of a rename."""


_HEAD = struct.Struct(">II")


class JournalError(RuntimeError):
    """The journal cannot be used; the message says why and what to do."""


class Opened(msgspec.Struct, frozen=True, tag=1, array_like=True):
    request: RequestRecord


class Dispatched(msgspec.Struct, frozen=True, tag=2, array_like=True):
    attempt: AttemptRecord
    """Its cost is the most this attempt can cost, so that a crash never bills too little."""


class Closed(msgspec.Struct, frozen=True, tag=3, array_like=True):
    request: RequestRecord
    attempts: list[AttemptRecord]


class _Segment(msgspec.Struct):
    number: int
    path: Path
    fd: int
    data: mmap.mmap
    size: int = 0
    uncommitted: int = 0
    """Requests opened in this segment that SQL does not have yet."""


def to_disk(fd: int) -> None:
    """What was written to a file, or the names that a folder holds, survive power loss on return."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.fsync(fd)
    else:
        os.fdatasync(fd)


class Journal:
    """Owned by the event loop's thread; no method blocks for longer than a new segment takes (0.1 ms each MiB).

    `sync`: how `synced` makes a file descriptor's data survive power loss; None (mode `process`): it does not.
    Raises JournalError when another process holds the folder.
    """

    def __init__(
        self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES, sync: Callable[[int], None] | None = None
    ) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._lock_fd = _lock(folder)
        self._encoder = msgspec.msgpack.Encoder()
        self._segments: deque[_Segment] = deque()
        self._segment_of: dict[str, _Segment] = {}
        self._sync = sync
        self._syncer = ThreadPoolExecutor(1, "journal-sync") if sync is not None else None
        self._syncing = False
        self._synced = (0, 0)
        """(segment, byte): all before it survives power loss."""
        self._barriers: list[tuple[tuple[int, int], asyncio.Future[None]]] = []
        self._unsynced_names = True
        self._broken: OSError | None = None
        self._old = segments(folder)
        self.lives = lives(folder)
        """Of earlier owners, whose holds of shared budgets end once `recover`'s rows are in SQL."""
        self._life: Path | None = None
        self._current = self._new_segment(1 + max((_number(p) for p in self._old), default=0))
        if sync is not None:
            for parent in (folder.parent, folder.parent.parent):  # the folder's own name, if it is new
                _sync_all(sync, [os.open(parent, os.O_RDONLY | os.O_DIRECTORY)])

    def sign(self, life: str) -> None:
        """Name what this process holds of shared budgets: whoever recovers its journal gives that back."""
        self._life = self._folder / f"{LIFE}{life}"
        self._life.touch(mode=0o600)
        self._unsynced_names = True

    def opened(self, request: RequestRecord) -> None:
        """Raises OSError when the disk does not take it: the request must not be admitted then."""
        self._write(Opened(request))
        segment = self._current
        segment.uncommitted += 1
        self._segment_of[request.id] = segment

    def dispatched(self, attempt: AttemptRecord) -> None:
        self._write(Dispatched(attempt))

    def closed(self, request: RequestRecord, attempts: list[AttemptRecord]) -> None:
        self._write(Closed(request, attempts))

    def committed(self, request_ids: list[str]) -> None:
        """SQL has these for good; segments that hold nothing else are deleted."""
        for request_id in request_ids:
            segment = self._segment_of.pop(request_id, None)
            if segment is not None:
                segment.uncommitted -= 1
        self._drop_committed()

    async def synced(self) -> None:
        """Returns when all that was written before this call survives power loss; at once in mode `process`.

        Those who wait while the disk is busy share its next turn. Raises OSError when the disk fails, for good: what
        it has then kept is not known, and nothing more is taken.
        """
        goal = (self._current.number, self._current.size)
        if self._syncer is None or self._synced >= goal:
            return
        if self._broken is not None:
            raise self._broken
        barrier: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append((goal, barrier))
        if not self._syncing:
            self._start_sync()
        await barrier

    def _start_sync(self) -> None:
        assert self._sync is not None
        goal = (self._current.number, self._current.size)
        fds: list[int] = []
        try:  # descriptors of the thread's own: the loop may drop a segment meanwhile
            fds.extend(os.dup(segment.fd) for segment in self._segments if segment.number >= self._synced[0])
            if self._unsynced_names:
                fds.append(os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY))
        except OSError as error:  # the process has no descriptors left: nothing was asked of the disk
            for fd in fds:
                os.close(fd)
            self._fail_barriers(error)
            return
        self._syncing = True
        self._unsynced_names = False
        done = asyncio.get_running_loop().run_in_executor(self._syncer, _sync_all, self._sync, fds)
        done.add_done_callback(lambda future: self._on_synced(goal, future.exception()))

    def _on_synced(self, goal: tuple[int, int], error: BaseException | None) -> None:
        self._syncing = False
        if error is not None:
            self._broken = OSError(5, f"the disk does not keep the journal ({error})", str(self._folder))
            self._fail_barriers(self._broken)
            return
        self._synced = goal
        waiting = []
        for wanted, barrier in self._barriers:
            if barrier.done():
                continue  # its request was cancelled
            if wanted <= goal:
                barrier.set_result(None)
            else:
                waiting.append((wanted, barrier))
        self._barriers = waiting
        if waiting:
            self._start_sync()

    def _fail_barriers(self, error: OSError) -> None:
        waiting, self._barriers = self._barriers, []
        for _, barrier in waiting:
            if not barrier.done():
                barrier.set_exception(error)

    def recover(self) -> list[tuple[RequestRecord, list[AttemptRecord]]]:
        """Everything that earlier owners of this folder left behind; call `forget` once it is in SQL."""
        return recovered(self._old)

    def forget(self) -> None:
        """Delete the segments that `recover` read."""
        for path in self._old:
            path.unlink(missing_ok=True)
        for life in self.lives:
            (self._folder / f"{LIFE}{life}").unlink(missing_ok=True)
        self._old, self.lives = [], []

    def unsign(self) -> None:
        """This process holds nothing more of shared budgets."""
        if self._life is not None:
            self._life.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the folder. Segments with nothing uncommitted are deleted, the rest stays for the next start."""
        for segment in self._segments:
            segment.data.close()
            os.close(segment.fd)
            if segment.uncommitted == 0 and not self._segment_of:
                segment.path.unlink(missing_ok=True)
        self._segments.clear()
        if self._syncer is not None:
            self._syncer.shutdown()
        os.close(self._lock_fd)

    def uncommitted(self) -> int:
        return len(self._segment_of)

    def _write(self, entry: Opened | Dispatched | Closed) -> None:
        if not self._segments:
            raise OSError(9, "the journal is closed", str(self._folder))
        if self._broken is not None:
            raise self._broken
        payload = self._encoder.encode(entry)
        frame = _HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        segment = self._current
        end = segment.size + len(frame)
        if end > len(segment.data):
            segment = self._current = self._new_segment(segment.number + 1, len(frame))
            end = len(frame)
            self._drop_committed()
        segment.data[segment.size : end] = frame
        segment.size = end

    def _new_segment(self, number: int, at_least: int = 0) -> _Segment:
        """Its blocks are taken now: a full disk is an OSError here, never a fault in the middle of a record."""
        path = self._folder / f"journal-{number:08d}.log"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        size = max(self._segment_bytes, at_least)
        try:
            os.posix_fallocate(fd, 0, size)
            data = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        segment = _Segment(number, path, fd, data)
        self._segments.append(segment)
        self._unsynced_names = True
        return segment

    def _drop_committed(self) -> None:
        # Oldest first: a later segment may hold the `Closed` of a request opened in an earlier one.
        while self._segments[0] is not self._current and self._segments[0].uncommitted == 0:
            segment = self._segments.popleft()
            segment.data.close()
            os.close(segment.fd)
            segment.path.unlink(missing_ok=True)


def segments(folder: Path) -> list[Path]:
    """The journal files of one worker, oldest first."""
    return sorted(folder.glob("journal-*.log"))


def lives(folder: Path) -> list[str]:
    """Who has held shared budgets from here, and has not ended in order."""
    return sorted(path.name.removeprefix(LIFE) for path in folder.glob(f"{LIFE}*"))


def recovered(paths: Iterable[Path]) -> list[tuple[RequestRecord, list[AttemptRecord]]]:
    """What the segments of one worker hold, oldest first.

    A request without its `Closed` was cut short by a crash: it is closed here as `interrupted`, each attempt that had
    been dispatched billed at the most it can have cost, flagged as an estimate.
    """
    open_requests: dict[str, RequestRecord] = {}
    attempts: dict[str, list[AttemptRecord]] = {}
    rows: list[tuple[RequestRecord, list[AttemptRecord]]] = []
    for path in paths:
        for entry in _read(path):
            if isinstance(entry, Opened):
                open_requests[entry.request.id] = entry.request
            elif isinstance(entry, Dispatched):
                attempts.setdefault(entry.attempt.request_id, []).append(entry.attempt)
            else:
                open_requests.pop(entry.request.id, None)
                attempts.pop(entry.request.id, None)
                rows.append((entry.request, entry.attempts))
    for request_id, request in open_requests.items():
        cut = attempts.get(request_id, [])
        for attempt in cut:
            attempt.outcome = "interrupted"
        request.outcome = "interrupted"
        request.http_status = 0
        request.error_code = "interrupted"
        request.total(cut)
        request.reserved_nanousd = request.cost_nanousd or 0
        if cut:
            request.model_served, request.provider = cut[-1].model, cut[-1].provider
        rows.append((request, cut))
    return rows


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed; None when another process holds it, or it is gone."""
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(folder / "lock")):  # else the folder was taken away meanwhile
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _lock(folder: Path) -> int:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = try_lock(folder)
        if fd is not None:
            return fd
        if time.monotonic() > deadline:
            raise JournalError(
                f"another gateway is running on {folder}; stop it, or give this one its own LEADLINE_HOME"
            )
        time.sleep(0.01)


def _sync_all(sync: Callable[[int], None], fds: list[int]) -> None:
    try:
        for fd in fds:
            sync(fd)
    finally:
        for fd in fds:
            os.close(fd)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("journal-"))


def _read(path: Path) -> list[Opened | Dispatched | Closed]:
    decoder = msgspec.msgpack.Decoder(Opened | Dispatched | Closed)
    data = path.read_bytes()
    entries: list[Opened | Dispatched | Closed] = []
    at = 0
    while at + 8 <= len(data):
        length, checksum = struct.unpack_from(">II", data, at)
        payload = data[at + 8 : at + 8 + length]
        if length == 0 or len(payload) < length or zlib.crc32(payload) != checksum:
            break  # torn; after power loss a tail may be zeros, and the checksum of nothing is zero
        entries.append(decoder.decode(payload))
        at += 8 + length
    return entries
