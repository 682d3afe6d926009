"""The role ``images``: a batch of images (N, C, H, W) in [0, 1]."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..data.datasets import Dataset
from ..data.open import DATASET_SUFFIXES, open_dataset
from ..errors import InputError, UnknownName, type_name, value_repr
from ..images.decode import item_pixels, open_rgb, read_image, to_pixels
from ..images.paths import expand_path, local_path
from ..models import Model
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest, check_dense

#: Images: float (N, C, H, W), RGB, in [0, 1].
Images: TypeAlias = Annotated[Tensor, Role("images")]


#: Images whose files are read at their own size, not at the model's.
Content: TypeAlias = Annotated[Tensor, Role("images", own_size=True)]


#: How many bundled images are one batch in memory; a data set of more is read in batches.
_MOST_BUNDLED = 10_000

#: Largest side of ``size``.
_LARGEST_SIDE = 16_384


class DifferentSizesError(InputError):
    """Images of different sizes, which are no batch: ``images``, each (1, C, H, W), and their ``files``.

    ``files`` is empty where not all of them were read from files.
    """

    def __init__(self, images: Sequence[Tensor], files: Sequence[str]) -> None:
        self.images, self.files = tuple(images), tuple(files)
        sizes = sorted({tuple(image.shape[2:]) for image in images})
        listed = ", ".join(f"{height}x{width}" for height, width in sizes[:4])
        super().__init__(
            f"images of different sizes cannot be one batch: {listed}{', ...' if len(sizes) > 4 else ''} "
            "(height x width). Resize and crop files and Pillow images to one size: --image-size 256, "
            'images={"files": ..., "size": 256} or read_images(files, size=256); or run each on its own'
        )

    def __reduce__(self) -> tuple[type[DifferentSizesError], tuple[Any, Any]]:
        return DifferentSizesError, (self.images, self.files)


def image_files(value: Any) -> tuple[str, ...]:
    """The file of each image, where all images are files, as paths, folders or patterns; else empty."""
    value = value.get("files") if isinstance(value, Mapping) else value
    if isinstance(value, Tensor) or (isinstance(value, str) and value.startswith("builtin:")):
        return ()
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, (str, os.PathLike)) for item in items):
        return ()
    if any(str(item).startswith("builtin:") for item in items):
        return ()
    return tuple(str(path) for item in items for path in expand_path(item))


def check_pixels(value: Any, channels: int | None = None) -> Tensor:
    """Float images (N, C, H, W) in [0, 1], or an InputError that says what is wrong and what to do."""
    if isinstance(value, (Dataset, TorchDataset, DataLoader)):
        raise InputError(
            f"images must be a tensor (N, C, H, W), not {type_name(value)}, which is streamed: "
            "phosphene.run(name, images=dataset, out=folder)"
        )
    if not isinstance(value, Tensor):
        raise InputError(
            f"images must be a tensor (N, C, H, W), not {type_name(value)}; "
            "phosphene.read_images(value, model) reads arrays, Pillow images and files"
        )
    check_dense(value, "images")
    last = "; images (N, H, W, C) become (N, C, H, W) by images.permute(0, 3, 1, 2)"
    shape = tuple(value.shape)
    is_last = value.ndim == 4 and value.shape[3] in (1, 3) and value.shape[1] not in (1, 2, 3, 4, channels)
    if not value.is_floating_point():
        raise InputError(
            f"images must be floats in [0, 1], not {value.dtype}: "
            f"divide bytes by 255{last if is_last else ''}"
        )
    if value.ndim != 4:
        hint = "; add the batch axis: images[None]" if value.ndim == 3 else ""
        raise InputError(f"images must have shape (N, C, H, W), not {shape}{hint}")
    if value.numel() == 0:
        raise InputError(f"images of shape {shape} are empty")
    if channels is not None and value.shape[1] != channels:
        hint = last if value.shape[3] == channels else ""
        raise InputError(f"the model takes {channels} channels, the images have {value.shape[1]}{hint}")
    if channels is None and is_last:
        raise InputError(
            f"images of shape {shape} have two readings: {value.shape[1]} channels (N, C, H, W), or "
            f"{value.shape[3]} channels (N, H, W, C){last}; the first is not supported without a model"
        )
    low, high = (float(v) for v in value.aminmax())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        what = "are not all finite" if low != low or high != high else f"lie in [{low:.4g}, {high:.4g}]"
        raise InputError(f"pixels must lie in [0, 1], these {what}; normalization happens inside the model")
    return value.detach().clamp(0, 1).contiguous()  # a tensor with gaps cannot be viewed in another shape


def check_images(value: Any, context: InputContext) -> Tensor:
    """Images that the model can take, on its device and in its precision."""
    model = context.model
    if model is None:
        return check_pixels(value)
    return check_pixels(value, model.input_size[0]).to(model.device, model.dtype)


def read_images(
    value: Any, model: Model | None = None, *, size: int | tuple[int, int] | None = None
) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as ``run`` reads them.

    Args:
        value: a file, folder or glob pattern (a path or a ``file://`` URI), a Pillow image, a NumPy array
            (H, W, C) or (N, H, W, C) of bytes or of floats in [0, 1], a tensor, ``builtin:scenes/8``, or a
            list of these. ``{"files": value, "size": size}`` is the same with a size.
        model: files and Pillow images are resized and cropped as for this model; without one they keep their
            own size. Arrays and tensors are not resized.
        size: resize and crop files and Pillow images to this square, or to (H, W), instead.

    Raises:
        InputError: no image, an array with two readings, or images of different sizes.

    Example::

        from phosphene import load_model, read_images

        model = load_model("builtin:shapes-vgg")
        read_images("builtin:scenes/2", model).shape  # (2, 3, 64, 64)
    """
    if isinstance(value, Mapping):
        value, size = _read_request(value, size)
    images = list(read_items(value, model, None if size is None else _read_size(size)))
    if len({tuple(image.shape[2:]) for image in images}) > 1:
        raise DifferentSizesError([image for batch in images for image in batch.split(1)], image_files(value))
    if len(counts := sorted({image.shape[1] for image in images})) > 1:
        raise InputError(f"images of {' and '.join(map(str, counts))} channels cannot be one batch")
    return torch.cat(images)


def _read_request(value: Mapping[str, Any], size: Any) -> tuple[Any, Any]:
    """Files and size of ``{"files": ..., "size": ...}``."""
    for key in value:
        if key not in ("files", "size"):
            raise UnknownName("key", key, ("files", "size"), "images")
    if "files" not in value:
        raise InputError('images as a mapping need the key "files": {"files": ..., "size": 256}')
    return value["files"], value.get("size", size)


def _read_size(size: Any) -> tuple[int, int]:
    """(H, W) of a size: a number, "256", "256,384" or (H, W)."""
    parts = str(size).split(",") if isinstance(size, (str, int)) else size
    try:
        height, width = [int(part) for part in parts] * (2 if len(parts) == 1 else 1)
        if isinstance(size, bool) or not 1 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(
            f"an image size is a side or (height, width), at most {_LARGEST_SIDE:,} pixels, "
            f"not {value_repr(size, 40)}"
        ) from None
    return height, width


def read_items(
    value: Any, model: Model | None = None, size: tuple[int, int] | None = None
) -> Iterator[Tensor]:
    """Each image, or batch of images, among the items of ``value``: (N, C, H, W). See ``read_images``."""
    channels = None if model is None else model.input_size[0]
    fit = _image_transform(model, size)
    for item in as_list(value):
        if isinstance(item, str) and item.startswith("builtin:"):
            yield _bundled_images(item, model, size)
        elif isinstance(item, (str, os.PathLike)):
            if _names_dataset(item):
                raise InputError(f"{item} is a data set, which is streamed: run(..., images=..., out=folder)")
            for path in expand_path(item):
                yield fit(open_rgb(path))[None]
        elif (pixels := item_pixels(item, fit, channels)) is not None:
            yield check_pixels(pixels)
        elif is_dataset(item):
            kind = type_name(item)
            raise InputError(f"{kind} is a data set, which is streamed: run(..., images=..., out=folder)")
        else:
            # A value that prints in a word; a list would print all its pixels.
            short = item is None or isinstance(item, (bool, int, float))
            raise InputError(
                "images are files, folders, glob patterns, Pillow images, NumPy arrays or tensors, "
                f"not {repr(item) if short else type_name(item)}"
            )


def _image_transform(
    model: Model | None, size: tuple[int, int] | None
) -> Callable[[str | Path | Image.Image], Tensor]:
    """How a file or a Pillow image becomes an image (C, H, W): in ``size``, else as for the model."""

    def fit(image: str | Path | Image.Image) -> Tensor:
        pixels = image if isinstance(image, Image.Image) else open_rgb(image)
        if size is not None:
            fitted = ImageOps.fit(pixels, (size[1], size[0]), Image.Resampling.BICUBIC)
            return to_pixels(fitted.convert("L") if model and model.input_size[0] == 1 else fitted)
        return to_pixels(pixels) if model is None else model.transform(pixels)

    return fit


def read_dataset(value: Any, model: Model | None = None) -> Dataset:
    """The images that ``read_images`` reads, as a data set that is read in batches; see ``open_dataset``.

    A mapping with files and size is read in that size; other images as ``read_images`` does.
    """
    size = None
    if isinstance(value, Mapping) and "files" in value:
        value, size = _read_request(value, None)
        size = None if size is None else _read_size(size)
    default = (64, 64) if model is None else (model.input_size[1], model.input_size[2])
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    is_path = isinstance(value, (str, os.PathLike))
    if isinstance(value, Image.Image) or (
        is_path and not _names_dataset(value) and local_path(value).is_file()
    ):
        value = [value]
    return open_dataset(value, _image_transform(model, size), size or default)


def is_dataset(value: Any) -> bool:
    """Whether a value is read only as a data set, not as a batch of images.

    That is a ``Dataset``, a torch data set or ``DataLoader``, another sequence of items such as a Hugging
    Face data set, a manifest, a COCO file or a list of Pascal VOC.
    """
    if isinstance(value, Mapping) and not isinstance(value, (TorchDataset, DataLoader)):
        return is_dataset(value["files"]) if "files" in value else False
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (str, os.PathLike)):
        return _names_dataset(value)
    if isinstance(value, (list, tuple, Tensor, np.ndarray, Image.Image)):
        return False
    if isinstance(value, (Dataset, TorchDataset, DataLoader)):
        return True
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _names_dataset(path: str | os.PathLike[str]) -> bool:
    text = os.fspath(path)
    return isinstance(text, str) and Path(text).suffix.lower() in DATASET_SUFFIXES


def _bundled_images(uri: str, model: Model | None, size: tuple[int, int] | None) -> Tensor:
    default = (64, 64) if model is None else (model.input_size[1], model.input_size[2])
    dataset = open_dataset(uri, read_image, size or default)
    if len(dataset) > _MOST_BUNDLED:
        raise InputError(
            f"{uri!r} are more images than a batch can hold, at most {_MOST_BUNDLED:,}; "
            "stream them: run(..., stream=True, out=folder)"
        )
    return dataset.read(range(len(dataset)))


def as_list(value: Any) -> list[Any]:
    """One item or several, as a list that is not empty."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise InputError("an empty list holds no images")
    return items


def bad_images(good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
    """Values that are no images, or that the model does not accept."""
    yield "an image without a batch axis", good[0]
    yield "a five-dimensional tensor", good[None]
    yield "an empty batch", good[:0]
    yield "images of no size", good[:, :, :0]
    yield "bytes", (good * 255).to(torch.uint8)
    yield "an array that is not a tensor", good.cpu().numpy()
    yield "a list", good.tolist()
    yield "a sparse tensor", good.to_sparse()
    yield "a tensor without values", good.to("meta")
    yield "a nested tensor", torch.nested.nested_tensor(list(good), layout=torch.jagged)
    for what, value in (("NaN", float("nan")), ("inf", float("inf")), ("1.5", 1.5), ("-0.5", -0.5)):
        spoiled = good.clone()
        spoiled[-1, -1, -1, -1] = value
        yield f"a pixel of {what}", spoiled
    if context.model is not None:  # without a model, any number of channels is an image
        yield "two channels", good[:, :2]
        yield "four channels", torch.cat([good, good[:, :1]], 1)


class ImagesRole(InputRole):
    """The images that a method works on; default: one bundled scene of each of four classes."""

    name, value_type, per_image = "images", Tensor, True
    default = "builtin:scenes/4"
    metavar = "FILE|FOLDER"
    description = "images (N, C, H, W) in [0, 1]"
    help = "image file, folder or pattern, repeatable; or builtin:scenes/8 (default: builtin:scenes/4)"

    def read(self, value: Any, context: InputContext) -> Tensor:
        return read_images(value, context.model)

    def check(self, value: Any, context: InputContext) -> Tensor:
        return check_images(value, context)

    def sample(self, request: SampleRequest) -> Tensor:
        model = request.model
        return request.draw(request.count, model.input_size[0]).to(model.device, model.dtype)

    def bad_values(self, good: Tensor, context: InputContext) -> Iterator[tuple[str, Any]]:
        return bad_images(good, context)


IMAGES = ImagesRole()
