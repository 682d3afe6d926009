"""Features of several layers of all images of a data set, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phosphene import Fold, InputError, Model, ModelError, at_least_float32, batch_size
from phosphene.data import Batch, Dataset, LabelRows, Rows, State


def layer_features(
    model: Model, dataset: Dataset, layers: Sequence[str], title: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Features (N, D) of every layer, averaged over its positions, on the CPU, and the N class names.

    Raises InputError for a data set without classes, or with a single one.
    """
    if dataset.labels([0]) is None:
        raise InputError(
            "the data set has no classes: sort its images into one folder per class, or pass "
            "TensorDataset(images, classes)"
        )
    state = _LayerFeatures(model, tuple(layers), title).run(dataset, batch_size(model))
    labels = state.pop("labels").labels()
    if len(labels) != len(dataset):
        raise InputError(f"{len(dataset) - len(labels)} images of the data set have no class")
    if len(set(labels)) < 2:
        raise InputError(f"the data set has a single class, {labels[0]!r}: nothing can be told apart")
    return {name: state[name].tensor() for name in layers}, labels


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
            features = at_least_float32(features)
            if features.ndim > 2:
                features = self.model.maps(features, images, name).mean((2, 3))
            if len(features) != len(images):
                raise ModelError(f"layer {name!r} returns {len(features)} rows for {len(images)} images")
            state[name].write(batch.indices[0], features.flatten(1))
        if (labels := batch.labels) is not None:
            state["labels"].write_labels(batch.indices[0], labels)
        return state

    def merge(self, first: State, second: State) -> State:
        return {name: rows.merge(second[name]) for name, rows in first.items()}

    def finish(self, state: State) -> State:
        return state
