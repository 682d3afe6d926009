"""Caricature: oracle, the score of the image itself, layers and images without activations."""

from __future__ import annotations

import pytest
import torch

from phosphene import DivergenceError, Model, methods

caricature = methods["synthesis.caricature"]


def test_oracle() -> None:
    caricature.spec.oracle()


@pytest.mark.parametrize("layer", ["0", "1", "2", "6"])
def test_activations_point_where_those_of_the_image_do(model: Model, layer: str) -> None:
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    result = caricature(model, images, layer=layer, jitter=1, steps=60, seed=0)
    a, b = (model.features(x, layer).flatten(1) for x in (result.images, images))
    assert (torch.cosine_similarity(a, b) > 0.5).all()
    assert (result.scores[-1] > result.scores[0]).all()
    assert result.targets == (layer, layer)


def test_image_without_activations_is_refused(model: Model) -> None:
    with torch.no_grad():
        model.module[0].bias.fill_(-100.0)
    with pytest.raises(DivergenceError, match="cannot start"):
        caricature(model, torch.rand(1, 3, 12, 12, dtype=torch.float64), layer="1", seed=0)
