"""Ablation-CAM: ablation drops as weights, for scores of any sign."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, load_model, methods

ablation_cam = methods["attribution.ablation_cam"]


class SharedRelu(nn.Module):
    """One ReLU used twice: the layer's maps are those of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 4, 3, padding=1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv2(self.relu(self.conv1(images)))).mean((2, 3)))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return load_model(SharedRelu().double(), input_size=(3, 8, 10))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_only_the_last_call_of_a_shared_layer_is_ablated(model: Model, images: Tensor) -> None:
    maps, weight = model.features(images, "relu"), model.module.fc.weight[1]
    drops = weight * maps.mean((2, 3)) / model(images)[:, 1, None].abs()
    expected = torch.einsum("nk,nkhw->nhw", drops, maps).relu().detach()
    torch.testing.assert_close(ablation_cam(model, images, 1, layer="relu").maps, expected)


def test_a_negative_score_does_not_invert_the_map(model: Model, images: Tensor) -> None:
    def shifted(by: float) -> Tensor:
        maps: Tensor = ablation_cam(model, images, lambda logits: logits[:, 0] + by, layer="conv2").maps
        return maps / maps.amax((1, 2), keepdim=True)

    torch.testing.assert_close(shifted(-50), shifted(50))


def test_a_score_of_zero_gives_an_empty_map(model: Model, images: Tensor) -> None:
    result = ablation_cam(model, images, lambda logits: logits[:, 0] * 0, layer="conv2")
    assert not result.maps.any()


def test_channels_that_the_score_ignores_have_no_weight(images: Tensor) -> None:
    class OneChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, images: Tensor) -> Tensor:
            return F.pad(self.conv(images).relu()[:, 2:3].mean((2, 3)), (0, 1))

    torch.manual_seed(0)
    model = load_model(OneChannel().double(), input_size=(3, 8, 10))
    maps = ablation_cam(model, images, 0, layer="conv").maps
    torch.testing.assert_close(maps, model.features(images, "conv")[:, 2].relu().detach())
