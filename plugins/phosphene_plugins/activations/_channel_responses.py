"""What this family's statistics read: the answers of any layer, one map a channel."""

from __future__ import annotations

from torch import Tensor

from phosphene import Model


def responses(model: Model, images: Tensor, layer: str) -> Tensor:
    """A layer's answers (n, C, h, w), class tokens dropped; a vector's have one place."""
    features = model.features(images, layer)
    return features[:, :, None, None] if features.ndim == 2 else model.maps(features, images)
