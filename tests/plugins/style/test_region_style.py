"""Style transfer by region: masks of ones, separate regions, style masks, empty regions, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phosphene import InputError, Model, methods

region_style, neural_style = methods["style.region_style"], methods["style.neural_style"]


@pytest.fixture
def content() -> Tensor:
    return torch.rand(2, 3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def styles() -> Tensor:
    return torch.rand(2, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def left_half(content: Tensor) -> Tensor:
    masks = torch.zeros_like(content[:, 0], dtype=torch.bool)
    masks[..., : masks.shape[2] // 2] = True
    return masks


def test_a_mask_of_ones_is_neural_style_bit_for_bit(model: Model, content: Tensor, styles: Tensor) -> None:
    ones = torch.ones_like(content[:, 0], dtype=torch.bool)
    plain = neural_style(model, content, styles[:1], steps=4, total_variation=1.0)
    for masks in (ones, None):
        regional = region_style(model, content, styles[:1], masks, steps=4, total_variation=1.0)
        assert torch.equal(regional.stylized, plain.stylized)
        assert torch.equal(regional.losses, plain.losses)


def test_without_a_second_style_pixels_far_outside_stay(
    model: Model, content: Tensor, styles: Tensor
) -> None:
    result = region_style(model, content, styles[:1], left_half(content), erosion=1.0, steps=5)
    change = (result.stylized - content).abs().amax(1)
    assert change[..., 16:].max() < 0.05 * change[..., :14].max()


def test_regions_with_exchanged_styles_and_masks(model: Model, content: Tensor, styles: Tensor) -> None:
    masks = left_half(content)
    first = region_style(model, content, styles, masks, steps=3)
    second = region_style(model, content, styles.flip(0), ~masks, steps=3)
    torch.testing.assert_close(first.stylized, second.stylized, rtol=0, atol=1e-9)


def test_style_masks_limit_the_style(model: Model, content: Tensor, styles: Tensor) -> None:
    """Of a style whose other half is black, as from the remaining half alone."""
    half = styles[:1].clone()
    half[..., 10:] = 0
    guide = torch.zeros(1, 3, 20, 20, dtype=torch.float64)
    guide[..., :10] = 1
    options = {"style_layers": ["1"], "style_scale": 20 / 32, "erosion": 1.0, "steps": 3}
    masked, other = (
        region_style(model, content, style, None, guide, **options) for style in (half, styles[:1])
    )
    assert torch.equal(masked.stylized, other.stylized)


def test_regions_of_other_images_do_not_matter(model: Model, content: Tensor, styles: Tensor) -> None:
    masks = left_half(content)
    masks[1] = True
    both = region_style(model, content, styles, masks, steps=3)
    for n in range(2):
        alone = region_style(model, content[n : n + 1], styles, masks[n : n + 1], steps=3)
        torch.testing.assert_close(both.stylized[n : n + 1], alone.stylized, rtol=0, atol=1e-9)


def test_regions_that_vanish_are_refused(model: Model, content: Tensor, styles: Tensor) -> None:
    masks = torch.zeros_like(content[:, 0], dtype=torch.bool)
    masks[:, 4:6, 4:6] = True
    region_style(model, content, styles, masks, erosion=0.0, steps=1)
    with pytest.raises(InputError, match="nothing of a region or of its style remains"):
        region_style(model, content, styles, masks, erosion=1.0, style_layers=["4"])
    with pytest.raises(InputError, match="nothing of a region or of its style remains"):
        region_style(model, content, styles[:1], None, torch.zeros(1, 3, 20, 20, dtype=torch.float64))


def test_style_masks_of_another_size_are_refused(model: Model, content: Tensor, styles: Tensor) -> None:
    with pytest.raises(InputError, match="style_masks must have the styles' shape"):
        region_style(model, content, styles[:1], None, styles[:1, ..., :10])


def test_several_styles_need_masks(model: Model, content: Tensor, styles: Tensor) -> None:
    with pytest.raises(InputError, match=f"{len(styles)} styles need masks"):
        region_style(model, content, styles)


def test_tiles_have_the_same_result(model: Model, content: Tensor, styles: Tensor) -> None:
    options = {"steps": 4, "total_variation": 1.0, "erosion": 0.2}
    masks = left_half(content)
    plain = region_style(model, content, styles, masks, **options)
    tiled = region_style(model, content, styles, masks, tile=16, **options)
    torch.testing.assert_close(tiled.losses, plain.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(tiled.stylized, plain.stylized, rtol=0, atol=1e-8)
