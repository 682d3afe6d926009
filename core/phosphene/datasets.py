"""What data-set-wide methods read, in batches and with ids: folders, tensors, the bundled world."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .builtin.drawing import integers, keys_of, normal, uniform
from .builtin.scenes import CLASSES, Scenes, draw_scenes
from .builtin.textures import TEXTURES, load_texture
from .errors import InputError
from .images import MASK_SUFFIX, find_images, resize


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


class FolderDataset(Dataset):
    """Every picture under a folder, by path; ``transform`` makes (C, H, W) of a path.

    Where each lies in a folder of its own kind, that folder's name is its class; the object in
    ``dog.jpg`` is what is white in ``dog.mask.png`` beside it.
    """

    def __init__(self, folder: str | Path, transform: Callable[[Path], Tensor]) -> None:
        self.uri = str(Path(folder).resolve())
        self._folder, self._paths, self._transform = Path(folder), find_images(folder), transform

    def __len__(self) -> int:
        return len(self._paths)

    def id(self, index: int) -> str:
        return self._paths[index].relative_to(self._folder).as_posix()

    def read(self, indices: Sequence[int]) -> Tensor:
        return self._read([self._paths[i] for i in indices])

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        if any(path.parent == self._folder for path in self._paths):
            return None
        return tuple(self._paths[i].parent.name for i in indices)

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        paths = [self._paths[i].with_suffix(MASK_SUFFIX) for i in indices]
        return self._read(paths).mean(1) > 0.5 if all(path.is_file() for path in paths) else None

    def _read(self, paths: Sequence[Path]) -> Tensor:
        # Decoding releases the interpreter lock, so threads do help.
        with ThreadPoolExecutor(max_workers=4) as pool:
            return stack(list(pool.map(self._transform, paths)))


class SceneDataset(Dataset):
    """The first ``count`` bundled scenes of the test split, drawn as they are read, in (H, W) of ``size``.

    ``biased``: those whose background gives the class away.
    """

    def __init__(self, count: int = 512, *, size: tuple[int, int] = (64, 64), biased: bool = False) -> None:
        self.uri = f"builtin:{'biased-' if biased else ''}scenes/{count}"
        self._count, self._size, self._biased = count, size, biased

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        images = torch.cat([scenes.images for scenes in self._drawn(indices)])
        return images if images.shape[2:] == self._size else resize(images, self._size)

    def labels(self, indices: Sequence[int]) -> tuple[str, ...]:
        return tuple(CLASSES[label] for scenes in self._drawn(indices) for label in scenes.labels.tolist())

    def masks(self, indices: Sequence[int]) -> Tensor:
        masks = torch.cat([scenes.masks for scenes in self._drawn(indices)])
        return F.interpolate(masks[:, None].float(), self._size, mode="nearest")[:, 0].bool()

    def _drawn(self, indices: Sequence[int]) -> Iterator[Scenes]:
        # A batch in order is drawn at once, scattered ones singly: none that was not asked for.
        first, count = indices[0], len(indices)
        runs = [(first, count)] if [*indices] == [*range(first, first + count)] else [(i, 1) for i in indices]
        for start, length in runs:
            draw = _remembered if 1 < length <= 32 else _test_scenes
            yield draw(length, start, self._biased)


def _test_scenes(count: int, start: int, biased: bool) -> Scenes:
    return draw_scenes(count, split="test", start=start, biased=biased)


#: Drawing takes longer than most of what is done with a scene: the last thousand are kept, 54 MB.
_remembered = lru_cache(maxsize=32)(_test_scenes)


class TextureDataset(Dataset):
    """``count`` styles drawn as they are read, in (H, W) of ``size``: pieces of the bundled textures.

    Each is a square of at least 48 pixels of one of the first four, turned or mirrored, and three in four
    have other colours. The fifth, pebbles, stays out, so that it can be looked at as an unseen one.
    """

    def __init__(self, count: int = 256, *, size: tuple[int, int] = (64, 64)) -> None:
        self.uri = f"builtin:textures/{count}"
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        return stack([_piece(i, self._size) for i in indices])


def _piece(index: int, size: tuple[int, int]) -> Tensor:
    """A piece (3, H, W) of a texture, in its colours or others."""
    key = keys_of([f"piece/{index}"])
    texture = _texture(TEXTURES[int(integers(key, "texture", below=4))])
    side = 48 + int(integers(key, "side", below=81))
    top, left = (int(integers(key, draw, below=129 - side)) for draw in ("top", "left"))
    piece = texture[:, top : top + side, left : left + side]
    piece = piece.rot90(int(integers(key, "turn", below=4)), (1, 2))
    piece = piece.flip(2) if int(integers(key, "mirror", below=2)) else piece
    if int(integers(key, "own colours", below=4)):
        mixing = normal(key, "mixing", 3, 3)[0] / math.sqrt(3) * 1.3
        mean, other = (
            piece.mean((1, 2), keepdim=True),
            uniform(key, "colour", 3, 1, 1, low=0.25, high=0.75)[0],
        )
        piece = torch.einsum("ij,jhw->ihw", mixing, piece - mean) + other
    return resize(piece.clamp(0, 1), size)


_texture = lru_cache(maxsize=len(TEXTURES))(load_texture)


def stack(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (C, H, W) as one batch; InputError where their sizes differ."""
    if len(shapes := sorted({tuple(p.shape) for p in pictures})) > 1:
        raise InputError(f"pictures of different sizes cannot be one batch: {shapes}")
    return torch.stack(list(pictures))


def open_dataset(value: object, transform: Callable[[Path], Tensor], size: tuple[int, int]) -> Dataset:
    """A data set from a folder, ``builtin:scenes/1000``, ``builtin:textures/64`` or a tensor."""
    if isinstance(value, Dataset):
        return value
    if isinstance(value, Tensor):
        return TensorDataset(value)
    if not isinstance(value, (str, Path)):
        raise InputError(f"a data set is a folder, builtin:scenes or a tensor, not a {type(value).__name__}")
    if not str(value).startswith("builtin:"):
        return FolderDataset(value, transform)
    told = re.fullmatch(r"builtin:(biased-)?(scenes|textures)(?:/0*([1-9]\d*))?", str(value))
    if told is None or told[1] and told[2] == "textures":
        known = "builtin:scenes, builtin:biased-scenes, builtin:textures, and builtin:scenes/1000"
        raise InputError(f"no bundled data set {value!r}; there are {known}")
    if told[2] == "textures":
        return TextureDataset(int(told[3] or 256), size=size)
    return SceneDataset(int(told[3] or 512), size=size, biased=told[1] is not None)
