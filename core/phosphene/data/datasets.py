"""``Dataset``, batches of it, and ``TensorDataset``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Batch:
    """Some images of a data set: their indices in it and their pixels (n, C, H, W) in [0, 1]."""

    indices: tuple[int, ...]
    images: Tensor
    dataset: Dataset = field(repr=False)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The class names of the images; None for a data set without classes."""
        return self.dataset.labels(self.indices)

    @property
    def masks(self) -> Tensor | None:
        """Masks (n, H, W) bool of the objects; None where an image has none."""
        return self.dataset.masks(self.indices)

    @property
    def boxes(self) -> tuple[Tensor, ...] | None:
        """Boxes (K, 4) of the objects of each image; None where an image has none."""
        return self.dataset.boxes(self.indices)

    @property
    def parts(self) -> tuple[Parts, ...] | None:
        """The parts of each image's object; None for a data set without parts."""
        return self.dataset.parts(self.indices)


@dataclass(frozen=True)
class Parts:
    """The parts of the object in one image, for measuring their importance by intervention.

    ``names`` of the P parts; ``masks`` (P, H, W) bool, the visible pixels of each; ``without`` (P, C, H, W),
    the image with each part removed and nothing else changed.
    """

    names: tuple[str, ...]
    masks: Tensor
    without: Tensor


class Dataset(ABC):
    """Images with ids, read in batches; never all in memory at once."""

    #: The data set's name on the command line, from which a run can be repeated; None for tensors.
    uri: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at these indices, (n, C, H, W) in [0, 1]."""

    def id(self, index: int) -> str:
        """The id of the image at an index; default: the index."""
        return str(index)

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        """The class names of the images at these indices; None for a data set without classes."""
        return None

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        """Masks (n, H, W) bool of the objects in these images; None where one has no mask."""
        return None

    def boxes(self, indices: Sequence[int]) -> tuple[Tensor, ...] | None:
        """Boxes (K, 4) of the objects of each image: left, top, right, bottom in pixels of the image that
        ``read`` returns; None where one has no boxes.
        """
        return None

    def parts(self, indices: Sequence[int]) -> tuple[Parts, ...] | None:
        """The parts of the object in each image; None for a data set that cannot remove parts."""
        return None

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The images from index ``start`` to ``stop`` (default: all) in order, at most ``size`` at a time."""
        for indices in batch_indices(len(self), size, start, stop):
            yield Batch(indices, self.read(indices), self)


@dataclass(eq=False)
class TensorDataset(Dataset):
    """Images in memory: (N, C, H, W) in [0, 1].

    ``classes``: N class names. ``objects``: masks (N, H, W) bool of the objects. ``object_parts``: the parts
    of each image's object.
    """

    images: Tensor
    classes: Sequence[str] | None = None
    objects: Tensor | None = None
    object_parts: Sequence[Parts] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.images[list(indices)]

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        return None if self.classes is None else tuple(self.classes[i] for i in indices)

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        return None if self.objects is None else self.objects[list(indices)]

    def parts(self, indices: Sequence[int]) -> tuple[Parts, ...] | None:
        return None if self.object_parts is None else tuple(self.object_parts[i] for i in indices)


def batch_indices(length: int, size: int, start: int, stop: int | None) -> list[tuple[int, ...]]:
    """The indices of every batch of at most ``size`` images from ``start`` to ``stop`` of ``length``."""
    stop = length if stop is None else stop
    return [tuple(range(first, min(first + size, stop))) for first in range(start, stop, size)]


def stack(images: Sequence[Tensor]) -> Tensor:
    """Images (C, H, W) as one batch; InputError where their sizes differ."""
    if len(shapes := sorted({tuple(image.shape) for image in images})) > 1:
        raise InputError(f"images of different sizes cannot be one batch: {shapes}")
    return torch.stack(list(images))
