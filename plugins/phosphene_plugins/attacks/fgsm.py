"""FGSM, the fast gradient sign method: one step of length eps along the sign of the loss's gradient."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor

from phosphene import ModelError, Reference, hookimpl, load_model, method
from phosphene.attacks import build_result, is_zero, project, steepest
from phosphene.optimize import TransformName
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, Monotone, param, size
from phosphene.testing import linear_model

from ._gradients import initial_gradient, loss_gradient, raw_gradient
from ._losses import cross_entropy
from ._oracle_models import (
    NORMS,
    UndefinedGradient,
    assert_zero_gradients,
    five_classes,
    mean_gradient,
    two_classes,
    unit_step,
)
from ._parameters import GRADIENT_RELATIONS, IN_BALL, Augmentations, EotSamples, Eps, Norm, Targeted


def moves_by_eps_in_the_steepest_direction() -> None:
    """clip(x + eps d): d = sign(g), g / ||g||_2, or the sign of the largest component; g = dL/dx."""
    for norm, targeted, eps in product(NORMS, (False, True), (0.1, 1.5)):
        case = two_classes(targeted=targeted)
        result = fgsm(case.model, case.images, case.labels, eps=eps, norm=norm, targeted=targeted)
        torch.testing.assert_close(result.adversarial, case.moved(eps, norm))
    # Of 200 pixels two share the step in l1; what the bound of one cuts off does not go to the other.
    weight = torch.stack([torch.zeros(200), torch.linspace(0.1, 0.5, 200)]).double().view(2, 1, 10, 20)
    for label, sign, bound in ((0, 1, 0.9), (1, -1, 0.1)):
        image, expected = torch.full((2, 1, 1, 10, 20), 0.5, dtype=torch.float64)
        image[..., -1, -2], expected[..., -1, -2], expected[..., -1, -1] = (
            bound,
            0.5 + sign / 2,
            0.5 + 0.3 * sign,
        )
        model = linear_model(weight, bias=[0.0, -float(weight[1].sum()) / 2 - sign])
        for targeted in (False, True):
            labels = torch.tensor([1 - label if targeted else label])
            result = fgsm(model, image, labels, eps=0.6, norm="l1", targeted=targeted)
            torch.testing.assert_close(result.adversarial, expected)
    case = five_classes()
    for seed in (0, 3):
        generator = Generator().manual_seed(seed)
        step = unit_step(mean_gradient(case, case.images, 2, ["rotate"], generator), "l2")
        result = fgsm(
            case.model, case.images, case.labels, eps=0.1, norm="l2", eot_samples=2,
            augmentations=("rotate",), seed=seed,
        )  # fmt: skip
        torch.testing.assert_close(result.adversarial, case.images + 0.1 * step)
    assert_zero_gradients(fgsm)
    gradients_take_the_passes_they_need()


def gradients_take_the_passes_they_need() -> None:
    """One pass for predictions and gradient, without random changes; else one, and those of the others."""
    case = two_classes()  # the last of three images is adversarial from the outset
    passes = []
    handle = case.model.module.register_forward_hook(lambda _, images, logits: passes.append(len(logits)))
    gradients: list[Tensor] = []
    cases: tuple[tuple[int, Sequence[TransformName], list[int]], ...] = (
        (1, (), [3]), (2, (), [3, 2, 2]), (1, ["rotate"], [3, 2]), (2, ["rotate"], [3, 2, 2]),
    )  # fmt: skip
    for eot_samples, augmentations, expected in cases:
        passes.clear()
        before, active, gradient = initial_gradient(
            case.model, case.images, case.labels, cross_entropy, targeted=False, eot_samples=eot_samples,
            augmentations=augmentations,
        )  # fmt: skip
        assert passes == expected and active.tolist() == [0, 1]
        torch.testing.assert_close(before, case.model(case.images))
        gradients += [] if augmentations else [gradient]
    torch.testing.assert_close(gradients[0], gradients[1])
    handle.remove()
    for values in loss_gradient(case.model, case.images, case.labels, cross_entropy, eot_samples=2):
        assert not values.requires_grad and not case.images.requires_grad
    options: Any = {"augmentations": ["rotate"]}
    drawn = loss_gradient(case.model, case.images, case.labels, cross_entropy, **options)[1]
    options["generator"] = Generator().manual_seed(0)
    again = loss_gradient(case.model, case.images, case.labels, cross_entropy, **options)[1]
    assert torch.equal(drawn, again), "the default seed is not 0"
    # The logits' gradient by the first pixel is NaN, which is no direction of a step.
    undefined = load_model(UndefinedGradient().double(), input_size=(3, 2, 3))
    _, gradient, logits = loss_gradient(undefined, case.images, case.labels, cross_entropy)
    raw, same_logits = raw_gradient(undefined, case.images, case.labels, cross_entropy)
    assert gradient[:, 0, 0, 0].tolist() == [0, 0, 0] and raw[:, 0, 0, 0].isnan().all()
    assert torch.equal(gradient.flatten(1)[:, 1:], raw.flatten(1)[:, 1:]) and bool(gradient.any())
    assert torch.equal(logits, same_logits) and not case.images.requires_grad and not raw.requires_grad
    rounded = load_model(UndefinedGradient(rounds=True).double(), input_size=(3, 2, 3))
    rounded.module.requires_grad_(True)
    refusal = ""
    try:
        loss_gradient(rounded, case.images, case.labels, cross_entropy)
    except ModelError as error:
        refusal = str(error)
    assert "gradient" in refusal


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
    invariants=IN_BALL,
    relations=[*GRADIENT_RELATIONS, Monotone("eps", values=(0.001, 0.003, 0.01), measure="loss")],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.eot_samples + 2), backward=size.images * param.eot_samples),
    tags=["white-box", "fixed-radius"],
    oracle=moves_by_eps_in_the_steepest_direction,
    quick={"eot_samples": 1},
)
def fgsm(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    norm: Norm = "linf",
    targeted: Targeted = False,
    eot_samples: EotSamples = 1,
    augmentations: Augmentations = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Fast gradient sign method (FGSM): adversarial examples by one gradient step of length eps.

    x' = clip(x + eps sign(dL/dx))

    with L the cross-entropy of ``labels``; in "l2" the step is eps dL/dx / ||dL/dx||_2, in "l1" the sign at
    the largest hundredth of the gradient. A targeted attack subtracts the step. The gradient is averaged
    over ``eot_samples`` passes of a stochastic model, or of images under random ``augmentations``.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W) inside the ball, rounding included, and
        ``success`` (N,).

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("fgsm", images="builtin:scenes/2", eps=8 / 255)
        result.success  # (2,)

    Source: Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    before, active, gradient = initial_gradient(
        model, images, labels, cross_entropy, targeted=targeted, eot_samples=eot_samples,
        augmentations=augmentations, generator=Generator().manual_seed(seed or 0),
    )  # fmt: skip
    x, sign = images[active], -1.0 if targeted else 1.0
    zero = is_zero(gradient)
    x_adv = project(x + sign * eps * steepest(gradient, norm), x, eps, norm)
    adversarial = images.index_copy(0, active, x_adv)
    return build_result(model, images, adversarial, labels, before, targeted=targeted, zero_gradient=zero)


@hookimpl
def phosphene_methods():
    return [fgsm]
