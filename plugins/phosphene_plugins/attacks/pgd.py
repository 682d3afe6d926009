"""Projected gradient descent: the strongest first-order adversary inside an epsilon-ball."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, progress
from phosphene.results import AdversarialExamples
from phosphene.spec import Cost, PixelRange, SameShape, WithinBall
from phosphene.types import Images, Labels, Model, Seed

Norm = Literal["linf", "l2"]


def finds_the_corner_of_a_linear_model() -> None:
    """On two classes clip(x + eps sign(w_other - w_true)), and in L2 eps along w_other - w_true."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    # All grey, so that in L2 nothing is clipped; and with black and white, so that in Linf it is.
    grey = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    images = torch.cat([grey, torch.tensor([[[[0.0, 1.0], [0.5, 0.75]]]], dtype=torch.float64)])
    true = model(images).argmax(1)
    away = (linear.weight[1 - true] - linear.weight[true]).detach().view_as(images)
    for targeted, labels in ((False, true), (True, 1 - true)):
        corner = pgd(
            model, images, labels, eps=0.1, step_size=0.05, steps=4, random_start=False, targeted=targeted
        )
        torch.testing.assert_close(corner.adversarial, (images + 0.1 * away.sign()).clamp(0, 1))
        point = pgd(
            model, grey, labels[:1], eps=0.1, step_size=0.05, steps=4, norm="l2", random_start=False,
            targeted=targeted,
        )  # fmt: skip
        torch.testing.assert_close(point.adversarial, grey + 0.1 * away[:1] / away[:1].norm())


@method(
    family="attacks",
    title="PGD",
    references=[
        Reference(
            key="madry2018",
            title="Towards Deep Learning Models Resistant to Adversarial Attacks",
            authors="Madry, Makelov, Schmidt, Tsipras, Vladu",
            year=2018,
            url="https://arxiv.org/abs/1706.06083",
        ),
        Reference(
            key="kurakin2017",
            title="Adversarial examples in the physical world",
            authors="Kurakin, Goodfellow, Bengio",
            year=2017,
            url="https://arxiv.org/abs/1607.02533",
        ),
    ],
    invariants=[
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial"),
        SameShape(field="adversarial"),
    ],
    needs=["gradients"],
    cost=Cost(forward="images * (steps + 2)", backward="images * steps"),
    tags=["white-box", "fixed-radius"],
    oracle=finds_the_corner_of_a_linear_model,
    quick={"steps": 3},
)
def pgd(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    step_size: Annotated[float, Field(gt=0, le=1000, description="length of one ascent step")] = 2 / 255,
    steps: Annotated[int, Field(ge=1, le=10_000, description="how many ascent steps")] = 10,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    random_start: Annotated[bool, Field(description="begin at a random point of the ball")] = True,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    seed: Seed = None,
) -> AdversarialExamples:
    """Climb the loss from a random point of an eps-ball around each image, projecting back after every step.

    x <- clip(P(x + step_size * d)),  d = sign(dL/dx) for "linf", dL/dx / ||dL/dx||_2 for "l2"

    with L the cross-entropy of ``labels`` and P the projection onto the ball. A targeted attack
    descends instead, towards ``labels``. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    ``adversarial`` is the last point and stays inside the ball after rounding, too; ``success`` is
    read from the model's answer to it. An image that is taken for another class from the outset
    (targeted: for the one wanted) comes back as it is. All images start with the same offset.
    """
    with torch.no_grad():
        before = model(images)
    adversarial = images
    if random_start:
        adversarial = _project(images + _random_offset(images, eps, norm, seed), images, eps, norm)
    for _ in progress(range(steps), "climbing the loss"):
        point = adversarial.detach().requires_grad_()
        loss = F.cross_entropy(model(point), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(-loss if targeted else loss, point)
        direction = gradient.sign() if norm == "linf" else _unit(gradient)
        adversarial = _project(adversarial + step_size * direction, images, eps, norm)
    reached = before.argmax(1).eq(labels) if targeted else before.argmax(1).ne(labels)
    adversarial = torch.where(reached[:, None, None, None], images, adversarial)
    with torch.no_grad():
        after = model(adversarial)
    return AdversarialExamples.judged(model, images, adversarial, labels, before, after, targeted=targeted)


def _project(points: Tensor, images: Tensor, eps: float, norm: Norm) -> Tensor:
    """The nearest points of the ball, clipped to [0, 1]; never outside the ball, rounding included."""
    # The lengths below are right to two units in the last place.
    eps *= 1 - 4 * torch.finfo(images.dtype).eps
    delta = points - images
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / _length(delta).clamp(min=eps))
    rounded = (images + delta).clamp(0, 1)
    too_far = (rounded - images).abs() > delta.abs()
    return torch.where(too_far, torch.nextafter(rounded, images), rounded)


def _length(vectors: Tensor) -> Tensor:
    """The L2 norm of each image, (N, 1, 1, 1)."""
    # Not torch.norm: in float32 it is wrong by 2e-3 on three million pixels, this by 2e-7.
    return vectors.square().sum((1, 2, 3), keepdim=True).sqrt()


def _unit(gradient: Tensor) -> Tensor:
    """Each image's gradient at unit length; zero stays zero."""
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    # First to about one: the squares of a saturated model's gradient would underflow.
    scaled = gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny)
    return scaled / _length(scaled).clamp(min=1)


def _random_offset(images: Tensor, eps: float, norm: Norm, seed: int | None) -> Tensor:
    """A uniformly random point of the ball, (1, C, H, W): one for all, so that no image depends on others."""
    generator = torch.Generator().manual_seed(seed or 0)
    shape = (1, *images.shape[1:])
    if norm == "linf":
        return (2 * torch.rand(shape, generator=generator) - 1).to(images) * eps
    direction = torch.randn(shape, generator=generator)
    radius = float(torch.rand((), generator=generator)) ** (1 / direction.numel())
    return (direction / _length(direction)).to(images) * (radius * eps)


@hookimpl
def phosphene_methods():
    return [pgd]
