"""Projected gradient descent: the strongest first-order adversary inside an epsilon-ball."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, SameShape, WithinBall, minimum, param, size

from ._gradients import Eot, Under, cross_entropy, judged, projected_ascent, reached
from ._lp_balls import Norm, random_point


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
    cost=Cost(
        forward=size.images
        * (param.restarts * (param.steps * param.eot + minimum(1, param.restarts - 1)) + 2),
        backward=size.images * param.restarts * param.steps * param.eot,
    ),
    tags=["white-box", "fixed-radius"],
    oracle=finds_the_corner_of_a_linear_model,
    quick={"steps": 3, "restarts": 1, "eot": 1},
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
    restarts: Annotated[
        int, Field(ge=1, le=1000, description="how many climbs, each from another point")
    ] = 1,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    eot: Eot = 1,
    under: Under = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Climb the loss from a random point of an eps-ball around each image, projecting back after every step.

    x <- clip(P(x + step_size * d)),  d = sign(dL/dx) for "linf", dL/dx / ||dL/dx||_2 for "l2"

    with L the cross-entropy of ``labels`` and P the projection onto the ball; for "l1" d is the sign at
    the largest hundredth of the gradient, of unit l1 length. A targeted attack descends instead, towards
    ``labels``. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    ``adversarial`` is the last point and stays inside the ball after rounding, too; of several
    ``restarts`` the one that reached its aim, else the one of the highest loss (without ``random_start``
    all are the same). ``success`` is read from the model's answer. An image that is taken for another
    class from the outset (targeted: for the one wanted) comes back as it is. All images start with the
    same offset. ``eot`` and ``under`` make the gradient a mean over a random model's answers and over
    random changes of the picture.

    Source: Madry et al. 2018, section 2.1.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    before: Tensor | None = None
    best, height = images, images.new_full((len(images),), -torch.inf)
    for _ in range(restarts):
        found, before = projected_ascent(
            model, images, labels, start=random_point(images, eps, norm, generator) if random_start else None,
            before=before, eps=eps, step_size=step_size, steps=steps, norm=norm, targeted=targeted, eot=eot,
            under=under, generator=generator,
        )  # fmt: skip
        if restarts == 1:
            best = found
            break
        with torch.no_grad():
            logits = model(found)
        loss = cross_entropy(logits, labels) * (-1 if targeted else 1)
        loss = torch.where(reached(logits, labels, targeted), torch.inf, loss)
        best = torch.where((loss > height)[:, None, None, None], found, best)
        height = torch.maximum(height, loss)
    assert before is not None
    return judged(model, images, best, labels, before, targeted=targeted)


@hookimpl
def phosphene_methods():
    return [pgd]
