"""The CAM family: layer layouts, display conventions, refused layers, peaks on the bundled objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, UnknownName, load_model, load_result, max_batch, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.images import min_max
from phosphene.results import Attribution

GRADIENTS = ["grad_cam", "grad_cam_plus_plus", "hires_cam", "layer_cam", "xgrad_cam"]
SIGNED = ["hires_cam", "eigen_cam"]
FAMILY = [*GRADIENTS, "score_cam", "ablation_cam", "eigen_cam"]
#: One forward pass per channel: a few seconds for a few scenes.
ONE_PASS_PER_CHANNEL = ["score_cam", "ablation_cam"]
CONVENTIONS = ["minmax", "captum", "torchcam", "pytorch-grad-cam", "pair-saliency"]


class Layouts(nn.Module):
    """The same numbers as maps (N, C, h, w), channels last (N, h, w, C) or tokens behind three others."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.Identity()
        self.fc = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu()
        if self.layout == "maps":
            return self.fc(self.block(x).square().mean((2, 3)))
        if self.layout == "channels last":
            return self.fc(self.block(x.permute(0, 2, 3, 1)).square().mean((1, 2)))
        tokens = F.pad(x.flatten(2).transpose(1, 2), (0, 0, 3, 0))
        return self.fc(self.block(tokens)[:, 3:].square().mean(1))


def explain(name: str, model: Model, images: Tensor, target: object = 0, **params: object) -> Attribution:
    inputs = () if name == "eigen_cam" else (target,)
    return methods[name](model, images, *inputs, **params)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(120, 3),
    )  # fmt: skip
    network[5].weight.data *= 100
    return load_model(network.double(), input_size=(3, 8, 12))


@pytest.mark.parametrize("name", [*FAMILY, "cam", "guided_grad_cam"])
def test_oracle(name: str) -> None:
    methods[name].spec.oracle()


@pytest.mark.parametrize("layout", ["channels last", "tokens"])
@pytest.mark.parametrize("name", FAMILY)
def test_all_layouts_of_a_layer_give_the_same_map(name: str, layout: str, images: Tensor) -> None:
    results = []
    for kind in ("maps", layout):
        torch.manual_seed(0)
        model = load_model(Layouts(kind).double(), input_size=(3, 8, 12))
        results.append(explain(name, model, images, layer="block").maps)
    assert results[0].shape == (2, 2, 3)
    assert results[0].any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_maps_have_the_layers_size_and_do_not_depend_on_the_batch(
    name: str, model: Model, images: Tensor
) -> None:
    for layer, size in (("1", (8, 12)), ("3", (4, 6))):
        both = explain(name, model, images, [2, 1], layer=layer).maps
        assert both.shape == (2, *size)
        with max_batch(3):
            torch.testing.assert_close(explain(name, model, images, [2, 1], layer=layer).maps, both)
        alone = explain(name, model, images[1:], 1, layer=layer).maps
        torch.testing.assert_close(alone, both[1:])


@pytest.mark.parametrize("name", FAMILY)
def test_a_layer_without_positions_is_refused(name: str, model: Model, images: Tensor) -> None:
    with pytest.raises(ModelError, match="not a map"):
        explain(name, model, images, layer="5")
    with pytest.raises(UnknownName, match="layer"):
        explain(name, model, images, layer="9")


@pytest.mark.parametrize("name", [*GRADIENTS, "guided_grad_cam"])
def test_a_layer_that_the_target_does_not_depend_on_is_refused(
    name: str, model: Model, images: Tensor
) -> None:
    with pytest.raises(ModelError, match=r"0\[1\] does not depend on layer '2'"):
        explain(name, model, images, "0[1]", layer="2")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", FAMILY)
def test_conventions_scale_the_same_map(name: str, convention: str, model: Model, images: Tensor) -> None:
    result = explain(name, model, images, layer="3")
    raw, signed = result.maps, result.as_convention("captum").maps
    torch.testing.assert_close(raw, signed if name in SIGNED else signed.relu())
    scaled = result.as_convention(convention)
    expected = {
        "captum": signed,
        "minmax": min_max(raw),
        "torchcam": min_max(raw),
        "pair-saliency": signed.relu() / signed.relu().amax((1, 2), keepdim=True),
        "pytorch-grad-cam": min_max(
            F.interpolate(min_max(signed.relu())[:, None], (8, 12), mode="bilinear")[:, 0]
        ),
    }[convention]
    torch.testing.assert_close(scaled.maps, expected, rtol=0, atol=1e-5)
    assert scaled.convention == convention and result.convention is None
    assert convention == "captum" or (scaled.maps.min() >= 0 and scaled.maps.max() <= 1)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(CONVENTIONS), st.booleans(), st.sampled_from([-2.0, 0.0, 3.0]))
def test_constant_maps_are_not_divided_by_zero(convention: str, rectified: bool, value: float) -> None:
    constant, images = torch.full((1, 2, 3), value), torch.zeros(1, 3, 4, 6)
    raw = Attribution(images=images, maps=constant, targets=("",))
    if rectified:
        raw = replace(raw, maps=constant.relu(), signed_maps=(constant,))
    scaled = raw.as_convention(convention).maps
    assert scaled.isfinite().all()
    assert scaled.shape == ((1, 4, 6) if convention == "pytorch-grad-cam" else (1, 2, 3))


def test_further_maps_are_scaled_as_the_maps_are(images: Tensor) -> None:
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = Attribution(
        images=images, maps=maps[:, 0], targets=("a", "b"), more=maps[:, 1:], more_names=("c", "d")
    )
    for convention in CONVENTIONS:
        scaled = both.as_convention(convention)
        for n in (0, 1):
            alone = Attribution(images=images, maps=maps[:, 1 + n], targets=("a", "b"))
            assert scaled.more is not None
            assert torch.equal(scaled.more[:, n], alone.as_convention(convention).maps)


def test_unknown_and_repeated_conventions_are_refused(model: Model, images: Tensor) -> None:
    result = explain("grad_cam", model, images)
    with pytest.raises(UnknownName, match="did you mean 'torchcam'"):
        result.as_convention("torch_cam")
    with pytest.raises(InputError, match="by 'torchcam' already"):
        result.as_convention("torchcam").as_convention("minmax")


def test_a_converted_result_is_saved_with_its_convention(
    model: Model, images: Tensor, tmp_path: Path
) -> None:
    result = explain("grad_cam", model, images.float(), layer=["1", "3"])
    scaled = result.as_convention("pytorch-grad-cam")
    scaled.save(tmp_path / "scaled")
    loaded = load_result(tmp_path / "scaled")
    assert isinstance(loaded, Attribution) and loaded.convention == "pytorch-grad-cam"
    assert torch.equal(loaded.maps, scaled.maps)
    result.save(tmp_path / "raw")
    again = load_result(tmp_path / "raw")
    assert isinstance(again, Attribution)
    assert torch.equal(again.as_convention("pytorch-grad-cam").maps, scaled.maps)


@pytest.mark.parametrize(
    ("name", "network"),
    [(n, "shapes-resnet") for n in [*FAMILY, "guided_grad_cam"]]
    + [(n, "shapes-vgg") for n in [*FAMILY, "guided_grad_cam"] if n not in ONE_PASS_PER_CHANNEL],
)
def test_peaks_lie_on_the_objects_of_the_bundled_scenes(name: str, network: str) -> None:
    count = 24 if name in ONE_PASS_PER_CHANNEL else 60
    scenes = draw_scenes(count, seed=12, split="test")
    result = explain(name, load_model(f"builtin:{network}"), scenes.images, scenes.labels.tolist())
    peaks = result.heat().flatten(1).argmax(1)
    assert scenes.masks.flatten(1)[torch.arange(count), peaks].float().mean() > 0.75


@pytest.mark.parametrize("name", ONE_PASS_PER_CHANNEL)
def test_the_cost_is_one_pass_per_channel(name: str, model: Model, images: Tensor) -> None:
    inputs = {"model": model, "images": images}
    assert methods[name].passes(inputs, {"layer": "1"}) == (2 * (1 + 6), 0)
    assert methods[name].passes(inputs, {"layer": None}) == (2 * (1 + 5), 0)


def test_methods_agree_before_a_pooled_head(images: Tensor) -> None:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3)
    model = load_model(nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), *head).double(), input_size=(3, 8, 12))
    cam = methods["cam"](model, images, 1).maps
    positions = cam[0].numel()
    for name in ("grad_cam", "hires_cam"):
        signed = explain(name, model, images, 1).as_convention("captum").maps
        torch.testing.assert_close(positions * signed, cam, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(explain("xgrad_cam", model, images, 1).maps * positions, cam.relu())
