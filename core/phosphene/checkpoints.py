"""Checkpoints: the state of long work, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Seconds between two writes: the most work that a crash loses.
INTERVAL = 10.0


#: The note on an interrupted run whose checkpoint was written.
RESUME_HINT = "the progress is saved: the same run with the same output folder resumes"


_METADATA = "phosphene"


@dataclass
class Checkpoint:
    """The progress of one run, in a file that is deleted when the run is complete.

    ``identity`` is the run's digest: a file of another run is not resumed from.
    """

    file: Path
    identity: str
    seed: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    #: How many slots the call has opened so far.
    slots: int = 0
    #: Whether the result that was returned is of an optimisation that was stopped early.
    unfinished: bool = False
    _written: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Checkpoint:
        try:
            with safe_open(self.file, "pt") as file:
                metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
                if metadata.get("identity") == self.identity:
                    self.seed = metadata["seed"]
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    self.state = metadata["state"] | tensors
        except (FileNotFoundError, SafetensorError):  # no file, or a damaged one: the run starts anew
            pass
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None and not self.unfinished:
            self.file.unlink(missing_ok=True)
        elif self.state:
            self.write()
            if error is not None:
                error.add_note(RESUME_HINT)

    def write(self) -> None:
        """Write the state to the file, atomically."""
        tensors = {name: value for name, value in self.state.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in self.state.items() if name not in tensors}
        metadata = json.dumps({"identity": self.identity, "seed": self.seed, "state": rest})
        stored = {
            n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for n, t in tensors.items()
        }
        partial = self.file.with_name(f"{self.file.name}.part")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(stored, partial, {_METADATA: metadata})
            os.replace(partial, self.file)
        finally:
            partial.unlink(missing_ok=True)
        self._written = time.monotonic()


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
    return {} if checkpoint is None else dict(checkpoint.state)


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
        checkpoint.state = state
        if time.monotonic() - checkpoint._written >= INTERVAL:
            checkpoint.write()


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

    def due(self) -> bool:
        """Whether the interval is over, so that a state that is costly to assemble will be written."""
        return self._checkpoint is not None and time.monotonic() - self._checkpoint._written >= INTERVAL

    def save(self, **state: Any) -> None:
        """``save_progress`` for this loop alone. Its tensors must not be changed in place afterwards."""
        if self._checkpoint is not None:
            save_progress(
                **self._checkpoint.state | {self._name + name: value for name, value in state.items()}
            )
