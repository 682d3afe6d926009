"""The input roles: how each is checked before work starts, and how it is made from what a person gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batching import batch_size
from .builtin.textures import TEXTURES, draw_texture
from .datasets import Dataset, TensorDataset, open_dataset, stack
from .errors import InputError, UnknownName
from .images import find_images, read_image, resize
from .models import Model, load_model
from .results import TrainedNetwork, load_result
from .targets import parse_target

#: Bundled pictures that the gallery shows: one scene of each of four classes.
DEFAULT_IMAGES = "builtin:scenes/4"
BUNDLED_STYLIZER = "builtin:shapes-styles"


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
    return value.detach().clamp(0, 1) if low < 0 or high > 1 else value.detach()


def check_images(value: Any, model: Model | None, given: Mapping[str, Any]) -> Tensor:
    # A copy: the result keeps its pictures, whatever their owner does with his.
    return _seen(value, model).clone()


def _seen(value: Any, model: Model | None) -> Tensor:
    """Pictures that the model can take, where it is and in its precision."""
    if model is None:
        return check_pixels(value)
    images = check_pixels(value, model.input_size[0]).to(model.device, model.dtype)
    model.see(images)
    return images


def check_labels(value: Any, model: Model | None, given: Mapping[str, Any]) -> Tensor:
    images = given.get("images")
    labels = value
    if not isinstance(value, Tensor):
        items = [value] if isinstance(value, (int, str)) else value
        if not isinstance(items, Sequence) or not items or model is None:
            raise InputError(f"labels must be class indices, one per image, not a {type(value).__name__}")
        labels = torch.tensor([model.class_index(item) for item in items])
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
    return labels.clone()


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
    images = value.images if isinstance(value, TensorDataset) else value
    dataset = TensorDataset(_seen(images, model)) if isinstance(images, Tensor) else value
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
    if isinstance(value, Model):
        return value
    return load_model("builtin:shapes-vgg" if value is None else value)


def make_images(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    if isinstance(value, Tensor):
        return value
    value = DEFAULT_IMAGES if value is None else value
    if isinstance(value, str) and value.startswith("builtin:"):
        dataset = make_dataset(value, model, given)
        return dataset.read(range(len(dataset)))
    pictures = []
    for item in _several(value):
        paths = find_images(item) if isinstance(item, (str, Path)) and Path(item).is_dir() else [item]
        pictures += [read_image(path) if model is None else model.transform(path) for path in paths]
    return stack(pictures)


def _several(value: Any) -> list[Any]:
    """One thing or a list of them, as a list that is not empty."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise InputError("an empty list holds no pictures")
    return items


def make_labels(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    """Names, indices, or where there are none what the model itself says of the images."""
    if value is not None or model is None:
        return value
    images = check_images(given["images"], model, given)
    with model.guard(), torch.no_grad():
        return torch.cat([model(some).argmax(1) for some in images.split(batch_size(model))])


def make_target(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    """As it is; where there is none and no image either to predict one of, the first five classes."""
    if value is None and model is not None and "images" not in given:
        return tuple(range(min(5, model.class_count)))
    return value


def make_dataset(value: Any, model: Model | None, given: Mapping[str, Any]) -> Dataset:
    size = (64, 64) if model is None else model.input_size[1:]
    transform = read_image if model is None else model.transform
    return open_dataset(value if value is not None else "builtin:scenes", transform, size)


def make_texture(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    """Sample pictures at their own size, the longer side at most 256 pixels."""
    if isinstance(value, Tensor):
        return value
    value = f"builtin:{TEXTURES[0]}" if value is None else value
    return stack([_drawn_or_read(item) for item in _several(value)])


def make_styles(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    """Style pictures, each cropped to its central square and resized to 128 x 128."""
    if isinstance(value, Tensor):
        return value
    squares = []
    for item in _several([f"builtin:{name}" for name in TEXTURES[:4]] if value is None else value):
        picture = _drawn_or_read(item)
        side = min(picture.shape[1:])
        top, left = (picture.shape[1] - side) // 2, (picture.shape[2] - side) // 2
        squares.append(resize(picture[:, top : top + side, left : left + side], (128, 128)))
    return torch.stack(squares)


def _drawn_or_read(value: Any) -> Tensor:
    if isinstance(value, str) and value.startswith("builtin:"):
        name = value.removeprefix("builtin:")
        if name not in TEXTURES:
            raise UnknownName("bundled texture", name, TEXTURES)
        return draw_texture(name)
    picture = read_image(value)
    shrink = min(1.0, 256 / max(picture.shape[1:]))
    height, width = (max(1, round(side * shrink)) for side in picture.shape[1:])
    return resize(picture, (height, width))


def make_stylizer(value: Any, model: Model | None, given: Mapping[str, Any]) -> Any:
    if isinstance(value, TrainedNetwork):
        return value
    if value is None or value == BUNDLED_STYLIZER:
        bundled = load_result(Path(__file__).parent / "builtin" / "weights" / "shapes-styles")
        return dataclasses.replace(bundled, uri=BUNDLED_STYLIZER)  # not where this machine has it
    if not isinstance(value, (str, Path)):
        raise InputError(f"a stylizer is a training's result or its folder, not a {type(value).__name__}")
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
