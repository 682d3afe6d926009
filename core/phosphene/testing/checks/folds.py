"""Checks of folds: states of parts of a data set merge to the state of all of it, in any order."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data import Dataset, Fold, LabelRows, Rows, State, shard_state, use_shard_executor
from ...models.batch_size import max_batch
from ..cases import Case
from .base import register_check, result_of
from .work import accepted_case

if TYPE_CHECKING:
    from .base import AnyMethod

#: The largest relative difference between sums in double precision that were added in another order.
_ROUNDING = 1e-12


@register_check(
    "method",
    "A fold's states of any parts of a data set merge to the state of all of it, in any order.",
    "merge: break ties by the index of the image, add in double precision, write Rows by the first index",
    lambda method: None if method.spec.input("dataset") else "it reads no data set",
)
def states_are_merged(method: AnyMethod) -> None:
    for pictures in ("noise", "scenes", "binary"):
        case, executor = Case(pictures=pictures, dataset=9), _CompareMerges()
        with max_batch(2), use_shard_executor(executor):
            result = result_of(method, case)
        if result is None:  # refused, as every run of this case, or only in shards
            if (accepted := accepted_case(method, case)) is None:
                return
            with max_batch(2), use_shard_executor(executor):
                accepted.run(method)
        if not executor.folds:
            return


class _CompareMerges:
    """Computes shards in this process and asserts that merging batches in other orders gives the same."""

    def __init__(self) -> None:
        self.folds = 0

    def states(
        self, fold: Fold[Any], dataset: Dataset, size: int, shards: Sequence[range], seed: int | None
    ) -> Iterator[State]:
        self.folds += 1
        batches = list(dataset.batches(size, 0, shards[-1].stop))
        total = fold.start()
        for batch in batches:
            total = fold.update_batch(total, batch, seed)
        orders = {
            "in order": range(len(batches)),
            "in reverse": range(len(batches))[::-1],
            "the middle first": sorted(range(len(batches)), key=lambda n: abs(n - len(batches) // 2)),
        }
        states = [fold.update_batch(fold.start(), batch, seed) for batch in batches]
        for name, order in orders.items():
            merged = fold.start()
            for n in order:
                merged = fold.merge(merged, copy.deepcopy(states[n]))
            difference = state_difference(merged, total)
            assert difference <= _ROUNDING, (
                f"{type(fold).__name__}: the states of batches, merged {name}, differ from the state of all "
                f"images by {difference:.3g}"
            )
        first, second = (copy.deepcopy(states[n]) for n in (0, -1))
        before = copy.deepcopy((first, second))
        fold.merge(first, second)
        assert state_difference(before, (first, second)) == 0, f"{type(fold).__name__}.merge changes a state"
        for shard in shards:
            yield shard_state(fold, dataset, size, shard, seed)


def state_difference(first: Any, second: Any) -> float:
    """The largest relative difference of two states' numbers; infinity where anything else differs."""
    match first, second:
        case LabelRows(), LabelRows():
            return 0.0 if first.labels() == second.labels() else math.inf
        case Rows(), Rows():
            return 0.0 if torch.equal(first.tensor(), second.tensor()) else math.inf
        case dict(), dict():
            if first.keys() != second.keys():
                return math.inf
            return max((state_difference(first[name], second[name]) for name in first), default=0.0)
        case ((tuple() | list()), (tuple() | list())):
            if len(first) != len(second):
                return math.inf
            pairs = zip(first, second, strict=True)
            return max((state_difference(*pair) for pair in pairs), default=0.0)
        case Tensor(), Tensor():
            return _tensor_difference(first, second)
        case float(), float():
            return 0.0 if first == second else abs(first - second) / max(abs(first), abs(second))
    return 0.0 if first == second else math.inf


def _tensor_difference(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape or first.dtype != second.dtype:
        return math.inf
    if torch.equal(first, second):
        return 0.0
    if not first.is_floating_point() or not torch.equal(first.isfinite(), second.isfinite()):
        return math.inf
    finite = first.isfinite()
    scale = float(torch.maximum(first.abs(), second.abs())[finite].max())
    return float((first - second)[finite].abs().max()) / scale if scale else 0.0
