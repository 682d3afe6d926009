"""Outliers: inserted images rank first, and the distances equal their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import InputError, TensorDataset, load_model, methods, run
from phosphene.builtin.scenes import draw_scenes

outliers = methods["embeddings.outliers"]


def test_noise_among_scenes_of_one_class_is_the_first_outlier():
    scenes = draw_scenes(200, split="test")
    images = scenes.images[scenes.labels == 1]
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    result = run("outliers", dataset=TensorDataset(torch.cat([images[:7], noise, images[7:]])), k=3)
    assert result.farthest(0, 1) == result.farthest(1, 1) == [7]
    assert result.ids[7] == "7"


def test_distances_equal_those_of_all_pairs_and_of_the_inverted_covariance():
    torch.manual_seed(0)
    identity = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    model = load_model(identity, input_size=(3, 2, 2))
    for count in (9, 60):  # fewer and more than the features
        images = torch.rand(count, 3, 2, 2).double()
        result = outliers(model, images, k=4)
        vectors = images.flatten(1)
        apart = torch.cdist(vectors, vectors).sort(dim=1).values[:, 4]
        assert torch.allclose(result.points[:, 0], apart, atol=1e-10)
        rest = vectors - vectors.mean(0)
        covariance, shrinkage = rest.T @ rest / count, result.metrics["shrinkage"]
        shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / 12 * torch.eye(12).double()
        squares = (rest @ shrunk.inverse() * rest).sum(1)
        assert 0 < shrinkage <= 1
        assert torch.allclose(result.points[:, 1], squares.sqrt(), atol=1e-8)


def test_mean_squared_mahalanobis_distance_of_gaussian_features_is_their_number():
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_size=(3, 2, 2))
    images = 0.5 + 0.1 * torch.randn(2000, 3, 2, 2, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    result = outliers(model, images)
    assert abs(float(result.points[:, 1].square().mean()) - 12) < 0.1


def test_as_many_neighbors_as_images_are_refused():
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), input_size=(3, 2, 2))
    with pytest.raises(InputError, match="5 images have at most 4 neighbors, not 5"):
        outliers(model, torch.rand(5, 3, 2, 2))
