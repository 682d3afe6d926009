"""The check that saved progress is complete, and not changed afterwards."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from ...checkpoints import Checkpoint, use_checkpoint
from ...errors import PhospheneError
from ...models.batch_size import max_batch
from ...rows import Rows
from ..cases import Case
from ..observation import assert_same_result
from .base import register_check
from .work import accepted_case

if TYPE_CHECKING:
    from .base import AnyMethod


@dataclass
class _ProgressInMemory(Checkpoint):
    """A checkpoint that is never written: each saved state, and a copy of it from when it was saved."""

    saved: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and "saved" in vars(self):
            self.saved.append((value, _copied(value)))
        super().__setattr__(name, value)

    def due(self) -> bool:
        return False

    def store_rows(self, name: str, rows: Rows) -> None:
        """Rows stay in memory."""

    def write(self) -> None:
        """Nothing is written."""

    def interrupted(self, number: int) -> Iterator[dict[str, Any]]:
        """A saved state, and the one that is saved where an interruption follows the next step's changes."""
        (tensors, state), (later_tensors, later) = self.saved[number : number + 2]
        yield state
        changed = [n for n, v in tensors.items() if isinstance(v, Tensor) and v is later_tensors.get(n)]
        if any(not torch.equal(state[n], later[n]) for n in changed):
            yield state | {n: later[n] for n in changed}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) for name, value in state.items()}


def _copy(value: Any) -> Any:
    """A value as a checkpoint restores it: tensors, rows, and all else by way of JSON."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if isinstance(value, Rows) else json.loads(json.dumps(value))


@register_check(
    "method",
    "An interrupted run that resumes returns the same bits.",
    "the saved state: all that a step reads; sums in new tensors, total = total + x, not total += x",
)
def resumes(method: AnyMethod) -> None:
    with max_batch(2):
        # The last two of ten images are a shard of their own, after one of four batches of two.
        case = accepted_case(method, Case(pictures="noise", count=3, dataset=10))
        if case is None:
            raise SkipTest("it refused the networks")
        progress = _ProgressInMemory(Path("checkpoint"), "kit")
        with use_checkpoint(progress):
            complete = case.run(method)
        if len(progress.saved) < 2:
            raise SkipTest("it saves no progress, or once")
        number = (len(progress.saved) - 1) // 2
        states = [*zip(progress.interrupted(number), ("between", "within"), strict=False)]
        if method.spec.input("dataset") is not None:
            states.append((progress.saved[-2][1], "before the last of"))
        for state, when in states:
            resumed = _ProgressInMemory(Path("checkpoint"), "kit", state=_copied(state))
            try:
                with use_checkpoint(resumed):
                    again = case.run(method)
                assert_same_result(again, complete)
            except (AssertionError, PhospheneError) as error:
                count = len(progress.saved)
                raise AssertionError(
                    f"resumed {when} two steps, of {count} that were saved: {error}"
                ) from error
