"""``Fold``: a computation over a data set whose states of parts of it can be merged."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..checkpoints import CheckpointSlot, claim_checkpoint
from ..progress import progress_bar
from ..rows import Rows
from ..torch_state import fork_random_state, seed_generators
from .datasets import Batch, Dataset

R = TypeVar("R")

#: What a fold has computed of some images: tensors on the CPU, ``Rows`` and what JSON holds, by name.
State = dict[str, Any]


class Fold(ABC, Generic[R]):
    """A computation over all images of a data set, one batch at a time.

    merge(update(update(start(), batch_1), batch_2), update(start(), batch_3)) = the state of three batches

    ``run`` shows the progress, saves the state inside ``phosphene.run(..., out=folder)``, resumes after an
    interruption, and computes shards of the data set wherever the executor of the run does. A fold whose
    states are not sums and rows has a ``merge`` of its own. States must be merged in any order with the same
    result: break ties by the index of the image, and add in double precision. A state holds tensors on the
    CPU, ``Rows`` (one row per image, created by ``start``) and JSON values, by name; ``update`` and ``merge``
    return a new mapping and change no tensor in place, since an interrupted step is repeated.

    A fold is sent to other processes with what it refers to, such as the model.

    Example::

        class MeanColor(Fold[Tensor]):
            title = "mean color"

            def start(self) -> State:
                return {"sum": torch.zeros(3).double(), "count": 0}

            def update(self, state: State, batch: Batch) -> State:
                colors = batch.images.double().mean((2, 3)).sum(0)
                return {"sum": state["sum"] + colors, "count": state["count"] + len(batch.images)}

            def finish(self, state: State) -> Tensor:
                return state["sum"] / state["count"]

        MeanColor().run(dataset, size=32)  # (3,)
    """

    #: Description of the progress bar.
    title: str = "images"
    #: Batches of a shard, the part of a data set that is computed by itself and then merged and saved.
    shard_batches: int = 4
    #: Whether ``update`` draws random numbers: every batch has a seed of its own.
    random: bool = False
    #: Whether checkpoints hold the state: not that of a short fold that a method runs many times.
    saved: bool = True

    def start(self) -> State:
        """The state of no images."""
        return {}

    @abstractmethod
    def update(self, state: State, batch: Batch) -> State:
        """The state after another batch."""

    def merge(self, first: State, second: State) -> State:
        """The state of the images of both. By default, ``Rows`` are joined, tensors and numbers are added.

        Raises TypeError for another value, which a fold has to merge itself.
        """
        merged = first | second
        for name in first.keys() & second.keys():
            value = first[name]
            if isinstance(value, Rows):
                merged[name] = value.merge(second[name])
            elif isinstance(value, (Tensor, int, float)):
                merged[name] = value + second[name]
            else:
                kind = type(value).__name__
                raise TypeError(f"{type(self).__name__} needs a merge of its own for {name!r}, a {kind}")
        return merged

    def finish(self, state: State) -> R:
        """The result of the state of all images; by default the state itself."""
        return cast("R", state)

    def run(self, dataset: Dataset, size: int, stop: int | None = None) -> R:
        """The result for the first ``stop`` images of a data set (default: all), in batches of ``size``."""
        stop = len(dataset) if stop is None else stop
        with nullcontext() if self.saved else claim_checkpoint():
            return self._run(dataset, size, stop)

    def _run(self, dataset: Dataset, size: int, stop: int) -> R:
        position = _Position(self)
        executor = _executor.get()
        # What is drawn after the fold must not depend on who computed its batches.
        with nullcontext() if position.seed is None else fork_random_state():
            if executor is None:
                self._run_locally(dataset, size, stop, position)
            else:
                shards = shard_ranges(position.first, stop, size * self.shard_batches)
                states = executor.states(self, dataset, size, shards, position.seed)
                for shard, state in zip(shards, progress_bar(states, self.title, len(shards)), strict=True):
                    position.add(self, state, shard.stop)
        return self.finish(position.total)

    def _run_locally(self, dataset: Dataset, size: int, stop: int, position: _Position) -> None:
        """Compute shard after shard in this process."""
        step, done = self.shard_batches * size, position.done
        batches = dataset.batches(size, done, stop)
        for batch in progress_bar(batches, self.title, math.ceil((stop - done) / size)):
            state = self.update_batch(position.part, batch, position.seed)
            done = batch.indices[-1] + 1
            if done - position.first >= step or done == stop:
                position.add(self, state, done)
            else:
                position.set_part(state, done)

    def update_batch(self, state: State, batch: Batch, seed: int | None) -> State:
        """``update``, with the batch's own seed in a fold that draws random numbers."""
        if seed is not None:
            digest = hashlib.sha256(f"{seed} {batch.indices[0]}".encode()).digest()
            seed_generators(int.from_bytes(digest[:8], "big") >> 1)
        return self.update(state, batch)


class ShardExecutor(Protocol):
    """Computes the states of shards somewhere, such as in other processes; see ``FoldTask``."""

    def states(
        self, fold: Fold[Any], dataset: Dataset, size: int, shards: Sequence[range], seed: int | None
    ) -> Iterator[State]:
        """``shard_state`` of every shard, in their order."""
        ...


def shard_state(fold: Fold[Any], dataset: Dataset, size: int, shard: range, seed: int | None) -> State:
    """The state of the images of a shard, read in batches of at most ``size``."""
    state = fold.start()
    for batch in dataset.batches(size, shard.start, shard.stop):
        state = fold.update_batch(state, batch, seed)
    return state


def shard_ranges(start: int, stop: int, step: int) -> list[range]:
    """The shards of the images from ``start`` to ``stop``, of ``step`` images each."""
    return [range(first, min(first + step, stop)) for first in range(start, stop, step)]


_executor: ContextVar[ShardExecutor | None] = ContextVar("phosphene_shard_executor", default=None)


@contextmanager
def use_shard_executor(executor: ShardExecutor | None) -> Iterator[None]:
    """Inside, the shards of folds are computed by ``executor``; by this process where it is None."""
    token = _executor.set(executor)
    try:
        yield
    finally:
        _executor.reset(token)


class _Position:
    """The progress of a fold: the merged state of ``first`` images, and that of the shard in progress."""

    def __init__(self, fold: Fold[Any]) -> None:
        self._slot = CheckpointSlot()
        self.first, self.done = self._slot.state.get("first", 0), self._slot.state.get("done", 0)
        self.seed = self._slot.state.get("seed", int(torch.randint(2**62, ())) if fold.random else None)
        self.total, self.part = (self._restore(fold.start(), f"{name}.") for name in ("total", "part"))
        if not self._slot.state:
            for name, rows in self.total.items():
                if isinstance(rows, Rows):
                    self._slot.store_rows(name, rows)
            self._save(write=False)

    def set_part(self, state: State, done: int) -> None:
        """Set the state of the shard in progress, which is written only if an exception ends the run."""
        self.part, self.done = state, done
        self._save(write=False)

    def add(self, fold: Fold[Any], state: State, done: int) -> None:
        """Merge the state of a complete shard."""
        self.total = fold.merge(self.total, state)
        self.part, self.first, self.done = fold.start(), done, done
        self._save(write=True)

    def _save(self, *, write: bool) -> None:
        total = {f"total.{name}": value for name, value in self.total.items()}
        part = {f"part.{name}": value for name, value in self.part.items()}
        position = {"first": self.first, "done": self.done, "seed": self.seed}
        self._slot.save(total | part | position, write=write)

    def _restore(self, state: State, prefix: str) -> State:
        """The saved state, or ``state`` where nothing is saved."""
        saved = {
            name.removeprefix(prefix): value
            for name, value in self._slot.state.items()
            if name.startswith(prefix)
        }
        for name, rows in state.items():
            if isinstance(rows, Rows) and isinstance(record := saved.get(name), Mapping):
                chunks = [saved.pop(f"{name}.{n}") for n in range(len(record["chunks"]))]
                self._slot.restore_rows(rows, record, chunks)
                saved[name] = rows
        return state | saved
