"""``UnfinishedFolder``: a result folder that is written file by file, survives a kill, and resumes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..errors import InputError
from . import system
from .documents import RESULT
from .output_folders import check_output_folder, replace_folder
from .tensors import save_tensors
from .work_folders import OLD, WRITING, complete_folder, is_folder, return_files

#: The files of an unfinished folder beside ``writing``: its owner, the lock, the file that is being written.
_OWNER, _LOCK, _PARTIAL = "owner.json", "lock", "partial"


class UnfinishedFolder:
    """A folder beside ``out`` that is completed file by file and takes the name of ``out`` at the end.

    Its files are in ``.NAME.stream/writing``. Each is written in ``partial``, synchronised with the disk and
    renamed, so after a kill all complete files remain. ``settings`` (JSON) are those of the first opening by
    a run of the same ``identity``, which resumes; ``resumed`` says whether it did. The files of another run,
    or of one without an identity, are deleted.

    At the end ``writing`` is exchanged with ``out`` in one step. ``result.json`` then has the ``token`` of
    this folder: by it the next opening recognizes the earlier result that was exchanged out.

    Raises:
        InputError: a folder of this name that is no unfinished one, one that another process writes to, or
            an ``out`` that cannot be replaced.
    """

    def __init__(
        self, out: str | os.PathLike[str], identity: str | None, settings: Mapping[str, Any]
    ) -> None:
        check_output_folder(out)
        self.target = Path(out).resolve()
        self._folder = self.target.with_name(f".{self.target.name}.stream")
        self.identity, self.settings, self.resumed = identity, dict(settings), False
        self.token = secrets.token_hex(8)
        self._exchanged = False
        self._exit = ExitStack()

    @property
    def writing(self) -> Path:
        """The folder with the complete files."""
        return self._folder / WRITING

    def __enter__(self) -> UnfinishedFolder:
        with ExitStack() as stack:
            with _explain(self.target):
                self._open(stack)
            self._exit = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self._folder) and not _is_own(self._folder):
            raise InputError(
                f"{self._folder} is needed for the unfinished result, but was not written by Phosphene: "
                "rename it, or choose another output folder"
            )
        self._folder.mkdir(0o700, exist_ok=True)
        if not stack.enter_context(system.exclusive(self._folder / _LOCK)):
            raise InputError(f"another process is writing the result {self.target}; choose another folder")
        shutil.rmtree(self._folder / _PARTIAL, ignore_errors=True)
        owner = _read_owner(self._folder)
        if owner is not None:
            self._return_exchanged(owner["token"])
        if owner is not None and self.identity is not None and owner["identity"] == self.identity:
            self.settings, self.token, self.resumed = owner["settings"], owner["token"], True
        else:
            shutil.rmtree(self.writing, ignore_errors=True)
            self._write_owner()
        self.writing.mkdir(exist_ok=True)
        system.sync(self._folder)

    def _return_exchanged(self, token: str) -> None:
        """Return the files of an earlier result that a killed process had exchanged out, and delete it."""
        if (self.writing / RESULT).is_file() and _token(self.writing) != token:
            complete_folder(self.writing, self.target)
        for path in sorted(self._folder.glob(f"{OLD}*")):
            if is_folder(path):
                complete_folder(path, self.target)

    def _write_owner(self) -> None:
        owner = {
            "program": "phosphene",
            "identity": self.identity,
            "token": self.token,
            "settings": self.settings,
        }
        with self._partial() as partial:
            (partial / _OWNER).write_text(json.dumps(owner))
            system.sync(partial / _OWNER)
            os.replace(partial / _OWNER, self._folder / _OWNER)

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        """Add a complete safetensors file."""
        with _explain(self.target), self._partial() as partial:
            save_tensors(tensors, partial / name, metadata)
            self._add(partial / name)

    def _add(self, file: Path) -> None:
        """Move a file, or a folder of files, into the folder so that it outlasts a power failure."""
        if file.is_dir():
            system.sync_tree(file)
            shutil.rmtree(self.writing / file.name, ignore_errors=True)
        else:
            system.sync(file)
        os.replace(file, self.writing / file.name)
        system.sync(self.writing)

    @contextlib.contextmanager
    def new_files(self) -> Iterator[Path]:
        """An empty folder; the files that are written into it are added at the end, ``result.json`` last."""
        with _explain(self.target), self._partial() as partial:
            yield partial
            for file in sorted(partial.iterdir(), key=lambda path: (path.name == RESULT, path.name)):
                self._add(file)

    @contextlib.contextmanager
    def _partial(self) -> Iterator[Path]:
        partial = self._folder / _PARTIAL
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def finish(self) -> None:
        """Give the complete folder the name of ``out``; an earlier result there is deleted."""
        with _explain(self.target):
            system.sync_tree(self.writing)
            check_output_folder(self.target)
            # From here on ``writing`` may be the earlier result, with files of the user.
            self._exchanged = True
            replace_folder(self.writing, self._folder / OLD, self.target)
            system.sync(self.target.parent)
            for path in (self.writing, *self._folder.glob(f"{OLD}*")):
                if is_folder(path):
                    return_files(path, self.target)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None or (self.identity is None and not self._exchanged):
                shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            self._exit.close()


@contextlib.contextmanager
def _explain(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"the result cannot be saved in {target}: {system.error_text(error)}") from error


def _is_own(folder: Path) -> bool:
    """Whether it is an unfinished folder, or one in which nothing was written yet."""
    if not is_folder(folder):
        return False
    names = set(os.listdir(folder))
    if _OWNER in names:
        return _read_owner(folder) is not None
    return names <= {_LOCK, _PARTIAL} and {path.name for path in folder.glob(f"{_PARTIAL}/*")} <= {_OWNER}


def _read_owner(folder: Path) -> dict[str, Any] | None:
    """The content of ``owner.json``; None where it is missing or no document of an unfinished folder."""
    try:
        owner = json.loads((folder / _OWNER).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(owner, dict) or owner.get("program") != "phosphene":
        return None
    valid = isinstance(owner.get("token"), str) and isinstance(owner.get("settings"), dict)
    return owner if valid and "identity" in owner else None


def _token(folder: Path) -> object:
    """The token in a folder's ``result.json``; None where it cannot be read."""
    try:
        document = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document.get("token") if isinstance(document, dict) else None
