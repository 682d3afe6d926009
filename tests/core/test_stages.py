"""``model.stages``: one layer per resolution; networks without a classification head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import ModelError, load_model


def conv(channels: int, out: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, **options)


def test_stages_are_the_first_activation_at_each_resolution() -> None:
    layers = [conv(3, 4, padding=1), nn.ReLU(), conv(4, 4, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [conv(4, 4, padding=1), nn.SiLU(), nn.MaxPool2d(2)]
    model = load_model(nn.Sequential(*layers), input_size=(3, 16, 16))
    assert model.stages == ("1", "6")
    bundled = load_model("builtin:shapes-vgg")
    assert bundled.stages == tuple(f"features.{n}" for n in (1, 6, 11, 16))


def test_unpadded_convolutions_do_not_start_a_stage() -> None:
    network = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 4, stride=2), nn.ReLU())
    assert load_model(network, input_size=(3, 32, 32)).stages == ("1", "5")


def test_convolutions_are_stages_where_activations_are_functional() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = conv(3, 4, padding=1), conv(4, 4, stride=2, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.coarse(self.fine(images).relu()).relu().mean((2, 3))

    assert load_model(Functional(), input_size=(3, 16, 16)).stages == ("fine", "coarse")


def test_network_of_one_resolution_has_stages_spread_over_its_depth() -> None:
    blocks = [layer for _ in range(9) for layer in (conv(3, 3, padding=1), nn.ReLU())]
    stages = load_model(nn.Sequential(*blocks), input_size=(3, 8, 8)).stages
    assert stages == ("1", "3", "7", "11", "15")


def test_network_without_feature_maps_has_no_stages() -> None:
    model = load_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_size=(3, 4, 4))
    with pytest.raises(ModelError, match="name layers yourself"):
        _ = model.stages


def test_network_without_a_head_has_no_classes() -> None:
    from phosphene import scores

    model = load_model(nn.Sequential(conv(3, 4), nn.ReLU()), input_size=(3, 8, 8))
    assert (model.class_count, model.last_map) == (0, "1")
    with pytest.raises(ModelError, match="not logits"):
        scores(model, torch.rand(2, 3, 8, 8), None)
