"""The disk tier: one file per block, within a byte budget; it survives restarts.

    FOLDER/leadline-kv-1/<32 hex digits of the tenant's root>/<32 hex digits of the block>.kv

A file appears whole, by a rename. It is not synced: what a power cut tears has the wrong checksum and is a miss. The
least recently used file goes first; modification times carry that order over restarts, and a block's is always older
than that of what it continues, so that no prefix loses its beginning first.

Several engines may use one folder: each keeps to its bytes with what it found there and what it wrote. A file that
another one removed is a miss, and forgetting a tenant removes what any of them wrote.

The files hold what the KV was computed from as good as in plain text: the folder is its owner's alone.
"""

import contextlib
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from local_engine.prefix_block import Block
from local_engine.prefix_format import encode
from local_engine.prefix_identity import ADDRESS_BYTES

_FOLDER: Final = "leadline-kv-1"
_GROUP: Final = re.compile(r"[0-9a-f]{32}")
_FILE: Final = re.compile(r"[0-9a-f]{32}\.kv")
_UNFINISHED: Final = re.compile(r"[0-9a-f]{32}\.[0-9a-f]+\.tmp")
_UNFINISHED_S: Final = 60.0
"""After which nobody can still be writing a file."""
_STALE_NS: Final = 60 * 10**9
"""Times on disk are renewed after this; within it, order is kept in memory alone."""

_Key = tuple[bytes, bytes]
"""(group, name): the first 128 bits of the root's and of the block's digest."""


class DiskTier:
    """Owned by the worker thread of `SlowTiers`, but for `may_have`. Raises OSError when the disk does."""

    medium = "disk"

    def __init__(self, folder: Path, bytes_limit: int) -> None:
        """Takes over what an earlier process left in `folder`; removes what is not a block there."""
        self.bytes_limit = bytes_limit
        self.bytes_used = 0
        self._folder = folder / _FOLDER
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._index: OrderedDict[_Key, tuple[int, int]] = OrderedDict()
        """(bytes, modification time) of each file, the next to be removed first."""
        self._newest_ns = 0
        self._own = secrets.token_hex(8)
        """In the names of files that this tier is writing."""
        self._take_over()
        self._make_room(0)

    def may_have(self, root: bytes, digest: bytes) -> bool:
        """From any thread."""
        return (root[:ADDRESS_BYTES], digest[:ADDRESS_BYTES]) in self._index

    def read(self, root: bytes, digests: Sequence[bytes]) -> list[bytes]:
        """The leading blocks that are there, as bytes."""
        found: list[bytes] = []
        for digest in digests:
            key = _key(root, digest)
            if key not in self._index:
                break
            try:
                found.append(self._path(key).read_bytes())
            except FileNotFoundError:
                self._forget(key)
                break
        return found

    def keep(self, root: bytes, path: Sequence[Block], rewrite: frozenset[Block]) -> Iterator[None]:
        """Write those blocks of `path`, a prefix, that are not there or in `rewrite`; yields after each."""
        keys = [_key(root, block.digest) for block in path]
        now = self._newest_ns = max(time.time_ns(), self._newest_ns + len(path) + 1)
        if any(key in self._index and now - self._index[key][1] > _STALE_NS for key in keys):
            for i, key in enumerate(keys):
                if key in self._index:
                    self._renew(key, now - i)
        self._use(keys)
        own = frozenset(keys)
        modified = now
        for key, block in zip(keys, path, strict=True):
            if key not in self._index or block in rewrite:
                if not self._write(key, encode(block), modified, own):
                    break
                modified -= 1
                yield
            else:
                modified = self._index[key][1] - 1
        self._use(keys)

    def forget(self, root: bytes, digests: Sequence[bytes] | None) -> None:
        """Remove these blocks; None: all below the root."""
        if digests is not None:
            for digest in digests:
                self._remove(_key(root, digest))
            return
        group = root[:ADDRESS_BYTES]
        for key in [key for key in self._index if key[0] == group]:
            self._remove(key)
        for file in _entries(self._folder / group.hex()):
            _discard(file)

    def close(self) -> None:
        """Nothing is open between calls."""

    def _use(self, keys: Sequence[_Key]) -> None:
        """Put what is there of a prefix at the young end, its beginning youngest."""
        for key in reversed(keys):
            if key in self._index:
                self._index.move_to_end(key)

    def _write(self, key: _Key, raw: bytes, modified_ns: int, own: frozenset[_Key]) -> bool:
        """Whether it is written: there was room beside `own`, the prefix that it is part of, and nobody interfered."""
        if key in self._index:
            self._remove(key)
        if not self._make_room(len(raw), own):
            return False
        path = self._path(key)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        unfinished = path.with_suffix(f".{self._own}.tmp")
        try:
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(raw)
            os.utime(unfinished, ns=(modified_ns, modified_ns))
            unfinished.replace(path)
        except FileNotFoundError:  # the tenant is being forgotten by another engine
            return False
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        self._index[key] = (len(raw), modified_ns)
        self.bytes_used += len(raw)
        return True

    def _renew(self, key: _Key, modified_ns: int) -> None:
        try:
            os.utime(self._path(key), ns=(modified_ns, modified_ns))
        except FileNotFoundError:
            self._forget(key)
        else:
            self._index[key] = (self._index[key][0], modified_ns)

    def _make_room(self, size: int, own: frozenset[_Key] = frozenset()) -> bool:
        while self.bytes_used + size > self.bytes_limit:
            oldest = next(iter(self._index), None)
            if oldest is None or oldest in own:
                break
            self._remove(oldest)
        return self.bytes_used + size <= self.bytes_limit

    def _remove(self, key: _Key) -> None:
        if key in self._index:
            self._forget(key)
        self._path(key).unlink(missing_ok=True)

    def _forget(self, key: _Key) -> None:
        self.bytes_used -= self._index.pop(key)[0]

    def _path(self, key: _Key) -> Path:
        return self._folder / key[0].hex() / f"{key[1].hex()}.kv"

    def _take_over(self) -> None:
        files = []
        for group in _entries(self._folder):
            if not (_GROUP.fullmatch(group.name) and group.is_dir(follow_symlinks=False)):
                _discard(group)
                continue
            for file in _entries(Path(group.path)):
                with contextlib.suppress(FileNotFoundError):  # another engine may remove it meanwhile
                    stat = file.stat(follow_symlinks=False)
                    if _FILE.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                        key = (bytes.fromhex(group.name), bytes.fromhex(file.name.removesuffix(".kv")))
                        files.append((stat.st_mtime_ns, key, stat.st_size))
                    elif not _UNFINISHED.fullmatch(file.name) or time.time() - stat.st_mtime > _UNFINISHED_S:
                        _discard(file)
        for modified, key, size in sorted(files):
            self._index[key] = (size, modified)
            self.bytes_used += size
            self._newest_ns = modified


def _key(root: bytes, digest: bytes) -> _Key:
    return root[:ADDRESS_BYTES], digest[:ADDRESS_BYTES]


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _discard(entry: "os.DirEntry[str]") -> None:
    """A file, whose ever it is. A folder that is not ours is left alone."""
    if not entry.is_dir(follow_symlinks=False):
        Path(entry.path).unlink(missing_ok=True)
