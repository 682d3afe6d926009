"""The role ``dataset``: many images, read in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..data.datasets import Dataset as _Dataset
from ..data.datasets import Parts, TensorDataset
from ..data.open import open_dataset
from ..errors import InputError, type_name
from ..images.decode import read_image
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest
from .images import bad_images, check_images

#: Many images, read in batches: a folder, a manifest, a torch data set, a tensor, the bundled scenes.
Dataset: TypeAlias = Annotated[_Dataset, Role("dataset")]


class DatasetRole(InputRole):
    """A data set; default: the bundled scenes."""

    name, value_type, default, size_name = "dataset", _Dataset, "builtin:scenes", "dataset"
    optional_is_none = True
    metavar = "FOLDER|FILE"
    description = "a ``Dataset``, or images (N, C, H, W) in [0, 1]"
    help = (
        "folder of images, manifest (.csv, .parquet), COCO file (.json), Pascal VOC folder, "
        "builtin:scenes/1000, builtin:part-scenes/100 or builtin:textures/64 (default: builtin:scenes)"
    )

    def read(self, value: Any, context: InputContext) -> _Dataset:
        if context.model is None:
            return open_dataset(value, read_image, (64, 64))
        return open_dataset(value, context.model.transform, context.model.input_size[1:])

    def check(self, value: Any, context: InputContext) -> _Dataset:
        dataset = TensorDataset(value) if isinstance(value, Tensor) else value
        if isinstance(dataset, TensorDataset):
            dataset = dataclasses.replace(dataset, images=check_images(dataset.images, context))
        if not isinstance(dataset, _Dataset):
            raise InputError(
                f"a data set must be a phosphene Dataset or a tensor, not {type_name(value)}; "
                "phosphene.data.open_dataset(value, model.transform, size) opens files and other data sets"
            )
        if len(dataset) == 0:
            raise InputError("the data set is empty")
        return dataset

    def fingerprint(self, value: _Dataset | None) -> Any:
        return None if value is None else [super().fingerprint(value), len(value)]

    def sample(self, request: SampleRequest) -> TensorDataset:
        model, count = request.model, request.dataset_size
        # A second data set has other images: two equal sets have a distance of 0 and no difference.
        before = sum(isinstance(value, TensorDataset) for value in request.inputs.values()) * count
        images = request.draw(before + count, model.input_size[0])[before:].to(model.dtype)
        classes = [str(i % min(request.classes, model.class_count or 1)) for i in range(count)]
        masks = _box_masks(count, request.size)
        return TensorDataset(images, classes, masks, list(map(_sample_parts, images, masks)))

    def bad_values(self, good: _Dataset, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "an empty data set", TensorDataset(torch.zeros(0, 3, 32, 32))
        yield "a path", "somewhere"
        yield from bad_images(torch.rand(4, 3, 32, 32), dataclasses.replace(context, model=None))


def _box_masks(count: int, size: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) bool of objects: a centered box in each image, each of another size."""
    height, width = size
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for n, mask in enumerate(masks):
        top, left = (side * (n + 1) // (3 * count) for side in size)
        mask[top : height - top, left : width - left] = True
    return masks


def _sample_parts(image: Tensor, mask: Tensor) -> Parts:
    """The upper and the lower part of an object, each removed by drawing it in gray."""
    upper = torch.arange(len(mask)) < len(mask) // 2
    masks = torch.stack([mask & upper[:, None], mask & ~upper[:, None]])
    return Parts(("upper", "lower"), masks, torch.where(masks[:, None].to(image.device), 0.5, image))


DATASET = DatasetRole()
