"""BIM, the basic iterative method (I-FGSM, with momentum MI-FGSM): gradient steps from the image itself."""

import torch
from torch import Generator

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import build_result, project, steepest
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, param, size
from phosphene.testing import linear_model

from ._gradients import initial_gradient, loss_gradient
from ._losses import cross_entropy
from ._parameters import (
    IN_BALL,
    Augmentations,
    EotSamples,
    Eps,
    Momentum,
    Norm,
    Steps,
    StepSize,
    Targeted,
)


def moves_a_linear_model_by_steps_times_step_size() -> None:
    """On a linear model clip(x + min(eps, steps * step_size) sign(w_other - w_true))."""
    model = linear_model()
    weight, _ = (p.detach() for p in model.module.parameters())
    images = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]], [[[0.0, 1.0], [0.5, 0.75]]]], dtype=torch.float64)
    true = model(images).argmax(1)
    normal = (weight[1 - true] - weight[true]).view_as(images)
    for steps, distance in ((2, 0.06), (9, 0.1)):
        result = bim(model, images, true, eps=0.1, step_size=0.03, steps=steps)
        torch.testing.assert_close(result.adversarial, (images + distance * normal.sign()).clamp(0, 1))


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
    invariants=IN_BALL,
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (param.steps * param.eot_samples + 2),
        backward=size.images * param.steps * param.eot_samples,
    ),
    tags=["white-box", "fixed-radius"],
    oracle=moves_a_linear_model_by_steps_times_step_size,
    quick={"steps": 3, "eot_samples": 1},
)
def bim(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    step_size: StepSize = 2 / 255,
    steps: Steps = 10,
    norm: Norm = "linf",
    momentum: Momentum = 0.0,
    targeted: Targeted = False,
    eot_samples: EotSamples = 1,
    augmentations: Augmentations = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Basic iterative method (BIM, I-FGSM; with momentum MI-FGSM): adversarial examples inside an l_p ball.

    x <- clip(P(x + step_size sign(g))),  g <- momentum g + dL/dx / mean|dL/dx|  (g = dL/dx without momentum)

    with L the cross-entropy of ``labels`` and P the projection onto the ball; in "l2" and "l1" the step is
    the steepest of that norm. It starts at the image; ``pgd`` starts at a random point. With ``momentum``
    (MI-FGSM) examples transfer better to other models. A targeted attack subtracts the step. The gradient is
    averaged over ``eot_samples`` passes of a stochastic model, or of images under random ``augmentations``.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W), the last point, inside the ball, rounding
        included, and ``success`` (N,).

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("bim", images="builtin:scenes/2", steps=3, momentum=1.0)
        result.adversarial.shape  # (2, 3, 64, 64)

    Source: Kurakin, Goodfellow & Bengio 2017, section 2.2; Dong et al. 2018, algorithm 1.
    """
    generator = Generator().manual_seed(seed or 0)
    before, active, gradient = initial_gradient(
        model, images, labels, cross_entropy, targeted=targeted, eot_samples=eot_samples,
        augmentations=augmentations, generator=generator,
    )  # fmt: skip
    x, y = images[active], labels[active]
    sign = -1.0 if targeted else 1.0
    x_adv, accumulated = x, torch.zeros_like(x)
    for step in progress_bar(range(steps if len(x) else 0), "BIM"):
        if step > 0:
            _, gradient, _ = loss_gradient(
                model, x_adv, y, cross_entropy, eot_samples=eot_samples, augmentations=augmentations,
                generator=generator,
            )  # fmt: skip
        if momentum:
            scale = gradient.abs().mean((1, 2, 3), keepdim=True)
            scale = scale.clamp(min=torch.finfo(gradient.dtype).tiny)
            gradient = accumulated = momentum * accumulated + gradient / scale
        x_adv = project(x_adv + sign * step_size * steepest(gradient, norm), x, eps, norm)
    adversarial = images.index_copy(0, active, x_adv)
    return build_result(model, images, adversarial, labels, before, targeted=targeted)


@hookimpl
def phosphene_methods():
    return [bim]
