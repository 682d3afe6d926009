"""Patch style: the loss falls at every scale, images are independent, several styles, and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import InputError, Model, load_model, methods
from phosphene_plugins.style.patch_style import best_matches

patch_style = methods["style.patch_style"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
    )
    return load_model(network.double())


@pytest.fixture
def content() -> Tensor:
    return torch.rand(2, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def styles() -> Tensor:
    return torch.rand(2, 3, 18, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 2


def test_the_loss_falls_at_every_scale(model: Model, content: Tensor, styles: Tensor) -> None:
    result = patch_style(model, content, styles, scales=2, steps=12, frames=4)
    assert result.losses.shape == (24, 2) and result.stylized.shape == content.shape
    assert (result.losses[11] < result.losses[0]).all() and (result.losses[23] < result.losses[12]).all()
    assert result.frames is not None and len(result.frames) == 8


def test_default_layers_are_the_middle_stage_and_the_next(
    model: Model, content: Tensor, styles: Tensor
) -> None:
    default = patch_style(model, content, styles, steps=2)
    named = patch_style(model, content, styles, style_layers=list(model.stages[1:3]), steps=2)
    assert torch.equal(default.stylized, named.stylized)
    assert not torch.equal(
        default.stylized, patch_style(model, content, styles, style_layers=["1"], steps=2).stylized
    )


def test_images_of_a_batch_are_independent(model: Model, content: Tensor, styles: Tensor) -> None:
    together = patch_style(model, content, styles, steps=1)
    for n in range(2):
        alone = patch_style(model, content[n : n + 1], styles, steps=1)
        torch.testing.assert_close(together.losses[:, n : n + 1], alone.losses, rtol=1e-9, atol=0)


def test_an_image_among_the_styles_is_its_own_match(model: Model, content: Tensor, styles: Tensor) -> None:
    """Several styles are one set of patches: one of them is the content, and nothing changes."""
    both = torch.cat([torch.rand_like(content[:1]), content[:1]])
    result = patch_style(model, content[:1], both, steps=2)
    assert result.losses.abs().max() < 1e-20 and torch.equal(result.stylized, content[:1])
    assert result.style == "in 2 styles"


def test_matches_are_by_direction_and_not_by_distance() -> None:
    patches = torch.tensor([[[1.0, 0.1], [-1.0, 0.0], [0.0, 0.0]]])
    style = torch.tensor([[0.9, 0.9], [50.0, 0.0], [0.0, 1.0]])
    assert best_matches(patches, style)[0, :2].tolist() == [1, 2]


def test_layers_and_weights_that_do_not_fit_are_refused(
    model: Model, content: Tensor, styles: Tensor
) -> None:
    with pytest.raises(InputError, match="at least one layer"):
        patch_style(model, content, styles, style_layers=[])
    with pytest.raises(InputError, match="2 layers, 1 weights"):
        patch_style(model, content, styles, weights=[1.0])


def test_tiles_have_the_same_result(model: Model, styles: Tensor) -> None:
    content = torch.rand(2, 3, 44, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"steps": 3, "scales": 2, "max_patches": 50}
    plain, tiled = (patch_style(model, content, styles, tile=tile, **options) for tile in (None, 16))
    torch.testing.assert_close(tiled.losses, plain.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(tiled.stylized, plain.stylized, rtol=0, atol=1e-8)
