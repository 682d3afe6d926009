"""WCT: covariances, blends, strengths, refusals, and VGG-19 with its decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from perceptual_networks import load_decoder, load_vgg19
from torch import Tensor

from phosphene import InputError, load_result, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.builtin.textures import load_texture
from phosphene.images import read_image, resize
from phosphene_plugins.style._adaptive_network import AdaptiveNetwork
from phosphene_plugins.style.wct import whiten_and_color

wct, adaptive_style = methods["style.wct"], methods["style.adaptive_style"]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_features_get_the_styles_mean_and_covariance() -> None:
    content, style = draw(5, 6, 7, seed=0), draw(5, 9, 4, seed=1) ** 2
    moved = whiten_and_color(content, style)
    torch.testing.assert_close(moved.flatten(1).cov(), style.flatten(1).cov())
    torch.testing.assert_close(moved.mean((1, 2)), style.mean((1, 2)))
    torch.testing.assert_close(whiten_and_color(content, content), content)


def test_fewer_positions_than_channels_are_finite() -> None:
    moved = whiten_and_color(draw(9, 2, 2, seed=0), draw(9, 1, 1, seed=1))
    torch.testing.assert_close(moved, draw(9, 1, 1, seed=1).expand(-1, 2, 2))


def test_without_strength_it_is_the_reconstruction_of_adaptive_style() -> None:
    content, styles = draw_scenes(2, seed=0).images, load_texture("swirls")[None]
    stylizer = load_result("builtin:shapes-adaptive")
    plain = adaptive_style(content, styles, stylizer, alpha=0.0).stylized
    assert torch.equal(wct(content, styles, stylizer, alpha=0.0).stylized, plain)


def test_a_network_of_another_method_is_refused() -> None:
    content, styles = draw_scenes(1, seed=0).images, load_texture("swirls")[None]
    with pytest.raises(InputError, match="wct applies a network of adaptive_style_fit"):
        wct(content, styles, load_result("builtin:shapes-styles"))


def test_real_features_are_nearer_to_the_style_than_by_adain(assets: Path) -> None:
    """The distance of the result's feature covariance at relu3_1 from the style's."""
    model = load_vgg19(assets)
    stylizer = AdaptiveNetwork.from_decoder(model, load_decoder(assets), model.stages[-1])
    content = resize(read_image(assets / "images" / "demo" / "owl.jpg"), (96, 128))[None]
    for name in ("the_scream", "starry_night"):
        style = resize(read_image(assets / "images" / "style" / f"{name}.jpg"), (96, 96))[None]
        target = stylizer.encode(style).flatten(2)[0].cov()
        by_adain, by_wct = (
            (stylizer.encode(m(content, style, stylizer).stylized).flatten(2)[0].cov() - target).norm()
            for m in (adaptive_style, wct)
        )
        assert by_wct < by_adain
