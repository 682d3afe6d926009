"""Optimal-transport style: distances, positions, content preservation, batches, seeds and frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phosphene import InputError, Model, methods
from phosphene_plugins.style._transport_loss import draw_positions, hypercolumns, relaxed_emd, sliced_distance

optimal_transport_style = methods["style.optimal_transport_style"]


@pytest.fixture
def content() -> Tensor:
    return torch.rand(2, 3, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def styles() -> Tensor:
    return torch.rand(1, 3, 18, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 2


def test_positions_are_different_pixel_centers() -> None:
    positions = draw_positions((4, 5), 20, torch.Generator())
    image = torch.arange(20.0).double().view(1, 1, 4, 5)
    assert hypercolumns([image], positions)[0, :, 0].tolist() == pytest.approx(list(range(20)))
    some = hypercolumns([image], draw_positions((4, 5), 7, torch.Generator().manual_seed(0)))[0, :, 0]
    assert len({round(v) for v in some.tolist()}) == 7


def test_a_relaxed_distance_is_zero_only_for_equal_sets() -> None:
    points = torch.tensor([[[0.0], [1.0], [5.0]]])
    subset = (points - points[:, :2].mT).abs()
    assert relaxed_emd(subset).tolist() == pytest.approx([4 / 3])
    assert relaxed_emd((points - points.flip(1).mT).abs()).tolist() == [0]
    assert sliced_distance(points, points.flip(1), torch.ones(1, 1)).tolist() == [0]


@pytest.mark.parametrize("transport", ["relaxed_emd", "sliced_wasserstein"])
def test_the_loss_falls_at_every_scale(model: Model, content: Tensor, styles: Tensor, transport: str) -> None:
    result = optimal_transport_style(
        model, content, styles, transport=transport, scales=2, steps=24, frames=4, seed=0
    )
    assert result.losses.shape == (48, 2) and result.stylized.shape == content.shape
    assert (result.losses[19] < result.losses[0]).all()
    assert len(result.frames) == 8


def test_a_larger_alpha_preserves_the_content(model: Model, content: Tensor, styles: Tensor) -> None:
    weak, strong = (
        optimal_transport_style(model, content, styles, alpha=alpha, steps=15, seed=0).stylized
        for alpha in (0.2, 20.0)
    )
    assert (strong - content).abs().mean() < 0.8 * (weak - content).abs().mean()


def test_images_of_a_batch_are_independent(model: Model, content: Tensor, styles: Tensor) -> None:
    together = optimal_transport_style(model, content, styles, steps=3, positions=50, seed=2)
    for n in range(2):
        alone = optimal_transport_style(model, content[n : n + 1], styles, steps=3, positions=50, seed=2)
        torch.testing.assert_close(together.stylized[n : n + 1], alone.stylized, rtol=0, atol=1e-8)


def test_no_style_layers_are_refused(model: Model, content: Tensor, styles: Tensor) -> None:
    with pytest.raises(InputError, match="at least one layer"):
        optimal_transport_style(model, content, styles, style_layers=[])


@pytest.mark.parametrize("transport", ["relaxed_emd", "sliced_wasserstein"])
def test_tiles_have_the_same_result(model: Model, styles: Tensor, transport: str) -> None:
    content = torch.rand(2, 3, 37, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"steps": 3, "positions": 200, "transport": transport, "seed": 0}
    plain, tiled = (optimal_transport_style(model, content, styles, tile=t, **options) for t in (None, 16))
    torch.testing.assert_close(tiled.losses, plain.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(tiled.stylized, plain.stylized, rtol=0, atol=1e-8)
