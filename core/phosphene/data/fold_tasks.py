"""``FoldTask``: a fold with all that its states depend on, as executors send it to other processes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..models.batch_size import batch_limit, max_batch
from ..models.optimized_copy import Optimizable, current_pass, repeat_pass
from ..progress import report_progress
from ..rows import Rows
from ..torch_state import TorchSettings
from .datasets import Dataset
from .folds import Fold, State, shard_state


class ComputedShard(NamedTuple):
    """The state of a shard, and whether a network's optimized copy computed it."""

    state: State
    optimized: bool


@dataclass
class FoldTask:
    """A fold over a data set with the settings of the call that it belongs to.

    It can be pickled where its model and its data set can. In another process, on a CPU of the same type,
    ``compute`` returns the same state, bit for bit: it has the same number of threads, the same batches, and
    the optimized copy of ``model`` where the call uses it. Random numbers that a network or a defense draws
    outside of the seeded batches of a fold are the exception.

    Example::

        class InThisProcess:
            def states(self, fold, dataset, size, shards, seed):
                task = FoldTask.capture(fold, dataset, size, seed)
                for shard in shards:
                    yield task.receive(task.compute(shard))
    """

    fold: Fold[Any]
    dataset: Dataset
    size: int
    seed: int | None
    model: Optimizable | None
    max_batch: int | None
    settings: TorchSettings

    @classmethod
    def capture(cls, fold: Fold[Any], dataset: Dataset, size: int, seed: int | None) -> FoldTask:
        """The task of a fold that is run now, with the arguments of ``ShardExecutor.states``."""
        optimized = current_pass()
        model = None if optimized is None else optimized.model
        return cls(fold, dataset, size, seed, model, batch_limit(), TorchSettings.current())

    def compute(self, shard: range) -> ComputedShard:
        """The state of a shard's images, in the process of a worker."""
        with (
            self.settings.apply(),
            max_batch(self.max_batch),
            repeat_pass(self.model) as optimized,
            report_progress(False),
        ):
            state = shard_state(self.fold, self.dataset, self.size, shard, self.seed)
        return ComputedShard({name: _compact(value) for name, value in state.items()}, optimized.used)

    def receive(self, computed: ComputedShard) -> State:
        """The state of a computed shard, in the process of the call, whose provenance records the copy."""
        optimized = current_pass()
        if optimized is not None and computed.optimized:
            optimized.used = True
        return computed.state


def _compact(value: Any) -> Any:
    """A tensor, or those of ``Rows``, without the rest of a storage that it is a view of."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, Rows):
        value = copy.copy(value)
        value.chunks = {first: _compact(rows) for first, rows in value.chunks.items()}
    return value
