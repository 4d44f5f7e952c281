"""Files that are still being written: their names, how they become final, and which of them are left over.

A file is written under a name of its own process, flushed to disk and renamed, so that a file with a final name is
complete and two processes that write the same file never mix their bytes. A process that is killed leaves its file
behind; ``sweep`` removes those.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
STALE_SECONDS = 24 * 3600  # a file that another machine has not touched for so long is left over
_NAME_LIMIT = 200  # characters of the final name in a partial one; file systems allow 255 bytes
_OWN = re.compile(r"\.([0-9a-f]{6})-(\d+)-[0-9a-f]{8}" + re.escape(PARTIAL))
_WINDOWS_TRIES = 10


def partial_of(path: Path) -> Path:
    """A new name beside ``path``, of this process alone: ``NAME.HOST-PID-RANDOM.partial``."""
    return path.with_name(f"{path.name[:_NAME_LIMIT]}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def final_name(path: Path) -> str:
    """The name that a file will have, from its partial one.

    >>> final_name(Path("a.gguf.0a1b2c-42-0123abcd.partial"))
    'a.gguf'
    """
    return _OWN.sub("", path.name)


def is_partial(path: Path) -> bool:
    """Whether ``partial_of`` made the name; a ``.partial`` file of another program is not ours to touch."""
    return _OWN.search(path.name) is not None


def is_left_over(path: Path) -> bool:
    """Whether the process that wrote a partial file is gone: dead, or on another machine and silent for a day."""
    match = _OWN.search(path.name)
    if match is None:
        return False
    host, pid = match[1], int(match[2])
    if host == _host():
        import psutil

        return not psutil.pid_exists(pid)
    try:
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    except OSError:
        return False  # its owner has just finished or removed it


def sweep(folder: Path, name: str = "") -> None:
    """Remove the left-over partial files of ``folder``, or those of its file ``name`` alone."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name.startswith(name[:_NAME_LIMIT]) and is_left_over(path):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a written file to disk."""
    # Windows flushes only through a handle that may write.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def commit(partial: Path, path: Path) -> None:
    """Flush a finished file to disk and give it its final name, replacing a file of that name."""
    flush(partial)
    for attempt in range(_WINDOWS_TRIES):
        try:
            os.replace(partial, path)
            return
        except PermissionError:
            # Windows refuses while a virus scanner or an indexer has the file open, which lasts for moments.
            if os.name != "nt" or attempt == _WINDOWS_TRIES - 1:
                raise
            time.sleep(0.05 * (attempt + 1))


def _host() -> str:
    """Six hexadecimal digits for this machine's name, which itself may hold any character."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
