"""Output folders: checked before the work, and replaced atomically after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, value_repr
from . import system
from .documents import PICTURES, RESULT, is_result_name, read_own_files, result_names
from .work_folders import OLD, READY, WRITING, sweep, work_folder

#: Bytes that a checkpoint's name has besides the folder's: ``.NAME.unfinished``.
_EXTRA_NAME = len(".") + len(".unfinished")

#: The longest path, in bytes, below the parent of an output folder: a work folder's name, with 10
#: digits for the process and 20 for its start, and ``/writing/arrays.safetensors``.
_EXTRA_PATH = 100

#: Bytes that are written as a test: a full disk has no block for them.
_TEST_SIZE = 4096


def check_output_folder(folder: str | os.PathLike[str]) -> None:
    """Raise InputError where no result can be saved.

    A folder is accepted if it does not exist, is empty, or contains a saved result, or only saved results in
    numbered folders. Refused are: every other folder, the working directory and what contains it, mount
    points, files, devices, FIFOs, sockets, symbolic links to nothing, also as a parent, names that are too
    long, and locations that cannot be written to, which is tested with a small file. What a killed save left
    beside the folder is completed and removed.
    """
    folder = _check_path(folder, "results are saved in a folder")
    for path in (folder, *folder.parents):
        if (kind := _kind(path)) not in (None, "folder"):
            raise InputError(f"{path} is a {kind}; results are saved in a folder")
    target = folder.resolve()
    _check_lengths(target)
    with contextlib.suppress(FileNotFoundError):  # there is no working directory any more
        if Path.cwd().is_relative_to(target):
            what = "is" if target == Path.cwd() else "contains"
            raise InputError(f"{target} {what} the working directory; choose another folder")
    sweep(target.parent)
    _check_writable(target.parent, target.name)
    if target.is_dir():
        _check_replaceable(target)


def check_output_file(file: str | os.PathLike[str], is_own: Callable[[str], bool]) -> None:
    """Raise InputError where a text file cannot be written, or would replace one that is not the project's.

    ``is_own`` decides by the text of an existing file.
    """
    file = _check_path(file, "a page is written to a file")
    for path in file.parents:
        if (kind := _kind(path)) not in (None, "folder"):
            raise InputError(f"{path} is a {kind}; the page needs a folder")
    if (kind := _kind(file)) not in (None, "file"):
        raise InputError(f"{file} is a {kind}; a page is written there: choose another folder")
    target = file.resolve()
    _check_lengths(target)
    sweep(target.parent)
    _check_writable(target.parent, target.name)
    if target.is_file() and not _matches(target, is_own):
        raise InputError(f"{target} was not written by Phosphene and is not replaced; choose another folder")


def _matches(file: Path, is_own: Callable[[str], bool]) -> bool:
    try:
        return is_own(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False


def _check_path(path: str | os.PathLike[str], purpose: str) -> Path:
    """The path with the working directory, without following links. Raises InputError for what is no path."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise InputError(f"{value_repr(path)} is no path; {purpose}")
    text = os.fspath(path)
    if "\0" in text:
        raise InputError(f"{text!r} contains a NUL character, which no path may contain")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise InputError(f"{text!r} contains characters that no file name may contain") from error
    try:
        full = Path(text) if os.path.isabs(text) else Path.cwd() / text
    except FileNotFoundError as error:
        raise InputError("the working directory no longer exists; change to another one") from error
    _check_lengths(full)
    return full


def _kind(path: Path) -> str | None:
    """What exists at a path: "folder", "file", "device", ...; None for nothing.

    Raises InputError where that cannot be determined.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "symbolic link to nothing" if path.is_symlink() else None
    except OSError as error:
        raise InputError(f"{path} cannot be used: {system.error_text(error)}") from error
    kinds = {
        stat.S_IFDIR: "folder",
        stat.S_IFREG: "file",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def _limit(path: Path, name: str, default: int) -> int:
    """A limit of the file system of a path, or of its nearest parent that exists."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not every system has this limit
        return os.pathconf(_existing(path), name)
    return default


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    while len(os.fsencode(path)) >= 4096 or not os.path.exists(path):
        path = path.parent
    return path


def _check_lengths(path: Path) -> None:
    longest = _limit(path, "PC_NAME_MAX", 255)
    for number, part in enumerate(path.parts, 1):
        # The last part's limit is smaller: the checkpoint's name has to fit as well.
        limit = longest - _EXTRA_NAME if number == len(path.parts) else longest
        if (length := len(os.fsencode(part))) > limit:
            raise InputError(
                f"the name {part[:20]!r}... has {length} bytes; at most {limit} are possible here"
            )
    most = _limit(path, "PC_PATH_MAX", 4096) - 1 - _EXTRA_PATH
    if (length := len(os.fsencode(path))) > most:
        raise InputError(
            f"the path {str(path)[:40]!r}... has {length} bytes; at most {most} are possible here"
        )


def _check_writable(parent: Path, name: str) -> None:
    """Create a work folder and write a small file in it. Raises InputError where that fails."""
    existing = _existing(parent)
    try:
        with work_folder(existing / name) as work:
            (work / WRITING).write_bytes(b"\0" * _TEST_SIZE)
    except OSError as error:
        raise InputError(f"nothing can be saved in {existing}: {system.error_text(error)}") from error


def _check_replaceable(folder: Path) -> None:
    """Raise InputError for a folder that is neither empty nor a saved result."""
    for _ in range(20):
        try:
            before = folder.stat()
            problem = _problem(folder)
            after = folder.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"{folder} cannot be used: {system.error_text(error)}") from error
        if problem is None:
            return
        # What was read may be of two folders if another process replaced the first one meanwhile.
        if (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns):
            break
    raise InputError(f"{folder} {problem}")


def _problem(folder: Path) -> str | None:
    """Why a folder cannot be replaced; None if it can."""
    if os.path.ismount(folder):
        return "is a mount point, which cannot be replaced; choose a folder inside it"
    info = folder.stat()
    parent = folder.parent.stat()
    others = hasattr(os, "geteuid") and os.geteuid() not in (0, info.st_uid, parent.st_uid)
    if others and parent.st_mode & stat.S_ISVTX:
        return "belongs to another user, and only its owner can replace it; choose another folder"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return "cannot be changed: Permission denied"
    names = sorted(os.listdir(folder))
    if not names:
        return None
    own = read_own_files(folder)
    if own is None and all(name.isdecimal() and read_own_files(folder / name) is not None for name in names):
        return None  # the results of images of different sizes, a folder each
    if own is None:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        unknown = f"; its {RESULT} is no saved result of Phosphene" if RESULT in names else ""
        return f"contains files other than a result ({listed}){unknown}; choose an empty or a new folder"
    pictures = folder / PICTURES
    if pictures.is_symlink() or (pictures.exists() and not pictures.is_dir()):
        return f"contains {PICTURES}, which is no folder of the result, but a new result needs its name"
    if pictures.is_dir() and not os.access(pictures, os.R_OK | os.W_OK | os.X_OK):
        return f"cannot be changed: {PICTURES}: Permission denied"
    if unknown_names := [name for name in result_names(folder) if name not in own]:
        return f"contains {unknown_names[0]}, which is no file of the result, but a new result needs its name"
    return None


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write a result into, which replaces an earlier result at the end.

    Files in the earlier result's folder that are not the result's stay in it.
    """
    check_output_folder(folder)
    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(target) as work:
        (work / WRITING).mkdir()
        yield work / WRITING
        system.sync_tree(work / WRITING)
        (work / WRITING).rename(work / READY)
        replace_folder(work / READY, work / OLD, target)
        system.sync(target.parent)


def replace_folder(ready: Path, old: Path, target: Path) -> None:
    """Rename a complete folder to ``target``.

    An earlier folder there is afterwards at ``ready``, or, on a system that cannot exchange folders, at
    ``old`` with a digit.
    """
    for attempt in range(20):  # another process may replace ``target`` between two calls
        try:
            kind = _kind(target)  # read once: between two readings it may be renamed to ``target``
            if kind == "folder":
                _check_replaceable(target)
                shutil.copymode(target, ready)
                _link_other_files(target, ready)
                if system.exchange(ready, target):
                    return
                with system.lock(target.parent):
                    system.move(target, old.with_name(f"{old.name}{attempt}"))
                    system.move(ready, target)
                return
            if kind is not None:
                raise InputError(f"{target} is a {kind} now; results are saved in a folder")
            system.move(ready, target)
            return
        except (FileNotFoundError, FileExistsError):
            continue
    raise InputError(f"{target} is replaced by other processes all the time; choose another folder")


def _link_other_files(folder: Path, ready: Path) -> None:
    """Link a folder's files that are not the result's into its replacement.

    So they are in place at every moment. What cannot be linked is moved after the replacement.
    """
    paths = [*folder.iterdir()]
    if (folder / PICTURES).is_dir():
        paths += (folder / PICTURES).iterdir()
    for path in paths:
        name = path.relative_to(folder)
        # By the name, not by the folder's document: another process may replace both between two calls, and
        # ``_check_replaceable`` accepts no other file of such a name.
        if not is_result_name(name.as_posix()) and not (path.is_dir() and not path.is_symlink()):
            if name.parent.name:
                (ready / name.parent).mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # a file system without links, or a file of another user
                os.link(path, ready / name, follow_symlinks=False)
