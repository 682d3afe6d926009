"""Score-CAM: weights that sum to one, masks that dim towards the mean, any target."""

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


def test_equal_scores_weigh_all_maps_alike(model: Model, images: Tensor) -> None:
    maps = score_cam(model, images, lambda logits: logits.sum(1) * 0, layer="1").maps
    torch.testing.assert_close(maps, model.features(images, "1").mean(1).detach())


def test_one_map_far_ahead_is_the_answer(model: Model, images: Tensor) -> None:
    maps = model.features(images, "1").detach()
    result = score_cam(model, images, lambda logits: 1e6 * logits[:, 2], layer="1").maps
    for picture, found in zip(maps, result, strict=True):
        assert any(torch.allclose(found, channel) for channel in picture)


def test_what_is_masked_away_is_the_mean_colour(model: Model, images: Tensor) -> None:
    seen: list[Tensor] = []
    model.module.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    score_cam(model, images[:1], 0, layer="1")
    masked, whole = seen[-1], model.normalize(images[:1])
    shown = masked / whole
    assert masked.shape == (4, 3, 8, 10)
    torch.testing.assert_close(shown, shown[:, :1].expand_as(shown))
    assert shown.min() > -1e-9 and shown.max() < 1 + 1e-9
    assert (shown.amax((1, 2, 3)) > 0.99).all() and (shown.amin((1, 2, 3)) < 0.01).all()


def test_the_class_is_decided_on_the_whole_picture(model: Model, images: Tensor) -> None:
    predicted = model(images).argmax(1)
    torch.testing.assert_close(score_cam(model, images).maps, score_cam(model, images, predicted).maps)


def test_a_map_that_is_flat_lets_nothing_through(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(160, 2)).double()
    network[0].weight.data[0], network[0].bias.data[0] = 0, 1
    result = score_cam(load_model(network, input_size=(3, 8, 10)), images, 0, layer="1")
    assert result.maps.isfinite().all()


def test_progress_counts_every_masked_picture(model: Model, images: Tensor) -> None:
    told = []
    with max_batch(2), report_progress(told.append):
        score_cam(model, images, 0, layer="1")
    assert {event.total for event in told} == {4}
    assert told[-1].done == told[-1].total
