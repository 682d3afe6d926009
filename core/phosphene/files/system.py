"""System calls for files: exchange of two folders, synchronisation with the disk, identity of a process."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2

#: The numbers of errors by which a kernel or a file system refuses the flags of ``renameat2``.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


@functools.cache
def _renameat2() -> Any:
    """``renameat2`` of the C library; None where it does not exist (it is Linux only)."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Rename with these flags; False where the system does not support them."""
    function = _renameat2()
    if function is None:
        return False
    current = -100  # AT_FDCWD: relative paths start from the working directory
    if function(current, os.fsencode(source), current, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; False where the system cannot."""
    return _rename(first, second, _RENAME_EXCHANGE)


def move(source: Path, target: Path) -> None:
    """Rename without replacing anything. Raises FileExistsError where ``target`` exists."""
    if not _rename(source, target, _RENAME_NOREPLACE):
        exists = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        if os.path.lexists(target):
            raise exists
        try:
            os.rename(source, target)
        except OSError as error:
            # Another process created a folder there between the two calls.
            raise exists if error.errno == errno.ENOTEMPTY else error from None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Inside, no other process is inside for the same folder, where the file system has locks."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system without locks: the caller tries again
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # a process that was forked meanwhile has the descriptor as well
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(file: Path) -> Iterator[bool]:
    """Whether no other process is inside for the same file; True where the file system has no locks.

    The lock ends with the process, and processes that it started do not have it.
    """
    if os.name != "posix":
        yield True
        return
    import fcntl

    with file.open("a") as stream:
        free = True
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # ENOLCK, ENOTSUP: a network file system without locks
            free = error.errno not in (errno.EACCES, errno.EAGAIN)
        yield free


def sync(path: Path) -> None:
    """Write a file or the entries of a folder to the disk, so that they outlast a power failure."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot synchronise a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """``sync`` for a folder and all that it contains."""
    for path, _, names in os.walk(folder):
        for name in names:
            sync(Path(path, name))
        sync(Path(path))


def start_time(pid: int) -> str | None:
    """When a process started, in the system's unit.

    None if no process of this number runs, "" if the system does not say when it started.
    """
    if sys.platform != "linux":
        import psutil

        try:
            return str(round(psutil.Process(pid).create_time() * 1000))
        except psutil.NoSuchProcess:
            return None
        except psutil.AccessDenied:
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    try:
        # After the name, which is in parentheses: the state and, 19 fields later, the start in clock ticks.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # hidden from this user
        return ""
    return None if fields[0] in "ZX" else fields[19]  # a zombie does nothing more


@functools.cache
def machine() -> tuple[str, str]:
    """Digests of this machine (or container) and of its current boot: process numbers are unique in both."""
    parts = [platform.node()]
    if sys.platform == "linux":
        parts += [
            _read("/etc/machine-id"),
            os.readlink("/proc/self/ns/pid") if os.path.isdir("/proc/self") else "",
        ]
    boot = _read("/proc/sys/kernel/random/boot_id")
    host, session = (hashlib.sha256(text.encode()).hexdigest() for text in ("\n".join(parts), boot))
    return host[:12], session[:8]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def error_text(error: Exception) -> str:
    """The reason of a failed system call without its number: "No space left on device"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # safetensors says "Error while serializing: I/O error: No space left on device (os error 28)".
    return str(error).rpartition("I/O error: ")[2].partition(" (os error ")[0] or type(error).__name__
