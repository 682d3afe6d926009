"""Features of several layers of all images of a data set, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Fold, InputError, Model, batch_size
from phosphene.data import Batch, Dataset, LabelRows, Rows, State
from phosphene.roles import LayerName
from phosphene.training import require_classes

from ..embeddings._features import layer_vectors

#: The parameter ``layers`` of the probes.
ProbedLayers = Annotated[
    list[LayerName] | None, Field(min_length=1, description="layers to read; default: the model's stages")
]


def layer_features(
    model: Model, dataset: Dataset, layers: Sequence[str], title: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Features (N, D) of every layer, averaged over its positions, on the CPU, and the N class names.

    No names for a data set of which not all images have a class.
    """
    state = _LayerFeatures(model, tuple(layers), title).run(dataset, batch_size(model))
    labels = state["labels"].labels()
    return {name: state[name].tensor() for name in layers}, labels if len(labels) == len(dataset) else ()


def classified_features(
    model: Model, dataset: Dataset, layers: Sequence[str], title: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """``layer_features`` of a data set with classes.

    Raises InputError for a data set in which an image has no class, or all have the same.
    """
    require_classes(dataset)
    features, labels = layer_features(model, dataset, layers, title)
    if not labels:
        raise InputError("some images of the data set have no class")
    if len(set(labels)) < 2:
        raise InputError(f"the data set has a single class, {labels[0]!r}: nothing can be told apart")
    return features, labels


@dataclass
class _LayerFeatures(Fold[State]):
    """The features of every layer, and the class names."""

    model: Model
    layers: tuple[str, ...]
    title: str

    def start(self) -> State:
        return {**{name: Rows() for name in self.layers}, "labels": LabelRows()}

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        for name, features in zip(self.layers, self.model.features_of(images, self.layers), strict=True):
            vectors = layer_vectors(self.model, features, images, name)
            state[name].write(batch.indices[0], vectors)
        if (labels := batch.labels) is not None:
            state["labels"].write_labels(batch.indices[0], labels)
        return state

    def finish(self, state: State) -> State:
        return state
