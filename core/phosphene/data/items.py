"""``ItemDataset``: images that are decoded one by one, with labels, masks and boxes at their pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import InputError, type_name
from ..images.decode import array_masks, decode_image, item_pixels, open_rgb, read_image, to_rgb
from ..images.paths import MASK_SUFFIX
from .datasets import Batch, Dataset, batch_indices, stack

#: Reads a file, or a Pillow image, as a tensor (C, H, W); resizes and crops it as for a model.
Transform = Callable[[Any], Tensor]

#: A box in pixels: left, top, right, bottom; right and bottom are outside the object.
Box = tuple[float, float, float, float]

#: Threads that decode: decoding releases the interpreter lock.
_THREADS = 4


@dataclass(frozen=True)
class Item:
    """One image of a data set as it is stored, with its annotations.

    ``image`` and ``mask`` are a path, the bytes of a file, a Pillow image, an array or a tensor; ``mask`` may
    also be a function that returns one. ``boxes`` are in pixels of the image at its own size; ``size`` is
    that size (H, W) where the annotation states it.
    """

    image: Any
    label: str | None = None
    mask: Any = None
    boxes: tuple[Box, ...] | None = None
    size: tuple[int, int] | None = None


class ItemDataset(Dataset):
    """Images that ``item(index)`` describes; masks and boxes are resized and cropped like the image.

    A mask file, or that of the name ``dog.mask.png`` beside ``dog.jpg``, is white on the object. Where there
    are boxes and no masks, the object is the union of its boxes.
    """

    def __init__(self, transform: Transform = read_image) -> None:
        self.transform = transform

    @abstractmethod
    def item(self, index: int) -> Item:
        """The image at an index, not decoded."""

    def read(self, indices: Sequence[int]) -> Tensor:
        return stack(self._map(self._image, indices))

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        labels = [self.item(index).label for index in indices]
        return None if None in labels else tuple(label for label in labels if label is not None)

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        masks = self._map(self._mask, indices)
        present = [mask for mask in masks if mask is not None]
        return torch.stack(present) if len(present) == len(masks) else None

    def boxes(self, indices: Sequence[int]) -> tuple[Tensor, ...] | None:
        boxes = self._map(self._boxes, indices)
        present = [box for box in boxes if box is not None]
        return tuple(present) if len(present) == len(boxes) else None

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The images in order; the next batch is decoded while the last one is used."""
        parts = batch_indices(len(self), size, start, stop)
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending = [pool.submit(self.read, part) for part in parts[:1]]
            for number, part in enumerate(parts):
                images = pending.pop().result()
                pending += [pool.submit(self.read, following) for following in parts[number + 1 : number + 2]]
                yield Batch(part, images, self)

    def _map(self, function: Callable[[int], Any], indices: Sequence[int]) -> list[Any]:
        with ThreadPoolExecutor(max_workers=_THREADS) as pool:
            return list(pool.map(function, indices))

    def _image(self, index: int) -> Tensor:
        return _single(self._pixels(self.item(index).image, index))

    def _pixels(self, image: Any, index: int) -> Tensor:
        image = _loaded(image)
        if isinstance(image, (str, Path)):
            return self.transform(image)[None]
        if (pixels := item_pixels(image, self.transform)) is None:
            raise InputError(f"image {self.id(index)} of the data set is {type_name(image)}")
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            extremes = f"[{float(pixels.min()):.4g}, {float(pixels.max()):.4g}]"
            raise InputError(
                f"image {self.id(index)} of the data set lies in {extremes}, not in [0, 1]: "
                "leave normalization out of its transform, the model does it"
            )
        return pixels

    def _mask(self, index: int) -> Tensor | None:
        item = self.item(index)
        if item.mask is None and isinstance(item.image, (str, Path)):
            beside = Path(item.image).with_suffix(MASK_SUFFIX)
            item = Item(item.image, mask=beside) if beside.is_file() else item
        if callable(item.mask):
            item = replace(item, mask=item.mask())
        if item.mask is not None:
            if isinstance(item.mask, np.ndarray):
                return self._fit(array_masks(item.mask)[0], index)
            if isinstance(item.mask, Tensor) and item.mask.dtype == torch.bool:
                return self._fit(item.mask.reshape(item.mask.shape[-2:]), index)
            return _single(self._pixels(item.mask, index)).mean(0) > 0.5
        return self._drawn(item, index) if item.boxes is not None else None

    def _boxes(self, index: int) -> Tensor | None:
        item = self.item(index)
        if item.boxes is None:
            return None
        single = [replace(item, boxes=(box,)) for box in item.boxes]
        drawn = [self._drawn(one, index) for one in single]
        return torch.tensor([bounding_box(mask) for mask in drawn if mask.any()]).reshape(-1, 4)

    def _drawn(self, item: Item, index: int) -> Tensor:
        """The union of an item's boxes as a mask of the image that ``read`` returns."""
        height, width = self._size(item, index)
        canvas = Image.new("L", (width, height))
        draw = ImageDraw.Draw(canvas)
        for left, top, right, bottom in item.boxes or ():
            corners = [round(left), round(top), round(right) - 1, round(bottom) - 1]
            if corners[2] >= corners[0] and corners[3] >= corners[1]:
                draw.rectangle(corners, fill=255)
        return self._fit(torch.from_numpy(np.array(canvas)) > 0, index, item)

    def _size(self, item: Item, index: int) -> tuple[int, int]:
        """The size (H, W) of an image before the transform; InputError where its source states another."""
        image = _loaded(item.image)
        if isinstance(image, Tensor):
            return image.shape[-2], image.shape[-1]
        if isinstance(image, np.ndarray):
            return image.shape[0], image.shape[1]
        image = to_rgb(image) if isinstance(image, Image.Image) else open_rgb(image)
        if item.size is not None and item.size != (image.height, image.width):
            raise InputError(
                f"image {self.id(index)} is {image.height}x{image.width}, its annotation is for "
                f"{item.size[0]}x{item.size[1]} pixels"
            )
        return image.height, image.width

    def _fit(self, mask: Tensor, index: int, item: Item | None = None) -> Tensor:
        """A mask at the image's own size as one of the image that ``read`` returns."""
        item = item or self.item(index)
        if isinstance(item.image, (Tensor, np.ndarray)):
            return mask
        white = Image.fromarray(mask.numpy().astype(np.uint8) * 255).convert("RGB")
        return self.transform(white).mean(0) > 0.5


def _loaded(image: Any) -> Any:
    """A Pillow image for the content of a file, or for Hugging Face's mapping of it; else unchanged."""
    if isinstance(image, Mapping) and {*image} == {"bytes", "path"}:
        image = image["bytes"] or image["path"]
    return decode_image(image) if isinstance(image, bytes) else image


def _single(images: Tensor) -> Tensor:
    """The image of a batch of one."""
    if len(images) != 1:
        raise InputError(f"an item of a data set holds one image, not {len(images)}")
    return images[0]


def bounding_box(mask: Tensor) -> Box:
    """The smallest box that holds a mask's pixels."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
