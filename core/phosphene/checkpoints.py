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

#: Seconds between two writings: what a lost machine costs at most.
INTERVAL = 10.0


#: What is said where work was cut off and kept.
RESUME_HINT = "what was done so far is kept: the same run, given the same out, goes on with it"


_METADATA = "phosphene"


@dataclass
class Checkpoint:
    """The work of one run, kept in a file until the run is whole.

    ``identity`` says which run: what another one left in the file is not gone on with.
    """

    file: Path
    identity: str
    seed: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    #: How many slots of work have begun in this call, and whether the result that it gave is not whole yet.
    slots: int = 0
    unfinished: bool = False
    _written: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Checkpoint:
        try:
            with safe_open(self.file, "pt") as kept:
                told = json.loads((kept.metadata() or {}).get(_METADATA, "{}"))
                if told.get("identity") == self.identity:
                    self.seed = told["seed"]
                    self.state = told["state"] | {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):  # nothing there, or nothing whole: from the beginning
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
        """Put the state into the file, whole or not at all."""
        tensors = {name: value for name, value in self.state.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in self.state.items() if name not in tensors}
        told = json.dumps({"identity": self.identity, "seed": self.seed, "state": rest})
        stored = {
            n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for n, t in tensors.items()
        }
        partial = self.file.with_name(f"{self.file.name}.part")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(stored, partial, {_METADATA: told})
            os.replace(partial, self.file)
        finally:
            partial.unlink(missing_ok=True)
        self._written = time.monotonic()


def checkpoint_path(out: str | os.PathLike[str]) -> Path:
    """Where the work for a result's folder is kept until that is whole."""
    folder = Path(out).resolve()
    return folder.with_name(f".{folder.name}.unfinished")


#: Of the run that is about to call its method, and of the call that is at work.
_pending: ContextVar[Checkpoint | None] = ContextVar("phosphene_checkpoint_pending", default=None)


_active: ContextVar[Checkpoint | None] = ContextVar("phosphene_checkpoint", default=None)


@contextmanager
def use_checkpoint(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Inside, the first method that is called keeps its work here; what it calls itself does not."""
    token = _pending.set(checkpoint)
    try:
        yield
    finally:
        _pending.reset(token)


@contextmanager
def claim_checkpoint() -> Iterator[Checkpoint | None]:
    """One method's call: it takes what is pending, and what is called inside finds nothing."""
    checkpoint = _pending.get()
    tokens = _pending.set(None), _active.set(checkpoint)
    try:
        yield checkpoint
    finally:
        _pending.reset(tokens[0])
        _active.reset(tokens[1])


def saved_progress() -> dict[str, Any]:
    """What ``keep`` was given last, when this very run was cut off; empty where it begins."""
    checkpoint = _active.get()
    return {} if checkpoint is None else dict(checkpoint.state)


def is_checkpointing() -> bool:
    """Whether what is kept has a place, so that nothing dear is put together in vain."""
    return _active.get() is not None


def save_progress(**state: Any) -> None:
    """Keep what a method has done so far, tensors and what JSON holds; it may be asked after every step.

    Only ``run(..., out=folder)`` has a place for it: beside the folder, until the result is whole.
    """
    checkpoint = _active.get()
    if checkpoint is not None:
        checkpoint.state = state
        if time.monotonic() - checkpoint._written >= INTERVAL:
            checkpoint.write()


class CheckpointSlot:
    """One of several loops of a call, with its own place in what is kept: ``state``, as it was cut off."""

    def __init__(self) -> None:
        self._checkpoint = _active.get()
        self.state: dict[str, Any] = {}
        if self._checkpoint is not None:
            self._name = f"{self._checkpoint.slots}."
            self._checkpoint.slots += 1
            kept = self._checkpoint.state.items()
            self.state = {k.removeprefix(self._name): v for k, v in kept if k.startswith(self._name)}

    def due(self) -> bool:
        """Whether it is time to keep what is done, which may cost something to gather."""
        return self._checkpoint is not None and time.monotonic() - self._checkpoint._written >= INTERVAL

    def save(self, **state: Any) -> None:
        """Like ``keep``, beside what the other slots keep; what is given must not change any more."""
        if self._checkpoint is not None:
            save_progress(
                **self._checkpoint.state | {self._name + name: value for name, value in state.items()}
            )
