"""Targets: what a score is of - a class, neuron, channel, layer, direction - one scalar per image."""

from __future__ import annotations

import inspect
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


class Objective(ABC):
    """Anything with one scalar per image to explain, raise or lower, read from the logits."""

    @abstractmethod
    def read(self, values: Tensor) -> Tensor:
        """(N,) from the logits (N, K); of a ``Layer`` from its maps (N, C, h, w) or features (N, C)."""

    def written(self) -> Any:
        """What ``parse_target`` reads back, as JSON; for a callable or a direction only its name."""
        return str(self)

    def select(self, rows: Sequence[int]) -> Objective:
        """The same target for these rows of the batch, in this order, repeats allowed."""
        return self

    def decide(self, model: Model, images: Tensor) -> Objective:
        """The target as it is once these images have settled which class is meant, if that is open."""
        return self

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        """What the target is called for each of ``count`` images."""
        return (str(self),) * count


@dataclass(frozen=True)
class Class(Objective):
    """The logit of a class: one index for all images, or one each."""

    index: int | tuple[int, ...]

    def read(self, values: Tensor) -> Tensor:
        index = (self.index,) * len(values) if isinstance(self.index, int) else self.index
        if len(index) != len(values):
            raise InputError(f"{len(values)} images need one class or one each, not {len(index)}")
        return _logits(values).gather(1, torch.tensor(index, device=values.device)[:, None])[:, 0]

    def written(self) -> Any:
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

    Decided by the first reading, which is of the images themselves, and kept for later readings
    of perturbed ones: a score must not change its subject half-way.
    """

    _decided: Class | None = None

    def read(self, values: Tensor) -> Tensor:
        self._decided = self._decided or Class(tuple(_logits(values).argmax(dim=1).tolist()))
        return self._decided.read(values)

    def decide(self, model: Model, images: Tensor) -> Objective:
        if self._decided is None:
            with torch.no_grad():
                self.read(model(images))
        return self._decided or self

    def written(self) -> Any:
        return None

    def select(self, rows: Sequence[int]) -> Objective:
        return self._decided.select(rows) if self._decided else Predicted()

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        return self._decided.names(model, count) if self._decided else super().names(model, count)

    def __str__(self) -> str:
        return "the predicted class"


@dataclass(frozen=True)
class Custom(Objective):
    """Any callable ``(logits) -> (N,)`` or ``(logits, tap) -> (N,)``: captioning, similarity, detection, ...

    ``tap["layer4"]`` is what a layer gave in the same pass.
    """

    function: Callable[..., Tensor]

    def read(self, values: Tensor, *tap: Any) -> Tensor:
        score = self.function(values, *tap)
        got = tuple(score.shape) if isinstance(score, Tensor) else f"a {type(score).__name__}"
        if got != (len(values),):
            raise InputError(f"a target must give one number per image, shape ({len(values)},), not {got}")
        if values.requires_grad and not score.requires_grad:
            raise InputError(
                f"the target {self} cuts the graph (detach, argmax, a constant): no gradient can flow"
            )
        return score

    def wants_tap(self) -> bool:
        """Whether the callable takes a second argument that must be given."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # some builtins do not say what they take
            return False
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return len([p for p in parameters if p.kind in kinds and p.default is p.empty]) == 2

    def __str__(self) -> str:
        return getattr(self.function, "__name__", "a callable")


@dataclass(frozen=True)
class Layer(Objective):
    """All of a layer: the mean square of its values (DeepDream's objective up to a factor)."""

    name: str

    def read(self, values: Tensor) -> Tensor:
        return values.flatten(1).square().mean(1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Channel(Layer):
    """One channel of a layer: the mean of its map."""

    channel: int

    def read(self, values: Tensor) -> Tensor:
        return _unit(values, self.name, self.channel).reshape(len(values), -1).mean(1)

    def __str__(self) -> str:
        return f"{self.name}[{self.channel}]"


@dataclass(frozen=True)
class Neuron(Channel):
    """One unit: a channel of a layer at a place of its map."""

    y: int
    x: int

    def read(self, values: Tensor) -> Tensor:
        if values.ndim != 4:
            channel = f"{self.name}[{self.channel}]"
            raise ModelError(f"layer {self.name!r} has no places, only channels: {channel!r}")
        return _unit(values, self.name, self.channel, self.y, self.x)

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
        return torch.einsum("nc...,c->n...", values, self.vector.to(values)).reshape(len(values), -1).mean(1)

    def __str__(self) -> str:
        return f"a direction in {self.name}"


def _logits(values: Tensor) -> Tensor:
    if values.ndim != 2:
        given = tuple(values.shape)
        raise ModelError(f"this model has no classes: it gives {given}; name a layer's unit instead")
    return values


def _unit(values: Tensor, layer: str, *place: int) -> Tensor:
    """The values at a channel, or at a channel, row and column; InputError where there is no such."""
    for what, index, size in zip(("channels", "rows", "columns"), place, values.shape[1:], strict=False):
        if not -size <= index < size:
            raise InputError(f"layer {layer!r} has {size} {what}, so there is no number {index}")
    at: tuple[Any, ...] = (slice(None), *place)
    return values[at]


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
    if isinstance(target, Class):
        target = target.index
    if isinstance(target, Objective):
        return target
    if hasattr(target, "tolist"):  # a tensor, an array or a number of NumPy's
        target = target.tolist()
    match target:
        case str():
            return _parse_text(target.strip(), model)
        case int():
            return Class(model.class_index(target))
        case [_, *_]:
            return Class(tuple(map(model.class_index, target)))
    if callable(target):
        return Custom(target)
    what = type(target).__name__ if target != [] else "list without a class"
    raise InputError(f"a target is a class, one each, a layer's unit or a callable, not a {what}")


def _parse_text(text: str, model: Model) -> Objective:
    if text.startswith("class:"):
        return Class(model.class_index(text.removeprefix("class:").strip()))
    if unit := re.fullmatch(r"(.+?)\s*\[(-?\d+(?:\s*,\s*-?\d+){0,2})\]", text):
        layer, place = model.layer_name(unit[1]), [int(part) for part in unit[2].split(",")]
        if len(place) == 2:
            raise InputError(f"{text!r}: a unit is layer[channel] or layer[channel,y,x]")
        return Neuron(layer, *place) if len(place) == 3 else Channel(layer, place[0])
    if text in model.layers or text in model.papers_names:
        return Layer(model.layer_name(text))
    try:
        return Class(model.class_index(text))
    except UnknownName as error:
        known = [*(model.classes or ()), *model.layers]
        raise UnknownName("class or layer", text, known, "this model") from error


def input_gradient(model: Model, images: Tensor, target: Any) -> Tensor:
    """dS/dI, the gradient of the target's scalar by every pixel: (N, C, H, W), off the graph."""
    images = images.detach().clone().requires_grad_()
    score = scores(model, images, target)
    if not score.requires_grad:
        raise ModelError(f"no gradient flows through {model.name} to the picture")
    (gradient,) = torch.autograd.grad(score.sum(), images)
    return gradient


def layer_gradients(model: Model, images: Tensor, target: Any, *layers: str) -> list[tuple[Tensor, Tensor]]:
    """Each layer's maps A and dS/dA, both (N, C, h, w) and off the graph; nothing below is differentiated.

    What the CAM family shares. Raises ModelError for a layer without places, for one that the target
    does not depend on, and where only its class token matters.
    """
    objective = parse_target(target, model)
    with model.tap(*layers, leaf=True) as tap:
        score = scores(model, images, objective)
    if not score.requires_grad:
        names = " or ".join(map(repr, layers))
        raise ModelError(f"{objective} does not depend on layer {names}: choose a layer below it")
    outputs = [tap[layer] for layer in layers]
    gradients = torch.autograd.grad(score.sum(), outputs, allow_unused=True)
    found = []
    for layer, output, gradient in zip(layers, outputs, gradients, strict=True):
        activations = model.maps(output.detach(), images)
        if gradient is None:
            raise ModelError(
                f"{objective} does not depend on the last output of layer {layer!r}: choose another"
            )
        placed = model.maps(gradient, images)
        if gradient.any() and not placed.any():
            raise ModelError(
                f"only the class token of layer {layer!r} matters to {objective}, and it has no place: "
                "choose an earlier layer"
            )
        found.append((activations, placed))
    return found


def scores(model: Model, images: Tensor, target: Any) -> Tensor:
    """The target's scalar for each image, (N,), on the graph; nothing above its layer runs.

    With a ``Tap`` open, its layers are read in the same pass, unless they lie above the target's.
    """
    objective = parse_target(target, model)
    if isinstance(objective, Layer):
        features = model.features(images, objective.name)
        return objective.read(model.maps(features, images) if features.ndim > 2 else features)
    if isinstance(objective, Custom) and objective.wants_tap():
        layers = [name for name, layer in model.anatomy.layers.items() if layer.shape is not None]
        with model.tap(*layers) as tap:
            return objective.read(model(images), tap)
    return objective.read(model(images))
