"""Gradients of each image's loss with respect to a network's weights, and the class of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Fold, InputError, Model, ModelError
from phosphene.data import Batch, Dataset, LabelRows, Rows, State
from phosphene.roles import Checkpoint, LayerName
from phosphene.training import class_indices, label_index, require_classes, trainable_copy

#: The parameter ``layers`` of the methods that differentiate weights.
WeightLayers = Annotated[
    list[LayerName] | None,
    Field(min_length=1, description="layers whose weights are differentiated; default: all"),
]

#: The parameter ``k``: how many proponents and opponents are returned.
Count = Annotated[int, Field(ge=1, le=1000, description="number of proponents, and of opponents, per image")]

#: A function of logits (1, K) and class indices (1,) whose value is differentiated.
Loss = Callable[[Tensor, Tensor], Tensor]


def require_class_labels(model: Model, dataset: Dataset) -> None:
    """Raise InputError for a data set without classes, and for an objective instead of labels."""
    if model.row_by_row:
        raise InputError("labels must be classes, since the training images have classes, not objectives")
    require_classes(dataset)
    first = dataset.labels([0]) or ()
    label_index(model, first[0])  # refuses a label that is no class of the model


def copy_at(model: Model, checkpoint: Checkpoint | None) -> Model:
    """A copy of the model with the weights of a checkpoint, which require gradients."""
    copied = trainable_copy(model)
    if checkpoint is not None:
        checkpoint.load_into(copied)
    return copied


def weights_of(model: Model, layers: Sequence[str] | None) -> list[nn.Parameter]:
    """The weights of these layers, or all: those of floating-point type, each once.

    Raises ModelError for layers without weights.
    """
    parts = [model.module] if layers is None else [model.layers[name] for name in layers]
    weights = {id(w): w for part in parts for w in part.parameters() if w.is_floating_point()}
    if not weights:
        raise ModelError(f"{'the network' if layers is None else ', '.join(layers)} has no weights")
    return list(weights.values())


def image_gradients(
    model: Model,
    weights: Sequence[nn.Parameter],
    images: Tensor,
    labels: Tensor,
    loss: Loss = F.cross_entropy,
) -> Iterator[Tensor]:
    """The gradient (P,) of each image's loss with respect to the weights, one after another, flattened."""
    for n in range(len(images)):
        with torch.enable_grad():
            value = loss(model(images[n : n + 1]), labels[n : n + 1])
            if not value.requires_grad:
                raise ModelError(f"no gradient flows from the logits of {model.name} to these weights")
            gradients = torch.autograd.grad(value, list(weights), allow_unused=True)
        # A weight that the logits do not depend on has no gradient.
        yield torch.cat(
            [
                torch.zeros_like(w).flatten() if gradient is None else gradient.detach().flatten()
                for w, gradient in zip(weights, gradients, strict=True)
            ]
        )


@dataclass
class GradientProducts(Fold[State]):
    """Inner products (M, Q) of each training image's gradient with Q directions (Q, P), and the classes.

    ``normalize``: those of the gradient divided by its norm; 0 for a gradient of 0.
    """

    model: Model
    layers: Sequence[str] | None
    directions: Tensor
    normalize: bool = False
    title: str = "gradients"

    def start(self) -> State:
        return {"products": Rows(), "classes": LabelRows()}

    def update(self, state: State, batch: Batch) -> State:
        labels = class_indices(self.model, batch)
        rows = []
        for gradient in image_gradients(
            self.model, weights_of(self.model, self.layers), batch.images.to(self.model.device), labels
        ):
            scale = unit_scale(gradient) if self.normalize else 1.0
            rows.append(self.directions @ gradient * scale)
        state["products"].write(batch.indices[0], torch.stack(rows))
        state["classes"].write_labels(batch.indices[0], batch.labels or ())
        return state


def unit_scale(gradient: Tensor) -> Tensor:
    """1 / the norm of a vector; 0 where that is 0."""
    norm = gradient.norm()
    return torch.where(norm > 0, 1 / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0)
