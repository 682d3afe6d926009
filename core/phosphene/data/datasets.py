"""The ``Dataset`` interface, batches, and data sets held in a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Batch:
    """Some pictures of a data set: their places in it and (n, C, H, W) pixels in [0, 1]."""

    indices: tuple[int, ...]
    images: Tensor


class Dataset(ABC):
    """Pictures with ids that stay with them, read a batch at a time; never held all at once."""

    #: How it is written on a command line, so that a run can be repeated; None for tensors.
    uri: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """The pictures at these places, (n, C, H, W) in [0, 1]."""

    def id(self, index: int) -> str:
        """What the picture at a place is called."""
        return str(index)

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        """The names of these pictures' classes; None where they are not known."""
        return None

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        """Where the objects are, (n, H, W) bool; None where it is not known."""
        return None

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """All pictures in order, at most ``size`` at a time, from the one at ``start`` on."""
        for first in range(start, len(self), size):
            indices = tuple(range(first, min(first + size, len(self))))
            yield Batch(indices, self.read(indices))


@dataclass(eq=False)
class TensorDataset(Dataset):
    """Pictures that are in memory: (N, C, H, W) in [0, 1].

    What is known of them: ``classes``, N names, and ``objects``, masks (N, H, W) bool.
    """

    images: Tensor
    classes: Sequence[str] | None = None
    objects: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.images[list(indices)]

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        return None if self.classes is None else tuple(self.classes[i] for i in indices)

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        return None if self.objects is None else self.objects[list(indices)]


def stack(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (C, H, W) as one batch; InputError where their sizes differ."""
    if len(shapes := sorted({tuple(p.shape) for p in pictures})) > 1:
        raise InputError(f"pictures of different sizes cannot be one batch: {shapes}")
    return torch.stack(list(pictures))
