"""The basic iterative method: small steps up the loss from the image itself, never leaving the ball."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import Reference, hookimpl, load_model, method
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, SameShape, WithinBall, param, size

from ._gradients import Eot, Under, judged, projected_ascent
from ._lp_balls import Norm


def goes_as_far_as_its_steps_carry_it() -> None:
    """On a linear model clip(x + min(eps, steps * step_size) sign(w_other - w_true))."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    images = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]], [[[0.0, 1.0], [0.5, 0.75]]]], dtype=torch.float64)
    true = model(images).argmax(1)
    away = (linear.weight[1 - true] - linear.weight[true]).detach().view_as(images)
    for steps, reach in ((2, 0.06), (9, 0.1)):
        found = bim(model, images, true, eps=0.1, step_size=0.03, steps=steps)
        torch.testing.assert_close(found.adversarial, (images + reach * away.sign()).clamp(0, 1))


@method(
    family="attacks",
    title="BIM",
    references=[
        Reference(
            key="kurakin2017",
            title="Adversarial examples in the physical world",
            authors="Kurakin, Goodfellow, Bengio",
            year=2017,
            url="https://arxiv.org/abs/1607.02533",
        ),
        Reference(
            key="dong2018",
            title="Boosting Adversarial Attacks with Momentum",
            authors="Dong, Liao, Pang, Su, Zhu, Hu, Li",
            year=2018,
            url="https://arxiv.org/abs/1710.06081",
        ),
    ],
    invariants=[
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial"),
        SameShape(field="adversarial"),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (param.steps * param.eot + 2), backward=size.images * param.steps * param.eot
    ),
    tags=["white-box", "fixed-radius"],
    oracle=goes_as_far_as_its_steps_carry_it,
    quick={"steps": 3, "eot": 1},
)
def bim(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    step_size: Annotated[float, Field(gt=0, le=1000, description="length of one step")] = 2 / 255,
    steps: Annotated[int, Field(ge=1, le=10_000, description="how many steps")] = 10,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    momentum: Annotated[float, Field(ge=0, le=1, description="of the gradients before: MI-FGSM")] = 0.0,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    eot: Eot = 1,
    under: Under = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Take small steps up the loss from the image itself, clipping back into the eps-ball after each.

    x <- clip(P(x + step_size sign(g))),  g <- momentum g + dL/dx / mean|dL/dx|  (g = dL/dx without momentum)

    with L the cross-entropy of ``labels`` and P the projection onto the ball; in "l2" and "l1" the step is
    the steepest of that norm. ``momentum`` makes it MI-FGSM, whose examples carry over to other models
    better. A targeted attack goes down instead, towards ``labels``. ``images`` (N, C, H, W) in [0, 1],
    ``labels`` (N,). An image that is taken for another class from the outset (targeted: for the one wanted)
    comes back as it is. ``eot`` and ``under`` make the gradient a mean over a random model's answers and
    over random changes of the picture. ``pgd`` begins at a random point instead.

    Source: Kurakin, Goodfellow & Bengio 2017, section 2.2; Dong et al. 2018, algorithm 1.
    """
    adversarial, before = projected_ascent(
        model, images, labels, eps=eps, step_size=step_size, steps=steps, norm=norm,
        targeted=targeted, momentum=momentum, eot=eot, under=under,
        generator=torch.Generator().manual_seed(seed or 0),
    )  # fmt: skip
    return judged(model, images, adversarial, labels, before, targeted=targeted)


@hookimpl
def phosphene_methods():
    return [bim]
