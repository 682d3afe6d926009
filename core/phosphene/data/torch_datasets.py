"""``TorchDataset``: a map-style torch data set, a ``DataLoader`` or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from ..errors import InputError
from ..images.decode import read_image
from ..models.class_names import ClassLabel
from .datasets import Batch, stack
from .items import Item, ItemDataset, Transform

#: Keys of an item, or columns, that hold an image, a label, a mask and boxes; the first that exists is read.
IMAGE_KEYS = ("image", "img", "pixel_values", "jpg", "jpeg", "png")
LABEL_KEYS = ("label", "labels", "target", "cls", "fine_label")
MASK_KEYS = ("mask", "masks")
BOX_KEYS = ("box", "boxes")


class TorchDataset(ItemDataset):
    """Anything with ``len`` and items by index: an image, a pair (image, label), or a mapping.

    An image is a Pillow image or a path, resized and cropped by ``transform``, an array (H, W, C) or a tensor
    (C, H, W) in [0, 1]. A label is a class number or name. The names of the classes are those of the data
    set's ``wnids`` or ``classes``, or of a Hugging Face ``ClassLabel``. Mappings have the keys ``image``,
    ``label``, ``mask`` and ``boxes`` (left, top, right, bottom).

    Of a ``DataLoader`` the data set is read in its own order, in its workers.

    Raises:
        InputError: items that are no images, that are random, or that need another order or collation.
    """

    def __init__(self, source: Any, transform: Transform = read_image) -> None:
        super().__init__(transform)
        self._loader = source if isinstance(source, DataLoader) else None
        self._source = source if self._loader is None else _loader_dataset(self._loader)
        if isinstance(self._source, IterableDataset) or not hasattr(self._source, "__getitem__"):
            raise InputError("the data set can only be iterated: pass a map-style one, or a list of items")
        self._names = _class_names(self._source)
        self._labels: dict[int, str | None] = {}
        self._last: tuple[int, Item] | None = None
        if len(self):
            self._refuse_random_items()

    def __len__(self) -> int:
        return len(self._source)

    def item(self, index: int) -> Item:
        last = self._last  # an image, its label and its mask are read one after another
        if last is None or last[0] != index:
            last = self._last = index, self._parse(self._source[index])
            self._labels[index] = last[1].label
        return last[1]

    def labels(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        for index in indices:
            if index not in self._labels:
                self.item(index)
        labels = [self._labels[index] for index in indices]
        return None if None in labels else tuple(label for label in labels if label is not None)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The images in order, decoded by the workers of the ``DataLoader``, if one was passed."""
        if self._loader is None or not self._loader.num_workers:
            yield from super().batches(size, start, stop)
            return
        loader = DataLoader(
            _Rows(self, range(start, len(self) if stop is None else stop)),
            batch_size=size,
            num_workers=self._loader.num_workers,
            prefetch_factor=self._loader.prefetch_factor,
            multiprocessing_context=self._loader.multiprocessing_context,
            worker_init_fn=self._loader.worker_init_fn,
            collate_fn=list,
        )
        first = start
        for rows in loader:
            indices = tuple(range(first, first + len(rows)))
            self._labels.update(zip(indices, (label for _, label in rows), strict=True))
            yield Batch(indices, stack([image for image, _ in rows]), self)
            first += len(rows)

    def _map(self, function: Callable[[int], Any], indices: Sequence[int]) -> list[Any]:
        return [function(index) for index in indices]  # not in threads: the data set need not allow them

    def _parse(self, sample: Any) -> Item:
        match sample:
            case Mapping():
                return self._parse_mapping(sample)
            case (image, Mapping() as target):
                return self._parse_mapping({**target, "image": image})
            case (image, label):
                return Item(image, self._label(label))
            case (image,):
                return Item(image)
            case tuple() | list():
                raise InputError(
                    f"an item of the data set has {len(sample)} parts: an image, a pair (image, label) and a "
                    "mapping with the keys image, label, mask and boxes are read"
                )
        return Item(sample)

    def _parse_mapping(self, sample: Mapping[str, Any]) -> Item:
        image = sample[find_column(sample, IMAGE_KEYS, "the data set")]
        label, mask, boxes = (_first(sample, keys) for keys in (LABEL_KEYS, MASK_KEYS, BOX_KEYS))
        if isinstance(mask, Tensor) and mask.ndim == 3 and mask.dtype in (torch.bool, torch.uint8):
            mask = mask.any(0)  # of several objects
        if getattr(getattr(boxes, "format", None), "name", "XYXY") != "XYXY":
            raise InputError("boxes of a data set are left, top, right and bottom: convert them to XYXY")
        corners = None
        if boxes is not None:
            rows = torch.as_tensor(boxes).reshape(-1, 4).tolist()
            corners = tuple((left, top, right, bottom) for left, top, right, bottom in rows)
        return Item(image, self._label(label), mask, corners)

    def _label(self, label: Any) -> str | None:
        if isinstance(label, str):
            return label
        number = label.item() if getattr(label, "ndim", None) == 0 else label
        if isinstance(number, bool) or not isinstance(number, int):
            return None  # several labels, fractions or none
        if self._names is None:
            return str(number)
        if not 0 <= number < len(self._names):
            raise InputError(f"label {number} of the data set is none of its {len(self._names)} classes")
        return ClassLabel(self._names[number], number)

    def _refuse_random_items(self) -> None:
        """Raise InputError where the first item differs between two reads: results could not be repeated."""
        first, again = (self._parse(self._source[0]).image for _ in range(2))
        if not torch.equal(self._pixels(first, 0), self._pixels(again, 0)):
            raise InputError(
                "the data set returns another image each time item 0 is read: "
                "leave random augmentations out of its transform"
            )


class _Rows(torch.utils.data.Dataset[tuple[Tensor, str | None]]):
    """Images and labels of some indices, for the workers of a ``DataLoader``."""

    def __init__(self, dataset: TorchDataset, indices: range) -> None:
        self._dataset, self._indices = dataset, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, row: int) -> tuple[Tensor, str | None]:
        index = self._indices[row]
        return self._dataset._image(index), self._dataset.item(index).label


def _loader_dataset(loader: DataLoader[Any]) -> Any:
    """The data set of a ``DataLoader`` whose items are its batches, but for their order."""
    advice = "pass its data set, or torch.utils.data.Subset(dataset, indices)"
    if loader.collate_fn is not default_collate and loader.batch_size is not None:
        raise InputError(f"the DataLoader changes its batches by a collate_fn: {advice}")
    plain = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    if not plain or type(loader.sampler) not in (SequentialSampler, RandomSampler) or loader.drop_last:
        raise InputError(f"the DataLoader selects images by a sampler or by drop_last: {advice}")
    return loader.dataset


def _class_names(source: Any) -> Sequence[str] | None:
    """The names of a data set's classes by number: WordNet ids before names, which can be of two classes."""
    while isinstance(source, Subset):
        source = source.dataset
    features = getattr(source, "features", None)
    if isinstance(features, Mapping):  # Hugging Face
        names = getattr(_first(features, LABEL_KEYS), "names", None)
    else:
        names = getattr(source, "wnids", None) or getattr(source, "classes", None)
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        return None
    return [name if isinstance(name, str) else ", ".join(name) for name in names]


def find_column(names: Iterable[str], keys: Sequence[str], source: str, *, required: bool = True) -> str:
    """The column for one of the keys; "" if it is absent and not required. InputError for several columns."""
    names = tuple(names)
    existing = [key for key in keys if key in names]
    if len(existing) > 1:
        raise InputError(f"{source} has several columns that may be the {keys[0]}: {', '.join(existing)}")
    if required and not existing:
        raise InputError(f"{source} has no column {keys[0]!r} but {', '.join(map(repr, names)) or 'none'}")
    return existing[0] if existing else ""


def _first(sample: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((sample[key] for key in keys if key in sample), None)
