"""Clusters: the heaps that are there, and how well they are the classes."""

from __future__ import annotations

import pytest
import torch

from phosphene import InputError, TensorDataset, run
from phosphene.testing.networks import make_network


def test_the_scenes_fall_into_their_classes():
    found = run("clusters", dataset="builtin:scenes/200", seed=0)
    assert len(set(found.clusters.tolist())) == len(set(found.labels)) == 10
    for name in ("purity", "adjusted Rand index", "normalized mutual information"):
        assert found.metrics[name] > 0.85, name
    assert len(found.panels()) == 10


def test_agreement_is_that_of_the_labels_given():
    model, images = make_network("gap"), torch.rand(12, 3, 24, 24)
    heaps = run("clusters", model=model, dataset=images, k=3, seed=0)
    assert set(heaps.metrics) == {"inertia"}
    told = TensorDataset(images, [f"heap {n}" for n in heaps.clusters.tolist()])
    again = run("clusters", model=model, dataset=told, seed=0)
    for name in ("purity", "adjusted Rand index", "normalized mutual information"):
        assert abs(float(again.metrics[name]) - 1) < 1e-6
    one = run("clusters", model=model, dataset=told, k=1, seed=0)
    assert float(one.metrics["adjusted Rand index"]) == 0


def test_the_sum_is_that_of_the_distances_to_the_middles():
    found = run("clusters", dataset="builtin:scenes/60", k=4, seed=0)
    middles = torch.stack([found.features[found.clusters == n].mean(0) for n in range(4)])
    far = (found.features - middles[found.clusters]).norm(dim=1)
    assert torch.allclose(found.center_distances, far, atol=1e-4)
    assert torch.allclose(found.metrics["inertia"], far.square().sum(), rtol=1e-4)


def test_more_clusters_than_pictures_are_refused():
    with pytest.raises(InputError, match="6 images make at most 6 clusters, not 7"):
        run("clusters", model=make_network("gap"), dataset=torch.rand(6, 3, 24, 24), k=7)
