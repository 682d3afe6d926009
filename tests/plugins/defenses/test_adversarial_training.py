"""Adversarial training: its three losses in closed form, the features it uses, and its note."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, TensorDataset, load_model, methods
from phosphene_plugins.defenses._training_evaluation import UNDER_PGD
from phosphene_plugins.defenses.adversarial_training import kl_divergence, overfitting_note

fit = methods["adversarial_training"]
pgd = methods["pgd"]
EPS = 0.05


def linear(pixels: int) -> Model:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2))
    return load_model(layers, input_size=(1, 1, pixels), mean=[0.5], std=[0.1])


@pytest.fixture(scope="module")
def pair() -> TensorDataset:
    images = 0.3 + 0.4 * torch.rand(2, 1, 1, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, ["1", "0"])


@pytest.fixture(scope="module")
def fragile_feature() -> TensorDataset:
    """One pixel separates nine in ten images by far; 200 separate all of them, by less than the radius."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(220) % 2
    side = 2.0 * labels - 1
    right = torch.where(torch.rand(220, generator=generator) < 0.9, side, -side)
    pixels = torch.cat([0.2 * right[:, None], 0.02 * side[:, None].expand(-1, 200)], 1)
    images = 0.5 + pixels + 0.002 * torch.randn(pixels.shape, generator=generator)
    return TensorDataset(images[:, None, None], [str(label) for label in labels.tolist()])


def test_the_oracle() -> None:
    fit.spec.oracle()


def first_loss(model: Model, dataset: TensorDataset, **params: Any) -> float:
    options = {"eps": EPS, "steps": 1, "batch": 1, "held_out": 0.5, "seed": 0} | params
    return float(fit(model, dataset, **options).losses[0])


def test_trades_loss_is_cross_entropy_plus_divergence(pair: TensorDataset) -> None:
    """Of a linear model the kl_divergence is largest at one of the two corners along the weights."""
    model, x = linear(6), pair.images[:1]
    away = (model.module[1].weight[0] - model.module[1].weight[1]).sign().view_as(x)  # type: ignore[index]
    p = model(x).softmax(1)
    clean = F.cross_entropy(model(x), torch.tensor([1]))
    for beta in (0.0, 3.0):
        expected = [clean + beta * kl_divergence(model(x + side * EPS * away), p) for side in (-1, 1)]
        loss = first_loss(model, pair, algorithm="trades", beta=beta)
        assert min(abs(loss - float(w.detach())) for w in expected) < 1e-5


def test_fast_attack_is_one_step_of_five_quarters_of_the_radius(pair: TensorDataset) -> None:
    model, x, y = linear(6), pair.images[:1], torch.tensor([1])
    direction = (model.module[1].weight[0] - model.module[1].weight[1]).sign().view_as(x)  # type: ignore[index]
    torch.manual_seed(0)
    start = EPS * (2 * torch.rand(1, 1, 1, 6) - 1)
    point = x + (start + 1.25 * EPS * direction).clamp(-EPS, EPS)
    expected = F.cross_entropy(model(point), y).item()
    assert first_loss(model, pair, algorithm="fast") == pytest.approx(expected, abs=1e-5)
    corner = F.cross_entropy(model(x + EPS * direction), y).item()
    assert first_loss(model, pair, algorithm="pgd", attack_steps=8) == pytest.approx(corner, abs=1e-5)
    assert expected < corner


@pytest.mark.parametrize("algorithm", ["pgd", "trades", "fast"])
def test_training_ignores_features_that_an_attack_can_change(
    fragile_feature: TensorDataset, algorithm: str
) -> None:
    options: dict[str, Any] = {"steps": 30, "batch": 50, "lr": 0.05, "weight_decay": 0.0, "seed": 0}
    plain = fit(linear(201), fragile_feature, eps=1e-6, **options)
    robust = fit(linear(201), fragile_feature, algorithm=algorithm, eps=EPS, attack_steps=3, **options)
    images, labels = fragile_feature.images[200:], [int(name) for name in fragile_feature.classes[200:]]  # type: ignore[index]

    def robust_accuracy(model: Model) -> float:
        attack = pgd(model, images, labels, eps=EPS, step_size=EPS / 4, steps=20, seed=0)
        return 1 - float(attack.success.double().mean())

    assert plain.curves["clean"][-1] == 1 and robust_accuracy(plain.model()) < 0.2
    assert robust_accuracy(robust.model()) > 0.75
    assert float(robust.curves[UNDER_PGD][-1]) == pytest.approx(robust_accuracy(robust.model()), abs=0.06)


def test_batch_norm_learns_its_statistics(pair: TensorDataset) -> None:
    layers = nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(6, 2)
    model = load_model(nn.Sequential(*layers), input_size=(1, 1, 6))
    result = fit(model, pair, steps=2, batch=2, attack_steps=1, held_out=0.5, seed=0)
    assert result.network[0].num_batches_tracked == 2 and not result.network[0].training
    assert layers[0].num_batches_tracked == 0


def test_catastrophic_overfitting_is_noted() -> None:
    assert overfitting_note([1.0] * 4, [0.0, 0.4, 0.5, 0.3], [0, 1, 2, 3], 64) == ""
    note = overfitting_note([1.0, 0.8, 0.8, 0.9, 0.9], [0.1, 0.6, 0.5, 0.2, 0.0], [0, 10, 20, 30, 40], 64)
    assert note == "catastrophic overfitting: under PGD 60%, then 20% after 30 steps"
    # Clean accuracy falls as well: the training failed in another way.
    assert overfitting_note([1.0, 0.8, 0.1], [0.1, 0.6, 0.1], [0, 10, 20], 64) == ""
    # A difference of two images may be chance.
    assert overfitting_note([1.0, 1.0], [3 / 13, 1 / 13], [0, 10], 13) == ""


def test_labels_can_be_predicted(pair: TensorDataset) -> None:
    model = linear(6)
    nameless = TensorDataset(pair.images)
    logits: Tensor = model(pair.images[:1])
    expected = F.cross_entropy(logits, logits.argmax(1)).item()
    loss = first_loss(model, nameless, labels="predicted", algorithm="trades", beta=0.0)
    assert loss == pytest.approx(expected, abs=1e-6)
