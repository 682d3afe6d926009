"""Feature matrices that are read block by block: the results of small ones, in bounded memory."""

from __future__ import annotations

import pickle

import pytest
import torch

from phosphene import methods
from phosphene.data import shard_state, use_shard_executor
from phosphene.testing.checks.folds import _CompareMerges
from phosphene_plugins.embeddings import _feature_folds


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    groups = 4 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(90, 6, generator=generator, dtype=torch.float64)
    rows = groups.repeat(30, 1) + noise * torch.linspace(2, 0.5, 6, dtype=torch.float64)
    return torch.cat([rows, torch.full((90, 1), 7.3, dtype=torch.float64)], 1)  # and a constant feature


@pytest.fixture
def blocks(monkeypatch):
    """Every matrix counts as large, in blocks of seven rows."""
    for name, value in (("LARGE", 0), ("BLOCK_ROWS", 7)):
        monkeypatch.setattr(_feature_folds, name, value)


class Pickled:
    """An executor that sends folds, rows and states through pickle, and computes the last shard first."""

    def states(self, fold, dataset, size, shards, seed):
        fold, dataset = pickle.loads(pickle.dumps((fold, dataset)))
        states = [shard_state(fold, dataset, size, shard, seed) for shard in reversed(shards)]
        return iter(pickle.loads(pickle.dumps(states[::-1])))


@pytest.mark.parametrize("name", ["pca", "outliers"])
def test_results_from_blocks_are_those_of_the_matrix(features, name, request):
    params = {"components": 3} if name == "pca" else {"k": 4}
    expected = methods[name](features=features, **params)
    request.getfixturevalue("blocks")
    result = methods[name](features=features, **params)
    scale = expected.points.abs().amax(0)
    assert ((result.points - expected.points).abs().amax(0) / scale).max() < 1e-12
    for metric, value in expected.metrics.items():
        assert abs(float(result.metrics[metric] / value) - 1) < 1e-12, metric
    for executor in (Pickled(), _CompareMerges()):
        with use_shard_executor(executor):
            again = methods[name](features=features, **params)
        assert ((again.points - result.points).abs().amax(0) / scale).max() < 1e-12


def test_equal_images_have_no_components_and_no_distances(blocks):
    equal = torch.full((9, 3), 7.3)
    assert not methods["pca"](features=equal).points.any()
    assert not methods["outliers"](features=equal, k=1).points.any()


def test_clusters_of_blocks_are_those_of_the_matrix(features, request, monkeypatch):
    expected = methods["clusters"](features=features, k=3, seed=0)
    request.getfixturevalue("blocks")
    for name, value in (("LARGE", 140), ("SAMPLE_ROWS", 30)):  # centers from every fifth row
        monkeypatch.setitem(methods["clusters"].function.__globals__, name, value)
    for executor in (None, Pickled(), _CompareMerges()):
        with use_shard_executor(executor):
            result = methods["clusters"](features=features, k=3, seed=0)
        number = torch.stack([result.clusters[expected.clusters == n].mode().values for n in range(3)])
        assert torch.equal(number[expected.clusters], result.clusters)
        for name in ("center_distances", "metrics"):
            ours, exact = (getattr(each, name) for each in (result, expected))
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
