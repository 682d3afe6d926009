"""FGSM takes one step of the whole radius, of the right length in each norm, and no pass too many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.testing.observation import traffic

fgsm, pgd = methods["attacks.fgsm"], methods["attacks.pgd"]


def network() -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    return load_model(module, input_size=(3, 8, 8))


def pictures(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_step_has_the_whole_length(norm: str) -> None:
    model, images = network(), 0.4 + 0.2 * pictures()
    found = fgsm(model, images, model(images).argmax(1), eps=0.1, norm=norm)
    torch.testing.assert_close(found.distance(norm), torch.full((4,), 0.1, dtype=torch.float64))


def test_in_l1_the_largest_hundredth_of_the_gradient_moves() -> None:
    model, images = network(), 0.4 + 0.2 * pictures()
    found = fgsm(model, images, model(images).argmax(1), eps=0.1, norm="l1")
    assert ((found.adversarial != images).flatten(1).sum(1) == 2).all()  # of 192


def test_it_is_one_step_of_pgd() -> None:
    model, images = network(), pictures()
    labels = model(images).argmax(1)
    one = pgd(model, images, labels, eps=0.1, step_size=0.1, steps=1, random_start=False)
    assert torch.equal(fgsm(model, images, labels, eps=0.1).adversarial, one.adversarial)


def test_it_takes_two_passes_forward_and_one_back() -> None:
    model, images = network(), pictures()
    labels = model(images).argmax(1)
    model.structure  # noqa: B018  - recorded once, with a pass of its own
    with traffic(model.module) as seen:
        fgsm(model, images, labels)
    assert (seen.forward, seen.backward) == (8, 4)
