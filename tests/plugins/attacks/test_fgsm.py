"""FGSM: one step of length eps in each norm, and two forward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.testing.observation import count_passes

fgsm, pgd = methods["attacks.fgsm"], methods["attacks.pgd"]


def network() -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    return load_model(module, input_size=(3, 8, 8))


def random_images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_step_has_length_eps(norm: str) -> None:
    model, images = network(), 0.4 + 0.2 * random_images()
    result = fgsm(model, images, model(images).argmax(1), eps=0.1, norm=norm)
    torch.testing.assert_close(result.distance(norm), torch.full((4,), 0.1, dtype=torch.float64))


def test_l1_step_moves_the_largest_hundredth() -> None:
    model, images = network(), 0.4 + 0.2 * random_images()
    result = fgsm(model, images, model(images).argmax(1), eps=0.1, norm="l1")
    assert ((result.adversarial != images).flatten(1).sum(1) == 2).all()  # of 192


def test_equals_one_step_of_pgd() -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    one = pgd(model, images, labels, eps=0.1, step_size=0.1, steps=1, random_start=False)
    assert torch.equal(fgsm(model, images, labels, eps=0.1).adversarial, one.adversarial)


def test_takes_two_forward_passes_and_one_backward() -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    with count_passes(model.module) as passes:
        fgsm(model, images, labels)
    assert (passes.forward, passes.backward) == (8, 4)
