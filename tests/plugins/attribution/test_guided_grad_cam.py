"""Guided Grad-CAM: product of its two factors, also for functional ReLUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, ModelError, load_model, methods
from phosphene.images import enlarge_maps

guided_grad_cam = methods["attribution.guided_grad_cam"]


class FunctionalRelus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, stride=2)
        self.fc = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu_(self.conv2(torch.relu(self.conv1(images)))).mean((2, 3)))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return load_model(FunctionalRelus().double(), input_size=(3, 9, 11))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_it_equals_enlarged_grad_cam_times_guided_backprop(model: Model, images: Tensor) -> None:
    coarse = methods["grad_cam"](model, images, [2, 0], layer="conv2").maps
    fine = methods["guided_backprop"](model, images, [2, 0]).maps
    # A unit of the second layer covers three pixels, two pixels apart, without padding.
    large = enlarge_maps(coarse, (9, 11), ((1, 3, 5, 7), (1, 3, 5, 7, 9)))
    maps = guided_grad_cam(model, images, [2, 0], layer="conv2").maps
    assert maps.any()
    torch.testing.assert_close(maps, large * fine, rtol=1e-12, atol=1e-16)


def test_both_factors_use_the_predicted_class(model: Model, images: Tensor) -> None:
    predicted = model(images).argmax(1)
    result = guided_grad_cam(model, images)
    torch.testing.assert_close(result.maps, guided_grad_cam(model, images, predicted).maps)
    assert result.targets == tuple(f"class {index}" for index in predicted.tolist())


def test_a_network_without_relus_is_refused(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(252, 2)).double()
    with pytest.raises(ModelError, match="found no ReLU"):
        guided_grad_cam(load_model(network, input_size=(3, 9, 11)), images, 0)
