"""The bundled scenes and textures as data sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..builtin.drawing import integers, keys_of, normal, uniform
from ..builtin.scenes import CLASSES, Scenes, draw_scenes
from ..builtin.textures import TEXTURES, load_texture
from ..images.color import resize
from .datasets import Dataset, Parts, stack
from .items import bounding_box


class SceneDataset(Dataset):
    """The first ``count`` bundled scenes of the test split, drawn when they are read, in ``size`` (H, W).

    ``biased``: scenes whose background is a function of the class.
    """

    def __init__(self, count: int = 512, *, size: tuple[int, int] = (64, 64), biased: bool = False) -> None:
        self.uri = f"builtin:{'biased-' if biased else ''}scenes/{count}"
        self._count, self._size, self._biased = count, size, biased

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        images = torch.cat([scenes.images for scenes in self._draw(indices)])
        return images if images.shape[2:] == self._size else resize(images, self._size)

    def labels(self, indices: Sequence[int]) -> tuple[str, ...]:
        return tuple(CLASSES[label] for scenes in self._draw(indices) for label in scenes.labels.tolist())

    def masks(self, indices: Sequence[int]) -> Tensor:
        masks = torch.cat([scenes.masks for scenes in self._draw(indices)])
        return F.interpolate(masks[:, None].float(), self._size, mode="nearest")[:, 0].bool()

    def _draw(self, indices: Sequence[int]) -> Iterator[Scenes]:
        # Consecutive indices are drawn in one call, others one at a time, so no other scene is drawn.
        first, count = indices[0], len(indices)
        runs = [(first, count)] if [*indices] == [*range(first, first + count)] else [(i, 1) for i in indices]
        for start, length in runs:
            draw_split = _cached_test_scenes if 1 < length <= 32 else _test_scenes
            yield draw_split(length, start, self._biased)


def _test_scenes(count: int, start: int, biased: bool) -> Scenes:
    return draw_scenes(count, split="test", start=start, biased=biased)


#: Drawing a scene takes longer than a small network does: the last 32 batches are cached (54 MB).
_cached_test_scenes = lru_cache(maxsize=32)(_test_scenes)


class PartSceneDataset(Dataset):
    """The first ``count`` bundled scenes of objects made of parts, of the test split, in ``size`` (H, W).

    They are drawn when they are read, ``parts`` with each part removed.
    """

    def __init__(self, count: int = 512, *, size: tuple[int, int] = (128, 128)) -> None:
        self.uri = f"builtin:part-scenes/{count}"
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        images = torch.stack([_part_scene(index)[0] for index in indices])
        return images if images.shape[2:] == self._size else resize(images, self._size)

    def labels(self, indices: Sequence[int]) -> tuple[str, ...]:
        return tuple(_part_scene(index)[1] for index in indices)

    def masks(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._masks((_part_scene(index)[2] >= 0)[None])[0] for index in indices])

    def boxes(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([bounding_box(mask)]) for mask in self.masks(indices))

    def parts(self, indices: Sequence[int]) -> tuple[Parts, ...]:
        return tuple(map(self._parts, indices))

    def _parts(self, index: int) -> Parts:
        from ..builtin.part_scenes import PARTS

        _, label, part_map = _part_scene(index)
        names = PARTS[label]
        without = torch.stack([_part_scene(index, name)[0] for name in names])
        if without.shape[2:] != self._size:
            without = resize(without, self._size)
        return Parts(names, self._masks(part_map == torch.arange(len(names))[:, None, None]), without)

    def _masks(self, masks: Tensor) -> Tensor:
        """Masks (n, 128, 128) in the size of the images."""
        return F.interpolate(masks[:, None].float(), self._size, mode="nearest")[:, 0].bool()


@lru_cache(maxsize=256)  # 80 MB: a scene takes longer to draw than the network to classify it
def _part_scene(index: int, removed: str | None = None) -> tuple[Tensor, str, Tensor]:
    """Image (3, 128, 128), class and part map of a test scene, with a part removed."""
    from ..builtin.part_scenes import PART_CLASSES, draw_part_scenes

    remove = () if removed is None else (removed,)
    scenes = draw_part_scenes(1, split="test", start=index, remove=remove)
    return scenes.images[0], PART_CLASSES[int(scenes.labels[0])], scenes.part_maps[0]


class TextureDataset(Dataset):
    """``count`` style images: random crops of the bundled textures, resized to ``size`` (H, W).

    Each is a square crop of at least 48 pixels of one of four textures, rotated by a multiple of 90 degrees
    or mirrored; three in four are recolored. The fifth texture, pebbles, is left out as a test style.
    """

    def __init__(self, count: int = 256, *, size: tuple[int, int] = (64, 64)) -> None:
        self.uri = f"builtin:textures/{count}"
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        return stack([_texture_crop(i, self._size) for i in indices])


def _texture_crop(index: int, size: tuple[int, int]) -> Tensor:
    """Crop ``index`` (3, H, W) of a texture, in its own colors or recolored."""
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
