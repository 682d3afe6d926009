"""The pointing game on maps with peaks at specified positions."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from phosphene.data import dilate_masks, localization


def test_hit_depends_on_the_position_of_the_peak() -> None:
    masks = torch.zeros(4, 20, 20, dtype=torch.bool)
    masks[:, 8:12, 8:12] = True
    heat = torch.zeros(4, 20, 20)
    heat[0, 9, 9] = heat[1, 11, 15] = heat[2, 11, 16] = heat[3, 0, 0] = 1
    score = localization(heat, masks, radius=4)
    assert (score.inside, score.near) == (0.25, 0.5)
    assert score.chance_inside == pytest.approx(16 / 400)
    assert score.chance_near == pytest.approx(float(dilate_masks(masks, 4)[0].double().mean()))
    assert score.count == 4


def test_mask_dilation_is_euclidean() -> None:
    masks = torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(0)) < 0.02
    for mask, dilated in zip(masks, dilate_masks(masks, 4), strict=True):
        assert np.array_equal(dilated.numpy(), distance_transform_edt(~mask.numpy()) <= 4)


def test_random_maps_score_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(4000, 10, 10, dtype=torch.bool)
    masks[:, 2:5, 3:8] = True
    score = localization(torch.rand(4000, 10, 10, generator=generator), masks, radius=1)
    assert score.inside == pytest.approx(score.chance_inside, abs=0.02)
    assert score.near == pytest.approx(score.chance_near, abs=0.03)
