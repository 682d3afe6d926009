"""Grad-CAM: equality with CAM, layers and layouts, several layers, no gradients below the layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, UnknownName, load_model, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.images import enlarge_maps

grad_cam, cam = methods["attribution.grad_cam"], methods["attribution.cam"]


class ChannelsLast(nn.Module):
    """The same numbers as maps (N, C, h, w), channels-last (N, h, w, C) or tokens with a class token."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.Identity()
        self.fc = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).tanh()
        if self.layout == "maps":
            return self.fc(self.block(x).square().mean((2, 3)))
        if self.layout == "channels last":
            return self.fc(self.block(x.permute(0, 2, 3, 1)).square().mean((1, 2)))
        tokens = F.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0))
        return self.fc(self.block(tokens)[:, 1:].square().mean(1))


class ClassToken(nn.Module):
    """Only the class token of its last block is read, as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.mix, self.last, self.fc = nn.Linear(7, 7), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.pad(self.conv(images).flatten(2).transpose(1, 2), (0, 0, 1, 0))
        mixed = tokens + 0.1 * self.mix(tokens.transpose(1, 2)).transpose(1, 2)
        return self.fc(self.last(mixed)[:, 0])


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    return load_model(network.double())


def network(kind: type[nn.Module], *args: str) -> Model:
    torch.manual_seed(0)
    return load_model(kind(*args).double())


def test_oracle() -> None:
    grad_cam.spec.oracle()


def test_equals_cam_after_a_relu_before_a_pooled_head(model: Model, images: Tensor) -> None:
    positions = cam(model, images).maps[0].numel()
    torch.testing.assert_close(grad_cam(model, images).maps, cam(model, images).maps.relu() / positions)


@pytest.mark.parametrize("layout", ["channels last", "tokens"])
def test_all_layouts_of_a_layer_give_the_same_map(layout: str, images: Tensor) -> None:
    usual = grad_cam(network(ChannelsLast, "maps"), images, 0, layer="block").maps
    turned = grad_cam(network(ChannelsLast, layout), images, 0, layer="block").maps
    assert usual.shape == (2, 2, 3)
    assert usual.any()
    torch.testing.assert_close(turned, usual, rtol=1e-12, atol=1e-14)


def test_every_layer_with_positions_is_accepted(model: Model, images: Tensor) -> None:
    for layer, size in (("0", (8, 12)), ("1", (8, 12)), ("2", (3, 5)), ("4", (1, 1))):
        assert grad_cam(model, images, 0, layer=layer).maps.shape == (2, *size)


def test_nothing_below_the_layer_is_differentiated(model: Model, images: Tensor) -> None:
    grad_cam(model, images, 0, layer="3")  # records the model's structure, by a backward pass of its own
    passed: list[str] = []
    for name, module in model.layers.items():

        def watch(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
            if output.requires_grad:
                passed.append(name)

        module.register_forward_hook(watch)
    grad_cam(model, images, 0, layer="3")
    assert "0" not in passed
    assert "2" not in passed
    assert "6" in passed


def test_a_unit_of_a_higher_layer_is_a_target(model: Model, images: Tensor) -> None:
    weight = model.module[2].weight[3].sum((1, 2)) / (8 * 12)
    below = model.features(images, "1")
    expected = torch.einsum("k,nkhw->nhw", weight, below).relu()
    torch.testing.assert_close(grad_cam(model, images, "2[3,1,2]", layer="1").maps, expected)


def test_a_layer_that_the_target_does_not_depend_on_is_refused(images: Tensor, model: Model) -> None:
    with pytest.raises(ModelError, match="does not depend on layer '2'"):
        grad_cam(model, images, "0[1]", layer="2")
    with pytest.raises(ModelError, match="class token"):
        grad_cam(network(ClassToken), images, 0, layer="last")
    with pytest.raises(ModelError, match="not a map"):
        grad_cam(model, images, 0, layer="6")
    with pytest.raises(UnknownName, match="layer"):
        grad_cam(model, images, 0, layer="7")


def test_the_conventions_scale_each_map(model: Model, images: Tensor) -> None:
    raw = grad_cam(model, images, 1).maps
    scaled = grad_cam(model, images, 1).as_convention("minmax").maps
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    torch.testing.assert_close(scaled, (raw - low) / (high - low))
    large = grad_cam(model, images, 1).as_convention("pytorch-grad-cam").maps

    def stretch(maps: Tensor) -> Tensor:
        least = maps.amin((1, 2), keepdim=True)
        return (maps - least) / (1e-7 + (maps - least).amax((1, 2), keepdim=True))

    enlarged = F.interpolate(stretch(raw)[:, None], (8, 12), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(large, stretch(enlarged), rtol=0, atol=1e-12)


def test_peaks_lie_on_the_objects_of_the_bundled_scenes() -> None:
    scenes = draw_scenes(60, seed=12, split="test")
    result = grad_cam(load_model("builtin:shapes-vgg"), scenes.images, scenes.labels.tolist())
    peaks = result.heat().flatten(1).argmax(1)
    assert scenes.masks.flatten(1)[torch.arange(60), peaks].float().mean() > 0.8


def test_several_layers_are_averaged_and_each_has_a_panel(model: Model, images: Tensor) -> None:
    result = grad_cam(model, images, 1, layer=["1", "3"])
    assert result.more_names == ("1", "3")
    for number, layer in enumerate(result.more_names):
        alone = grad_cam(model, images, 1, layer=layer).as_convention("minmax")
        large = enlarge_maps(alone.maps, (8, 12), alone.centers)
        torch.testing.assert_close(result.more[:, number], large)
    torch.testing.assert_close(result.maps, result.more.mean(1))
    (group, _) = result.panels()
    assert [panel.title for panel in group] == ["", "class 1", "1", "3"]


def test_several_layers_take_one_pass_in_any_order(model: Model, images: Tensor) -> None:
    passes: list[int] = []
    grad_cam(model, images, 1, layer="1")  # the structure is recorded here, by a pass of its own
    model.module.register_forward_hook(lambda *_: passes.append(1))
    up = grad_cam(model, images, 1, layer=["1", "3"])
    down = grad_cam(model, images, 1, layer=["3", "1"])
    assert len(passes) == 2
    torch.testing.assert_close(up.maps, down.maps)
    torch.testing.assert_close(up.more, down.more.flip(1))


def test_a_list_of_one_layer_is_that_layers_map_enlarged(model: Model, images: Tensor) -> None:
    listed = grad_cam(model, images, 1, layer=["3"]).as_convention("pytorch-grad-cam").maps
    single = grad_cam(model, images, 1, layer="3").as_convention("pytorch-grad-cam").maps
    torch.testing.assert_close(listed, single)


def test_an_empty_list_of_layers_is_refused(model: Model, images: Tensor) -> None:
    with pytest.raises(InputError, match="at least 1 item"):
        grad_cam(model, images, 1, layer=[])
