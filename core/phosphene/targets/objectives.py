"""Objectives: class, contrast of classes, layer, channel, neuron, direction, function of the logits."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import InputError, ModelError, UnknownName, type_name
from ..finite_values import check_finite

if TYPE_CHECKING:
    from ..models import Model


class AbsentObjective(InputError):
    """An image without the object that an objective names: no such region is predicted, no such box found."""


class Objective(ABC):
    """A scalar per image, to be explained, maximized or minimized, or changed in sign by an attack."""

    @abstractmethod
    def score(self, values: Tensor) -> Tensor:
        """(N,) from the logits (N, K), or, of a ``Layer``, from its maps (N, C, h, w) or features (N, C)."""

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        """The score of each image (N, C, H, W) in [0, 1], (N,), on the graph."""
        return self.score(model.outputs(images))

    def margin(self, model: Model, images: Tensor) -> Tensor:
        """(N,), positive where the objective holds: an attack succeeds where it changes the sign.

        Raises InputError for an objective without a criterion, such as a layer's activation.
        """
        raise InputError(
            f"{self} has no criterion by which an attack on it succeeds; attack a class, 'contrast:a,b', "
            "'region:...', 'box:...' or 'similar:...'"
        )

    @property
    def is_identified(self) -> bool:
        """Whether ``to_json`` differs from that of every other objective."""
        return True

    def to_json(self) -> Any:
        """The target as JSON that ``parse_target`` accepts; of a callable or a direction only its name."""
        return str(self)

    def select(self, rows: Sequence[int]) -> Objective:
        """The same target for these rows of the batch, in this order; rows may repeat."""
        return self

    def resolve(self, model: Model, images: Tensor) -> Objective:
        """The target with the class fixed: for ``Predicted`` that of these images, else the target itself."""
        return self

    def unresolved(self) -> Objective:
        """The target for other images: without the class, region or box that earlier ones fixed."""
        return self

    def for_model(self, model: Model) -> Objective:
        """The same target for another model with the same classes."""
        return self

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        """The target's name for each of ``count`` images."""
        return (str(self),) * count


@dataclass(frozen=True)
class Class(Objective):
    """The logit of a class: one index for all images, or one for each image."""

    index: int | tuple[int, ...]

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        return self.score(class_values(model, images))

    def margin(self, model: Model, images: Tensor) -> Tensor:
        values = class_values(model, images)
        own = self.score(values)
        if model.task == "multilabel":
            return own
        if model.task == "regression":
            raise InputError(
                f"{model.name} returns values (task 'regression'), and an attack on a value has no criterion "
                "of success"
            )
        others = values.scatter(1, self._indices(values)[:, None], -torch.inf)
        return own - others.amax(1)

    def _indices(self, values: Tensor) -> Tensor:
        index = (self.index,) * len(values) if isinstance(self.index, int) else self.index
        if len(index) != len(values):
            raise InputError(f"{len(values)} images need one class, or one each, not {len(index)}")
        return torch.tensor(index, device=values.device)

    def score(self, values: Tensor) -> Tensor:
        return check_logits(values).gather(1, self._indices(values)[:, None])[:, 0]

    def to_json(self) -> Any:
        return self.index if isinstance(self.index, int) else list(self.index)

    def select(self, rows: Sequence[int]) -> Class:
        return self if isinstance(self.index, int) else Class(tuple(self.index[r] for r in rows))

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        indices = (self.index,) * count if isinstance(self.index, int) else self.index
        return tuple(map(model.class_name, indices))

    def __str__(self) -> str:
        return f"class:{self.index}"


class Predicted(Objective):
    """The logit of the class that the model predicts for each image.

    The classes are fixed at the first call of ``score``, for the images themselves, and used for perturbed
    images in later calls, which may be predicted otherwise.
    """

    _resolved: Class | None = None

    def score(self, values: Tensor) -> Tensor:
        self._resolved = self._resolved or Class(tuple(check_logits(values).argmax(dim=1).tolist()))
        return self._resolved.score(values)

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        if self._resolved is not None:
            return self._resolved.evaluate(model, images)
        values = class_values(model, images)
        if model.task == "regression" and values.shape[1] > 1:
            raise InputError(
                f"{model.name} is a regression with {values.shape[1]} outputs, none of which is predicted: "
                "name one, target=0"
            )
        return self.score(values)

    def margin(self, model: Model, images: Tensor) -> Tensor:
        return self.resolve(model, images).margin(model, images)

    def resolve(self, model: Model, images: Tensor) -> Objective:
        if self._resolved is None:
            with torch.no_grad():
                self.evaluate(model, images)
        return self._resolved or self

    def unresolved(self) -> Predicted:
        return Predicted()

    def to_json(self) -> Any:
        return None

    def select(self, rows: Sequence[int]) -> Objective:
        return self._resolved.select(rows) if self._resolved else Predicted()

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        return self._resolved.names(model, count) if self._resolved else super().names(model, count)

    def __str__(self) -> str:
        return "the predicted class"


@dataclass(frozen=True)
class Contrast(Objective):
    """The difference of two classes' logits, z_a - z_b; an attack succeeds where it changes the sign."""

    first: int
    second: int

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise InputError(f"a contrast is of two different classes, not of class {self.first} twice")

    def score(self, values: Tensor) -> Tensor:
        logits = check_logits(values)
        return logits[:, self.first] - logits[:, self.second]

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        return self.score(class_values(model, images))

    def margin(self, model: Model, images: Tensor) -> Tensor:
        return self.evaluate(model, images)

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        return (f"{model.class_name(self.first)} - {model.class_name(self.second)}",) * count

    def __str__(self) -> str:
        return f"contrast:{self.first},{self.second}"


@dataclass(frozen=True)
class Custom(Objective):
    """A callable ``(logits) -> (N,)`` or ``(logits, tap) -> (N,)``: captioning, similarity, detection, ...

    ``tap["layer4"]`` is a layer's output in the same pass.
    """

    function: Callable[..., Tensor]

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        if not self.takes_tap():
            return self.score(model.outputs(images))
        layers = [name for name, layer in model.structure.layers.items() if layer.shape is not None]
        with model.tap(*layers) as tap:
            return self.score(model.outputs(images), tap)

    @property
    def is_identified(self) -> bool:
        return False

    def score(self, values: Tensor, *tap: Any) -> Tensor:
        score = self.function(values, *tap)
        shape = tuple(score.shape) if isinstance(score, Tensor) else f"{type_name(score)}"
        if shape != (len(values),):
            raise InputError(
                f"a target must return one number per image, shape ({len(values)},), not {shape}"
            )
        check_finite(score, "target", lambda: InputError(f"the target {self} returned NaN or infinity"))
        if values.requires_grad and not score.requires_grad:
            raise InputError(
                f"the target {self} cuts the graph (detach, argmax, a constant): it has no gradient"
            )
        return score

    def takes_tap(self) -> bool:
        """Whether the callable has a second positional parameter without default."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # some builtins have no signature
            return False
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return len([p for p in parameters if p.kind in kinds and p.default is p.empty]) == 2

    def __str__(self) -> str:
        return getattr(self.function, "__name__", "a callable")


@dataclass(frozen=True)
class Layer(Objective):
    """A layer: the mean square of its values (DeepDream's objective up to a factor)."""

    name: str

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        features = model.features(images, self.name)
        return self.score(model.maps(features, images, self.name) if features.ndim > 2 else features)

    def score(self, values: Tensor) -> Tensor:
        return values.flatten(1).square().mean(1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Channel(Layer):
    """A channel of a layer: the mean of its map."""

    channel: int

    def __post_init__(self) -> None:
        _check_indices(self.name, ("channel", self.channel))

    def score(self, values: Tensor) -> Tensor:
        return _select_unit(values, self.name, self.channel).reshape(len(values), -1).mean(1)

    def __str__(self) -> str:
        return f"{self.name}[{self.channel}]"


@dataclass(frozen=True)
class Neuron(Channel):
    """A unit: a channel of a layer at one position of its map."""

    y: int
    x: int

    def __post_init__(self) -> None:
        _check_indices(self.name, ("channel", self.channel), ("row", self.y), ("column", self.x))

    def score(self, values: Tensor) -> Tensor:
        if values.ndim != 4:
            channel = f"{self.name}[{self.channel}]"
            raise ModelError(f"layer {self.name!r} has no spatial map, only channels: write {channel!r}")
        return _select_unit(values, self.name, self.channel, self.y, self.x)

    def __str__(self) -> str:
        return f"{self.name}[{self.channel},{self.y},{self.x}]"


@dataclass(frozen=True, eq=False)
class Direction(Layer):
    """A direction in a layer's channels, ``vector`` (C,): the mean over positions of <vector, features>.

    ``pooling`` "max" is the largest value over the positions instead. ``source`` is the text that it was read
    from, ``concept:folder#name``, or "". An image has the concept where its score is above the ``threshold``;
    without one, an attack has no criterion of success.
    """

    vector: Tensor
    source: str = ""
    threshold: float | None = None
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "max"):
            raise UnknownName("pooling", str(self.pooling), ("mean", "max"))
        if not isinstance(self.vector, Tensor) or self.vector.ndim != 1:
            kind = tuple(self.vector.shape) if isinstance(self.vector, Tensor) else type(self.vector).__name__
            raise InputError(f"the vector of a direction must be a tensor (C,), not {kind}")
        error = InputError(f"the direction in layer {self.name!r} contains NaN or infinity")
        check_finite(self.vector, "direction", lambda: error)

    @property
    def is_identified(self) -> bool:
        return bool(self.source)

    def margin(self, model: Model, images: Tensor) -> Tensor:
        if self.threshold is None:
            return super().margin(model, images)
        return self.evaluate(model, images) - self.threshold

    # Compared by identity: ``==`` of tensors is elementwise, and Layer's own compares names alone.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def score(self, values: Tensor) -> Tensor:
        if self.vector.shape != values.shape[1:2]:
            raise InputError(
                f"layer {self.name!r} has {values.shape[1]} channels, the direction has {len(self.vector)}"
            )
        products = torch.einsum("nc...,c->n...", values, self.vector.to(values)).reshape(len(values), -1)
        return products.mean(1) if self.pooling == "mean" else products.amax(1)

    def __str__(self) -> str:
        return self.source or f"a direction in {self.name}"


def class_values(model: Model, images: Tensor) -> Tensor:
    """(N, K): logits of classes, exclusive or not, or the values of a regression."""
    return model.outputs(images) if model.task in ("multilabel", "regression") else model(images)


def check_logits(values: Tensor) -> Tensor:
    if values.ndim != 2:
        shape = tuple(values.shape)
        raise ModelError(
            f"this model has no classes: its output is {shape}, not (N, K); name a layer's unit, or a region "
            "of a segmentation"
        )
    return values


def _check_indices(layer: str, *indices: tuple[str, int]) -> None:
    """Refuse negative indices, which count from 0 as those of classes."""
    for axis, index in indices:
        if index < 0:
            raise InputError(f"layer {layer!r} has no {axis} {index}: {axis}s are counted from 0")


def _select_unit(values: Tensor, layer: str, *indices: int) -> Tensor:
    """A layer's values at a channel, or at a channel, row and column; InputError where it does not exist."""
    for axis, index, size in zip(("channel", "row", "column"), indices, values.shape[1:], strict=False):
        if index >= size:
            raise InputError(f"layer {layer!r} has {size} {axis}s, so {axis} {index} does not exist")
    selection: tuple[Any, ...] = (slice(None), *indices)
    return values[selection]
