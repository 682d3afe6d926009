"""The CAM family: one layout of layers, one set of conventions, the same refusals, heat on the object."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import Model, ModelError, UnknownName, load_model, max_batch, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.images import min_max
from phosphene.results import Attribution
from phosphene_plugins.attribution._cam import by_convention

GRADIENTS = ["grad_cam", "grad_cam_plus_plus", "hires_cam", "layer_cam", "xgrad_cam"]
SIGNED = ["hires_cam", "eigen_cam"]
FAMILY = [*GRADIENTS, "score_cam", "ablation_cam", "eigen_cam"]
#: A pass for every channel: a few seconds for a few scenes.
DEAR = ["score_cam", "ablation_cam"]
CONVENTIONS = ["minmax", "captum", "torchcam", "pgc", "pair"]


class Layouts(nn.Module):
    """The same numbers as maps (N, C, h, w), channels last (N, h, w, C) or tokens behind three others."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.num_prefix_tokens = 3 * (layout == "tokens")
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
def test_layouts_of_the_same_numbers_give_the_same_map(name: str, layout: str, images: Tensor) -> None:
    found = []
    for kind in ("maps", layout):
        torch.manual_seed(0)
        model = load_model(Layouts(kind).double(), input_size=(3, 8, 12))
        found.append(explain(name, model, images, layer="block").maps)
    assert found[0].shape == (2, 2, 3)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_maps_have_the_layers_size_and_do_not_depend_on_the_batch(
    name: str, model: Model, images: Tensor
) -> None:
    for layer, size in (("1", (8, 12)), ("3", (4, 6))):
        whole = explain(name, model, images, [2, 1], layer=layer).maps
        assert whole.shape == (2, *size)
        with max_batch(3):
            torch.testing.assert_close(explain(name, model, images, [2, 1], layer=layer).maps, whole)
        alone = explain(name, model, images[1:], 1, layer=layer).maps
        torch.testing.assert_close(alone, whole[1:])


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_no_layer_with_places_is_refused(name: str, model: Model, images: Tensor) -> None:
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
def test_the_conventions_are_of_the_same_map(
    name: str, convention: str, model: Model, images: Tensor
) -> None:
    signed = explain(name, model, images, layer="3", normalize="captum").maps
    raw = explain(name, model, images, layer="3").maps
    torch.testing.assert_close(raw, signed if name in SIGNED else signed.relu())
    shown = explain(name, model, images, layer="3", normalize=convention).maps
    expected = {
        "captum": signed,
        "minmax": min_max(raw),
        "torchcam": min_max(raw),
        "pair": signed.relu() / signed.relu().amax((1, 2), keepdim=True),
        "pgc": min_max(F.interpolate(min_max(signed.relu())[:, None], (8, 12), mode="bilinear")[:, 0]),
    }[convention]
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([None, *CONVENTIONS]), st.booleans(), st.sampled_from([-2.0, 0.0, 3.0]))
def test_a_flat_map_is_never_divided_by_nothing(convention: str | None, signed: bool, value: float) -> None:
    flat = torch.full((1, 2, 3), value)
    shown = by_convention(flat, torch.zeros(1, 3, 4, 6), convention, signed=signed)
    assert shown.isfinite().all()
    assert shown.shape == ((1, 4, 6) if convention == "pgc" else (1, 2, 3))


@pytest.mark.parametrize(
    ("name", "network"),
    [(n, "shapes-resnet") for n in [*FAMILY, "guided_grad_cam"]]
    + [(n, "shapes-vgg") for n in [*FAMILY, "guided_grad_cam"] if n not in DEAR],
)
def test_heat_lies_on_the_objects_of_the_bundled_scenes(name: str, network: str) -> None:
    count = 24 if name in DEAR else 60
    scenes = draw_scenes(count, seed=12, split="test")
    result = explain(name, load_model(f"builtin:{network}"), scenes.images, scenes.labels.tolist())
    peaks = result.heat().flatten(1).argmax(1)
    assert scenes.masks.flatten(1)[torch.arange(count), peaks].float().mean() > 0.75


@pytest.mark.parametrize("name", DEAR)
def test_a_pass_for_every_channel_is_foretold(name: str, model: Model, images: Tensor) -> None:
    given = {"model": model, "images": images}
    assert methods[name].passes(given, {"layer": "1", "normalize": None}) == (2 * (1 + 6), 0)
    assert methods[name].passes(given, {"layer": None, "normalize": None}) == (2 * (1 + 5), 0)


def test_before_a_pooled_head_most_of_the_family_is_one(images: Tensor) -> None:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3)
    model = load_model(nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), *head).double(), input_size=(3, 8, 12))
    cam = methods["cam"](model, images, 1).maps
    places = cam[0].numel()
    for name in ("grad_cam", "hires_cam"):
        signed = explain(name, model, images, 1, normalize="captum").maps
        torch.testing.assert_close(places * signed, cam, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(explain("xgrad_cam", model, images, 1).maps * places, cam.relu())
