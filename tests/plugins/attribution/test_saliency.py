"""Saliency: classes, units, channels and callables as targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Channel, InputError, Model, Neuron, load_model, methods

saliency = methods["attribution.saliency"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return load_model(network.double(), classes=["cat", "dog", "owl"], mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_oracle() -> None:
    saliency.spec.oracle()


def test_a_neurons_saliency_is_its_filter_in_its_receptive_field(model: Model, images: Tensor) -> None:
    maps = saliency(model, images, Neuron("0", 2, 4, 5)).maps
    expected = torch.zeros(8, 9, dtype=torch.float64)
    expected[3:6, 4:7] = (model.module[0].weight[2] / 0.25).abs().amax(0)
    torch.testing.assert_close(maps, expected.expand(2, 8, 9))


def test_a_channel_target_as_text_equals_the_object(model: Model, images: Tensor) -> None:
    assert torch.equal(saliency(model, images, "1[3]").maps, saliency(model, images, Channel("1", 3)).maps)


def test_the_default_target_is_the_predicted_class(model: Model, images: Tensor) -> None:
    predicted = model(images).argmax(1)
    result = saliency(model, images)
    assert result.targets == tuple(model.classes[i] for i in predicted.tolist())
    assert torch.equal(result.maps, saliency(model, images, predicted).maps)


def test_a_callable_of_the_logits_is_a_target(model: Model, images: Tensor) -> None:
    doubled = saliency(model, images, lambda logits: 2 * logits[:, 1])
    torch.testing.assert_close(doubled.maps, 2 * saliency(model, images, "dog").maps)


@pytest.mark.parametrize(
    "cut", [lambda z: z.detach()[:, 0], lambda z: z.argmax(1).double(), lambda z: z.sum(), lambda z: 1.0]
)
def test_a_callable_without_a_gradient_or_a_number_per_image_is_refused(
    model: Model, images: Tensor, cut: object
) -> None:
    with pytest.raises(InputError, match="target"):
        saliency(model, images, cut)
