"""The socket at which an engine answers: who may take its path, and who removes it."""

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from local_engine.config import SOCKET_PATH_BYTES
from local_engine.errors import ConfigError

BACKLOG = 100
_FIELD = "socket_path"


@dataclass(frozen=True, slots=True)
class Place:
    """A socket that this process made."""

    path: str
    listener: socket.socket
    made: tuple[int, int]
    """Device and inode."""

    def remove(self) -> None:
        """Unless another has taken the path. While the listener is open nobody else gets its inode."""
        try:
            there = os.lstat(self.path)
        except FileNotFoundError:
            return
        if (there.st_dev, there.st_ino) == self.made:
            os.unlink(self.path)


def clear(path: str) -> None:
    """Remove a socket that nobody answers any more. Raises ConfigError where a socket cannot be made at `path`."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise ConfigError(_FIELD, f"{path} has {length} bytes, of {SOCKET_PATH_BYTES} at most; choose a shorter path")
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(_FIELD, f"{path}: there is no folder {folder}; make it first, or choose another path")
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(kind):
        raise ConfigError(_FIELD, f"{path} is a folder, not a socket; name a file in it, e.g. {path}/engine.sock")
    if not stat.S_ISSOCK(kind):
        left = "it is left as it is: choose another path, or move it away"
        raise ConfigError(_FIELD, f"{path} is a {'link' if stat.S_ISLNK(kind) else 'file'}, not a socket; {left}")
    with socket.socket(socket.AF_UNIX) as asking:
        asking.setblocking(False)
        try:
            asking.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:  # it has ended just now
            return
        except BlockingIOError:  # many others wait for it already
            pass
        except OSError as error:
            raise _unusable(path, error) from error
    raise ConfigError(_FIELD, f"an engine already listens at {path}; stop it, or choose another path")


def take(path: str) -> Place:
    """Listen at `path`, for this user alone. Raises ConfigError where that cannot be."""
    clear(path)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
        made = os.lstat(path)
    except OSError as error:
        listener.close()
        raise _unusable(path, error) from error
    finally:
        os.umask(mask)
    return Place(path, listener, (made.st_dev, made.st_ino))


def _unusable(path: str, error: OSError) -> ConfigError:
    return ConfigError(_FIELD, f"{path}: cannot be used ({error.strerror}); choose another path")
