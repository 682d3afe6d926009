"""Targets: what a score is of - a class, neuron, channel, layer, direction - one scalar per image."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError, ModelError, UnknownName

if TYPE_CHECKING:
    from .models import Model


@dataclass(frozen=True)
class Objective(ABC):
    """Anything with one scalar per image to explain, raise or lower."""

    @property
    def layer(self) -> str | None:
        """The layer it is read from, or None for the logits."""
        return None

    @abstractmethod
    def read(self, values: Tensor) -> Tensor:
        """(N,) from the logits (N, K), or from the layer's maps (N, C, h, w) or features (N, C)."""

    def written(self) -> Any:
        """What ``parse_target`` reads back, as JSON; for a callable or a direction only its name."""
        return str(self)

    def select(self, rows: Sequence[int]) -> Objective:
        """The same target for these rows of the batch, in this order, repeats allowed."""
        return self

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        """What the target is called for each of ``count`` images."""
        return (str(self),) * count


@dataclass(frozen=True)
class Class(Objective):
    """The logit of a class: one index for all images, or one each."""

    index: int | tuple[int, ...]

    def read(self, values: Tensor) -> Tensor:
        if isinstance(self.index, int):
            return _logits(values)[:, self.index]
        if len(self.index) != len(values):
            raise InputError(f"{len(values)} images need one class or one each, not {len(self.index)}")
        index = torch.tensor(self.index, device=values.device)
        return _logits(values).gather(1, index[:, None])[:, 0]

    def written(self) -> Any:
        return self.index if isinstance(self.index, int) else list(self.index)

    def select(self, rows: Sequence[int]) -> Class:
        return self if isinstance(self.index, int) else Class(tuple(self.index[r] for r in rows))

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        indices = (self.index,) * count if isinstance(self.index, int) else self.index
        return tuple(model.class_name(i) for i in indices)

    def __str__(self) -> str:
        return f"class:{self.index}"


class Predicted(Objective):
    """The logit of the class that the model predicts for each image.

    Decided by the first reading, which is of the images themselves, and kept for later readings
    of perturbed ones: a score must not change its subject half-way.
    """

    def __init__(self) -> None:
        self._decided: Class | None = None

    def read(self, values: Tensor) -> Tensor:
        if self._decided is None:
            self._decided = Class(tuple(_logits(values).argmax(dim=1).tolist()))
        return self._decided.read(values)

    def written(self) -> Any:
        return None

    def select(self, rows: Sequence[int]) -> Objective:
        return Predicted() if self._decided is None else self._decided.select(rows)

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        return super().names(model, count) if self._decided is None else self._decided.names(model, count)

    def __str__(self) -> str:
        return "the predicted class"


@dataclass(frozen=True)
class Layer(Objective):
    """All of a layer: the mean square of its values (DeepDream's objective up to a factor)."""

    name: str

    @property
    def layer(self) -> str:
        return self.name

    def read(self, values: Tensor) -> Tensor:
        return values.flatten(1).square().mean(1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Channel(Layer):
    """One channel of a layer: the mean of its map."""

    channel: int

    def read(self, values: Tensor) -> Tensor:
        return _unit(values, 1, self.channel, self.name).reshape(len(values), -1).mean(1)

    def __str__(self) -> str:
        return f"{self.name}[{self.channel}]"


@dataclass(frozen=True)
class Neuron(Channel):
    """One unit: a channel of a layer at a place of its map."""

    y: int
    x: int

    def read(self, values: Tensor) -> Tensor:
        if values.ndim != 4:
            raise ModelError(
                f"layer {self.name!r} has no places, only channels: '{self.name}[{self.channel}]'"
            )
        column = _unit(_unit(values, 3, self.x, self.name), 2, self.y, self.name)
        return _unit(column, 1, self.channel, self.name)

    def __str__(self) -> str:
        return f"{self.name}[{self.channel},{self.y},{self.x}]"


@dataclass(frozen=True, eq=False)
class Direction(Layer):
    """A direction in a layer's channels: the mean over places of <vector, features>; ``vector`` is (C,)."""

    vector: Tensor

    # Tensors do not compare to one truth, and Layer's own would see the name alone.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def read(self, values: Tensor) -> Tensor:
        if self.vector.shape != values.shape[1:2]:
            raise InputError(
                f"layer {self.name!r} has {values.shape[1]} channels, the direction {len(self.vector)}"
            )
        projected = torch.einsum("nc...,c->n...", values, self.vector.to(values))
        return projected.flatten(1).mean(1) if projected.ndim > 1 else projected

    def __str__(self) -> str:
        return f"a direction in {self.name}"


@dataclass(frozen=True)
class Custom(Objective):
    """Any callable ``(logits) -> (N,)``, for captioning, similarity, detection, ..."""

    function: Callable[[Tensor], Tensor]

    def read(self, values: Tensor) -> Tensor:
        score = self.function(values)
        got = tuple(score.shape) if isinstance(score, Tensor) else f"a {type(score).__name__}"
        if got != (len(values),):
            raise InputError(f"a target must give one number per image, shape ({len(values)},), not {got}")
        if values.requires_grad and not score.requires_grad:
            raise InputError(
                f"the target {self} cuts the graph (detach, argmax, a constant): no gradient can flow"
            )
        return score

    def __str__(self) -> str:
        return getattr(self.function, "__name__", "a callable")


def _logits(values: Tensor) -> Tensor:
    if values.ndim != 2:
        raise ModelError(
            f"this model has no classes: it gives {tuple(values.shape)}; name a layer's unit instead"
        )
    return values


def _unit(values: Tensor, dim: int, index: int, layer: str) -> Tensor:
    if not -values.shape[dim] <= index < values.shape[dim]:
        what = {1: "channels", 2: "rows", 3: "columns"}[dim]
        raise InputError(f"layer {layer!r} has {values.shape[dim]} {what}, so there is no number {index}")
    return values.select(dim, index)


def parse_target(target: Any, model: Model) -> Objective:
    """An ``Objective`` from what a person writes.

    ``None`` (the predicted class), ``281``, ``"tabby"``, ``"class:tabby"``, ``"layer4"``,
    ``"layer4[17]"``, ``"layer4[17,3,5]"``, one index per image, a callable, or an ``Objective``.
    Unknown classes and layers are refused with the nearest that exist.
    """
    if target is None:
        return Predicted()
    if isinstance(target, Layer):
        return replace(target, name=model.layer_name(target.name))
    if isinstance(target, str):
        return _parse_text(target.strip(), model)
    if isinstance(target, Class):
        target = target.index
    elif isinstance(target, Objective):
        return target
    elif hasattr(target, "tolist"):  # a tensor, an array or a number of NumPy's
        target = target.tolist()
    if isinstance(target, (int, str)):
        return Class(model.class_index(target))
    if isinstance(target, Sequence) and target:
        return Class(tuple(model.class_index(t) for t in target))
    if callable(target):
        return Custom(target)
    what = type(target).__name__ if target != [] else "list without a class"
    raise InputError(f"a target is a class, one each, a layer's unit or a callable, not a {what}")


def _parse_text(text: str, model: Model) -> Objective:
    if text.startswith("class:"):
        return Class(model.class_index(text.removeprefix("class:").strip()))
    unit = re.fullmatch(r"(?P<layer>.+?)\s*\[(?P<place>-?\d+(?:\s*,\s*-?\d+){0,2})\]", text)
    if unit:
        layer = model.layer_name(unit["layer"])
        place = [int(part) for part in unit["place"].split(",")]
        if len(place) == 2:
            raise InputError(f"{text!r}: a unit is layer[channel] or layer[channel,y,x]")
        return Neuron(layer, *place) if len(place) == 3 else Channel(layer, place[0])
    if text in model.layers:
        return Layer(text)
    try:
        return Class(model.class_index(text))
    except UnknownName as error:
        known = [*(model.classes or ()), *model.layers]
        raise UnknownName("class or layer", text, known, "this model") from error


def scores(model: Model, images: Tensor, target: Any) -> Tensor:
    """The target's scalar for each image, (N,), on the graph; nothing above its layer runs.

    With a ``Tap`` open, its layers are read in the same pass, unless they lie above the target's.
    """
    objective = parse_target(target, model)
    if objective.layer is None:
        return objective.read(model(images))
    features = model.features(images, objective.layer)
    return objective.read(model.maps(features, images) if features.ndim > 2 else features)
