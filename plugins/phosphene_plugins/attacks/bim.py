"""BIM, the basic iterative method (I-FGSM, with momentum MI-FGSM): gradient steps from the image itself."""

from contextlib import suppress
from itertools import product

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from phosphene import ModelError, Reference, hookimpl, load_model, method, progress_bar
from phosphene.attacks import build_result, is_zero, project, steepest
from phosphene.optimize import compose
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Agrees, Cost, Monotone, param, size

from ._gradients import initial_gradient, loss_gradient, raw_gradient
from ._losses import cross_entropy, margin
from ._oracle_models import (
    NORMS,
    assert_zero_gradients,
    constant_model,
    five_classes,
    mean_gradient,
    two_classes,
    unit_step,
)
from ._parameters import (
    GRADIENT_RELATIONS,
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


def moves_by_steps_times_step_size_in_the_steepest_direction() -> None:
    """clip(x + min(eps, steps step_size) d) on two classes; on curved losses the loop of MI-FGSM."""
    for norm, targeted, steps in product(NORMS, (False, True), (1, 2)):
        case = two_classes(targeted=targeted)
        result = bim(
            case.model, case.images, case.labels, eps=0.1, step_size=0.03, steps=steps, norm=norm,
            targeted=targeted,
        )  # fmt: skip
        torch.testing.assert_close(result.adversarial, case.moved(0.03 * steps, norm))
    case = two_classes()
    corner = bim(case.model, case.images, case.labels, eps=0.1, step_size=0.03, steps=9)
    torch.testing.assert_close(corner.adversarial, case.moved(0.1, "linf"))
    case = five_classes(2)
    for seed in (0, 3):
        x, g, generator = case.images, torch.zeros_like(case.images), Generator().manual_seed(seed)
        for _ in range(3):
            gradient = mean_gradient(case, x, 2, ["rotate"], generator)
            g = 0.5 * g + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
            x = x + 0.03 * unit_step(g, "l2")
        result = bim(
            case.model, case.images, case.labels, eps=0.1, step_size=0.03, steps=3, norm="l2", momentum=0.5,
            eot_samples=2, augmentations=("rotate",), seed=seed,
        )  # fmt: skip
        torch.testing.assert_close(result.adversarial, x)
    _gradients_are_means_of_passes()
    # A gradient of zero moves nothing, though it cannot be divided by its mean.
    images = two_classes().images
    result = bim(constant_model(), images, torch.zeros(3, dtype=torch.long), norm="l2", momentum=1.0)
    torch.testing.assert_close(result.adversarial, images)
    assert_zero_gradients(bim, steps=2)


def _gradients_are_means_of_passes() -> None:
    """Loss, gradient and logits of two random views are means; NaN becomes 0; no gradient is an error."""
    case = five_classes(2)
    leaf, generator = case.images.detach().requires_grad_(), Generator().manual_seed(0)
    views = [case.model(compose(["rotate"])(leaf, generator)) for _ in range(2)]
    loss = sum(F.cross_entropy(z, case.labels, reduction="none") / 2 for z in views)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    expected = loss.detach(), gradient, ((views[0] + views[1]) / 2).detach()
    case_arguments = case.model, case.images, case.labels
    actual = loss_gradient(*case_arguments, cross_entropy, eot_samples=2, augmentations=["rotate"])
    torch.testing.assert_close(actual, expected)
    nan, logits = raw_gradient(*case_arguments, lambda z, y: (0 * z[:, 0]).sqrt())
    torch.testing.assert_close(logits, case.model(case.images).detach())
    zero = loss_gradient(*case_arguments, lambda z, y: (0 * z[:, 0]).sqrt())[1]
    assert nan.isnan().all() and not zero.any()
    # Only images that are not adversarial yet have a first gradient.
    case = two_classes()
    for samples in (1, 2):
        before, active, gradient = initial_gradient(
            case.model, case.images, case.labels, margin, targeted=False, eot_samples=samples
        )
        torch.testing.assert_close(before, case.model(case.images).detach())
        assert active.tolist() == [0, 1]
        torch.testing.assert_close(gradient, case.ascent[:2])
        rest = initial_gradient(
            case.model, case.images[2:], case.labels[2:], margin, targeted=False, eot_samples=samples
        )
        assert rest[1].tolist() == [] and rest[2].shape == (0, 3, 2, 3)
    detached = load_model(lambda x: case.model(x).detach(), input_size=(3, 2, 3), classes=["a", "b"])
    for model, objective in (
        (detached, cross_entropy),
        (case.model, lambda z, y: torch.ones(len(z), requires_grad=True)),
    ):
        with suppress(ModelError):
            loss_gradient(model, case.images, case.labels, objective)
            raise AssertionError("a model without gradients is refused")


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
    relations=[
        *GRADIENT_RELATIONS,
        Monotone("eps", values=(0.001, 0.003, 0.01), measure="loss"),
        Agrees(
            "attacks.fgsm",
            where={"eps": 0.01, "step_size": 0.01, "steps": 1},
            other={"eps": 0.01},
            fields=("adversarial",),
        ),
    ],  # fmt: skip
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (param.steps * param.eot_samples + 2),
        backward=size.images * param.steps * param.eot_samples,
    ),
    tags=["white-box", "fixed-radius"],
    oracle=moves_by_steps_times_step_size_in_the_steepest_direction,
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
    zero = is_zero(gradient)
    x, y = images[active], labels[active]
    sign = -1.0 if targeted else 1.0
    x_adv, accumulated = x, torch.zeros_like(x)
    # equivalent mutants: steps of an empty batch change nothing
    for step in progress_bar(range(steps if len(x) else 0), "BIM"):
        if step > 0:
            _, gradient, _ = loss_gradient(
                model, x_adv, y, cross_entropy, eot_samples=eot_samples, augmentations=augmentations,
                generator=generator,
            )  # fmt: skip
        if momentum:
            # equivalent mutants: a factor of all gradients does not change the direction of their sum
            scale = gradient.abs().mean((1, 2, 3), keepdim=True)
            scale = scale.clamp(min=torch.finfo(gradient.dtype).tiny)
            gradient = accumulated = momentum * accumulated + gradient / scale
        x_adv = project(x_adv + sign * step_size * steepest(gradient, norm), x, eps, norm)
    adversarial = images.index_copy(0, active, x_adv)
    return build_result(model, images, adversarial, labels, before, targeted=targeted, zero_gradient=zero)


@hookimpl
def phosphene_methods():
    return [bim]
