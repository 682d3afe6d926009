"""Activation maps: the scaling of lecture 21.3, choices of layer and channel, before and after a ReLU."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model, load_result, max_batch, methods

activation_maps = methods["activations.activation_maps"]


class Shared(nn.Module):
    """One in-place ReLU that runs twice, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 12, 3, 2)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.second(self.relu(self.first(images))))
        return self.fc(F.relu(self.third(x)).mean((2, 3)))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return load_model(Shared().double(), input_size=(3, 12, 12))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_oracle():
    activation_maps.spec.oracle()


def test_each_map_is_min_max_scaled_and_a_constant_map_is_zero(model, images):
    with torch.no_grad():
        model.module.third.weight[5] = 0
    result = activation_maps(model, images, layer="third")
    assert result.channels == tuple(range(12))
    assert torch.equal(result.maps, model.features(images, "third").detach())
    low, high = result.maps.amin((2, 3), keepdim=True), result.maps.amax((2, 3), keepdim=True)
    others = [c for c in range(12) if c != 5]
    assert torch.allclose(
        result.scaled[:, others], ((result.maps - low) / (high - low))[:, others], atol=1e-6
    )
    assert result.scaled[:, 5].eq(0).all()


def test_shared_scale_is_over_the_channels_of_one_image(model, images):
    result = activation_maps(model, images, layer="third", scale="shared")
    assert result.scaled.amin((1, 2, 3)).eq(0).all() and result.scaled.amax((1, 2, 3)).eq(1).all()
    single = activation_maps(model, images[1:2], layer="third", scale="shared")
    assert torch.allclose(single.scaled, result.scaled[1:2], atol=1e-6)


def test_signed_scale_maps_zero_to_one_half(model, images):
    with torch.no_grad():
        model.module.third.weight[5] = model.module.third.bias[5] = 0
    result = activation_maps(model, images, layer="third", scale="signed")
    largest = result.maps.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(result.scaled, result.maps / largest / 2 + 0.5)
    assert result.scaled[:, 5].eq(0.5).all()
    image = activation_maps(model, images, layer="third", channels=[5], scale="signed").panels()[0][1].image
    assert image.min() > 0.95  # zero is white, positive red, negative blue


def test_weak_map_stays_weak_with_a_shared_scale_and_its_title_states_the_range(model, images):
    with torch.no_grad():
        model.module.third.weight[5] *= 1e-6
        model.module.third.bias[5] = 0
    each = activation_maps(model, images, layer="third", channels=[3, 5])
    shared = activation_maps(model, images, layer="third", channels=[3, 5], scale="shared")
    assert each.scaled[:, 1].amax((1, 2)).eq(1).all()
    assert (shared.scaled[:, 1].amax((1, 2)) - shared.scaled[:, 1].amin((1, 2))).max() < 1e-4
    low, high = (float(each.maps[0, 1].aminmax()[n]) for n in (0, 1))
    assert each.panels()[0][2].title == f"channel 5: {low:.2g} to {high:.2g}"


def test_pre_activation_of_a_relu_has_negative_values(model, images):
    before = activation_maps(model, images, layer="relu", pre_activation=True)
    after = activation_maps(model, images, layer="relu")
    assert before.maps.min() < 0
    assert torch.equal(before.maps.relu(), after.maps)
    assert before.maps.shape[2] == 8  # of the shared ReLU's calls, the last


def test_pre_activation_of_another_module_is_refused(model, images):
    with pytest.raises(ModelError, match="'third' is a Conv2d, not an activation.*'relu'"):
        activation_maps(model, images, layer="third", pre_activation=True)


def test_default_layer_is_an_activation_at_the_middle_resolution(model, images):
    assert activation_maps(model, images).layer == "relu"
    assert activation_maps(load_model("builtin:shapes-vgg"), torch.rand(1, 3, 64, 64)).layer == "features.8"


def test_channels_are_returned_in_the_requested_order_and_checked(model, images):
    result = activation_maps(model, images, layer="third", channels=[7, 2])
    assert result.channels == (7, 2)
    assert torch.equal(result.maps, model.features(images, "third").detach()[:, [7, 2]])
    for wrong in ([12], [-1], []):
        with pytest.raises(InputError):
            activation_maps(model, images, layer="third", channels=wrong)
    with pytest.raises(ModelError, match="not a map"):
        activation_maps(model, images, layer="fc")


def test_batch_equals_single_images(model, images):
    together = activation_maps(model, images, layer="third")
    with max_batch(1):
        parts = activation_maps(model, images, layer="third")
    assert torch.allclose(together.scaled, parts.scaled, atol=1e-6) and together.channels == parts.channels


def test_token_layers_are_maps():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
    result = activation_maps(load_model(vit, input_size=(3, 64, 64)), torch.rand(1, 3, 64, 64))
    assert result.layer == "blocks.1.mlp.act" and result.maps.shape == (1, 768, 4, 4)


@pytest.mark.parametrize("overlay", [False, True])
def test_figure_shows_the_channels_of_largest_activation(model, images, overlay, tmp_path):
    result = activation_maps(model, images, layer="third", overlay=overlay)
    rows = result.panels()
    assert len(rows) == 3 and all(len(row) == 10 for row in rows)
    for row, maps in zip(rows, result.maps, strict=True):
        first = int(maps.flatten(1).amax(1).argmax())
        assert row[1].title == f"channel {first}: {maps[first].min():.2g} to {maps[first].max():.2g}"
    result.save(tmp_path / "maps")
    assert torch.equal(load_result(tmp_path / "maps").scaled, result.scaled)
