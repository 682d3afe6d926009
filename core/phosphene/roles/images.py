"""The role ``images``: a batch of images (N, C, H, W) in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from ..data.datasets import stack
from ..data.open import open_dataset
from ..errors import InputError
from ..images.io import find_images, read_image
from ..models import Model
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest, check_dense

#: Images: float (N, C, H, W), RGB, in [0, 1].
Images: TypeAlias = Annotated[Tensor, Role("images")]


#: Images whose files are read at their own size, not at the model's.
Content: TypeAlias = Annotated[Tensor, Role("images", own_size=True)]


#: How many bundled images are one batch in memory; a data set of more is read in batches.
_MOST_BUNDLED = 10_000


def check_pixels(value: Any, channels: int | None = None) -> Tensor:
    """Float images (N, C, H, W) in [0, 1], or an InputError that says what is wrong and what to do."""
    if not isinstance(value, Tensor):
        raise InputError(f"images must be a tensor (N, C, H, W), not a {type(value).__name__}")
    check_dense(value, "images")
    if not value.is_floating_point():
        raise InputError(f"images must be floats in [0, 1], not {value.dtype}: divide bytes by 255")
    if value.ndim != 4:
        hint = "; add the batch axis: images[None]" if value.ndim == 3 else ""
        raise InputError(f"images must have shape (N, C, H, W), not {tuple(value.shape)}{hint}")
    if value.numel() == 0:
        raise InputError(f"images of shape {tuple(value.shape)} are empty")
    if channels is not None and value.shape[1] != channels:
        raise InputError(f"the model takes {channels} channels, the images have {value.shape[1]}")
    low, high = (float(v) for v in value.aminmax())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        what = "are not all finite" if low != low or high != high else f"lie in [{low:.4g}, {high:.4g}]"
        raise InputError(f"pixels must lie in [0, 1], these {what}; normalisation happens inside the model")
    return value.detach().clamp(0, 1).contiguous()  # a tensor with gaps cannot be viewed in another shape


def check_images(value: Any, context: InputContext) -> Tensor:
    """Images that the model can take, on its device and in its precision."""
    model = context.model
    if model is None:
        return check_pixels(value)
    return check_pixels(value, model.input_size[0]).to(model.device, model.dtype)


def read_images(value: Any, model: Model | None = None) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as ``run`` reads them: a path, a list, a folder, ``builtin:scenes/8``.

    They are resized and cropped as for ``model``; without one they keep their own size, which must be the
    same for all. Raises InputError for what is no image.
    """
    if isinstance(value, str) and value.startswith("builtin:"):
        transform, size = (read_image, (64, 64)) if model is None else (model.transform, model.input_size[1:])
        dataset = open_dataset(value, transform, size)
        if len(dataset) > _MOST_BUNDLED:
            raise InputError(f"{value!r} are more images than a batch can hold, at most {_MOST_BUNDLED:,}")
        return dataset.read(range(len(dataset)))
    paths: list[Any] = []
    for item in as_list(value):
        paths += find_images(item) if isinstance(item, (str, Path)) and Path(item).is_dir() else [item]
    read = read_image if model is None else model.transform
    return stack([read(path) for path in paths])


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
    help = "image file or folder, repeatable; or builtin:scenes/8 (default: builtin:scenes/4)"

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
