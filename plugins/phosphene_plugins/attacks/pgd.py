"""PGD, projected gradient descent: gradient steps from a random point, projected onto an l_p ball."""

from dataclasses import replace
from itertools import product
from typing import Annotated

import torch
from pydantic import Field

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import (
    build_result,
    is_adversarial,
    is_zero,
    not_adversarial,
    per_image,
    predict_logits,
    project,
    random_point,
    steepest,
)
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Agrees, Cost, Monotone, minimum, param, size

from ._gradients import loss_gradient
from ._losses import cross_entropy
from ._oracle_models import NORMS, assert_zero_gradients, five_classes, mean_gradient, two_classes, unit_step
from ._parameters import (
    GRADIENT_RELATIONS,
    IN_BALL,
    Augmentations,
    EotSamples,
    Eps,
    Norm,
    Restarts,
    Steps,
    StepSize,
    Targeted,
)


def moves_in_the_steepest_direction_and_selects_the_first_success() -> None:
    """clip(x + steps step_size d) on two classes; on curved losses the best of several random starts."""
    for norm, targeted in product(NORMS, (False, True)):
        case = two_classes(targeted=targeted)
        result = pgd(
            case.model, case.images, case.labels, eps=0.1, step_size=0.03, steps=3, norm=norm,
            random_start=False, targeted=targeted,
        )  # fmt: skip
        torch.testing.assert_close(result.adversarial, case.moved(0.09, norm))
    corner = pgd(case.model, case.images, case.labels, eps=0.1, step_size=0.06, targeted=True, seed=0)
    torch.testing.assert_close(corner.adversarial, case.moved(0.1, "linf"))
    for targeted, (restarts, seed) in product((False, True), ((1, 0), (3, 3))):
        case = five_classes(6)
        labels = (case.labels + 1) % 5 if targeted else case.labels
        sign, generator = -1 if targeted else 1, torch.Generator().manual_seed(seed)
        points, losses = [], []
        for _ in range(restarts):
            x = random_point(case.images, 0.1, "l2", generator)
            for _ in range(2):
                gradient = mean_gradient(replace(case, labels=labels), x, 2, ["rotate"], generator)
                x = project(x + sign * 0.02 * unit_step(gradient, "l2"), case.images, 0.1, "l2")
            logits = case.model(x).detach()
            success = logits.argmax(1).eq(labels) == targeted
            points.append(x)
            losses.append((sign * cross_entropy(logits, labels)).masked_fill(success, torch.inf))
        run = torch.stack(losses).argmax(0)  # of equal ones the first
        best = torch.stack(points)[run, torch.arange(6)]
        result = pgd(
            case.model, case.images, labels, eps=0.1, step_size=0.02, steps=2, norm="l2", restarts=restarts,
            targeted=targeted, eot_samples=2, augmentations=("rotate",), seed=seed,
        )  # fmt: skip
        torch.testing.assert_close(result.adversarial, best)
    assert_zero_gradients(pgd, steps=1)


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
    invariants=IN_BALL,
    relations=[
        *(relation.model_copy(update={"where": {"random_start": False}}) for relation in GRADIENT_RELATIONS),
        Monotone("eps", values=(0.001, 0.003, 0.01), measure="loss", where={"random_start": False}),
        Agrees("attacks.bim", where={"random_start": False}, other={"steps": 3}, fields=("adversarial",)),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (param.restarts * (param.steps * param.eot_samples + minimum(1, param.restarts - 1)) + 2),
        backward=size.images * param.restarts * param.steps * param.eot_samples,
    ),
    tags=["white-box", "fixed-radius"],
    oracle=moves_in_the_steepest_direction_and_selects_the_first_success,
    quick={"steps": 3, "restarts": 1, "eot_samples": 1},
)
def pgd(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    step_size: StepSize = 2 / 255,
    steps: Steps = 10,
    norm: Norm = "linf",
    random_start: Annotated[bool, Field(description="whether to start at a random point of the ball")] = True,
    restarts: Restarts = 1,
    targeted: Targeted = False,
    eot_samples: EotSamples = 1,
    augmentations: Augmentations = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Projected gradient descent (PGD): adversarial examples inside an l_p ball.

    x <- clip(P(x + step_size * d)),  d = sign(dL/dx) for "linf", dL/dx / ||dL/dx||_2 for "l2"

    with L the cross-entropy of ``labels`` and P the projection onto the ball; for "l1" d is the sign at
    the largest hundredth of the gradient, of unit l1 norm. A targeted attack subtracts the step. The
    gradient is averaged over ``eot_samples`` passes of a stochastic model, or of images under random
    ``augmentations``. All images start with the same random offset.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W), the last point, inside the ball, rounding
        included; of several ``restarts`` the first successful one, else the one of the highest loss (without
        ``random_start`` all are the same). ``success`` (N,).

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("pgd", images="builtin:scenes/2", eps=8 / 255, steps=5, seed=0)
        result.success  # (2,)

    Source: Madry et al. 2018, section 2.1.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    before = predict_logits(model, images)
    active = not_adversarial(before, labels, targeted)
    x, y = images[active], labels[active]
    sign = -1.0 if targeted else 1.0
    zero = torch.zeros_like(y, dtype=torch.bool)
    best, best_loss = x, x.new_full((len(x),), -torch.inf)
    # equivalent mutants: runs of an empty batch change nothing
    for restart in range(restarts if len(x) else 0):
        x_adv = random_point(x, eps, norm, generator) if random_start else x
        for step in progress_bar(range(steps), "PGD"):
            _, gradient, _ = loss_gradient(
                model, x_adv, y, cross_entropy, eot_samples=eot_samples, augmentations=augmentations,
                generator=generator,
            )  # fmt: skip
            if restart == step == 0:
                zero = is_zero(gradient)
            x_adv = project(x_adv + sign * step_size * steepest(gradient, norm), x, eps, norm)
        # equivalent mutants: of a single run any loss is the highest
        if restarts == 1:
            best = x_adv
            break
        logits = predict_logits(model, x_adv)
        loss = torch.where(is_adversarial(logits, y, targeted), torch.inf, sign * cross_entropy(logits, y))
        best = torch.where(per_image(loss > best_loss), x_adv, best)
        best_loss = torch.maximum(best_loss, loss)
    adversarial = images.index_copy(0, active, best)
    return build_result(model, images, adversarial, labels, before, targeted=targeted, zero_gradient=zero)


@hookimpl
def phosphene_methods():
    return [pgd]
