"""Relevance-maximizing patches: agreement with top_patches and concept_relevance, figures, refused values."""

from __future__ import annotations

import pytest
import torch

from phosphene import InputError, TensorDataset, UnknownName, load_model, max_batch, methods, run
from phosphene_plugins.concepts.relevant_patches import RelevantPatches

OPTIONS = {"layer": "features.11", "channels": [5, 1], "k": 3}


@pytest.fixture(scope="module")
def result() -> RelevantPatches:
    return run("relevant_patches", dataset="builtin:scenes/12", target="star", progress=False, **OPTIONS)


def test_patches_of_activation_are_those_of_top_patches(result: RelevantPatches) -> None:
    top = run("top_patches", dataset="builtin:scenes/12", progress=False, **OPTIONS)
    ours = result.most_active()
    assert ours.ids == top.ids and torch.equal(ours.positions, top.positions)
    torch.testing.assert_close(ours.scores, top.scores)
    assert torch.equal(ours.boxes, top.boxes)


def test_batches_have_the_predicted_classes_of_their_own_images() -> None:
    model = load_model("builtin:shapes-vgg")
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1:, 0] *= 0.2  # other classes are predicted
    results = []
    for size in (1, 5):
        with max_batch(size):
            results.append(methods["relevant_patches"](model, TensorDataset(images), **OPTIONS))
    assert results[0].ids == results[1].ids
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-3, atol=1e-6)
    # The relevance of a unit is part of that of its channel.
    through = methods["concept_relevance"](model, images, layer="features.11", channels=[5]).relevance
    assert float(results[0].scores[0]) <= float(through[:, 5].max()) + 1e-6


def test_the_figure_has_both_criteria_of_each_channel(result: RelevantPatches) -> None:
    groups = result.panels()
    assert [group[0].title.rpartition(" ")[0] for group in groups[::2]] == [
        "5: relevance", "5: activation", "1: relevance", "1: activation",
    ]  # fmt: skip
    assert all(len(group) == 3 for group in groups) and len(result.lines()) == 4
    many = run("relevant_patches", dataset="builtin:scenes/3", channels="all", k=2, progress=False)
    assert len(many.panels()) == 2 * len(set(many.channels))


def test_wrong_values_are_refused() -> None:
    with pytest.raises(InputError, match="so there is no number 5000"):
        run("relevant_patches", dataset="builtin:scenes/2", channels=[5000], progress=False)
    with pytest.raises(UnknownName, match="no class or layer 'stars'"):
        run("relevant_patches", dataset="builtin:scenes/2", target="stars", progress=False)
