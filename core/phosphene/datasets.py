"""What data-set-wide methods read, in batches and with ids: folders, tensors, the bundled scenes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .builtin.scenes import draw_scenes
from .errors import InputError
from .images import find_images, resize


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

    def batches(self, size: int) -> Iterator[Batch]:
        """All pictures in order, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            indices = tuple(range(start, min(start + size, len(self))))
            yield Batch(indices, self.read(indices))


@dataclass(eq=False)
class TensorDataset(Dataset):
    """Pictures that are in memory: (N, C, H, W) in [0, 1]."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.images[list(indices)]


class FolderDataset(Dataset):
    """Every picture under a folder, by path; ``transform`` makes (C, H, W) of a path."""

    def __init__(self, folder: str | Path, transform: Callable[[Path], Tensor]) -> None:
        self.uri = str(Path(folder).resolve())
        self._folder, self._paths, self._transform = Path(folder), find_images(folder), transform

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        return self._paths[index].relative_to(self._folder).as_posix()

    def read(self, indices: Sequence[int]) -> Tensor:
        # Decoding releases the interpreter lock, so threads do help.
        with ThreadPoolExecutor(max_workers=4) as pool:
            return stack(list(pool.map(self._transform, [self._paths[i] for i in indices])))


class SceneDataset(Dataset):
    """The first ``count`` bundled scenes of the test split, drawn as they are read, in (H, W) of ``size``."""

    def __init__(self, count: int = 512, *, size: tuple[int, int] = (64, 64)) -> None:
        self.uri = f"builtin:scenes/{count}"
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        # A batch in order is drawn at once, scattered ones singly: none that was not asked for.
        first, count = indices[0], len(indices)
        runs = [(first, count)] if [*indices] == [*range(first, first + count)] else [(i, 1) for i in indices]
        images = torch.cat([draw_scenes(n, split="test", start=i).images for i, n in runs])
        return images if images.shape[2:] == self._size else resize(images, self._size)


def stack(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (C, H, W) as one batch; InputError where their sizes differ."""
    if len(shapes := sorted({tuple(p.shape) for p in pictures})) > 1:
        raise InputError(f"pictures of different sizes cannot be one batch: {shapes}")
    return torch.stack(list(pictures))


def open_dataset(value: object, transform: Callable[[Path], Tensor], size: tuple[int, int]) -> Dataset:
    """A data set from a folder, ``builtin:scenes``, ``builtin:scenes/1000`` or a tensor."""
    if isinstance(value, Dataset):
        return value
    if isinstance(value, Tensor):
        return TensorDataset(value)
    if not isinstance(value, (str, Path)):
        raise InputError(f"a data set is a folder, builtin:scenes or a tensor, not a {type(value).__name__}")
    if not str(value).startswith("builtin:"):
        return FolderDataset(value, transform)
    count = re.fullmatch(r"builtin:scenes(?:/0*([1-9]\d*))?", str(value))
    if count is None:
        raise InputError(f"no bundled data set {value!r}; there is builtin:scenes, and builtin:scenes/1000")
    return SceneDataset(int(count[1] or 512), size=size)
