"""Nearest neighbours as scikit-learn has them."""

from __future__ import annotations

import pytest
import torch
from sklearn import neighbors
from torch import nn

from phosphene import TensorDataset, load_model, max_batch, methods


@pytest.mark.parametrize(("metric", "theirs"), [("l2", "euclidean"), ("cosine", "cosine")])
def test_the_same_neighbours_at_the_same_distances(metric, theirs):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5)]
    model = load_model(nn.Sequential(*layers).double(), input_size=(3, 16, 16))
    images, dataset = torch.rand(12, 3, 16, 16).double(), torch.rand(300, 3, 16, 16).double()
    with max_batch(37):
        ours = methods["nearest_neighbors"](model, images, TensorDataset(dataset), k=10, metric=metric)
    for found, far, queries, points, how in (
        (ours.indices, ours.distances, model.embed(images), model.embed(dataset), theirs),
        (ours.pixel_indices, ours.pixel_distances, images.flatten(1), dataset.flatten(1), "euclidean"),
    ):
        search = neighbors.NearestNeighbors(n_neighbors=10, metric=how, algorithm="brute")
        distances, indices = search.fit(points.detach()).kneighbors(queries.detach())
        assert found.tolist() == indices.tolist()
        assert torch.allclose(far, torch.from_numpy(distances), rtol=1e-10, atol=1e-10)
