"""Score-CAM: weights that sum to one, masks toward the mean color, any target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, max_batch, methods, report_progress

score_cam = methods["attribution.score_cam"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(48, 3))
    return load_model(network.double(), mean=(0.2, 0.5, 0.7), std=(0.2, 0.2, 0.3), input_size=(3, 8, 10))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_equal_scores_give_equal_weights(model: Model, images: Tensor) -> None:
    maps = score_cam(model, images, lambda logits: logits.sum(1) * 0, layer="1").maps
    torch.testing.assert_close(maps, model.features(images, "1").mean(1).detach())


def test_a_much_higher_score_selects_one_channel(model: Model, images: Tensor) -> None:
    maps = model.features(images, "1").detach()
    result = score_cam(model, images, lambda logits: 1e6 * logits[:, 2], layer="1").maps
    for channels, expected in zip(maps, result, strict=True):
        assert any(torch.allclose(expected, channel) for channel in channels)


def test_masked_pixels_are_the_mean_color(model: Model, images: Tensor) -> None:
    inputs: list[Tensor] = []
    model.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    score_cam(model, images[:1], 0, layer="1")
    masked, unmasked = inputs[-1], model.normalize(images[:1])
    visible = masked / unmasked
    assert masked.shape == (4, 3, 8, 10)
    torch.testing.assert_close(visible, visible[:, :1].expand_as(visible))
    assert visible.min() > -1e-9 and visible.max() < 1 + 1e-9
    assert (visible.amax((1, 2, 3)) > 0.99).all() and (visible.amin((1, 2, 3)) < 0.01).all()


def test_the_default_target_is_predicted_for_the_unmasked_image(model: Model, images: Tensor) -> None:
    predicted = model(images).argmax(1)
    torch.testing.assert_close(score_cam(model, images).maps, score_cam(model, images, predicted).maps)


def test_a_constant_channel_gives_finite_maps(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(160, 2)).double()
    network[0].weight.data[0], network[0].bias.data[0] = 0, 1
    result = score_cam(load_model(network, input_size=(3, 8, 10)), images, 0, layer="1")
    assert result.maps.isfinite().all()


def test_progress_counts_every_batch_of_masked_images(model: Model, images: Tensor) -> None:
    events = []
    with max_batch(2), report_progress(events.append):
        score_cam(model, images, 0, layer="1")
    assert {event.total for event in events} == {4}
    assert events[-1].done == events[-1].total
