"""Penalized target: class logit minus an l_inf penalty on the change, maximized by proximal steps."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import build_result, is_zero, not_adversarial, per_image, predict_logits
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model
from phosphene.spec import Cost, Monotone, param, size
from phosphene.testing import linear_model

from ._gradients import loss_gradient
from ._oracle_models import LinearCase, assert_predictions, rectified
from ._parameters import GRADIENT_RELATIONS, IN_RANGE

#: Bisection steps for the radius of the ball, which determine it to 2^-30.
# equivalent mutants: further bisections change less than 1e-9
_BISECTIONS = 30


def moves_while_the_gradient_outweighs_the_penalty() -> None:
    """S = w . x: r grows while the |w_i| of the pixels that are not at a bound sum to more than lambda."""
    weight = torch.tensor([[9.0, 9.0, 9.0, 9.0], [4.0, -3.0, 2.0, 1.0]], dtype=torch.float64)
    model = linear_model(weight.view(2, 1, 2, 2))
    # Moved along the sign of the weights, the pixels reach their bounds after 0.1, 0.2, 0.3 and 0.4.
    images = torch.tensor([[[[0.9, 0.2], [0.7, 0.6]]]], dtype=torch.float64)
    target = torch.tensor([1])
    assert model(images).argmax(1) == 0
    for penalty, moves in ((11, [0, 0, 0, 0]), (5, [0.1, -0.2, 0.2, 0.2]), (0.5, [0.1, -0.2, 0.3, 0.4])):
        result = penalized_target(model, images, target, penalty=penalty, steps=30, step_size=0.08)
        move = torch.tensor(moves, dtype=torch.float64).view(1, 1, 2, 2)
        torch.testing.assert_close(result.adversarial - images, move, rtol=0, atol=1e-2)
    # The proximal step minimizes its objective over all radii.
    case = rectified(4)
    points, weight = case.images + 0.3 * (case.images.flip(0) - 0.4), torch.tensor([0.05, 0.3, 1.0, 9.0])
    nearest = _proximal_step(points, case.images, per_image(weight))
    radii = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None, None, None]
    moved = (case.images + (points - case.images).clamp(-radii, radii)).clamp(0, 1)
    cost = (moved - points).square().sum((2, 3, 4)) / 2 + weight * radii[:, :, 0, 0, 0]
    best = moved[cost.argmin(0), torch.arange(4)]
    torch.testing.assert_close(nearest, best, rtol=0, atol=5e-4)
    assert torch.equal(_proximal_step(points, case.images, per_image(100 * weight))[2:], case.images[2:])
    at_once = penalized_target(case.model, case.images, case.labels, steps=1)
    assert torch.equal(at_once.adversarial, case.images)
    for penalty in (2.0, 8.0):
        _equals_plain_steps(case, penalty)


def _equals_plain_steps(case: LinearCase, penalty: float) -> None:
    """Nine steps of each image, of which the point of the highest objective is returned."""
    targets = (case.labels + 2).index_fill(0, torch.tensor([1]), int(case.labels[1])) % 5
    result = penalized_target(case.model, case.images, targets, penalty=penalty, steps=9, step_size=0.2)
    assert_predictions(result, case, targets, targeted=True)
    for n, (image, target) in enumerate(zip(case.images, targets.tolist(), strict=True)):
        x, highest, expected = image, -torch.inf, image
        for _ in range(9 if case.labels[n] != target else 0):
            leaf = x[None].detach().requires_grad_()
            logit = case.model(leaf)[0, target]
            (gradient,) = torch.autograd.grad(logit, leaf)
            if (value := logit.item() - penalty * float((x - image).abs().max())) > highest:
                expected, highest = x, value
            eta = 0.2 / gradient.abs().max().clamp(min=1e-150)
            (x,) = _proximal_step(x[None] + eta * gradient, image[None], (penalty * eta).view(1, 1, 1, 1))
        torch.testing.assert_close(result.adversarial[n], expected)


@method(
    family="attacks",
    title="Penalized target",
    references=[
        Reference(
            key="szegedy2014",
            title="Intriguing properties of neural networks",
            authors="Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow, Fergus",
            year=2014,
            url="https://arxiv.org/abs/1312.6199",
        ),
        Reference(
            key="parikh2014",
            title="Proximal Algorithms",
            authors="Parikh, Boyd",
            year=2014,
            url="https://doi.org/10.1561/2400000003",
        ),
    ],
    invariants=IN_RANGE,
    relations=[*GRADIENT_RELATIONS, Monotone("penalty", values=(0.1, 1, 10), measure="distance", falls=True)],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    tags=["white-box", "targeted"],
    oracle=moves_while_the_gradient_outweighs_the_penalty,
    quick={"steps": 4},
    demo={"images": "builtin:scenes/3", "labels": ["circle", "cross", "star"]},
)
def penalized_target(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    penalty: Annotated[
        float, Field(ge=0, le=1e9, description="lambda: logits per unit of the largest pixel change")
    ] = 100.0,
    steps: Annotated[int, Field(ge=1, le=100_000, description="number of gradient steps")] = 100,
    step_size: Annotated[
        float,
        Field(gt=0, le=1, description="change per step of the pixel with the largest gradient, in [0, 1]"),
    ] = 0.01,
) -> AdversarialExamples:
    """Penalized target attack: targeted adversarial examples with an l_inf penalty on the perturbation.

    I* = argmax_I S_c(I) - lambda ||I - I_orig||_inf

    with S_c the logit of the target class in ``labels`` (N,). Each step is a proximal gradient step:
    v = I + eta dS_c/dI, then the minimizer u of ||u - v||_2^2 / 2 + eta lambda ||u - I_orig||_inf with pixels
    in [0, 1]: v clipped to the ball whose radius r solves sum_i max(|v_i - I_i| - r, 0) = eta lambda.
    The image stays unchanged where lambda exceeds the sum of the gradient's absolute values. eta is
    ``step_size`` divided by the largest gradient component.

    ``images`` (N, C, H, W) in [0, 1].

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W), the point of the highest objective of all
        steps, and ``success`` (N,), whether it is classified as the target.

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("penalized_target", images="builtin:scenes/2", labels=["circle", "cross"], steps=10)
        result.after  # (2,)

    Source: lecture 21.7.1; the step is Parikh & Boyd 2014, section 4.2.
    """
    before = predict_logits(model, images)
    active = not_adversarial(before, labels, targeted=True)
    original, targets = images[active], labels[active]
    x, best = original, original
    # equivalent mutants: only the number of images matters
    best_value = torch.full_like(images[active, 0, 0, 0], -torch.inf)
    zero = torch.zeros_like(targets, dtype=torch.bool)
    for step in progress_bar(range(steps), "penalized target"):
        if not len(active):
            break
        logit, gradient, _ = loss_gradient(model, x, targets, _target_logit)
        if step == 0:
            zero = is_zero(gradient)
        change = (x - original).abs().amax((1, 2, 3))
        value = logit - penalty * change
        best = torch.where(per_image(value > best_value), x, best)
        best_value = torch.maximum(best_value, value)
        largest = gradient.abs().amax((1, 2, 3), keepdim=True)
        # equivalent mutants: a zero gradient moves nothing, however small the divisor
        eta = step_size / largest.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
        x = _proximal_step(x + eta * gradient, original, eta * penalty)
    adversarial = images.index_copy(0, active, best)
    return build_result(model, images, adversarial, labels, before, targeted=True, zero_gradient=zero)


def _target_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0]


def _proximal_step(points: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """argmin_u ||u - points||^2 / 2 + weight ||u - images||_inf, pixels in [0, 1]; weight (N, 1, 1, 1)."""
    delta = points - images
    # equivalent mutants: where delta is 0 nothing exceeds the radius
    margins = torch.where(delta > 0, 1 - images, images)
    low, high = torch.zeros_like(weight), torch.ones_like(weight)
    for _ in range(_BISECTIONS):
        radius = (low + high) / 2
        # Decrease of the first term per unit of radius: pixels at their bounds contribute nothing.
        excess = (delta.abs() - radius).clamp(min=0)
        # equivalent mutants: a pixel counts or not at its margin itself, which moves the radius by 2^-30
        gain = torch.where(margins > radius, excess, 0).sum((1, 2, 3), keepdim=True)
        # equivalent mutants: at equality the radius itself is the minimizer
        larger = gain > weight
        low, high = torch.where(larger, radius, low), torch.where(larger, high, radius)
    radius = torch.where(low > 0, high, 0)
    return (images + delta.clamp(-radius, radius)).clamp(0, 1)


@hookimpl
def phosphene_methods():
    return [penalized_target]
