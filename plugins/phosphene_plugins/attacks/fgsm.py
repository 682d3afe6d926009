"""The fast gradient sign method: one step of the whole radius, up the loss."""

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


def reaches_the_corner_of_a_linear_model_at_once() -> None:
    """On two classes clip(x + eps sign(w_other - w_true)): a linear loss is climbed in one step."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    images = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]], [[[0.0, 1.0], [0.5, 0.75]]]], dtype=torch.float64)
    true = model(images).argmax(1)
    away = (linear.weight[1 - true] - linear.weight[true]).detach().view_as(images)
    for targeted, labels in ((False, true), (True, 1 - true)):
        found = fgsm(model, images, labels, eps=0.1, targeted=targeted)
        torch.testing.assert_close(found.adversarial, (images + 0.1 * away.sign()).clamp(0, 1))


@method(
    family="attacks",
    title="FGSM",
    references=[
        Reference(
            key="goodfellow2015",
            title="Explaining and Harnessing Adversarial Examples",
            authors="Goodfellow, Shlens, Szegedy",
            year=2015,
            url="https://arxiv.org/abs/1412.6572",
        )
    ],
    invariants=[
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial"),
        SameShape(field="adversarial"),
    ],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.eot + 2), backward=size.images * param.eot),
    tags=["white-box", "fixed-radius"],
    oracle=reaches_the_corner_of_a_linear_model_at_once,
    quick={"eot": 1},
)
def fgsm(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    eot: Eot = 1,
    under: Under = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Go one step of the whole radius up the loss: the fastest attack, and a coarse one.

    x' = clip(x + eps sign(dL/dx))

    with L the cross-entropy of ``labels``; in "l2" the step is eps dL/dx / ||dL/dx||_2, in "l1" the sign at
    the largest hundredth of the gradient. A targeted attack goes down instead, towards ``labels``.
    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). An image that is taken for another class from the
    outset (targeted: for the one wanted) comes back as it is. ``eot`` and ``under`` make the gradient a mean
    over a random model's answers and over random changes of the picture.

    Source: Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    adversarial, before = projected_ascent(
        model, images, labels, eps=eps, step_size=eps, steps=1, norm=norm, targeted=targeted,
        eot=eot, under=under, generator=torch.Generator().manual_seed(seed or 0),
    )  # fmt: skip
    return judged(model, images, adversarial, labels, before, targeted=targeted)


@hookimpl
def phosphene_methods():
    return [fgsm]
