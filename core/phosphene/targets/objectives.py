"""Objectives: class, layer, channel, neuron, direction, or a function of the logits."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, ModelError

if TYPE_CHECKING:
    from ..models import Model


class Objective(ABC):
    """Anything with one scalar per image to explain, raise or lower, read from the logits."""

    @abstractmethod
    def score(self, values: Tensor) -> Tensor:
        """(N,) from the logits (N, K); of a ``Layer`` from its maps (N, C, h, w) or features (N, C)."""

    def to_json(self) -> Any:
        """What ``parse_target`` reads back, as JSON; for a callable or a direction only its name."""
        return str(self)

    def select(self, rows: Sequence[int]) -> Objective:
        """The same target for these rows of the batch, in this order, repeats allowed."""
        return self

    def resolve(self, model: Model, images: Tensor) -> Objective:
        """The target as it is once these images have settled which class is meant, if that is open."""
        return self

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        """What the target is called for each of ``count`` images."""
        return (str(self),) * count


@dataclass(frozen=True)
class Class(Objective):
    """The logit of a class: one index for all images, or one each."""

    index: int | tuple[int, ...]

    def score(self, values: Tensor) -> Tensor:
        index = (self.index,) * len(values) if isinstance(self.index, int) else self.index
        if len(index) != len(values):
            raise InputError(f"{len(values)} images need one class or one each, not {len(index)}")
        return _logits(values).gather(1, torch.tensor(index, device=values.device)[:, None])[:, 0]

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

    Decided by the first reading, which is of the images themselves, and kept for later readings
    of perturbed ones: a score must not change its subject half-way.
    """

    _decided: Class | None = None

    def score(self, values: Tensor) -> Tensor:
        self._decided = self._decided or Class(tuple(_logits(values).argmax(dim=1).tolist()))
        return self._decided.score(values)

    def resolve(self, model: Model, images: Tensor) -> Objective:
        if self._decided is None:
            with torch.no_grad():
                self.score(model(images))
        return self._decided or self

    def to_json(self) -> Any:
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

    def score(self, values: Tensor, *tap: Any) -> Tensor:
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

    def score(self, values: Tensor) -> Tensor:
        return values.flatten(1).square().mean(1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Channel(Layer):
    """One channel of a layer: the mean of its map."""

    channel: int

    def score(self, values: Tensor) -> Tensor:
        return _unit(values, self.name, self.channel).reshape(len(values), -1).mean(1)

    def __str__(self) -> str:
        return f"{self.name}[{self.channel}]"


@dataclass(frozen=True)
class Neuron(Channel):
    """One unit: a channel of a layer at a place of its map."""

    y: int
    x: int

    def score(self, values: Tensor) -> Tensor:
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

    def score(self, values: Tensor) -> Tensor:
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
