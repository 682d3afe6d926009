"""Feature accentuation: oracle, the distance in the layer, targets and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phosphene import Model, UnknownName, max_batch, methods

accentuate = methods["synthesis.feature_accentuation"]


def test_oracle() -> None:
    accentuate.spec.oracle()


def test_weight_holds_the_image_near_in_the_layer(model: Model) -> None:
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    distances, scores = [], []  # of both images
    for weight in (0.0, 1.0, 100.0):
        result = accentuate(model, images, (1, 2), layer="1", weight=weight, jitter=1, steps=20, seed=0)
        change = model.features(result.images, "1") - model.features(images, "1")
        distances.append(float(change.detach().square().sum()))
        scores.append(float(model(result.images)[[0, 1], [1, 2]].detach().sum()))
    start = float(model(images)[[0, 1], [1, 2]].detach().sum())
    assert distances[0] > distances[1] > distances[2]
    assert scores[0] > scores[1] > scores[2] > start


def test_predicted_class_is_that_of_the_image_itself(model: Model) -> None:
    images = torch.rand(3, 3, 12, 12, dtype=torch.float64)
    options: dict[str, Any] = {"layer": "1", "steps": 4, "seed": 0}
    predicted = accentuate(model, images, **options)
    named = accentuate(model, images, model(images).argmax(1).tolist(), **options)
    assert predicted.targets == named.targets and torch.equal(predicted.images, named.images)
    with max_batch(2):
        parts = accentuate(model, images, **options)
    torch.testing.assert_close(parts.images, predicted.images, atol=1e-9, rtol=0)
    torch.testing.assert_close(parts.alpha, predicted.alpha, atol=1e-9, rtol=0)


def test_layer_is_the_middle_stage_by_default_and_must_exist(model: Model) -> None:
    images = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    middle = model.stages[len(model.stages) // 2]
    default, named = (accentuate(model, images, 0, steps=3, seed=0, **o) for o in ({}, {"layer": middle}))
    assert torch.equal(default.images, named.images)
    with pytest.raises(UnknownName):
        accentuate(model, images, 0, layer="nowhere")
