"""APGD: checkpoints of the paper, its losses, and a loss no lower than that of PGD after as many steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene_plugins.attacks._losses import (
    difference_of_logits_ratio,
    targeted_difference_of_logits_ratio,
)
from phosphene_plugins.attacks.apgd import _checkpoints

apgd, pgd = methods["attacks.apgd"], methods["attacks.pgd"]


def network() -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 64, 6),
        ).double()  # fmt: skip
    return load_model(module, input_size=(3, 8, 8))


def random_images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_checkpoints_equal_the_paper() -> None:
    assert _checkpoints(100)[:8] == [0, 22, 41, 57, 70, 80, 87, 93]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_loss_is_no_lower_than_that_of_pgd(norm: str) -> None:
    """In a ball without adversarial examples, so that no success ends a run."""
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    eps = {"linf": 0.0005, "l2": 0.005, "l1": 0.02}[norm]
    apgd_result = apgd(model, images, labels, eps=eps, norm=norm, steps=20, seed=0)
    pgd_result = pgd(model, images, labels, eps=eps, norm=norm, step_size=eps / 4, steps=20, seed=0)
    assert not apgd_result.success.any()
    loss = [
        F.cross_entropy(model(r.adversarial), labels, reduction="none") for r in (apgd_result, pgd_result)
    ]
    assert (loss[0] >= loss[1] - 1e-6).all()


@pytest.mark.parametrize("loss", ["cross-entropy", "dlr"])
@pytest.mark.parametrize("targeted", [False, True])
def test_every_loss_succeeds(loss: str, targeted: bool) -> None:
    model, images = network(), random_images()
    predictions = model(images).argmax(1)
    labels = (predictions + 1) % 6 if targeted else predictions
    result = apgd(model, images, labels, eps=0.3, loss=loss, targeted=targeted, steps=30, seed=0)
    assert result.success.all()


def test_dlr_does_not_depend_on_the_scale_of_the_logits() -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    plain = apgd(model, images, labels, loss="dlr", steps=10, seed=0).adversarial
    model.module[5].weight.data *= 1e4
    model.module[5].bias.data *= 1e4
    torch.testing.assert_close(apgd(model, images, labels, loss="dlr", steps=10, seed=0).adversarial, plain)


def test_dlr_equals_its_definition() -> None:
    logits, labels = torch.tensor([[5.0, 1.0, 4.0, 2.0]]), torch.tensor([0])
    assert difference_of_logits_ratio(logits, labels).item() == pytest.approx((4 - 5) / (5 - 2))
    ratio = targeted_difference_of_logits_ratio(logits, torch.tensor([3]))
    assert ratio.item() == pytest.approx((2 - 5) / (5 - (2 + 1) / 2))


def test_restarts_lose_no_success() -> None:
    model, images = network(), random_images(16)
    labels = model(images).argmax(1)
    single, restarted = (
        apgd(model, images, labels, eps=0.004, steps=5, restarts=n, seed=0).success for n in (1, 3)
    )
    assert (restarted | ~single).all()


def test_target_classes_count_any_misclassification_as_success() -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    wide, narrow = (
        apgd(model, images, labels, eps=0.004, loss="dlr", steps=20, target_classes=n, seed=0) for n in (5, 1)
    )
    assert not wide.targeted
    assert torch.equal(wide.success, wide.after != labels)
    assert wide.success.any() and (wide.success | ~narrow.success).all()


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_dlr_is_defined_for_few_classes(classes: int) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, classes)).double()
    model = load_model(module, input_size=(3, 8, 8), task="classification")
    images = random_images()
    labels = model(images).argmax(1)
    result = apgd(model, images, labels, eps=0.5, loss="dlr", steps=10, target_classes=9, seed=0)
    assert result.adversarial.isfinite().all()
    assert result.success.all() == (classes > 1)
