"""Nearest neighbors against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn import neighbors
from torch import nn

from phosphene import TensorDataset, load_model, max_batch, methods


@pytest.mark.parametrize(("metric", "sklearn_metric"), [("l2", "euclidean"), ("cosine", "cosine")])
def test_neighbors_and_distances_equal_sklearn(metric, sklearn_metric):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5)]
    model = load_model(nn.Sequential(*layers).double(), input_size=(3, 16, 16))
    images, dataset = torch.rand(12, 3, 16, 16).double(), torch.rand(300, 3, 16, 16).double()
    with max_batch(37):
        ours = methods["nearest_neighbors"](model, images, TensorDataset(dataset), k=10, metric=metric)
    for our_indices, our_distances, queries, points, metric_name in (
        (ours.indices, ours.distances, model.embed(images), model.embed(dataset), sklearn_metric),
        (ours.pixel_indices, ours.pixel_distances, images.flatten(1), dataset.flatten(1), "euclidean"),
    ):
        search = neighbors.NearestNeighbors(n_neighbors=10, metric=metric_name, algorithm="brute")
        distances, indices = search.fit(points.detach()).kneighbors(queries.detach())
        assert our_indices.tolist() == indices.tolist()
        assert torch.allclose(our_distances, torch.from_numpy(distances), rtol=1e-10, atol=1e-10)
