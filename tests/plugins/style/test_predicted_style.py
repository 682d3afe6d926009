"""Predicted style parameters: saving and loading, blends, resumed trainings, export, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phosphene import InputError, export, load_result, methods, run
from phosphene.builtin.textures import load_texture
from phosphene.images import resize
from phosphene_plugins.style._predicted_network import PredictedStyle, PredictedStyleNetwork

apply, fit = methods["style.predicted_style"], methods["style.predicted_style_fit"]
SMALL: dict[str, Any] = {"steps": 2, "batch": 2, "width": 2, "blocks": 1, "predictor_width": 2, "seed": 0}
DATA = {"dataset": "builtin:scenes/4", "styles": "builtin:textures/3"}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def stylizer() -> PredictedStyle:
    torch.manual_seed(0)
    network = PredictedStyleNetwork(width=2, blocks=1, predictor_width=2, bottleneck=4)
    torch.nn.init.normal_(network.predictor.predict.weight, std=0.5)
    return PredictedStyle(
        network=network.eval().requires_grad_(False), method="style.predicted_style_fit",
        config=network.config, losses=torch.zeros(1), labels=(), previews=torch.zeros(0, 3, 8, 8),
    )  # fmt: skip


def test_a_training_is_saved_loaded_and_applied(tmp_path: Path) -> None:
    result: Any = run("predicted_style_fit", **DATA, **SMALL, out=tmp_path / "fit")
    assert result.losses.shape == (2,) and len(result.labels) == 4
    loaded = load_result(tmp_path / "fit")
    assert isinstance(loaded, PredictedStyle)
    images, styles = draw(2, 3, 16, 20), draw(1, 3, 11, 13)
    ours = apply(images, styles, result).stylized
    torch.testing.assert_close(apply(images, styles, loaded).stylized, ours)
    again = run("predicted_style", images=images, styles=styles, stylizer=tmp_path / "fit")
    torch.testing.assert_close(again.stylized, ours)


def test_a_training_starts_at_a_stylizer_and_does_not_change_it() -> None:
    start = stylizer()
    before = {name: value.clone() for name, value in start.network.state_dict().items()}
    options: Any = DATA | {"stylizer": start, "batch": 2, "seed": 0}
    result: Any = run("predicted_style_fit", **options, steps=1, lr=1e-9)
    assert result.config == start.config
    for name, value in result.network.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
        assert torch.equal(start.network.state_dict()[name], before[name])
    trained: Any = run("predicted_style_fit", **options, steps=2)
    assert all(not torch.equal(v, before[n]) for n, v in trained.network.state_dict().items())


def test_styles_are_equal_before_the_training_and_differ_after() -> None:
    untrained, random = PredictedStyleNetwork(2, 1, 2, 4), stylizer().network
    styles = draw(2, 3, 9, 9)
    first, second = untrained.predict(styles)
    assert torch.equal(first, second)
    first, second = random.predict(styles)
    assert (first - second).abs().max() > 1e-3
    # Of any size; a style of one color has finite parameters.
    for size in ((1, 1), (3, 40)):
        assert random.predict(torch.full((1, 3, *size), 0.4)).isfinite().all()


def test_blends_and_strength_mix_the_parameters() -> None:
    trained, images, styles = stylizer(), draw(2, 3, 12, 9), draw(2, 3, 9, 9, seed=2)
    alone = [apply(images, styles[n : n + 1], trained).stylized for n in (0, 1)]
    for n, blend in enumerate(([1.0, 0.0], [0.0, 3.0])):
        torch.testing.assert_close(apply(images, styles, trained, blend=blend).stylized, alone[n])
    assert not torch.equal(apply(images, styles, trained).stylized, alone[0])
    own = apply(images, styles, trained, strength=0.0).stylized
    expected = torch.cat([apply(image, image, trained).stylized for image in images.split(1)])
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_the_exported_network_takes_images_and_styles(suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    trained = stylizer()
    exported = export(trained, tmp_path / f"a{suffix}")
    assert set(exported.inputs) == {"images", "style"}
    if suffix == ".pt2":
        images, styles = draw(3, 3, 33, 52), draw(3, 3, 40, 31, seed=3)
        program = torch.export.load(exported.path).module()
        torch.testing.assert_close(
            program(images=images, style=styles), trained.network(images, styles), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("images", "styles", "message"),
    [
        (draw(1, 3, 7, 9), draw(1, 3, 9, 9), "8 pixels a side or more"),
        (draw(1, 1, 9, 9), draw(1, 3, 9, 9), "takes"),
        (draw(1, 3, 9, 9), draw(1, 1, 9, 9), r"takes styles \(S, 3, H, W\)"),
    ],
)
def test_refusals(images: Tensor, styles: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply(images, styles, stylizer())


def test_networks_of_other_methods_are_refused() -> None:
    other = load_result("builtin:shapes-styles")
    with pytest.raises(InputError, match="a network of predicted_style_fit, not one of style.fast_style_fit"):
        apply(draw(1, 3, 9, 9), draw(1, 3, 9, 9), other)
    with pytest.raises(InputError, match="network of fast_style_fit is needed"):
        methods["style.fast_style"](draw(1, 3, 9, 9), stylizer())


def test_the_bundled_network_draws_different_styles() -> None:
    images = draw(1, 3, 64, 64)
    styles = [resize(load_texture(name), (64, 64))[None] for name in ("swirls", "bricks")]
    trained = load_result("builtin:shapes-predicted")
    first, second = (apply(images, style, trained).stylized for style in styles)
    assert (first - second).abs().mean() > 0.02
