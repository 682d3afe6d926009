"""Deletion and insertion: curves of additive models, areas over exact fractions, signed order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phosphene import Class, InputError, Model, SceneDataset, TensorDataset, load_model, methods
from phosphene.images import baseline_images
from phosphene_plugins.scores._evaluate_maps import ScoringContext
from phosphene_plugins.scores.deletion_insertion import changed_counts, curve_areas, score_curves

deletion_insertion = methods["scores.deletion_insertion"]


def additive(weight: torch.Tensor) -> Model:
    """A model whose first logit is the sum of weight (H, W) times the pixels."""
    linear = nn.Linear(weight.numel(), 2, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight.flatten(), torch.zeros(weight.numel())]))
    return load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, *weight.shape))


def test_oracle() -> None:
    deletion_insertion.spec.oracle()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.sampled_from(["gray", "zero", "mean", "blur", "noise"]))
def test_an_additive_models_curves_are_cumulative_sums(seed: int, steps: int, baseline: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight, maps = torch.randn(2, 6, 7, dtype=torch.float64, generator=draw)
    images = torch.rand(1, 1, 6, 7, dtype=torch.float64, generator=draw)
    context = ScoringContext(additive(weight), images, maps[None], Class((0,)), None, None)
    result = score_curves(context, steps, baseline, "logit", seed=3)[0]  # type: ignore[arg-type]
    removed = baseline_images(images, baseline, sigma=6 / 8, seed=3)  # type: ignore[arg-type]
    contributions = (weight * (images - removed)[0, 0]).flatten()[maps.flatten().argsort(descending=True)]
    sums = torch.cat([contributions.new_zeros(1), contributions.cumsum(0)])[changed_counts(steps, 42)]
    torch.testing.assert_close(result[0], (weight * images[0, 0]).sum() - sums)
    torch.testing.assert_close(result[1], (weight * removed[0, 0]).sum() + sums)


def test_steps_cover_all_pixels_and_areas_use_the_exact_fractions() -> None:
    assert changed_counts(3, 10) == [0, 3, 7, 10]
    assert changed_counts(99, 4) == [0, 1, 2, 3, 4]
    line = torch.tensor([0.0, 3.0, 7.0, 10.0]) / 10
    assert float(curve_areas(line, changed_counts(3, 10))) == pytest.approx(0.5)


def test_pixels_with_negative_values_are_removed_last() -> None:
    """By signed order deletion falls below its end, then comes back; by size it would not."""
    weight = torch.tensor([[2.0, -2.0, 1.0, -1.0]], dtype=torch.float64)
    images = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    result = deletion_insertion(
        additive(weight), TensorDataset(images, ["0"]), method="gradient_x_input", steps=4, baseline="zero",
        score="logit", seed=0,
    )  # fmt: skip
    assert result.deletion[0].tolist() == [0.0, -2.0, -3.0, -2.0, 0.0]
    assert result.insertion[0].tolist() == [0.0, 2.0, 3.0, 2.0, 0.0]


def test_grad_cam_beats_random_maps_on_the_bundled_scenes() -> None:
    model = load_model("builtin:shapes-vgg")
    result = deletion_insertion(model, SceneDataset(8), steps=6, seed=0)
    assert result.value("grad_cam", "deletion") < result.value("random maps", "deletion") - 0.1
    assert result.value("grad_cam", "insertion") > result.value("random maps", "insertion") + 0.1
    ends = result.deletion[:, [0, -1]]
    torch.testing.assert_close(ends, ends[:1].expand_as(ends))
    torch.testing.assert_close(result.insertion[:, [-1, 0]], ends)


def test_a_data_set_without_labels_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match='target="predicted"'):
        deletion_insertion(load_model("builtin:shapes-vgg"), TensorDataset(torch.rand(1, 3, 64, 64)), seed=0)
