"""Pointing game and mask IoU: closed forms, ties, baselines."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phosphene import Class, SceneDataset, load_model, methods
from phosphene.data import localization, peak_hits
from phosphene_plugins.scores._evaluate_maps import (
    ScoringContext,
    baseline_sources,
    pixel_ranks,
    positive_part,
)
from phosphene_plugins.scores.mask_iou import overlap_metric

MODEL = load_model("builtin:shapes-vgg")


def context(maps: torch.Tensor, masks: torch.Tensor) -> ScoringContext:
    return ScoringContext(MODEL, torch.zeros(len(maps), 3, *maps.shape[1:]), maps, Class(0), masks, None)


def test_oracles() -> None:
    methods["scores.pointing_game"].spec.oracle()
    methods["scores.mask_iou"].spec.oracle()


def test_a_tie_counts_the_fraction_of_maxima_inside() -> None:
    maps, masks = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    maps[0, 0, 0] = maps[0, 3, 3] = 1.0
    masks[:, 3, 2:] = True
    assert peak_hits(maps, masks, radius=0)[:, 0].tolist() == [0.5, 2 / 16]
    assert localization(maps, masks, radius=0).inside == (0.5 + 2 / 16) / 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 100), st.floats(0.05, 0.95))
def test_overlap_is_invariant_to_the_maps_scale(seed: int, factor: float, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 9, 7, dtype=torch.float64, generator=draw)
    masks = torch.rand(3, 9, 7, generator=draw) < share
    for threshold in (None, 0.5):
        measure = overlap_metric(threshold).function
        one, other = measure(context(maps, masks)), measure(context(maps * factor, masks))
        assert one is not None and other is not None
        torch.testing.assert_close(one, other)
        assert one.min() >= 0 and one.max() <= 1 + 1e-12


def test_the_objects_mask_overlaps_completely_and_a_constant_map_has_the_objects_energy() -> None:
    masks = SceneDataset(4).masks(range(4))
    result = overlap_metric(None).function(context(masks.float(), masks))
    assert result is not None
    torch.testing.assert_close(result, torch.ones(4, 2))
    for level in (0.0, 3.0, -3.0):
        result = overlap_metric(None).function(context(torch.full(masks.shape, level), masks))
        assert result is not None
        torch.testing.assert_close(result[:, 1], masks.float().mean((1, 2)))


def test_negative_values_count_only_where_a_map_has_no_positive_ones() -> None:
    maps = torch.tensor([[[-1.0, 0.0, 2.0]], [[-3.0, -1.0, -2.0]], [[-1.0, -1.0, -1.0]]])
    expected = torch.tensor([[[0.0, 0.0, 2.0]], [[0.0, 2.0, 1.0]], [[1.0, 1.0, 1.0]]])
    torch.testing.assert_close(positive_part(maps), expected)


def test_ranks_break_ties_in_row_major_order() -> None:
    assert pixel_ranks(torch.tensor([[[1.0, 3.0], [3.0, 1.0]]])).tolist() == [[[2, 0], [1, 3]]]


def test_baselines_are_a_central_peak_and_random_maps() -> None:
    images = torch.zeros(3, 3, 64, 48)
    center, noise = (s.compute(MODEL, images, Class(0), range(2, 5)) for s in baseline_sources(6, seed=4))
    assert center.shape == noise.shape == (3, 64, 48)
    torch.testing.assert_close(center, center.flip(1, 2))
    assert (center[0] == center.max()).nonzero().tolist() == [[31, 23], [31, 24], [32, 23], [32, 24]]
    assert noise[0].corrcoef().isfinite().all() and not torch.equal(noise[0], noise[1])
    # An image's map does not depend on its batch.
    again = baseline_sources(6, seed=4)[1].compute(MODEL, images[:1], Class(0), range(3, 4))
    assert torch.equal(again[0], noise[1])


def test_grad_cam_points_at_the_object() -> None:
    result = methods["pointing_game"](MODEL, SceneDataset(32), seed=0)
    assert result.value("grad_cam", "pointing") > 0.8
    assert result.value("random maps", "pointing") < 0.4
    assert result.value("grad_cam", "within 4 px") >= result.value("grad_cam", "pointing")
