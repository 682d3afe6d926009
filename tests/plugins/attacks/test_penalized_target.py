"""The penalised target: its objective is raised, its penalty felt, and never a worse point than the start."""

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


def objective(model: Model, images: Tensor, found: Tensor, wanted: Tensor, penalty: float) -> Tensor:
    score = model(found).gather(1, wanted[:, None])[:, 0].detach()
    return score - penalty * (found - images).abs().amax((1, 2, 3))


def test_objective_is_raised_and_a_dearer_change_is_smaller() -> None:
    model, images, wanted = network()
    far = []
    for penalty in (0.5, 2.0, 8.0):
        found = penalized_target(model, images, wanted, penalty=penalty)
        raised = objective(model, images, found.adversarial, wanted, penalty)
        assert (raised >= objective(model, images, images, wanted, penalty) - 1e-12).all()
        far.append(found.distance("linf"))
    assert (far[0] > far[1]).all() and (far[1] >= far[2]).all()


def test_penalty_above_the_slope_leaves_the_image_alone() -> None:
    model, images, wanted = network()
    assert torch.equal(penalized_target(model, images, wanted, penalty=1e4).adversarial, images)


def test_point_is_better_than_any_step_along_the_sign() -> None:
    """Of all changes of one size the sign of the gradient is the best where the model is linear."""
    model, images, wanted = network()
    found = penalized_target(model, images, wanted, penalty=1.0, steps=300)
    best = objective(model, images, found.adversarial, wanted, 1.0)
    place = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(place).gather(1, wanted[:, None]).sum(), place)
    for size in torch.linspace(0, 1, 21).tolist():
        step = (images + size * slope.sign()).clamp(0, 1)
        assert (best >= objective(model, images, step, wanted, 1.0) - 1e-3).all()


def test_already_wanted_class_is_left_alone() -> None:
    model, images, _ = network()
    found = penalized_target(model, images, model(images).argmax(1))
    assert torch.equal(found.adversarial, images)
    assert found.success.all() and found.targeted
