"""CAM: the map and the bias sum to the logit; other heads and targets are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError, Model, ModelError, load_model, max_batch, methods
from phosphene.builtin.scenes import draw_scenes

cam = methods["attribution.cam"]


class ReluBetween(nn.Module):
    """Its last map passes through a functional ReLU before it is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(images), inplace=True).mean((2, 3)))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return load_model(ReluBetween().double())


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_oracle() -> None:
    cam.spec.oracle()


def test_map_and_bias_give_the_logit_after_a_functional_relu(model: Model, images: Tensor) -> None:
    with torch.no_grad():
        logits = model(images)
    for index in range(4):
        total = cam(model, images, index).maps.mean((1, 2)) + model.module.fc.bias[index]
        torch.testing.assert_close(total, logits[:, index], rtol=1e-12, atol=1e-12)


def test_each_image_may_have_its_own_class_in_any_batches(model: Model, images: Tensor) -> None:
    classes = [3, 0, 0, 2, 1]
    with max_batch(2):
        maps = cam(model, images, classes).maps
        predicted = cam(model, images)
    for number, index in enumerate(classes):
        alone = cam(model, images[number : number + 1], index).maps[0]
        torch.testing.assert_close(maps[number], alone, rtol=1e-12, atol=1e-14)
    assert predicted.targets == tuple(f"class {i}" for i in model(images).argmax(1).tolist())


def test_targets_other_than_classes_are_refused(model: Model, images: Tensor) -> None:
    for target in ("conv[1]", "conv", lambda logits: logits[:, 0]):
        with pytest.raises(InputError, match="grad_cam"):
            cam(model, images, target)


def test_a_network_without_a_pooled_head_is_refused(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(84, 4)).double()
    with pytest.raises(ModelError, match="grad_cam"):
        cam(load_model(network), images)


def test_peaks_lie_on_the_objects_of_the_bundled_scenes() -> None:
    scenes = draw_scenes(60, seed=12, split="test")
    model = load_model("builtin:shapes-vgg")
    result = cam(model, scenes.images, scenes.labels.tolist())
    assert result.maps.shape == (60, 8, 8)
    assert (result.maps < 0).any()
    peaks = result.heat().flatten(1).argmax(1)
    assert scenes.masks.flatten(1)[torch.arange(60), peaks].float().mean() > 0.8
