"""Adversarial training: its three losses in closed form, what it learns to rely on, and what it tells."""

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
def one() -> TensorDataset:
    images = 0.3 + 0.4 * torch.rand(2, 1, 1, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, ["1", "0"])


@pytest.fixture(scope="module")
def tempting() -> TensorDataset:
    """One pixel is far apart and right nine times in ten; two hundred are always right, and very near."""
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
    given = {"eps": EPS, "steps": 1, "batch": 1, "held_out": 0.5, "seed": 0} | params
    return float(fit(model, dataset, **given).losses[0])


def test_trades_adds_the_divergence_to_the_cross_entropy(one: TensorDataset) -> None:
    """Of a linear model the kl_divergence is largest at one of the two corners along the weights."""
    model, x = linear(6), one.images[:1]
    away = (model.module[1].weight[0] - model.module[1].weight[1]).sign().view_as(x)  # type: ignore[index]
    p = model(x).softmax(1)
    clean = F.cross_entropy(model(x), torch.tensor([1]))
    for beta in (0.0, 3.0):
        want = [clean + beta * kl_divergence(model(x + side * EPS * away), p) for side in (-1, 1)]
        found = first_loss(model, one, algorithm="trades", beta=beta)
        assert min(abs(found - float(w.detach())) for w in want) < 1e-5


def test_a_fast_attack_is_one_step_of_five_quarters_of_the_radius(one: TensorDataset) -> None:
    model, x, y = linear(6), one.images[:1], torch.tensor([1])
    way = (model.module[1].weight[0] - model.module[1].weight[1]).sign().view_as(x)  # type: ignore[index]
    torch.manual_seed(0)
    start = EPS * (2 * torch.rand(1, 1, 1, 6) - 1)
    point = x + (start + 1.25 * EPS * way).clamp(-EPS, EPS)
    want = F.cross_entropy(model(point), y).item()
    assert first_loss(model, one, algorithm="fast") == pytest.approx(want, abs=1e-5)
    corner = F.cross_entropy(model(x + EPS * way), y).item()
    assert first_loss(model, one, algorithm="pgd", attack_steps=8) == pytest.approx(corner, abs=1e-5)
    assert want < corner


@pytest.mark.parametrize("algorithm", ["pgd", "trades", "fast"])
def test_it_learns_to_do_without_what_can_be_faked(tempting: TensorDataset, algorithm: str) -> None:
    given: dict[str, Any] = {"steps": 30, "batch": 50, "lr": 0.05, "weight_decay": 0.0, "seed": 0}
    plain = fit(linear(201), tempting, eps=1e-6, **given)
    robust = fit(linear(201), tempting, algorithm=algorithm, eps=EPS, attack_steps=3, **given)
    images, labels = tempting.images[200:], [int(name) for name in tempting.classes[200:]]  # type: ignore[index]

    def under_attack(model: Model) -> float:
        found = pgd(model, images, labels, eps=EPS, step_size=EPS / 4, steps=20, seed=0)
        return 1 - float(found.success.double().mean())

    assert plain.curves["clean"][-1] == 1 and under_attack(plain.model()) < 0.2
    assert under_attack(robust.model()) > 0.75
    assert float(robust.curves[UNDER_PGD][-1]) == pytest.approx(under_attack(robust.model()), abs=0.06)


def test_batch_norm_learns_its_statistics(one: TensorDataset) -> None:
    layers = nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(6, 2)
    model = load_model(nn.Sequential(*layers), input_size=(1, 1, 6))
    made = fit(model, one, steps=2, batch=2, attack_steps=1, held_out=0.5, seed=0)
    assert made.network[0].num_batches_tracked == 2 and not made.network[0].training
    assert layers[0].num_batches_tracked == 0


def test_a_collapse_is_told() -> None:
    assert overfitting_note([1.0] * 4, [0.0, 0.4, 0.5, 0.3], [0, 1, 2, 3], 64) == ""
    told = overfitting_note([1.0, 0.8, 0.8, 0.9, 0.9], [0.1, 0.6, 0.5, 0.2, 0.0], [0, 10, 20, 30, 40], 64)
    assert told == "catastrophic overfitting: under PGD 60%, then 20% after 30 steps"
    assert (
        overfitting_note([1.0, 0.8, 0.1], [0.1, 0.6, 0.1], [0, 10, 20], 64) == ""
    )  # it has forgotten everything
    assert overfitting_note([1.0, 1.0], [3 / 13, 1 / 13], [0, 10], 13) == ""  # two pictures, as it happens


def test_labels_may_be_the_models_own(one: TensorDataset) -> None:
    model = linear(6)
    nameless = TensorDataset(one.images)
    said: Tensor = model(one.images[:1])
    want = F.cross_entropy(said, said.argmax(1)).item()
    found = first_loss(model, nameless, labels="predicted", algorithm="trades", beta=0.0)
    assert found == pytest.approx(want, abs=1e-6)
