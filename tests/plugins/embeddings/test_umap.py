"""UMAP: the map of the optional library, and an error before any pass if it is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from phosphene import InputError, MissingExtra, run
from phosphene.testing.networks import make_network
from phosphene.testing.observation import count_passes


def test_missing_library_is_reported_before_any_forward_pass(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    model = make_network("gap")
    assert model.structure.classes  # recorded once, with a pass of its own, which does not count
    with count_passes(model.module) as passes, pytest.raises(MissingExtra, match=r"phosphene\[umap\]"):
        run("umap", model=model, dataset=torch.rand(8, 3, 24, 24))
    assert passes.started == 0


def test_more_neighbors_than_images_are_refused():
    with pytest.raises(InputError, match="8 images have at most 7 neighbors, not 8"):
        run("umap", model=make_network("gap"), dataset=torch.rand(8, 3, 24, 24), neighbors=8)


def test_neighbors_on_the_map_of_scenes_share_a_class_and_a_seed_determines_the_map():
    threads = torch.get_num_threads()
    result, again = (run("umap", dataset="builtin:scenes/120", seed=3) for _ in range(2))
    assert torch.equal(result.points, again.points)
    assert torch.get_num_threads() == threads  # numba sets them at its first call
    distances = torch.cdist(result.points, result.points).fill_diagonal_(torch.inf)
    same = [result.labels[i] == result.labels[j] for i, j in enumerate(distances.argmin(1).tolist())]
    assert sum(same) / len(same) > 0.85
    assert result.metrics["trustworthiness"] > 0.95
