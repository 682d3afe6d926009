"""UMAP: the optional library does the work, and its absence is said before any."""

from __future__ import annotations

import sys

import pytest
import torch

from phosphene import InputError, MissingExtra, run
from phosphene.testing.networks import make_network
from phosphene.testing.observation import traffic


def test_without_the_library_it_says_which_extra_brings_it_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    model = make_network("gap")
    assert model.structure.classes  # what the wrapper looks at once is no work
    with traffic(model.module) as seen, pytest.raises(MissingExtra, match=r"phosphene\[umap\]"):
        run("umap", model=model, dataset=torch.rand(8, 3, 24, 24))
    assert seen.passes == 0


def test_more_neighbours_than_pictures_are_refused():
    with pytest.raises(InputError, match="8 images have at most 7 neighbors, not 8"):
        run("umap", model=make_network("gap"), dataset=torch.rand(8, 3, 24, 24), neighbors=8)


def test_a_map_of_the_scenes_has_the_classes_as_neighbours_and_a_seed_means_one_map():
    threads = torch.get_num_threads()
    found, again = (run("umap", dataset="builtin:scenes/120", seed=3) for _ in range(2))
    assert torch.equal(found.points, again.points)
    assert torch.get_num_threads() == threads  # numba sets them at its first call
    apart = torch.cdist(found.points, found.points).fill_diagonal_(torch.inf)
    same = [found.labels[i] == found.labels[j] for i, j in enumerate(apart.argmin(1).tolist())]
    assert sum(same) / len(same) > 0.85
    assert found.metrics["trustworthiness"] > 0.95
