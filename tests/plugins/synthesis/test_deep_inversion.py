"""DeepInversion: closed form, statistics of the bundled network, batches, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import InputError, ModelError, load_model, methods

deep_inversion = methods["synthesis.deep_inversion"]


def test_oracle() -> None:
    deep_inversion.spec.oracle()


def test_statistics_approach_the_stored_ones_and_images_of_a_class_differ() -> None:
    model = load_model("builtin:shapes-resnet")
    result = deep_inversion(model, target=("star", "ring"), per_class=2, steps=30, seed=0)
    assert result.targets == ("star", "ring", "star", "ring")
    assert result.distances[0, 1] < 0.5 * result.distances[0, 0]
    assert result.probabilities.mean() > 0.4 and (result.images[0] - result.images[2]).abs().max() > 0.1
    plain = deep_inversion(model, target=("star", "ring"), per_class=2, steps=30, seed=0, statistics=0)
    assert result.distances[0, 1] < 0.8 * plain.distances[0, 1]


def test_each_batch_is_optimised_alone_and_frames_have_all_images() -> None:
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(norm, nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    model = load_model(network, input_size=(3, 8, 8))
    both = deep_inversion(model, target=(0, 2), per_class=2, batch=2, steps=4, seed=3, frames=2)
    first = deep_inversion(model, target=(0, 2), per_class=1, batch=2, steps=4, seed=3)
    assert torch.equal(both.images[:2], first.images) and both.distances.shape == (2, 2)
    assert both.frames is not None and both.frames.shape == (2, 4, 3, 8, 8) and both.scores.shape == (4, 4)


def test_what_is_no_class_and_networks_without_statistics_are_refused() -> None:
    with pytest.raises(InputError, match="is none: for example"):
        deep_inversion(load_model("builtin:shapes-resnet"), target="layer2[3]", steps=1)
    with pytest.raises(ModelError, match="no batch norm with running statistics"):
        deep_inversion(load_model("builtin:shapes-vgg"), target=0, steps=1)
