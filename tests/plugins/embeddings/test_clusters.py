"""Clusters: k-means groups and their agreement with the classes."""

from __future__ import annotations

import pytest
import torch

from phosphene import InputError, TensorDataset, run
from phosphene.testing.networks import make_network


def test_clusters_of_scenes_are_their_classes():
    result = run("clusters", dataset="builtin:scenes/200", seed=0)
    assert len(set(result.clusters.tolist())) == len(set(result.labels)) == 10
    for name in ("purity", "adjusted Rand index", "normalized mutual information"):
        assert result.metrics[name] > 0.85, name
    assert len(result.panels()) == 10


def test_agreement_with_the_labels_of_the_data_set():
    model, images = make_network("gap"), torch.rand(12, 3, 24, 24)
    clustering = run("clusters", model=model, dataset=images, k=3, seed=0)
    assert set(clustering.metrics) == {"inertia"}
    arguments = TensorDataset(images, [f"cluster {n}" for n in clustering.clusters.tolist()])
    again = run("clusters", model=model, dataset=arguments, seed=0)
    for name in ("purity", "adjusted Rand index", "normalized mutual information"):
        assert abs(float(again.metrics[name]) - 1) < 1e-6
    one = run("clusters", model=model, dataset=arguments, k=1, seed=0)
    assert float(one.metrics["adjusted Rand index"]) == 0


def test_inertia_is_the_sum_of_squared_center_distances():
    result = run("clusters", dataset="builtin:scenes/60", k=4, seed=0)
    middles = torch.stack([result.features[result.clusters == n].mean(0) for n in range(4)])
    far = (result.features - middles[result.clusters]).norm(dim=1)
    assert torch.allclose(result.center_distances, far, atol=1e-4)
    assert torch.allclose(result.metrics["inertia"], far.square().sum(), rtol=1e-4)


def test_more_clusters_than_images_are_refused():
    with pytest.raises(InputError, match="6 images make at most 6 clusters, not 7"):
        run("clusters", model=make_network("gap"), dataset=torch.rand(6, 3, 24, 24), k=7)
