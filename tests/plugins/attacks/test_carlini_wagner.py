"""Carlini-Wagner: minimum distance on linear models, kappa, and early stopping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.testing.observation import count_passes

carlini_wagner = methods["attacks.carlini_wagner"]


def linear(classes: int, seed: int, shift: float = 0.0) -> tuple[Model, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(48, classes).double()
    layer.weight.data = torch.randn(classes, 48, generator=generator, dtype=torch.float64)
    layer.bias.data.fill_(shift)
    images = 0.5 + 0.05 * torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    return load_model(nn.Sequential(nn.Flatten(), layer), input_size=(3, 4, 4)), images


def boundary_distances(model: Model, images: Tensor, labels: Tensor, dual: float) -> Tensor:
    weight, logits = model.module[1].weight.detach(), model(images).detach()
    distances = (logits.gather(1, labels[:, None]) - logits) / (weight - weight[labels][:, None]).norm(
        dual, dim=2
    )
    return distances.scatter(1, labels[:, None], torch.inf)


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("linf", 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_distance_to_a_boundary_is_exact_to_three_percent(norm: str, dual: float, seed: int) -> None:
    model, images = linear(2, seed, shift=-100.0)
    labels = model(images).argmax(1)
    result = carlini_wagner(model, images, labels, norm=norm)
    ratio = result.distance(norm) / boundary_distances(model, images, labels, dual).amin(1)
    assert result.success.all() and ratio.min() > 1 - 1e-9 and ratio.max() < 1.03


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("linf", 1.0)])
def test_nearest_of_ten_classes_wins_over_the_most_likely(norm: str, dual: float) -> None:
    others = 0
    for seed in range(4):
        model, images = linear(10, seed)
        logits = model(images).detach()
        labels = logits.argmax(1)
        distances = boundary_distances(model, images, labels, dual)
        ratio = carlini_wagner(model, images, labels, norm=norm).distance(norm) / distances.amin(1)
        others += int(logits.topk(2, dim=1).indices[:, 1].ne(distances.argmin(1)).sum())
        assert ratio.min() > 1 - 1e-9 and ratio.max() < 1.03
    assert others >= 3


def test_black_and_white_pixels_move() -> None:
    """Under the tanh of the paper they hardly do."""
    model, images = linear(2, 0)
    binary = images.gt(0.5).double()
    result = carlini_wagner(model, binary, model(binary).argmax(1))
    assert result.success.all()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adversarial_logit_leads_by_kappa(targeted: bool, norm: str) -> None:
    model, images = linear(4, 1)
    predictions = model(images).argmax(1)
    labels = (predictions + 1) % 4 if targeted else predictions
    result = carlini_wagner(model, images, labels, kappa=0.7, targeted=targeted, norm=norm)
    best = model(result.adversarial).detach().topk(2).values
    assert result.success.all()
    assert (best[:, 0] - best[:, 1] >= 0.7 - 1e-9).all()
    near = carlini_wagner(model, images, labels, targeted=targeted, norm=norm)
    assert (near.distance(norm) < result.distance(norm)).all()


def test_descent_stops_early_where_the_objective_no_longer_falls() -> None:
    model, images = linear(2, 0)
    with count_passes(model.module) as passes:
        carlini_wagner(model, images, model(images).argmax(1), steps=1000, search_steps=6)
    assert passes.backward < 0.7 * 6 * 1000 * len(images)
