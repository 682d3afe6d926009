"""``resumable`` and ``resumable_batches``: loops that save their state and resume after an interruption."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..checkpoints import CheckpointSlot
from ..progress import progress_bar
from .datasets import Batch, Dataset

T = TypeVar("T")


def resumable(items: Sequence[T], state: dict[str, Any], title: str) -> Iterator[T]:
    """Iterate over ``items`` with a progress bar and save ``state`` after each one.

    A resumed run skips the items that were completed. ``state`` (tensors and what JSON holds, by name) is
    updated in place before this function returns, so values may be read from it before the loop as well.
    In the loop, assign new values to its keys: an item that is interrupted is repeated from its start, and a
    sum that was changed in place would count it twice. An item's own rows of a tensor may be set in place.

    Example::

        state = {"total": torch.zeros(3), "count": 0}
        for image in resumable(images, state, "mean color"):
            state["total"] = state["total"] + image.mean((1, 2))
            state["count"] += 1
    """
    slot = CheckpointSlot()
    done = _restore(slot, state)
    steps = progress_bar(enumerate(items[done:], start=done + 1), title, len(items) - done)
    return _save_after_each(slot, state, steps)


def resumable_batches(dataset: Dataset, size: int, state: dict[str, Any], title: str) -> Iterator[Batch]:
    """The data set's batches as ``resumable`` iterates: with a progress bar, ``state`` saved after each one.

    The position is counted in images, so a run may be resumed with another batch ``size``.
    """
    slot = CheckpointSlot()
    done = _restore(slot, state)
    batches = progress_bar(dataset.batches(size, done), title, math.ceil((len(dataset) - done) / size))
    return _save_after_each(slot, state, ((batch.indices[-1] + 1, batch) for batch in batches))


def _restore(slot: CheckpointSlot, state: dict[str, Any]) -> int:
    """Update ``state`` with the values saved in ``slot``; returns the saved position.

    Tensors are restored on the device of their initial value.
    """
    saved = dict(slot.state)
    done: int = saved.pop("done", 0)
    for name, value in saved.items():
        initial = state.get(name)
        state[name] = value.to(initial.device) if isinstance(initial, Tensor) else value
    return done


def _save_after_each(
    slot: CheckpointSlot, state: Mapping[str, Any], steps: Iterable[tuple[int, T]]
) -> Iterator[T]:
    """The items of ``steps``; after each one, ``state`` is saved with its position."""
    for done, item in steps:
        yield item
        slot.save({**state, "done": done})
