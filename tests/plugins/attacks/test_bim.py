"""BIM: length of its steps, momentum, and averaged gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods

bim = methods["attacks.bim"]


def network() -> Model:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    return load_model(module, input_size=(3, 8, 8))


def random_images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_distance_is_bounded_by_the_steps_and_the_ball(norm: str) -> None:
    model, images = network(), 0.4 + 0.2 * random_images()
    labels = model(images).argmax(1)
    for steps, largest in ((2, 0.04), (20, 0.1)):
        result = bim(model, images, labels, eps=0.1, step_size=0.02, steps=steps, norm=norm)
        assert (result.distance(norm) <= largest * (1 + 1e-9)).all()
        assert (result.distance(norm) > 0.5 * largest).all()


def test_momentum_zero_equals_no_momentum() -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    params: dict[str, Any] = {"eps": 0.3, "step_size": 0.05, "steps": 10}
    plain = bim(model, images, labels, **params).adversarial
    assert torch.equal(bim(model, images, labels, momentum=0.0, **params).adversarial, plain)
    assert not torch.equal(bim(model, images, labels, momentum=1.0, **params).adversarial, plain)


def test_eot_of_a_deterministic_model_equals_one_pass() -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    torch.testing.assert_close(
        bim(model, images, labels, eot_samples=3).adversarial, bim(model, images, labels).adversarial
    )
