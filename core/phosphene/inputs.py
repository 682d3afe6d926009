"""The input roles: how each is checked before work starts, and how it is made from what a person gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .builtin.textures import TEXTURES, draw_texture
from .datasets import Dataset, TensorDataset, open_dataset
from .errors import InputError, UnknownName
from .images import find_images, read_image, resize
from .models import Model, load_model
from .results import TrainedNetwork, load_result
from .targets import parse_target

#: Bundled pictures that the gallery shows: one scene of each of four classes.
DEFAULT_IMAGES = "builtin:scenes/4"


@dataclass(frozen=True)
class RoleKind:
    """What a role needs: a check of finished values, and a way to make one from a person's.

    ``check(value, model, given)`` and ``make(value, model, given)`` see the inputs before theirs;
    ``make`` is called with None for an input that was left out.
    """

    check: Callable[[Any, Model | None, Mapping[str, Any]], Any]
    make: Callable[[Any, Model | None, Mapping[str, Any]], Any]


# --- checks ----------------------------------------------------------------------------------


def check_model(value: Any, model: Model | None, given: Mapping[str, Any]) -> Model:
    if not isinstance(value, Model):
        hint = "load_model(module, mean=..., std=...) makes one of your module"
        raise InputError(f"a model must be a phosphene Model, not a {type(value).__name__}: {hint}")
    return value


def check_pixels(value: Any, channels: int | None = None) -> Tensor:
    """Float pictures (N, C, H, W) in [0, 1], or an InputError that says what is wrong and what to do."""
    if not isinstance(value, Tensor):
        raise InputError(f"images must be a tensor (N, C, H, W), not a {type(value).__name__}")
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
    value = value.detach().clamp(0, 1) if low < 0 or high > 1 else value.detach()
    return value.clone() if value.is_inference() else value


def check_images(value: Any, model: Model | None, given: Mapping[str, Any]) -> Tensor:
    if model is None:
        return check_pixels(value)
    images = check_pixels(value, model.input_size[0]).to(model.device, model.dtype)
    model.see(images)
    return images


def check_labels(value: Any, model: Model | None, given: Mapping[str, Any]) -> Tensor:
    images = given.get("images")
    labels = value if isinstance(value, Tensor) else _as_labels(value, model)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"labels must be class indices of shape (N,), not {tuple(labels.shape)} {labels.dtype}"
        )
    if isinstance(images, Tensor) and len(labels) != len(images):
        raise InputError(f"{len(images)} images need as many labels, not {len(labels)}")
    if model is not None:
        labels = labels.to(model.device, torch.int64)
        for index in labels.tolist():
            model.class_index(index)
    return labels.clone() if labels.is_inference() else labels


def _as_labels(value: Any, model: Model | None) -> Tensor:
    items = [value] if isinstance(value, (int, str)) else value
    if not isinstance(items, Sequence) or model is None:
        raise InputError(f"labels must be class indices, one per image, not a {type(value).__name__}")
    return torch.tensor([model.class_index(i) for i in items])


def check_target(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    if model is None:
        raise InputError("a target needs a model, given before it")
    target = parse_target(value, model)
    images = given.get("images")
    index = getattr(target, "index", None)
    if isinstance(index, tuple) and isinstance(images, Tensor) and len(index) != len(images):
        raise InputError(f"{len(images)} images need one class or one each, not {len(index)}")
    return target


def check_dataset(value: Any, model: Model | None, given: Mapping[str, Any]) -> Dataset:
    dataset = TensorDataset(check_images(value, model, given)) if isinstance(value, Tensor) else value
    if not isinstance(dataset, Dataset):
        raise InputError(f"a data set must be a phosphene Dataset or a tensor, not a {type(value).__name__}")
    if len(dataset) == 0:
        raise InputError("the data set is empty")
    return dataset


def check_stylizer(value: Any, model: Model | None, given: Mapping[str, Any]) -> TrainedNetwork:
    if not isinstance(value, TrainedNetwork):
        raise InputError(
            f"needs what a training method gives, or its saved folder, not a {type(value).__name__}"
        )
    return value


# --- making them from what a person gives ----------------------------------------------------


def make_model(value: Any, model: Model | None, given: Mapping[str, Any]) -> Model:
    return value if isinstance(value, Model) else load_model(value or "builtin:shapes-vgg")


def make_images(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    if isinstance(value, Tensor):
        return value
    size = (64, 64) if model is None else (model.input_size[1], model.input_size[2])
    value = value if value is not None else DEFAULT_IMAGES
    if isinstance(value, str) and value.startswith("builtin:"):
        dataset = open_dataset(value, read_image, size)
        return dataset.read(range(len(dataset)))
    transform = read_image if model is None else model.transform
    pictures = [transform(path) for path in _paths(value)]
    shapes = {tuple(p.shape) for p in pictures}
    if len(shapes) > 1:
        raise InputError(f"pictures of different sizes cannot be one batch: {sorted(shapes)}")
    return torch.stack(pictures)


def _paths(value: Any) -> list[Path]:
    items = [value] if isinstance(value, (str, Path)) else list(value)
    paths: list[Path] = []
    for item in items:
        paths += find_images(item) if Path(item).is_dir() else [Path(item)]
    return paths


def make_labels(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    """Names, indices, or where there are none what the model itself says of the images."""
    if value is not None or model is None:
        return value
    with model.guard(), torch.inference_mode():
        return model(check_images(given["images"], model, given)).argmax(1)


def make_target(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    if value is None and "images" not in given:
        return tuple(range(min(5, model.class_count))) if model else None
    return value


def make_dataset(value: Any, model: Model | None, given: Mapping[str, Any]) -> Dataset:
    size = (64, 64) if model is None else (model.input_size[1], model.input_size[2])
    transform = read_image if model is None else model.transform
    return open_dataset(value if value is not None else "builtin:scenes", transform, size)


def make_texture(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    """Sample pictures at their own size, the longer side at most 256 pixels."""
    if isinstance(value, Tensor):
        return value
    pictures = [
        _drawn_or_read(v)
        for v in ([value or f"builtin:{TEXTURES[0]}"] if not isinstance(value, list) else value)
    ]
    return torch.stack(pictures)


def make_styles(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    """Style pictures, each cropped to its central square and resized to 128 x 128."""
    if isinstance(value, Tensor):
        return value
    names = [f"builtin:{t}" for t in TEXTURES[:4]] if value is None else value
    names = [names] if isinstance(names, (str, Path)) else names
    squares = []
    for name in names:
        picture = _drawn_or_read(name)
        side = min(picture.shape[1:])
        top, left = (picture.shape[1] - side) // 2, (picture.shape[2] - side) // 2
        squares.append(resize(picture[:, top : top + side, left : left + side], (128, 128)))
    return torch.stack(squares)


def _drawn_or_read(value: str | Path) -> Tensor:
    if isinstance(value, str) and value.startswith("builtin:"):
        name = value.removeprefix("builtin:")
        if name not in TEXTURES:
            raise UnknownName("bundled texture", name, TEXTURES)
        return draw_texture(name)
    picture = read_image(value)
    longer = max(picture.shape[1:])
    if longer <= 256:
        return picture
    height, width = (round(s * 256 / longer) for s in picture.shape[1:])
    return resize(picture, (max(1, height), max(1, width)))


def make_stylizer(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    if isinstance(value, TrainedNetwork):
        return value
    if value is None or value == "builtin:shapes-styles":
        value = Path(__file__).parent / "builtin" / "weights" / "shapes-styles"
    return load_result(value)


ROLES: dict[str, RoleKind] = {
    "model": RoleKind(check_model, make_model),
    "images": RoleKind(check_images, make_images),
    "labels": RoleKind(check_labels, make_labels),
    "target": RoleKind(check_target, make_target),
    "dataset": RoleKind(check_dataset, make_dataset),
    "texture": RoleKind(check_images, make_texture),
    "styles": RoleKind(check_images, make_styles),
    "stylizer": RoleKind(check_stylizer, make_stylizer),
}
