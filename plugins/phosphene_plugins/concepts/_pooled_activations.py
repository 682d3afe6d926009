"""Activations of a layer averaged over its positions, and the gradients of a target with respect to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phosphene import Fold, InputError, Model, at_least_float32, layer_gradients
from phosphene.data import Batch, Dataset, Rows, State
from phosphene.targets import Objective

from ..comparison._layer_features import layer_features

#: The fewest images of a concept, and of random ones: one to fit and one to test a vector with.
LEAST_IMAGES = 2


def pooled_activations(
    model: Model, dataset: Dataset, layer: str, title: str
) -> tuple[Tensor, tuple[str, ...]]:
    """Activations (N, C) averaged over the layer's positions, and the class names, if all images have one."""
    features, labels = layer_features(model, dataset, [layer], title)
    return features[layer], labels


def by_concept(features: Tensor, labels: Sequence[str], dataset: Dataset) -> dict[str, Tensor]:
    """The activations of each concept, by name: the classes of a data set, or all of it.

    Raises InputError for a concept with fewer than two images.
    """
    if not labels:
        labels = [(dataset.uri or "concept").rpartition("/")[2] or "concept"] * len(features)
    names = sorted(set(labels))
    groups = {name: features[[n for n, label in enumerate(labels) if label == name]] for name in names}
    for name, rows in groups.items():
        if len(rows) < LEAST_IMAGES:
            raise InputError(
                f"concept {name!r} has {len(rows)} image; a vector needs at least {LEAST_IMAGES}"
            )
    return groups


@dataclass
class PooledGradients(Fold[Tensor]):
    """Derivatives (N, C) of a target's score by a shift of the layer's channels at all positions."""

    model: Model
    layer: str
    target: Objective
    title: str = "derivatives"

    def start(self) -> State:
        return {"gradients": Rows()}

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        with torch.enable_grad():
            ((_, gradients),) = layer_gradients(self.model, images, self.target, self.layer)
        state["gradients"].write(batch.indices[0], at_least_float32(gradients).sum((2, 3)))
        return state

    def finish(self, state: State) -> Tensor:
        gradients: Tensor = state["gradients"].tensor()
        return gradients


def fit_vector(concept: Tensor, random: Tensor, classifier: str, strength: float) -> tuple[Tensor, float]:
    """The unit vector (C,) that points from random activations (m, C) to a concept's (n, C), and its offset.

    Zeros where both are the same.
    """
    concept, random = concept.double(), random.double()
    if classifier == "mean_difference":
        vector = concept.mean(0) - random.mean(0)
        middle = (concept.mean(0) + random.mean(0)) / 2
        length = vector.norm()
        unit = vector / length if length > 0 else torch.zeros_like(vector)
        return unit, float(unit @ middle)
    from sklearn.linear_model import LogisticRegression  # slow to import

    features = torch.cat([concept, random])
    mean = features.mean(0)
    # One scale for all channels: the vector is one of the layer, and the penalty has no unit.
    scale = (features - mean).square().sum(1).mean().sqrt()
    if not scale > 0:
        return torch.zeros_like(mean), 0.0
    labels = torch.cat([torch.ones(len(concept)), torch.zeros(len(random))])
    estimator = LogisticRegression(C=1 / strength, class_weight="balanced", max_iter=1000)
    estimator.fit(((features - mean) / scale).numpy(), labels.numpy())
    vector = torch.from_numpy(estimator.coef_[0])
    length = vector.norm()
    if not length > 0:
        return torch.zeros_like(mean), 0.0
    unit = vector / length
    return unit, float(unit @ mean - estimator.intercept_[0] * scale / length)
