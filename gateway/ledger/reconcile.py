"""What dead workers left open: each worker looks for journals that nobody holds any more and brings them into SQL.

A journal's lock ends with its process. The finder takes the lock and renames the folder in one step, so that a worker
that starts under the same index meanwhile gets a new one, and a finder that dies halfway leaves an orphan for the next.
"""

import os
import secrets
from pathlib import Path

from gateway.ledger.journal import LIFE, lives, recovered, segments, try_lock
from gateway.ledger.records import AttemptRecord, RequestRecord

INTERVAL_S = 10.0


class Orphan:
    """A dead worker's journal, held by this process until `forget` or `release`."""

    def __init__(self, folder: Path, lock_fd: int, *, own_folder: bool) -> None:
        self._folder = folder
        self._lock_fd = lock_fd
        self._own_folder = own_folder
        self._segments = segments(folder)
        self.lives = lives(folder)
        """As `Journal.lives`."""

    def rows(self) -> list[tuple[RequestRecord, list[AttemptRecord]]]:
        """As `journal.recovered`."""
        return recovered(self._segments)

    def forget(self) -> None:
        """Delete it: SQL has its rows."""
        for path in self._segments:
            path.unlink()
        for life in self.lives:
            (self._folder / f"{LIFE}{life}").unlink()
        if self._own_folder:
            (self._folder / "lock").unlink()
            self._folder.rmdir()
        self.release()

    def release(self) -> None:
        """Leave it to the next reconciler."""
        os.close(self._lock_fd)


def adopt_orphans(root: Path) -> list[Orphan]:
    """The journals under `root` that no living process holds, now held by this one.

    `root` itself is one where a version of one worker alone, without folders per worker, has left its segments there.
    """
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and (segments(path) or lives(path))):
        fd = try_lock(folder)
        if fd is None:
            continue
        orphaned = root / f"orphan-{secrets.token_hex(8)}"
        try:
            folder.rename(orphaned)
        except OSError:
            os.close(fd)
            raise
        found.append(Orphan(orphaned, fd, own_folder=True))
    if segments(root):
        fd = try_lock(root)
        if fd is not None:
            found.append(Orphan(root, fd, own_folder=False))
    return found
