"""Checkpoints: the state of long work, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError
from .files.system import error_text, sync
from .files.tensors import save_tensors
from .files.work_folders import WRITING, is_folder, sweep, work_folder
from .rows import Rows, check_record

#: Seconds between two writes: the most work that a crash loses.
INTERVAL = 10.0


#: The note on an interrupted run whose checkpoint was written.
RESUME_HINT = "the progress is saved: the same run with the same output folder resumes"


_METADATA = "phosphene"

#: The name of the folder of rows beside a checkpoint: its name, and random digits.
_ROWS = r"{}\.rows-[0-9a-f]{{8}}"


class CheckpointWarning(UserWarning):
    """A checkpoint cannot be read or written, or is damaged: the run continues without it or a part of it."""


@dataclass
class Checkpoint:
    """The progress of one run, in a file that is deleted when the run is complete.

    ``identity`` is the run's digest: a file of another run is not resumed from. A checkpoint that cannot be
    written is a ``CheckpointWarning``, once, and the work goes on. A file of this name that is no checkpoint
    is neither replaced nor deleted.
    """

    file: Path
    identity: str
    seed: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    #: How many slots the call has opened so far.
    slots: int = 0
    #: Whether the result that was returned is of an optimization that was stopped early.
    unfinished: bool = False
    #: Whether the file has progress of this run.
    stored: bool = field(default=False, init=False)
    #: Whether writing failed: it is not tried again before the end of the run.
    failed: bool = field(default=False, init=False)
    #: The hidden folder with the rows of folds, and one of an earlier run that is replaced.
    rows: Path | None = field(default=None, init=False)
    replaced_rows: Path | None = field(default=None, init=False)
    #: Whether the model's optimized copy computed a part of the state.
    optimized: Callable[[], bool] = field(default_factory=lambda: lambda: False, init=False)
    #: Whether a file that is no checkpoint has the checkpoint's name.
    blocked: bool = field(default=False, init=False)
    _written: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Checkpoint:
        sweep(self.file.parent)
        try:
            self._read()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.failed = self.blocked = True
            self.seed, self.state, self.rows = None, {}, None
            self._warn(f"{self.file} is no checkpoint that can be read", error)
        return self

    def _read(self) -> None:
        """Read the file, if there is one. Raises an error if it is no checkpoint."""
        try:
            if not stat.S_ISREG(self.file.lstat().st_mode):  # opening a FIFO would not return
                raise OSError("it is not a file")
        except FileNotFoundError:
            return
        with safe_open(self.file, "pt") as file:
            metadata = json.loads((file.metadata() or {})[_METADATA])
            rows = self._rows_folder(metadata.get("rows"))
            if metadata["identity"] != self.identity:
                self.replaced_rows = rows
                return
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.seed, self.state = metadata["seed"], metadata["state"] | tensors
            self.rows = rows if rows is not None and is_folder(rows) else None
            self._drop_damaged()
            self.stored = bool(self.state)
            optimized = self.stored and bool(metadata.get("optimized"))
            self.optimized = lambda: optimized

    def _drop_damaged(self) -> None:
        """Drop the first loop whose rows are damaged and what was computed after it, with a warning."""
        records = {name: value for name, value in self.state.items() if isinstance(value, Mapping)}
        slots: dict[int, InputError] = {}
        for name, record in records.items():
            if _is_slot(name) and "chunks" in record:
                chunks = [n for n in range(len(record["chunks"])) if f"{name}.{n}" in self.state]
                try:
                    check_record(record, len(chunks), self.rows)
                except InputError as error:
                    slots.setdefault(_slot_number(name), error)
        if slots:
            first = min(slots)
            sound = [name for name in self.state if _is_slot(name) and _slot_number(name) < first]
            self.state = {name: self.state[name] for name in sound}
            text = f"the checkpoint {self.file} is damaged ({slots[first]}): what it lacks is computed again"
            warnings.warn(text, CheckpointWarning, stacklevel=2)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.blocked:
            return
        if error is None and not self.unfinished:
            try:
                self.file.unlink(missing_ok=True)
                for folder in (self.rows, self.replaced_rows):
                    _remove_rows(folder)
            except OSError as problem:
                self._warn(f"the checkpoint {self.file} cannot be deleted", problem)
        elif self.state:
            self.write()
            if error is not None and self.stored:
                error.add_note(RESUME_HINT)

    def _rows_folder(self, name: Any) -> Path | None:
        """The folder of rows that a checkpoint names; ValueError for a name that is no such folder's."""
        if name is None:
            return None
        if not isinstance(name, str) or not re.fullmatch(_ROWS.format(re.escape(self.file.name)), name):
            raise ValueError(f"it names an invalid folder {name!r:.80}")
        return self.file.with_name(name)

    def store_rows(self, name: str, rows: Rows) -> None:
        """Store the rows that are merged into ``rows`` from now on in a file, each once.

        Where no checkpoint can be written, they stay in memory.
        """
        if self.rows is None and not self.failed:
            folder = self.file.with_name(f"{self.file.name}.rows-{secrets.token_hex(4)}")
            self.rows = folder
            self.write()  # first, so that a folder of a killed run is named by its checkpoint
            try:
                if not self.failed:
                    folder.mkdir(0o700)
            except OSError as error:
                self.warn_unwritable(error)
        if not self.failed and self.rows is not None:
            try:
                rows.to_file(self.rows / f"{name}.rows", self.warn_unwritable)
            except OSError as error:
                self.warn_unwritable(error)

    def due(self) -> bool:
        """Whether the interval is over, so that the state is to be written."""
        return not self.failed and time.monotonic() - self._written >= INTERVAL

    def write(self) -> None:
        """Write the state to the file, atomically; a failure is a warning, once."""
        try:
            self._write()
        except (OSError, SafetensorError) as error:
            self.warn_unwritable(error)

    def warn_unwritable(self, error: Exception) -> None:
        """Warn, once, that writing failed; nothing is written afterwards."""
        if not self.failed:
            self.failed = True
            self._warn(f"the checkpoint {self.file} cannot be written", error)

    def _write(self) -> None:
        tensors = {name: value for name, value in self.state.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in self.state.items() if name not in tensors}
        for name, value in rest.items():
            if isinstance(value, Rows):
                value.sync()
                tensors |= {f"{name}.{n}": chunk for n, chunk in enumerate(value.chunks.values())}
                rest[name] = value.record()
        rows = {} if self.rows is None else {"rows": self.rows.name}
        own = {"identity": self.identity, "seed": self.seed, "optimized": self.optimized()}
        metadata = json.dumps({**own, "state": rest, **rows})
        stored = {
            n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for n, t in tensors.items()
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(self.file) as work:
            partial = work / WRITING
            partial.mkdir()
            save_tensors(stored, partial / "checkpoint", {_METADATA: metadata})
            sync(partial / "checkpoint")
            os.replace(partial / "checkpoint", self.file)
        sync(self.file.parent)
        _remove_rows(self.replaced_rows)
        self.replaced_rows = None
        self.stored = True
        self._written = time.monotonic()

    def _warn(self, problem: str, error: Exception) -> None:
        text = f"{problem} ({error_text(error)}): the run continues, but cannot resume if it is interrupted"
        warnings.warn(text, CheckpointWarning, stacklevel=2)


def _remove_rows(folder: Path | None) -> None:
    """Remove a folder of rows; other files in it, and what is no folder, stay."""
    if folder is not None and is_folder(folder):
        for file in folder.glob("*.rows"):
            if stat.S_ISREG(file.lstat().st_mode):
                file.unlink()
        if not os.listdir(folder):
            folder.rmdir()


def checkpoint_path(out: str | os.PathLike[str]) -> Path:
    """The checkpoint file of a run that saves to this folder, a hidden file beside it."""
    folder = Path(out).resolve()
    return folder.with_name(f".{folder.name}.unfinished")


#: The checkpoint of the run that is about to call its method, and that of the call in progress.
_pending: ContextVar[Checkpoint | None] = ContextVar("phosphene_checkpoint_pending", default=None)


_active: ContextVar[Checkpoint | None] = ContextVar("phosphene_checkpoint", default=None)


@contextmanager
def use_checkpoint(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Inside, the first method that is called uses the checkpoint; methods that it calls do not."""
    token = _pending.set(checkpoint)
    try:
        yield
    finally:
        _pending.reset(token)


@contextmanager
def claim_checkpoint() -> Iterator[Checkpoint | None]:
    """For one method's call: yields the pending checkpoint, and hides it from methods called inside."""
    checkpoint = _pending.get()
    tokens = _pending.set(None), _active.set(checkpoint)
    try:
        yield checkpoint
    finally:
        _pending.reset(tokens[0])
        _active.reset(tokens[1])


def saved_progress() -> dict[str, Any]:
    """The last ``save_progress`` of this run before it was interrupted; empty if it starts anew."""
    checkpoint = _active.get()
    return {} if checkpoint is None else {n: v for n, v in checkpoint.state.items() if not _is_slot(n)}


def is_checkpointing() -> bool:
    """Whether ``save_progress`` has a file to write to; if not, a costly state need not be assembled."""
    return _active.get() is not None


def save_progress(**state: Any) -> None:
    """Save a method's progress: tensors and JSON values by name. It may be called after every step.

    Only inside ``run(..., out=folder)``: the state is written every ``INTERVAL`` seconds to a file beside the
    folder, which is deleted when the result is complete.
    """
    checkpoint = _active.get()
    if checkpoint is not None:
        slots = {name: value for name, value in checkpoint.state.items() if _is_slot(name)}
        checkpoint.state = slots | state
        if checkpoint.due():
            checkpoint.write()


def _is_slot(name: str) -> bool:
    """Whether a value of a checkpoint's state is a ``CheckpointSlot``'s, such as "0.scores"."""
    return name.partition(".")[0].isdigit()


def _slot_number(name: str) -> int:
    """The number of the slot whose value has this name."""
    return int(name.partition(".")[0])


class CheckpointSlot:
    """The progress of one of several loops in a call; ``state`` is the one before an interruption."""

    def __init__(self) -> None:
        self._checkpoint = _active.get()
        self.state: dict[str, Any] = {}
        if self._checkpoint is not None:
            self._name = f"{self._checkpoint.slots}."
            self._checkpoint.slots += 1
            saved = self._checkpoint.state.items()
            self.state = {k.removeprefix(self._name): v for k, v in saved if k.startswith(self._name)}

    def restore_rows(self, rows: Rows, record: Mapping[str, Any], chunks: Sequence[Tensor]) -> None:
        """Set ``rows`` to those that were stored before an interruption; further ones are stored as well."""
        assert self._checkpoint is not None
        rows.restore(record, chunks, self._checkpoint.rows, self._checkpoint.warn_unwritable)

    def store_rows(self, name: str, rows: Rows) -> None:
        """Store the rows that are merged into ``rows`` in a file, if this run has a checkpoint."""
        if self._checkpoint is not None:
            self._checkpoint.store_rows(self._name + name, rows)

    def due(self) -> bool:
        """Whether the interval is over, so that a state that is costly to assemble will be written."""
        return self._checkpoint is not None and self._checkpoint.due()

    def save(self, state: Mapping[str, Any], *, write: bool = True) -> None:
        """``save_progress`` for this loop alone. Its tensors must not be changed in place afterwards.

        ``write=False``: it is written only if the run is interrupted by an exception.
        """
        if self._checkpoint is not None:
            values = {self._name + name: value for name, value in state.items()}
            # Values of an earlier state that this one lacks must not be restored with it.
            rest = {n: v for n, v in self._checkpoint.state.items() if not n.startswith(self._name)}
            self._checkpoint.state = rest | values
            if write and self._checkpoint.due():
                self._checkpoint.write()
