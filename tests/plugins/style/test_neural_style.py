"""Neural style: closed forms, blends, colours, scales, tiles, and a real network's strokes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.perceptual_networks import load_vgg19
from torch import Tensor

from phosphene import InputError, Model, ModelError, load_model, methods, run
from phosphene.optimize import gram_matrix
from phosphene_plugins.style._color_transfer import luminance, matched, recoloured
from phosphene_plugins.style._style_loss import Aim, Perception, relative
from phosphene_plugins.style._tiled_gradient import by_tiles, tiles

paint = methods["style.neural_style"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("builtin:shapes-vgg", dtype=torch.float64)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.rand(*shape[:2], 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.interpolate(drawn, shape[2:], mode="bilinear").clamp(0, 1)


def test_oracle() -> None:
    assert paint.spec.oracle is not None
    paint.spec.oracle()


def test_the_loss_falls_and_a_heavier_style_goes_further_from_the_content(model: Model) -> None:
    content, styles = pictures(1, 3, 32, 40), pictures(1, 3, 48, 48, seed=1)
    away = []
    for weight in (1.0, 1000.0):
        made = paint(model, content, styles, steps=20, style_weight=weight)
        assert made.stylized.shape == content.shape and made.losses.shape == (20, 1)
        assert (made.losses.diff(dim=0) <= 1e-12).all()
        look = Perception(model)
        away.append(float(relative(look.content(made.stylized), look.content(content))))
    assert away[0] < away[1]


def test_a_blend_of_targets_has_the_gradient_of_a_blend_of_losses(model: Model) -> None:
    look, images = Perception(model), pictures(2, 3, 32, 32).requires_grad_()
    styles, shares = pictures(2, 3, 40, 40, seed=1), torch.tensor([0.3, 0.7], dtype=torch.float64)
    mixed = look.style(styles, shares)
    found = [gram_matrix(f) for f in look.maps(images)[:-1]]
    one = torch.autograd.grad(look.style_loss(found, Aim(images, mixed)).sum(), images, retain_graph=True)[0]
    apart = [look.style(style, torch.ones(1, dtype=torch.float64)) for style in styles.split(1)]
    both = torch.zeros_like(images)
    for share, grams in zip(shares, apart, strict=True):
        # each relative to the mixture, as the seed's losses are to nothing
        terms = zip(look.weights, found, grams, mixed, strict=True)
        loss = sum(w * (f - g).square().sum() / m.square().sum() for w, f, g, m in terms)
        both += share * torch.autograd.grad(loss, images, retain_graph=True)[0]
    torch.testing.assert_close(one, both)


def test_a_share_of_nothing_is_nothing_and_shares_are_of_their_sum(model: Model) -> None:
    content, styles = pictures(1, 3, 32, 32), pictures(2, 3, 32, 32, seed=1)
    one = paint(model, content, styles, blend=[0.0, 5.0], steps=4)
    assert torch.equal(one.stylized, paint(model, content, styles[1:], steps=4).stylized)
    assert one.style == "100% of style 1"
    for blend in ([0.0, 0.0], [1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(InputError, match="2 styles need one share each"):
            paint(model, content, styles, blend=blend)
    with pytest.raises(InputError, match="one weight for each"):
        paint(model, content, styles, weights=[1.0])


def test_what_it_begins_with(model: Model) -> None:
    content, styles = pictures(2, 3, 32, 32), pictures(1, 3, 32, 32, seed=1)
    still: dict[str, Any] = {"steps": 1, "optimizer": "adam", "lr": 1e-9}
    begun = {init: paint(model, content, styles, init=init, seed=3, **still).stylized for init in
             ("content", "style", "noise")}  # fmt: skip
    assert (begun["content"] - content).abs().max() < 1e-6
    assert (begun["style"] - styles).abs().max() < 1e-6
    assert (begun["noise"][0] - begun["noise"][1]).abs().max() < 1e-6 and begun["noise"].std() > 0.15
    assert (paint(model, content, styles, styles, init="noise", **still).stylized - styles).abs().max() < 1e-6


def test_colours_are_kept(model: Model) -> None:
    content, styles = pictures(2, 3, 32, 32), pictures(2, 3, 32, 32, seed=1)
    like = matched(styles, content[:1])

    def of(images: Tensor) -> tuple[Tensor, Tensor]:
        flat = images.transpose(0, 1).flatten(1)
        return flat.mean(1), torch.cov(flat)

    for style in matched(0.5 + 0.05 * (styles - 0.5), 0.5 + 0.05 * (content[:1] - 0.5)):  # nothing to clip
        for have, want in zip(of(style[None]), of(0.5 + 0.05 * (content[:1] - 0.5)), strict=True):
            torch.testing.assert_close(have, want, atol=1e-6, rtol=1e-3)
    assert torch.equal(matched(styles[:, :1], like[:1, :1])[1:], matched(styles[1:, :1], like[:1, :1]))
    made = paint(model, content, styles, colour="luminance", steps=3)
    grey = made.stylized - luminance(made.stylized) - (content - luminance(content))
    inside = ((made.stylized > 0) & (made.stylized < 1)).all(1)
    assert grey.abs().amax(1)[inside].max() < 1e-9
    torch.testing.assert_close(recoloured(content, content), content)
    for colour in ("luminance", "histogram"):  # every picture's own, whatever it stands beside
        whole = paint(model, content, styles, colour=colour, steps=3).stylized
        alone = paint(model, content[1:], styles, colour=colour, steps=3).stylized
        torch.testing.assert_close(whole[1:], alone, atol=1e-9, rtol=0)
    grey_model = load_model(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), input_size=(1, 16, 16))
    with pytest.raises(InputError, match="red, green and blue"):
        paint(grey_model, torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16), colour="luminance")


def test_sizes_scales_and_frames(model: Model) -> None:
    content, styles = pictures(1, 3, 48, 64), pictures(1, 3, 32, 32, seed=1)
    made = paint(model, content, styles, size=32, scales=2, steps=3, frames=2)
    assert made.images.shape == made.stylized.shape == (1, 3, 24, 32)
    assert made.losses.shape == (6, 1) and made.frames.shape == (4, 1, 3, 24, 32)
    seen: list[tuple[int, ...]] = []
    handle = model.module.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    paint(model, content, styles, style_scale=0.5, steps=1)
    handle.remove()
    assert set(seen) == {(48, 64), (32, 32)}


@pytest.mark.parametrize(("height", "width", "side"), [(130, 75, 48), (64, 64, 16), (100, 60, 64)])
def test_tiles_give_the_same_loss_and_gradient(model: Model, height: int, width: int, side: int) -> None:
    look = Perception(model, content_layer="relu2_2", style_layers=["relu1_1", "relu2_1", "relu3_1"])
    images, content = pictures(2, 3, height, width), pictures(2, 3, height, width, seed=2)
    aim = Aim(look.content(content), look.style(pictures(1, 3, 40, 40, seed=1), content.new_ones(1)))
    images.requires_grad_()
    *styles, found = look.maps(images)
    whole = 2 * relative(found, aim.content) + 3 * look.style_loss([gram_matrix(f) for f in styles], aim)
    parts = tiles(look, images, side)
    assert parts is not None and len(parts) > 1
    widest = max(p.place[0].stop - p.place[0].start for p in parts)
    assert widest < height or height <= side + 40
    tiled = by_tiles(look, aim, parts, 2.0, 3.0, images)
    torch.testing.assert_close(tiled, whole)
    (one,), (other,) = (torch.autograd.grad(loss.sum(), images) for loss in (whole, tiled))
    torch.testing.assert_close(other, one, atol=1e-12 * float(one.abs().max()), rtol=1e-9)


def test_what_sees_everything_has_no_tiles(model: Model) -> None:
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 4, 3)]
    everywhere = load_model(torch.nn.Sequential(*layers), input_size=(3, 64, 64))
    with pytest.raises(ModelError, match="too far for tiles"):
        paint(everywhere, torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64), tile=16, style_layers=["2"])
    assert tiles(Perception(model), pictures(1, 3, 64, 64), 64) is None


def test_pictures_are_read_at_their_own_size(tmp_path: Path) -> None:
    from phosphene.images import write_png

    write_png(torch.rand(3, 40, 72), tmp_path / "a.png")
    made = run("neural_style", images=tmp_path / "a.png", styles="builtin:bricks", steps=1)
    assert made.images.shape == (1, 3, 40, 72)


def test_a_real_network_paints_in_strokes(assets: Path) -> None:
    model = load_vgg19(assets)
    layers: Any = {"content_layer": "relu3_1", "style_layers": ["relu1_1", "relu2_1", "relu3_1"]}
    made = run(
        "neural_style", model=model, images=assets / "images" / "demo" / "tubingen.jpg",
        styles=assets / "images" / "style" / "starry_night.jpg", size=96, steps=8, **layers,
    )  # fmt: skip
    assert made.losses[-1] < 0.3 * made.losses[0]
    # bluer than the photograph, as the painting is
    assert made.stylized.mean((0, 2, 3)).argmax() == 2
