"""Hidden folders in which files are written before they are renamed, and their removal after a kill."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import system
from .documents import PICTURES, RESULT, read_own_files

#: The file that marks a folder as this project's; it records the name of the file or folder to replace.
_OWNER = "owner.json"

#: A work folder contains ``writing``, a file or a folder that is not complete yet, ``ready``, a complete
#: folder or the one that it was exchanged with, and ``old0``, ..., the folders that were renamed away.
WRITING, READY, OLD = "writing", "ready", "old"

#: Machine, boot, process number, start of the process, random digits.
_NAME = re.compile(r"\.phosphene-([0-9a-f]{12})-([0-9a-f]{8})-(\d{1,10})-(\d*)-[0-9a-f]{8}")


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, which is removed at the end.

    Files in it that belong to a folder at ``target`` are returned there first.
    """
    pid = os.getpid()
    owner = "-".join([*system.machine(), str(pid), system.start_time(pid) or ""])
    folder = target.with_name(f".phosphene-{owner}-{secrets.token_hex(4)}")
    folder.mkdir(0o700)
    try:
        (folder / _OWNER).write_text(json.dumps({"program": "phosphene", "target": target.name}))
        yield folder
    finally:
        try:
            _remove(folder)
        except OSError as error:  # the work itself is complete, or its own error is raised
            reason = system.error_text(error)
            warnings.warn(f"the temporary folder {folder} cannot be removed: {reason}", stacklevel=3)


def write_file(file: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically: an earlier file is replaced by a complete one, or remains."""
    with work_folder(file) as work:
        (work / WRITING).write_text(text, encoding="utf-8", errors="replace")  # a name may be invalid Unicode
        system.sync(work / WRITING)
        os.replace(work / WRITING, file)
    system.sync(file.parent)


def sweep(parent: Path, target: str | None = None) -> None:
    """Remove the work folders that killed processes left in a folder, and complete what they had begun.

    ``target``: only those of this name. Folders of living processes, of other users and of other machines are
    left unchanged.
    """
    # A folder that cannot be read or changed is none of this user's to clean; it harms nothing.
    with contextlib.suppress(OSError):
        for entry in sorted(filter(_NAME.fullmatch, os.listdir(parent))):
            if _is_abandoned(parent / entry) and target in (None, _target(parent / entry)):
                with contextlib.suppress(OSError):
                    _remove(parent / entry)


def _is_abandoned(folder: Path) -> bool:
    """Whether it is a work folder of this user whose process has ended."""
    if (name := _NAME.fullmatch(folder.name)) is None or not is_folder(folder):
        return False
    if hasattr(os, "geteuid") and folder.lstat().st_uid != os.geteuid():
        return False
    host, boot, pid, start = name.groups()
    if host != system.machine()[0]:
        return False
    if boot != system.machine()[1]:
        return True
    now = system.start_time(int(pid))
    return now is None or ("" not in (now, start) and now != start)


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, not a symbolic link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _target(folder: Path) -> str | None:
    """The name that a work folder's marker records; None if it has no marker."""
    try:
        owner = json.loads((folder / _OWNER).read_text())
    except (OSError, ValueError):
        return None
    target = owner.get("target") if isinstance(owner, dict) else None
    if not isinstance(target, str) or target in ("", ".", "..") or "/" in target or "\0" in target:
        return None
    return target


def _remove(folder: Path) -> None:
    """Remove a work folder after completing the replacement that was begun in it."""
    if (name := _target(folder)) is not None:
        target = folder.parent / name
        folders = [
            path for path in folder.iterdir() if path.name.startswith((READY, OLD)) and is_folder(path)
        ]
        for path in sorted(folders, key=lambda path: (path.name != READY, path.name)):
            complete_folder(path, target)
        writing = folder / WRITING
        if is_folder(writing):
            shutil.rmtree(writing, ignore_errors=True)
        else:
            writing.unlink(missing_ok=True)
    # Without a readable marker only an empty folder is removed: its process was killed at once.
    rest = [path for path in folder.iterdir() if path.name != _OWNER]
    if not rest:
        (folder / _OWNER).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process removed it
        folder.rmdir()


def complete_folder(folder: Path, target: Path) -> None:
    """Rename a complete folder to ``target`` where that is missing, else return its other files there."""
    if is_folder(target):
        with contextlib.suppress(FileNotFoundError):  # ``target`` was renamed meanwhile
            return_files(folder, target)
            return
    # Without an exchange of folders, ``target`` is missing while another process is between its two renames.
    # Inside the lock it is missing only if a process was killed there: the newest folder takes the name.
    with system.lock(target.parent):
        if not os.path.lexists(target):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                system.move(folder, target)
        if is_folder(folder) and is_folder(target):
            return_files(folder, target)


def return_files(old: Path, target: Path) -> None:
    """Delete a replaced result folder ``old``; every file in it that is not the result's goes to ``target``.

    Raises OSError if a file cannot be moved; it is then left in ``old``. FileNotFoundError: ``target`` is
    missing.
    """
    for attempt in range(10):
        try:
            _return_files(old, target)
            return
        except OSError as error:
            if not is_folder(old):  # another process deleted it
                return
            # ENOTEMPTY: another process returned a file into ``old`` before it was replaced; that file is
            # moved as well. ENOENT: another process moved one of its files.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or attempt == 9:
                raise


def _return_files(old: Path, target: Path) -> None:
    own = read_own_files(old) or set()
    for path in list(old.iterdir()):
        if path.name == PICTURES and is_folder(path):
            for picture in list(path.iterdir()):
                if f"{PICTURES}/{picture.name}" not in own:
                    (target / PICTURES).mkdir(exist_ok=True)
                    _move_back(picture, target / PICTURES / picture.name)
        elif path.name not in own:
            _move_back(path, target / path.name)
    for name in own - {RESULT}:
        (old / name).unlink(missing_ok=True)
    if is_folder(old / PICTURES):
        (old / PICTURES).rmdir()
    # The document last: without it, the folder's other files would no longer be recognized.
    if RESULT in own:
        (old / RESULT).unlink(missing_ok=True)
    old.rmdir()


def _move_back(path: Path, target: Path) -> None:
    try:
        system.move(path, target)
    except FileExistsError:
        if not os.path.samestat(path.lstat(), target.lstat()):
            raise
        path.unlink()  # the second name of a file that is in ``target`` already
