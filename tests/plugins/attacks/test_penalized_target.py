"""Penalized target: the objective grows, and a larger penalty yields a smaller change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods

penalized_target = methods["attacks.penalized_target"]


def network() -> tuple[Model, Tensor, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    model = load_model(module, input_size=(3, 8, 8))
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, images, (model(images).argmax(1) + 1) % 4


def objective(model: Model, images: Tensor, result: Tensor, targets: Tensor, penalty: float) -> Tensor:
    score = model(result).gather(1, targets[:, None])[:, 0].detach()
    return score - penalty * (result - images).abs().amax((1, 2, 3))


def test_objective_grows_and_a_larger_penalty_yields_a_smaller_change() -> None:
    model, images, targets = network()
    distances = []
    for penalty in (0.5, 2.0, 8.0):
        result = penalized_target(model, images, targets, penalty=penalty)
        raised = objective(model, images, result.adversarial, targets, penalty)
        assert (raised >= objective(model, images, images, targets, penalty) - 1e-12).all()
        distances.append(result.distance("linf"))
    assert (distances[0] > distances[1]).all() and (distances[1] >= distances[2]).all()


def test_penalty_above_the_gradient_leaves_the_image_unchanged() -> None:
    model, images, targets = network()
    assert torch.equal(penalized_target(model, images, targets, penalty=1e4).adversarial, images)


def test_result_is_better_than_any_step_along_the_sign() -> None:
    """On a linear model the sign of the gradient is the best change of its size."""
    model, images, targets = network()
    result = penalized_target(model, images, targets, penalty=1.0, steps=300)
    best = objective(model, images, result.adversarial, targets, 1.0)
    point = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(point).gather(1, targets[:, None]).sum(), point)
    for size in torch.linspace(0, 1, 21).tolist():
        step = (images + size * slope.sign()).clamp(0, 1)
        assert (best >= objective(model, images, step, targets, 1.0) - 1e-3).all()


def test_image_of_the_target_class_is_unchanged() -> None:
    model, images, _ = network()
    result = penalized_target(model, images, model(images).argmax(1))
    assert torch.equal(result.adversarial, images)
    assert result.success.all() and result.targeted
