"""APGD, Auto-PGD: projected gradient steps with momentum whose size is halved where the loss stalls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Generator, Tensor

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
from phosphene.optimize import TransformName
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, InvariantTo, Monotone, ScalesWith, maximum, param, size

from ._apgd_l1 import apgd_l1
from ._gradients import loss_gradient
from ._losses import (
    Loss,
    cross_entropy,
    difference_of_logits_ratio,
    targeted_difference_of_logits_ratio,
)
from ._oracle_models import (
    NORMS,
    assert_predictions,
    assert_zero_gradients,
    five_classes,
    rectified,
    two_classes,
)
from ._parameters import (
    IN_BALL,
    Augmentations,
    EotSamples,
    Eps,
    Norm,
    Restarts,
    Steps,
    TargetClasses,
    Targeted,
)
from ._reference_attacks import best_of_plain_runs, gradients_and_signs_of_apgd_l1
from .deepfool import top_other_classes

#: The weight of the new step against the last one, and the fraction of steps that must increase the loss.
_ALPHA, _RHO = 0.75, 0.75


def equals_a_plain_loop_over_each_image() -> None:
    """The corner on two classes; else each image's result is that of algorithm 1 in a plain loop."""
    gradients_and_signs_of_apgd_l1()
    for targeted in (False, True):
        case = two_classes(targeted=targeted, margin=2.0)
        result = apgd(case.model, case.images[:1], case.labels[:1], eps=0.01, steps=5, targeted=targeted)
        torch.testing.assert_close(result.adversarial, case.moved(0.01, "linf")[:1])
    assert _checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99, 105]
    _losses_have_their_closed_forms()
    _stalled_images_restart_from_their_best_points()
    models = {"linear": five_classes(3), "rectified": rectified(3)}
    for name, loss_name, targeted, target_classes, norm, eps, steps, restarts, samples in _ORACLE_CASES:
        case = models[name]
        labels = (case.labels + 1) % 5 if targeted else case.labels
        loss_labels, generator = [labels], torch.Generator().manual_seed(restarts)
        if target_classes:
            others = case.model(case.images).scatter(1, labels[:, None], -torch.inf)
            loss_labels = list(others.argsort(descending=True)[:, :target_classes].T)
        runs = [(random_point(case.images, eps, norm, generator), y) for y in loss_labels * restarts]
        loss = _OBJECTIVES[loss_name, targeted or target_classes > 0]
        expected = best_of_plain_runs(case, labels, runs, loss, targeted, eps, steps, norm, samples == 1)
        result = apgd(
            case.model, case.images, labels, eps=eps, steps=steps, norm=norm, loss=loss_name,
            restarts=restarts, targeted=targeted, target_classes=target_classes, seed=restarts,
            eot_samples=samples,
        )  # fmt: skip
        torch.testing.assert_close(result.adversarial, expected)
        assert_predictions(result, case, labels, targeted=targeted)
    for norm in NORMS:
        assert_zero_gradients(apgd, norm=norm, steps=2)


def _losses_have_their_closed_forms() -> None:
    """DLR -2/4, towards the second class -2/4.5, for logits 5, 3, 1, 0; with fewer the last one counts."""
    y, second = torch.tensor([0]), torch.tensor([1])
    for logits, ratio, targeted_ratio in (
        ([5.0, 3, 1, 0], -2 / 4, -2 / 4.5),
        ([5.0, 3, 1], -2 / 4, -2 / 4),
        ([5.0, 3], -2, -2),
        ([2e-12, 0, 0], -2 / 3, -2 / 3),
    ):
        z = torch.tensor([logits], dtype=torch.float64)
        assert math.isclose(float(difference_of_logits_ratio(z, y)), ratio)
        assert math.isclose(float(targeted_difference_of_logits_ratio(z, second)), targeted_ratio)
    assert float(difference_of_logits_ratio(torch.tensor([[3.0]]), y)) == -3
    torch.testing.assert_close(cross_entropy(torch.tensor([[1.0, 1]]), y), torch.tensor([math.log(2)]))


def _stalled_images_restart_from_their_best_points() -> None:
    """Stalled: less than 3 of 4 losses increased, or neither the step size nor the best loss has changed."""
    x, y = torch.arange(4.0).view(4, 1, 1, 1), torch.arange(4)
    at = _State.at_start(x, x, y, y, eta=8.0)
    at.gradient, at.best, at.best_gradient = x + 10, x + 20, x + 30
    at.value, at.best_loss, at.increases = torch.zeros(4), torch.ones(4), torch.tensor([2.0, 3, 3, 3])
    at.best_loss_before, at.eta_before = torch.tensor([0.0, 0, 1, 1]), torch.tensor([8.0, 8, 8, 16])
    at.eta_before = at.eta_before.view(4, 1, 1, 1)
    at.adapt(4)
    assert at.eta.flatten().tolist() == [4, 8, 4, 8] and at.eta_before.flatten().tolist() == [8, 8, 8, 8]
    assert at.x.flatten().tolist() == [20, 1, 22, 3] and at.gradient.flatten().tolist() == [30, 11, 32, 13]
    assert at.value.tolist() == [1, 0, 1, 0] and at.best_loss_before.tolist() == [1, 1, 1, 1]
    assert at.increases.tolist() == [0, 0, 0, 0]


LossName: TypeAlias = Literal["cross-entropy", "dlr"]
#: Model, loss, targeted, target_classes, norm, eps, steps, restarts and eot_samples of the comparisons.
_ORACLE_CASES: list[tuple[str, LossName, bool, int, Norm, float, int, int, int]] = [
    ("linear", "cross-entropy", False, 0, "linf", 0.005, 12, 2, 1),
    ("linear", "cross-entropy", False, 0, "linf", 0.5, 2, 2, 1),
    ("linear", "dlr", False, 2, "l2", 0.04, 14, 1, 1),
    ("linear", "cross-entropy", True, 0, "l1", 0.2, 34, 1, 1),
    ("rectified", "dlr", True, 0, "l2", 0.6, 40, 1, 1),
    ("rectified", "cross-entropy", False, 0, "linf", 0.1, 40, 1, 1),
    ("rectified", "dlr", False, 0, "l1", 0.6, 64, 1, 1),
    ("linear", "dlr", False, 1, "l2", 0.04, 6, 1, 2),
    ("linear", "cross-entropy", False, 0, "l1", 0.2, 20, 1, 2),
]
#: The maximized loss by its name and by whether the labels are target classes.
_OBJECTIVES: dict[tuple[LossName, bool], Loss] = {
    ("cross-entropy", False): cross_entropy,
    ("cross-entropy", True): lambda logits, labels: -cross_entropy(logits, labels),
    ("dlr", False): difference_of_logits_ratio,
    ("dlr", True): targeted_difference_of_logits_ratio,
}


@method(
    family="attacks",
    title="APGD",
    references=[
        Reference(
            key="croce2020",
            title="Reliable evaluation of adversarial robustness with an ensemble of diverse "
            "parameter-free attacks",
            authors="Croce, Hein",
            year=2020,
            url="https://arxiv.org/abs/2003.01690",
        ),
        Reference(
            key="croce2021",
            title="Mind the box: l1-APGD for sparse adversarial attacks on image classifiers",
            authors="Croce, Hein",
            year=2021,
            url="https://arxiv.org/abs/2103.01208",
        ),
    ],
    invariants=IN_BALL,
    relations=[
        InvariantTo("normalization", fields=("adversarial",)),
        InvariantTo("batch_order", fields=("adversarial",)),
        ScalesWith("logits", power=0, where={"loss": "dlr"}, fields=("adversarial",)),
        Monotone("eps", values=(0.001, 0.003, 0.01), measure="loss"),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (param.restarts * maximum(1, param.target_classes) * (param.steps + 1) * param.eot_samples + 2),
        backward=size.images
        * param.restarts
        * maximum(1, param.target_classes)
        * (param.steps + 1)
        * param.eot_samples,
    ),
    tags=["white-box", "fixed-radius"],
    oracle=equals_a_plain_loop_over_each_image,
    quick={"steps": 4, "restarts": 1, "eot_samples": 1, "target_classes": 0},
)
def apgd(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    steps: Steps = 100,
    norm: Norm = "linf",
    loss: Annotated[
        LossName,
        Field(description="maximized loss; dlr is invariant to the logits' scale"),
    ] = "cross-entropy",
    restarts: Restarts = 1,
    targeted: Targeted = False,
    target_classes: TargetClasses = 0,
    eot_samples: EotSamples = 1,
    augmentations: Augmentations = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Auto-PGD (APGD): parameter-free adversarial examples inside an l_p ball, with an adaptive step size.

    z = P(x + eta d),  x <- P(x + 0.75 (z - x) + 0.25 (x - x_before))

    with d the steepest direction of the gradient (its sign, or in "l2" its unit vector) and eta = 2 eps at
    first. At checkpoints after p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06) of all
    ``steps``, eta is halved and the image restarts from its best point if fewer than 3/4 of the steps since
    the last checkpoint increased its loss, or if neither eta nor its best loss has changed since then. "dlr"
    is the difference of logits ratio (max_{k != y} z_k - z_y) / (z_1st - z_3rd), for a target class t
    (z_t - max_{k != t} z_k) / (z_1st - (z_3rd + z_4th) / 2); with fewer classes the last logit
    replaces missing ones, and with two the ratio is the difference. In "l1" steps are sparse, and the first
    ones are in balls of 3 ``eps`` and 2 ``eps`` (Croce & Hein 2021). With ``target_classes`` (APGD-T)
    it runs once towards each of that many other classes, most likely first, and any class but ``labels`` is
    a success. The gradient is averaged over ``eot_samples`` passes of a stochastic model, or of images under
    random ``augmentations``. All images start with the same random offset.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W) inside the ball, rounding included: the first
        adversarial point of each image, else its point of highest loss. ``success`` (N,).

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("apgd", images="builtin:scenes/2", steps=10, seed=0)
        result.success  # (2,)

    Source: Croce & Hein 2020, algorithm 1 and section 4; in l1 Croce & Hein 2021, algorithm 1.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    before = predict_logits(model, images)
    adversarial = images.clone()
    best_loss = torch.full_like(before[:, 0], -torch.inf)
    active = not_adversarial(before, labels, targeted)
    all_loss_labels = [labels]
    if target_classes and not targeted:
        all_loss_labels = list(top_other_classes(before, labels, target_classes + 1).T)
    objective = _OBJECTIVES[loss, targeted or target_classes > 0]
    zero = torch.zeros_like(active, dtype=torch.bool)
    run = apgd_l1 if norm == "l1" else partial(_apgd, norm=norm)
    for number, loss_labels in enumerate(all_loss_labels * restarts):
        start = random_point(images, eps, norm, generator)[active]
        if not len(active):
            break
        points, losses, success, first_zero = run(
            model, start, images[active], labels[active], loss_labels[active], objective, eps=eps,
            steps=steps, targeted=targeted, eot_samples=eot_samples, augmentations=augmentations,
            generator=generator,
        )  # fmt: skip
        zero = zero if number else first_zero
        better = success | (losses > best_loss[active])
        adversarial[active[better]], best_loss[active[better]] = points[better], losses[better]
        active = active[~success]
    return build_result(model, images, adversarial, labels, before, targeted=targeted, zero_gradient=zero)


def _apgd(
    model: Model,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    loss_labels: Tensor,
    loss: Loss,
    *,
    eps: float,
    steps: int,
    norm: Norm,
    targeted: bool,
    eot_samples: int,
    augmentations: Sequence[TransformName],
    generator: Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One run: each image's first adversarial point or its best one, the loss there, and success (N,).

    And whether the first gradient was zero, (N,).
    """
    points, losses = torch.empty_like(start), start.new_empty(len(start))
    success = zero = torch.zeros_like(labels, dtype=torch.bool)
    success = success.clone()
    # A success by chance does not count, so a stochastic gradient never ends a run.
    stops = eot_samples == 1 and not augmentations
    checkpoints = _checkpoints(steps)
    at = _State.at_start(start, images, labels, loss_labels, eta=2 * eps)
    # equivalent mutants: the loop ends at its last step
    for step in progress_bar(range(steps + 1), "APGD"):
        value, at.gradient, logits = loss_gradient(
            model, at.x, at.loss_labels, loss, eot_samples=eot_samples, augmentations=augmentations,
            generator=generator,
        )  # fmt: skip
        if step == 0:
            zero = is_zero(at.gradient)
        at.keep_best(value)
        if stops:
            won = is_adversarial(logits, at.labels, targeted)
            points[at.indices[won]], losses[at.indices[won]] = at.x[won], value[won]
            success[at.indices[won]] = True
            if won.any():
                at = at.select(~won)
        # equivalent mutants: steps of an empty batch and after the last loss change nothing
        if step == steps or not len(at.indices):
            break
        if step in checkpoints:
            # equivalent mutants: at the first checkpoint nothing can have stalled
            at.adapt(step - checkpoints[checkpoints.index(step) - 1] if step else 0)
        alpha = _ALPHA if step else 1.0
        z = project(at.x + at.eta * steepest(at.gradient, norm), at.images, eps, norm)
        further = at.x + alpha * (z - at.x) + (1 - alpha) * (at.x - at.x_before)
        at.x_before, at.x = at.x, project(further, at.images, eps, norm)
    points[at.indices], losses[at.indices] = at.best, at.best_loss
    return points, losses, success, zero


@dataclass
class _State:
    """The images that are still attacked: every field has a row for each."""

    #: Positions in the batch.
    indices: Tensor
    images: Tensor
    labels: Tensor
    #: The classes in the loss: ``labels``, or target classes.
    loss_labels: Tensor
    x: Tensor
    x_before: Tensor
    value: Tensor
    gradient: Tensor
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    #: Step size (n, 1, 1, 1), and how many steps since the last checkpoint increased the loss.
    eta: Tensor
    increases: Tensor
    #: Step size and best loss at the last checkpoint.
    eta_before: Tensor
    best_loss_before: Tensor

    @classmethod
    def at_start(
        cls, start: Tensor, images: Tensor, labels: Tensor, loss_labels: Tensor, *, eta: float
    ) -> "_State":
        """The state before the first gradient."""
        zero = start.new_zeros(len(start))
        lowest, eta_each = zero - torch.inf, start.new_full((len(start), 1, 1, 1), eta)
        return cls(
            indices=torch.arange(len(start), device=start.device), images=images, labels=labels,
            loss_labels=loss_labels, x=start, x_before=start, value=lowest, gradient=torch.zeros_like(start),
            best=start, best_loss=lowest, best_gradient=torch.zeros_like(start), eta=eta_each,
            increases=zero, eta_before=eta_each, best_loss_before=lowest,
        )  # fmt: skip

    def keep_best(self, value: Tensor) -> None:
        """Count the steps that increased the loss, and store the points of the highest loss so far."""
        self.increases = self.increases + (value > self.value)
        higher = value > self.best_loss
        self.value, self.best_loss = value, torch.where(higher, value, self.best_loss)
        self.best = torch.where(per_image(higher), self.x, self.best)
        self.best_gradient = torch.where(per_image(higher), self.gradient, self.best_gradient)

    def adapt(self, steps_since: int) -> None:
        """A checkpoint: halve the step size of images that stall, and restart them from their best points."""
        unchanged = (self.eta_before == self.eta)[:, 0, 0, 0] & (self.best_loss_before == self.best_loss)
        stalled = (self.increases < _RHO * steps_since) | unchanged
        self.eta_before, self.best_loss_before = self.eta, self.best_loss
        self.increases = torch.zeros_like(self.increases)
        self.eta = torch.where(per_image(stalled), self.eta / 2, self.eta)
        self.x = torch.where(per_image(stalled), self.best, self.x)
        self.value = torch.where(stalled, self.best_loss, self.value)
        self.gradient = torch.where(per_image(stalled), self.best_gradient, self.gradient)

    def select(self, selected: Tensor) -> "_State":
        """The state of these images alone."""
        return _State(*(getattr(self, f.name)[selected] for f in fields(self)))


def _checkpoints(steps: int) -> list[int]:
    """The steps at which the step size is adapted, 0 first."""
    fractions = [0.0, 0.22]
    # equivalent mutants: no fraction is exactly 1
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    # Less 1e-9: rounding in a sum of hundredths would otherwise move a checkpoint by one step.
    return sorted({math.ceil(fraction * steps - 1e-9) for fraction in fractions})


@hookimpl
def phosphene_methods():
    return [apgd]
