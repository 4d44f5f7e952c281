"""A lock that one process at a time holds on a path, across processes and machines.

The lock is a file with two safeguards. The operating system locks it, and releases it when the process ends in
whatever way, so that nothing stays locked after a kill or a reboot. And the file says who its owner is, who renews
its modification time every ``BEAT`` seconds: messages name that owner, and it decides where locks of a network folder
do not reach beyond one machine, or do not exist.

The file is deleted at release. Whoever locks a file that was deleted meanwhile notices and starts again.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

BEAT, STALE = 10.0, 60.0  # seconds between signs of life, and without any until an owner elsewhere counts as dead
_POLL = 0.05
_SETTLE = 0.2  # seconds after which the last of several writers without system locks is known
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SAME_START = 2.0  # seconds; start times of processes are computed from clocks
# What a file system without locks answers.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# Bytes that are locked: far behind the text, because Windows lets nobody read what is locked.
_LOCKED_BYTE = 1 << 30


@dataclass(frozen=True)
class Owner:
    """A process: the name of its machine, its id, when it started (seconds since 1970) and the machine's boot."""

    host: str
    pid: int
    started: float
    boot: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Locked(Exception):
    """Another process holds the lock; ``owner`` is ``None`` if it could not be read."""

    def __init__(self, owner: Owner | None) -> None:
        self.owner = owner
        super().__init__(str(owner or "another process"))


@contextmanager
def hold(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock at ``path``, whose folder must exist, for the length of the context.

    Args:
        path: the lock file.
        wait: seconds to wait for another process.

    Raises:
        Locked: another process holds it.
        OSError: the folder cannot be written.
    """
    until = time.monotonic() + wait
    while (descriptor := _acquire(path)) is None:
        if time.monotonic() >= until:
            raise Locked(_read(path))
        time.sleep(_POLL)
    released = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, released), daemon=True)
    heart.start()
    try:
        yield
    finally:
        released.set()
        heart.join()
        _release(path, descriptor)


def holder(path: Path) -> Owner | None:
    """The living owner of the lock at ``path``, by what the file says; ``None`` if there is none."""
    owner = _read(path)
    return owner if owner is not None and _alive(owner, path) else None


def this_process() -> Owner:
    """The calling process."""
    import psutil

    boot = _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else ""
    return Owner(socket.gethostname(), os.getpid(), psutil.Process().create_time(), boot)


def _acquire(path: Path) -> int | None:
    """The open, locked file with this process as its owner; ``None`` if another one has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        by_system = _lock(descriptor)
        if by_system is False or not _is_at(descriptor, path) or _taken(path, by_system):
            os.close(descriptor)
            return None
        text = json.dumps(asdict(this_process())).encode()
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, text)
        if by_system is None:
            time.sleep(_SETTLE)
            if _read(path) != this_process():
                os.close(descriptor)
                return None
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int) -> bool | None:
    """Lock an open file: whether that worked, or ``None`` where the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has its name: its owner may have deleted it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _taken(path: Path, by_system: bool | None) -> bool:
    """Whether the file names a living owner other than this process, whose lock the system did not show."""
    owner, here = _read(path), this_process()
    if owner is None or owner == here:
        # Where the system has locks, this process does not hold it: the lock was just granted.
        return by_system is None and owner is not None
    if by_system and owner.boot == here.boot:
        return False  # one kernel: had the owner been alive, its lock would have been in the way
    return _alive(owner, path)


def _alive(owner: Owner, path: Path) -> bool:
    import psutil

    here = this_process()
    if owner.host != here.host:
        try:
            return time.time() - path.stat().st_mtime < STALE
        except OSError:
            return False
    if owner.boot != here.boot:
        return False
    try:
        process = psutil.Process(owner.pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # dead, and its parent has not asked yet how it ended
            return False
        return abs(process.create_time() - owner.started) < _SAME_START
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _read(path: Path) -> Owner | None:
    """The owner that the file names; ``None`` for a file that is missing, or not written yet."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _beat(path: Path, released: threading.Event) -> None:
    """Renew the file's changing time until the lock is released."""
    while not released.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _release(path: Path, descriptor: int) -> None:
    """Delete the file, while it is locked where the system allows that, and unlock it."""
    if sys.platform == "win32":
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()  # refused if the next process has opened it already, which then keeps it
        return
    with suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)
