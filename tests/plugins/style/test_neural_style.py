"""Neural style transfer: closed forms, blends, colors, scales, tiles, and a pretrained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.perceptual_networks import load_vgg19
from torch import Tensor

from phosphene import InputError, Model, ModelError, load_model, methods, run
from phosphene.optimize import gram_matrix
from phosphene_plugins.style._color_transfer import luminance, match_color_statistics, replace_luminance
from phosphene_plugins.style._style_loss import StyleLoss, StyleTargets, relative_error
from phosphene_plugins.style._tiled_gradient import image_loss, split_into_tiles, tiled_loss

neural_style = methods["style.neural_style"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("builtin:shapes-vgg", dtype=torch.float64)


def draw_images(*shape: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(*shape[:2], 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear").clamp(0, 1)


def test_oracle() -> None:
    assert neural_style.spec.oracle is not None
    neural_style.spec.oracle()


def test_the_loss_falls_and_a_higher_style_weight_changes_the_content_more(model: Model) -> None:
    content, styles = draw_images(1, 3, 32, 40), draw_images(1, 3, 48, 48, seed=1)
    content_change = []
    for weight in (1.0, 1000.0):
        result = neural_style(model, content, styles, steps=20, style_weight=weight)
        assert result.stylized.shape == content.shape and result.losses.shape == (20, 1)
        assert (result.losses.diff(dim=0) <= 1e-12).all()
        loss_network = StyleLoss(model)
        content_change.append(
            float(
                relative_error(
                    loss_network.content_features(result.stylized), loss_network.content_features(content)
                )
            )
        )
    assert content_change[0] < content_change[1]


def test_blended_gram_matrices_have_the_gradient_of_blended_losses(model: Model) -> None:
    loss_network, images = StyleLoss(model), draw_images(2, 3, 32, 32).requires_grad_()
    styles, blend_weights = draw_images(2, 3, 40, 40, seed=1), torch.tensor([0.3, 0.7], dtype=torch.float64)
    mixed = loss_network.style_grams(styles, blend_weights)
    grams = [gram_matrix(f) for f in loss_network.features(images)[:-1]]
    gradient = torch.autograd.grad(loss_network.style_loss(grams, mixed).sum(), images, retain_graph=True)[0]
    separate = [
        loss_network.style_grams(style, torch.ones(1, dtype=torch.float64)) for style in styles.split(1)
    ]
    sum_of_gradients = torch.zeros_like(images)
    for weight, style_grams in zip(blend_weights, separate, strict=True):
        # relative to the blended Gram matrices, as in the loss
        terms = zip(loss_network.weights, grams, style_grams, mixed, strict=True)
        loss = sum(w * (f - g).square().sum() / m.square().sum() for w, f, g, m in terms)
        sum_of_gradients += weight * torch.autograd.grad(loss, images, retain_graph=True)[0]
    torch.testing.assert_close(gradient, sum_of_gradients)


def test_blend_weights_are_normalized_and_zero_removes_a_style(model: Model) -> None:
    content, styles = draw_images(1, 3, 32, 32), draw_images(2, 3, 32, 32, seed=1)
    one = neural_style(model, content, styles, blend=[0.0, 5.0], steps=4)
    assert torch.equal(one.stylized, neural_style(model, content, styles[1:], steps=4).stylized)
    assert one.style == "100% of style 1"
    for blend in ([0.0, 0.0], [1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(InputError, match="2 styles need one weight each"):
            neural_style(model, content, styles, blend=blend)
    with pytest.raises(InputError, match="one weight for each"):
        neural_style(model, content, styles, weights=[1.0])


def test_initial_images(model: Model) -> None:
    content, styles = draw_images(2, 3, 32, 32), draw_images(1, 3, 32, 32, seed=1)
    negligible: dict[str, Any] = {"steps": 1, "optimizer": "adam", "lr": 1e-9}
    initial = {
        init: neural_style(model, content, styles, init=init, seed=3, **negligible).stylized
        for init in ("content", "style", "noise")
    }
    assert (initial["content"] - content).abs().max() < 1e-6
    assert (initial["style"] - styles).abs().max() < 1e-6
    assert (initial["noise"][0] - initial["noise"][1]).abs().max() < 1e-6 and initial["noise"].std() > 0.15
    started = neural_style(model, content, styles, styles, init="noise", **negligible).stylized
    assert (started - styles).abs().max() < 1e-6


def test_colors_are_preserved(model: Model) -> None:
    content, styles = draw_images(2, 3, 32, 32), draw_images(2, 3, 32, 32, seed=1)
    like = match_color_statistics(styles, content[:1])

    def color_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
        flat = images.transpose(0, 1).flatten(1)
        return flat.mean(1), torch.cov(flat)

    pale_styles, pale_content = (0.5 + 0.05 * (i - 0.5) for i in (styles, content[:1]))  # nothing is clipped
    for style in match_color_statistics(pale_styles, pale_content):
        statistics = zip(color_statistics(style[None]), color_statistics(pale_content), strict=True)
        for statistic, expected in statistics:
            torch.testing.assert_close(statistic, expected, atol=1e-6, rtol=1e-3)
    assert torch.equal(
        match_color_statistics(styles[:, :1], like[:1, :1])[1:],
        match_color_statistics(styles[1:, :1], like[:1, :1]),
    )
    result = neural_style(model, content, styles, color="luminance", steps=3)
    gray = result.stylized - luminance(result.stylized) - (content - luminance(content))
    inside = ((result.stylized > 0) & (result.stylized < 1)).all(1)
    assert gray.abs().amax(1)[inside].max() < 1e-9
    torch.testing.assert_close(replace_luminance(content, content), content)
    for color in ("luminance", "histogram"):  # independent of the other images of the batch
        together = neural_style(model, content, styles, color=color, steps=3).stylized
        alone = neural_style(model, content[1:], styles, color=color, steps=3).stylized
        torch.testing.assert_close(together[1:], alone, atol=1e-9, rtol=0)
    gray_model = load_model(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), input_size=(1, 16, 16))
    with pytest.raises(InputError, match="red, green and blue"):
        neural_style(gray_model, torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16), color="luminance")


def test_sizes_scales_and_frames(model: Model) -> None:
    content, styles = draw_images(1, 3, 48, 64), draw_images(1, 3, 32, 32, seed=1)
    result = neural_style(model, content, styles, size=32, scales=2, steps=3, frames=2)
    assert result.images.shape == result.stylized.shape == (1, 3, 24, 32)
    assert result.losses.shape == (6, 1) and result.frames.shape == (4, 1, 3, 24, 32)
    sizes: list[tuple[int, ...]] = []
    handle = model.module.register_forward_pre_hook(
        lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:]))
    )
    neural_style(model, content, styles, style_scale=0.5, steps=1)
    handle.remove()
    assert set(sizes) == {(48, 64), (32, 32)}


@pytest.mark.parametrize(("height", "width", "side"), [(130, 75, 48), (64, 64, 16), (100, 60, 64)])
def test_tiles_have_the_same_loss_and_gradient(model: Model, height: int, width: int, side: int) -> None:
    loss_network = StyleLoss(model, content_layer="relu2_2", style_layers=["relu1_1", "relu2_1", "relu3_1"])
    images, content = draw_images(2, 3, height, width), draw_images(2, 3, height, width, seed=2)
    targets = StyleTargets(
        loss_network.content_features(content),
        loss_network.style_grams(draw_images(1, 3, 40, 40, seed=1), content.new_ones(1)),
    )
    images.requires_grad_()
    *style_features, content_features = loss_network.features(images)
    loss = 2 * relative_error(content_features, targets.content) + 3 * loss_network.style_loss(
        [gram_matrix(f) for f in style_features], targets.style_grams
    )
    tiles = split_into_tiles(loss_network, images, side)
    assert tiles is not None and len(tiles) > 1
    widest = max(t.window[0].stop - t.window[0].start for t in tiles)
    assert widest < height or height <= side + 40
    tiled = tiled_loss(loss_network, targets, tiles, 2.0, 3.0, images)
    torch.testing.assert_close(tiled, loss)
    (gradient,), (tiled_gradient,) = (torch.autograd.grad(value.sum(), images) for value in (loss, tiled))
    torch.testing.assert_close(tiled_gradient, gradient, atol=1e-12 * float(gradient.abs().max()), rtol=1e-9)


def test_windows_of_tiles_bound_what_passes_through_the_network(model: Model) -> None:
    """Any loss of features has the same gradient in tiles, and no pass is larger than a window."""
    loss_network = StyleLoss(model, content_layer="relu2_2", style_layers=["relu1_1", "relu2_1"])
    random = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 130, 75, dtype=torch.float64, generator=random)  # no ties in max pooling
    images.requires_grad_()

    def loss(features: list[Tensor], candidates: Tensor) -> Tensor:
        deviations = [f.std((2, 3)).sum(1) for f in features]  # no sum over positions
        return sum(deviations, candidates.square().mean((1, 2, 3)))

    assert model.structure.layers  # reading it takes a pass
    passed: list[int] = []
    hook = model.module.register_forward_pre_hook(lambda _, inputs: passed.append(max(inputs[0].shape[2:])))
    values = [image_loss(loss_network, loss, images, tile)(images) for tile in (None, 48)]
    hook.remove()
    assert passed[0] == 130 and max(passed[1:]) < 100
    torch.testing.assert_close(values[1], values[0])
    gradients = [torch.autograd.grad(value.sum(), images)[0] for value in values]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-12, rtol=1e-9)


def test_layers_with_a_global_receptive_field_have_no_tiles(model: Model) -> None:
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 4, 3)]
    global_model = load_model(torch.nn.Sequential(*layers), input_size=(3, 64, 64))
    with pytest.raises(ModelError, match="too large for tiles"):
        neural_style(
            global_model, torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64), tile=16, style_layers=["2"]
        )
    assert split_into_tiles(StyleLoss(model), draw_images(1, 3, 64, 64), 64) is None


def test_images_are_read_at_their_own_size(tmp_path: Path) -> None:
    from phosphene.images import write_png

    write_png(torch.rand(3, 40, 72), tmp_path / "a.png")
    result = run("neural_style", images=tmp_path / "a.png", styles="builtin:bricks", steps=1)
    assert result.images.shape == (1, 3, 40, 72)


def test_a_pretrained_network(assets: Path) -> None:
    model = load_vgg19(assets)
    layers: Any = {"content_layer": "relu3_1", "style_layers": ["relu1_1", "relu2_1", "relu3_1"]}
    result = run(
        "neural_style", model=model, images=assets / "images" / "demo" / "tubingen.jpg",
        styles=assets / "images" / "style" / "starry_night.jpg", size=96, steps=8, **layers,
    )  # fmt: skip
    assert result.losses[-1] < 0.3 * result.losses[0]
    # blue dominates, as in the painting
    assert result.stylized.mean((0, 2, 3)).argmax() == 2
