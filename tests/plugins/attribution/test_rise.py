"""RISE: equality with a loop over the same masks, and the masks' distribution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import InputError, load_model, max_batch, methods
from phosphene_plugins.attribution.rise import random_masks

rise = methods["attribution.rise"]


def small_model():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return load_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head).double(), input_size=(3, 11, 14))


def test_oracle() -> None:
    rise.spec.oracle()


@pytest.mark.parametrize("batch", [5, 32])
def test_it_equals_a_loop_over_the_same_masks(batch: int) -> None:
    model, images = small_model(), torch.rand(2, 3, 11, 14, dtype=torch.float64)
    masks = random_masks(12, (11, 14), grid=3, keep_probability=0.6, seed=4)(range(12)).double()
    expected = torch.zeros(2, 11, 14, dtype=torch.float64)
    with torch.no_grad():
        for n, image in enumerate(images):
            for mask in masks:
                expected[n] += model((image * mask)[None]).softmax(1)[0, n] * mask / (12 * 0.6)
    with max_batch(batch):
        maps = rise(model, images, [0, 1], masks=12, grid=3, keep_probability=0.6, seed=4).maps
    torch.testing.assert_close(maps, expected)


def test_every_pixel_is_visible_with_the_keep_probability() -> None:
    masks = random_masks(3000, (20, 24), grid=4, keep_probability=0.3, seed=0)(range(3000))
    assert masks.min() >= 0 and masks.max() <= 1
    torch.testing.assert_close(masks.mean(0), torch.full((20, 24), 0.3), rtol=0, atol=0.04)


def test_a_neurons_probability_is_refused() -> None:
    with pytest.raises(InputError, match="probability"):
        rise(small_model(), torch.rand(1, 3, 11, 14), "0[1]", score="probability", masks=2)
