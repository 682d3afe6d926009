"""The input roles: how each is made from what a person gives, and how it is checked before work starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..builtin.autoencoder import AUTOENCODER, load_autoencoder
from ..builtin.denoiser import DENOISER, load_denoiser
from ..builtin.textures import TEXTURES, load_texture
from ..data.bundled import SceneDataset
from ..data.datasets import Dataset, TensorDataset, stack
from ..data.open import open_dataset
from ..errors import InputError, UnknownName
from ..generative.denoisers import Denoiser, load_pipeline
from ..generative.generators import Generator
from ..images.color import resize
from ..images.io import find_images, read_image
from ..models import Model, load_model
from ..models.batch_size import batch_size
from ..results import Result, TrainedNetwork, load_result
from ..targets.parse import parse_target

BUNDLED_STYLIZER = "builtin:shapes-styles"


BUNDLED_ADAPTIVE_STYLIZER = "builtin:shapes-adaptive"


BUNDLED_DENOISER = f"builtin:{DENOISER}"


BUNDLED_GENERATOR = f"builtin:{AUTOENCODER}"


#: The inputs that stand before one, by name; what reads or checks a value knows them and the model.
EarlierInputs = Mapping[str, Any]


Step = Callable[[Any, Model | None, EarlierInputs], Any]


@dataclass(frozen=True)
class RoleKind:
    """What a role needs: its finished type, what stands for one left out, reading what a person gives.

    ``check(value, model, given)`` refuses a finished value that no method can work with.
    """

    finished: type
    default: Any
    read: Step
    check: Step

    def make(self, value: Any, model: Model | None, given: EarlierInputs) -> Any:
        """A finished value of what a person gives; None for an input that was left out."""
        if isinstance(value, self.finished):
            return value
        return self.read(self.default if value is None else value, model_for_inputs(model, given), given)


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
    return value.detach().clamp(0, 1).contiguous()  # so that any view of it works


def _check_images(value: Any, model: Model | None, given: EarlierInputs) -> Tensor:
    """Pictures that the model can take, where it is and in its precision."""
    if model is None:
        return check_pixels(value)
    return check_pixels(value, model.input_size[0]).to(model.device, model.dtype)


def model_for_inputs(model: Model | None, inputs: EarlierInputs) -> Model | None:
    """The model at the size of the first images among the inputs, where its own input size is not known."""
    if model is None or model.size_known:
        return model
    for value in inputs.values():
        images = value.read([0]) if isinstance(value, Dataset) and len(value) else value
        if isinstance(images, Tensor) and images.ndim == 4:
            return model.for_images(images)
    return model


def _check_labels(value: Any, model: Model | None, given: EarlierInputs) -> Tensor:
    items = value.tolist() if isinstance(value, Tensor) else value
    items = [items] if isinstance(items, (int, str)) else items
    if model is None or not isinstance(items, Sequence) or not items:
        raise InputError(f"labels must be classes of a model, one per image, not a {type(value).__name__}")
    indices = [model.class_index(item) for item in items]
    _check_count(indices, given, "label")
    return torch.tensor(indices, device=model.device)


def _check_masks(value: Any, model: Model | None, given: EarlierInputs) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"masks must be a bool tensor (N, H, W), true in the object, not {kind}")
    expected = tuple(given["images"][:, 0].shape)
    if tuple(value.shape) != expected:
        raise InputError(f"masks must have the images' shape {expected}, not {tuple(value.shape)}")
    return value.to(given["images"].device)


def _check_start(value: Any, model: Model | None, given: EarlierInputs) -> Tensor | None:
    if value is None:
        return None
    start, count = _check_images(value, model, given), image_count(given)
    if "images" in given and start.shape[1:] != given["images"].shape[1:]:
        expected, found = tuple(given["images"].shape[1:]), tuple(start.shape[1:])
        raise InputError(f"start pictures must have the images' shape {expected}, not {found}")
    if count is None:
        return start
    if len(start) not in (1, count):
        raise InputError(f"needs one picture to start from, or {count}, not {len(start)}")
    return start.expand(count, -1, -1, -1).contiguous()


def image_count(given: EarlierInputs) -> int | None:
    """How many images a call is about: those given, or one for each class of a target; None if none says."""
    for value in given.values():
        if isinstance(value, Tensor) and value.ndim == 4:
            return len(value)
        if isinstance(index := getattr(value, "index", None), tuple):
            return len(index)
    return None


def _check_guide(value: Any, model: Model | None, given: EarlierInputs) -> Tensor | None:
    return None if value is None else _check_images(value, model, given)


def _check_target(value: Any, model: Model | None, given: EarlierInputs) -> Any:
    if model is None:
        raise InputError("a target needs a model, given before it")
    target = parse_target(value, model)
    if isinstance(index := getattr(target, "index", None), tuple):
        _check_count(index, given, "class")
    return target


def _check_count(values: Sequence[Any], given: EarlierInputs, what: str) -> None:
    if "images" in given and len(values) != len(given["images"]):
        raise InputError(f"{len(given['images'])} images need one {what} each, not {len(values)}")


def _check_dataset(value: Any, model: Model | None, given: EarlierInputs) -> Dataset:
    dataset = TensorDataset(value) if isinstance(value, Tensor) else value
    if isinstance(dataset, TensorDataset):
        dataset = dataclasses.replace(dataset, images=_check_images(dataset.images, model, given))
    if not isinstance(dataset, Dataset):
        raise InputError(f"a data set must be a phosphene Dataset or a tensor, not a {type(value).__name__}")
    if len(dataset) == 0:
        raise InputError("the data set is empty")
    return dataset


def _check_made(kind: type, how: str) -> Step:
    def check(value: Any, model: Model | None, given: EarlierInputs) -> Any:
        if not isinstance(value, kind):
            raise InputError(f"needs a {kind.__name__}, {how}, not a {type(value).__name__}")
        return value

    return check


def _read_model(value: Any, model: Model | None, given: EarlierInputs) -> Model:
    """A model by its URI, alone or with what else ``load_model`` is told, as results record it."""
    if not isinstance(value, Mapping):
        return load_model(value)
    settings = {str(name): setting for name, setting in value.items()}
    uri = settings.pop("uri", None)
    if not isinstance(uri, str):
        raise InputError('a model with settings is {"uri": "scheme:name", "weights": ..., ...}')
    try:
        return load_model(uri, **settings)
    except TypeError as error:
        raise InputError(f"{uri} cannot be loaded with {settings}: {error}") from error


def read_images(value: Any, model: Model | None = None) -> Tensor:
    """Pictures (N, C, H, W) in [0, 1] as ``run`` reads them: a path, several, a folder, ``builtin:scenes/8``.

    They come as ``model`` was trained on them; without one at their own size, which must be the same.
    Raises InputError for what is no picture.
    """
    if isinstance(value, str) and value.startswith("builtin:"):
        dataset = _read_dataset(value, model, {})
        return dataset.read(range(len(dataset)))
    paths: list[Any] = []
    for item in _several(value):
        paths += find_images(item) if isinstance(item, (str, Path)) and Path(item).is_dir() else [item]
    read = read_image if model is None else model.transform
    return stack([read(path) for path in paths])


def _several(value: Any) -> list[Any]:
    """One thing or a list of them, as a list that is not empty."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise InputError("an empty list holds no pictures")
    return items


def _read_labels(value: Any, model: Model | None, given: EarlierInputs) -> Any:
    """Names or numbers as they are; where there are none what the model itself says of the images."""
    if value is not None or model is None:
        return value
    images = _check_images(given["images"], model, given)
    with model.guard(), torch.no_grad():
        return torch.cat([model(some).argmax(1) for some in images.split(batch_size(model))])


def _read_masks(value: Any, model: Model | None, given: EarlierInputs) -> Tensor | None:
    """What is white in mask pictures; where there are none, the truth of the bundled scenes."""
    if value is not None:
        return read_images(value, model).mean(1) > 0.5
    images = given["images"]
    for biased in (False, True):
        scenes, places = SceneDataset(size=images.shape[2:], biased=biased), range(len(images))
        if torch.equal(images.float().cpu(), scenes.read(places)):
            return scenes.masks(places)
    return None


def _read_start(value: Any, model: Model | None, given: EarlierInputs) -> Tensor | None:
    """Pictures, or those that a saved result made; none where nobody gave any."""
    if isinstance(value, (str, Path)) and Path(value, "result.json").is_file():
        value = load_result(value)
    if isinstance(value, Result):
        value = stack([panel.image for group in value.panels() for panel in group if panel.is_output])
        return value if model is None else value[:, : model.input_size[0]]
    return None if value is None else read_images(value, model)


def _read_target(value: Any, model: Model | None, given: EarlierInputs) -> Any:
    """As it is; where there is none and no image either to predict one of, the first five classes."""
    if value is None and model is not None and "images" not in given:
        return tuple(range(min(5, model.class_count)))
    return value


def _read_dataset(value: Any, model: Model | None, given: EarlierInputs) -> Dataset:
    if model is None:
        return open_dataset(value, read_image, (64, 64))
    return open_dataset(value, model.transform, model.input_size[1:])


def _read_texture(value: Any, model: Model | None, given: EarlierInputs) -> Tensor:
    """Sample pictures at their own size, which must be the same."""
    return stack([_drawn_or_read(item) for item in _several(value)])


def _read_guide(value: Any, model: Model | None, given: EarlierInputs) -> Tensor | None:
    return None if value is None else _read_texture(value, model, given)


def _read_styles(value: Any, model: Model | None, given: EarlierInputs) -> Tensor:
    """Style pictures' central squares, as high as the shorter side of the images they are for, or 128."""
    wanted = min(given["images"].shape[2:]) if "images" in given else 128
    squares = []
    for picture in map(_drawn_or_read, _several(value)):
        side = min(picture.shape[1:])
        top, left = (picture.shape[1] - side) // 2, (picture.shape[2] - side) // 2
        squares.append(resize(picture[:, top : top + side, left : left + side], (wanted, wanted)))
    return stack(squares)


def _drawn_or_read(value: Any) -> Tensor:
    if isinstance(value, str) and value.startswith("builtin:"):
        name = value.removeprefix("builtin:")
        if name not in TEXTURES:
            raise UnknownName("bundled texture", name, TEXTURES)
        return load_texture(name)
    return read_image(value)


def _read_stylizer(value: Any, model: Model | None, given: EarlierInputs) -> Any:
    if not isinstance(value, (str, Path)):
        raise InputError(f"a stylizer is a training's result or its folder, not a {type(value).__name__}")
    return load_result(value)


def _read_denoiser(value: Any, model: Model | None, given: EarlierInputs) -> Denoiser:
    """The bundled diffusion model by its name, another by its folder."""
    if value == BUNDLED_DENOISER:
        return load_denoiser()
    if not isinstance(value, (str, Path)):
        raise InputError(
            f"a diffusion model is a Denoiser or a pipeline's folder, not a {type(value).__name__}"
        )
    return load_pipeline(value)


def _read_generator(value: Any, model: Model | None, given: EarlierInputs) -> Any:
    """The bundled autoencoder by its name, or what a training made, itself or its folder."""
    if value == BUNDLED_GENERATOR:
        return load_autoencoder()
    made = load_result(value) if isinstance(value, (str, Path)) else value
    if not isinstance(made, TrainedNetwork):
        return made  # for the check to refuse
    if isinstance(made.network, Generator):
        made.network.uri = made.uri
    return made.network


_STYLES = [f"builtin:{name}" for name in TEXTURES[:4]]


#: The roles whose rows belong to the images, one each.
PER_IMAGE = ("images", "labels", "masks", "start", "texture")


#: Every role by name. The bundled pictures are one scene of each of four classes.
ROLES: dict[str, RoleKind] = {
    "model": RoleKind(
        Model,
        "builtin:shapes-vgg",
        _read_model,
        _check_made(Model, "which load_model(module, mean=..., std=...) makes of a module of yours"),
    ),
    "images": RoleKind(
        Tensor, "builtin:scenes/4", lambda value, model, given: read_images(value, model), _check_images
    ),
    "labels": RoleKind(Tensor, None, _read_labels, _check_labels),
    "masks": RoleKind(Tensor, None, _read_masks, _check_masks),
    "start": RoleKind(Tensor, None, _read_start, _check_start),
    "guide": RoleKind(Tensor, None, _read_guide, _check_guide),
    "target": RoleKind(Tensor, None, _read_target, _check_target),
    "dataset": RoleKind(Dataset, "builtin:scenes", _read_dataset, _check_dataset),
    "texture": RoleKind(Tensor, _STYLES[0], _read_texture, _check_images),
    "styles": RoleKind(Tensor, _STYLES, _read_styles, _check_images),
    "stylizer": RoleKind(
        TrainedNetwork,
        BUNDLED_STYLIZER,
        _read_stylizer,
        _check_made(TrainedNetwork, "which a training method gives"),
    ),
    "adaptive_stylizer": RoleKind(
        TrainedNetwork,
        BUNDLED_ADAPTIVE_STYLIZER,
        _read_stylizer,
        _check_made(TrainedNetwork, "which a training method gives"),
    ),
    "denoiser": RoleKind(
        Denoiser,
        BUNDLED_DENOISER,
        _read_denoiser,
        _check_made(Denoiser, "as phosphene.generative has it: a subclass, or load_pipeline(folder)"),
    ),
    "generator": RoleKind(
        Generator,
        BUNDLED_GENERATOR,
        _read_generator,
        _check_made(
            Generator,
            "which phosphene.generative.Generator(latent_size, decoder) makes of a decoder of yours",
        ),
    ),
}
