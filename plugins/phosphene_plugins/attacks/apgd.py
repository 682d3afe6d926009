"""Auto-PGD: projected ascent whose step size needs no tuning, for it shrinks where the loss stalls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.optimize import TransformName
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, SameShape, WithinBall, maximum, param, size

from ._apgd_l1 import sparse_ascent
from ._gradients import (
    Eot,
    Loss,
    TargetClasses,
    Under,
    climb,
    cross_entropy,
    difference_of_logits_ratio,
    judged,
    reached,
    targeted_difference_of_logits_ratio,
    unreached,
)
from ._lp_balls import Norm, project, random_point, steepest
from .deepfool import likeliest

#: The share of the last step that is taken over, and of steps that must have raised the loss.
_ALPHA, _RHO = 0.75, 0.75


def climbs_as_far_as_a_linear_model_allows() -> None:
    """On two classes it reaches clip(x + eps sign(w_other - w_true)), wherever it began, in one step."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    images = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]], [[[0.0, 1.0], [0.5, 0.75]]]], dtype=torch.float64)
    true = model(images).argmax(1)
    away = (linear.weight[1 - true] - linear.weight[true]).detach().view_as(images)
    for targeted, labels in ((False, true), (True, 1 - true)):
        found = apgd(model, images, labels, eps=0.01, steps=5, seed=0, targeted=targeted)
        assert not found.success.any()  # so that no success ends it
        torch.testing.assert_close(found.adversarial, (images + 0.01 * away.sign()).clamp(0, 1))


#: What is climbed, by its name and by whether the labels are wanted.
_OBJECTIVES: dict[tuple[str, bool], Loss] = {
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
    invariants=[
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial"),
        SameShape(field="adversarial"),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (param.restarts * maximum(1, param.target_classes) * (param.steps + 1) * param.eot + 2),
        backward=size.images
        * param.restarts
        * maximum(1, param.target_classes)
        * (param.steps + 1)
        * param.eot,
    ),
    tags=["white-box", "fixed-radius"],
    oracle=climbs_as_far_as_a_linear_model_allows,
    quick={"steps": 4, "restarts": 1, "eot": 1, "target_classes": 0},
)
def apgd(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    steps: Annotated[int, Field(ge=1, le=10_000, description="how many ascent steps")] = 100,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    loss: Annotated[
        Literal["cross-entropy", "dlr"],
        Field(description="what is climbed; dlr is blind to the logits' scale"),
    ] = "cross-entropy",
    restarts: Annotated[
        int, Field(ge=1, le=1000, description="how many climbs, each from another point")
    ] = 1,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    target_classes: TargetClasses = 0,
    eot: Eot = 1,
    under: Under = (),
    seed: Seed = None,
) -> AdversarialExamples:
    """Climb the loss with momentum and a step that halves itself where the climb stalls: nothing to tune.

    z = P(x + eta d),  x <- P(x + 0.75 (z - x) + 0.25 (x - x_before))

    with d the steepest direction of the gradient (its sign, or in "l2" its unit vector) and eta = 2 eps at
    first. At checkpoints after p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06) of all
    ``steps``, eta is halved and the image begins again at its best point if fewer than 3/4 of the steps since
    the last checkpoint raised its loss, or if neither eta nor its best loss has changed since then. "dlr" is
    the difference of logits ratio (max_{k != y} z_k - z_y) / (z_1st - z_3rd), and towards a wanted class t
    (z_t - max_{k != t} z_k) / (z_1st - (z_3rd + z_4th) / 2); of fewer classes the last stands for those there
    are not, and of two alone the ratio is the difference. In "l1" few numbers move at a time, and first in
    balls of 3 and 2 ``eps``, as ``sparse_ascent`` describes. With ``target_classes`` (APGD-T) it climbs
    towards each of so many other classes in turn, those first that the model finds likeliest in the image,
    and any class but ``labels`` is a success. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    Each image stops where it succeeds, and otherwise brings its point of highest loss; what is taken for
    another class from the outset (targeted: for the one wanted) comes back as it is. All images start with
    the same random offset. ``eot`` and ``under`` make the gradient a mean over a random model's answers and
    over random changes of the picture.

    Source: Croce & Hein 2020, algorithm 1 and section 4; in l1 Croce & Hein 2021, algorithm 1.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        before = model(images)
    adversarial = images.clone()
    best = torch.full_like(before[:, 0], -torch.inf)
    rows = unreached(before, labels, targeted)
    aims = [labels]
    if target_classes and not targeted:
        aims = list(likeliest(before, labels, target_classes + 1).T)
    objective = _OBJECTIVES[loss, targeted or target_classes > 0]
    for aim in aims * restarts:
        start = random_point(images, eps, norm, generator)[rows]
        if not len(rows):
            break
        climbed = sparse_ascent if norm == "l1" else partial(_ascended, norm=norm)
        points, heights, done = climbed(
            model, start, images[rows], labels[rows], aim[rows], objective, eps=eps, steps=steps,
            targeted=targeted, eot=eot, under=under, generator=generator,
        )  # fmt: skip
        higher = done | (heights > best[rows])
        adversarial[rows[higher]], best[rows[higher]] = points[higher], heights[higher]
        rows = rows[~done]
    return judged(model, images, adversarial, labels, before, targeted=targeted)


@dataclass
class _Climb:
    """Where the images that are still climbing are: every field has a row for each."""

    rows: Tensor
    images: Tensor
    labels: Tensor
    #: The classes that the loss is of.
    aims: Tensor
    x: Tensor
    x_before: Tensor
    value: Tensor
    gradient: Tensor
    best: Tensor
    best_value: Tensor
    best_gradient: Tensor
    #: Step size, how many steps raised the loss, and what was so at the last checkpoint.
    eta: Tensor
    rises: Tensor
    eta_then: Tensor
    best_then: Tensor

    def only(self, chosen: Tensor) -> "_Climb":
        """The climb of these images alone."""
        return _Climb(*(getattr(self, f.name)[chosen] for f in fields(self)))


def _ascended(
    model: Model,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    aims: Tensor,
    objective: Loss,
    *,
    eps: float,
    steps: int,
    norm: Norm,
    targeted: bool,
    eot: int,
    under: Sequence[TransformName],
    generator: Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """One climb: each image's best or first successful point, its loss, and whether it succeeded."""
    points, heights = start.clone(), start.new_full((len(start),), -torch.inf)
    done = torch.zeros_like(labels, dtype=torch.bool)
    marks = _checkpoints(steps)
    at: _Climb | None = None
    for step in progress_bar(range(steps + 1), "climbing the loss"):
        x, aim = (start, aims) if at is None else (at.x, at.aims)
        value, gradient, logits = climb(model, x, aim, objective, eot=eot, under=under, generator=generator)
        if at is None:
            eta, none = start.new_full((len(start), 1, 1, 1), 2 * eps), torch.full_like(value, -torch.inf)
            rows = torch.arange(len(x), device=x.device)
            at = _Climb(
                rows, images, labels, aims, x, x, value, gradient, x, value, gradient, eta, 0 * value, eta,
                none,
            )  # fmt: skip
        else:
            at.rises = at.rises + (value > at.value)
            at.value, at.gradient = value, gradient
            higher = value > at.best_value
            at.best_value = torch.where(higher, value, at.best_value)
            at.best = torch.where(_pictures(higher), x, at.best)
            at.best_gradient = torch.where(_pictures(higher), gradient, at.best_gradient)
        if eot == 1 and not under:  # a success by chance is none
            won = reached(logits, at.labels, targeted)
            points[at.rows[won]], heights[at.rows[won]], done[at.rows[won]] = x[won], value[won], True
            if won.any():
                at = at.only(~won)
        if step == steps or not len(at.rows):
            break
        if step in marks:
            _at_checkpoint(at, step - marks[marks.index(step) - 1] if step else 0)
        share = _ALPHA if step else 1.0
        z = project(at.x + at.eta * steepest(at.gradient, norm), at.images, eps, norm)
        further = at.x + share * (z - at.x) + (1 - share) * (at.x - at.x_before)
        at.x_before, at.x = at.x, project(further, at.images, eps, norm)
    assert at is not None
    points[at.rows], heights[at.rows] = at.best, at.best_value
    return points, heights, done


def _checkpoints(steps: int) -> list[int]:
    """The steps at which the step size is looked at, 0 first."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Not one more for the last place of a sum of hundredths.
    return sorted({math.ceil(share * steps - 1e-9) for share in shares})


def _at_checkpoint(at: _Climb, since: int) -> None:
    """Halve the step of the images whose climb stalls, and send them back to their best points."""
    stalled = at.rises < _RHO * since
    stalled = stalled | ((at.eta_then[:, 0, 0, 0] == at.eta[:, 0, 0, 0]) & (at.best_then == at.best_value))
    at.eta_then, at.best_then = at.eta, at.best_value
    if since:
        back = _pictures(stalled)
        at.eta = torch.where(back, at.eta / 2, at.eta)
        at.x, at.value = torch.where(back, at.best, at.x), torch.where(stalled, at.best_value, at.value)
        at.gradient = torch.where(back, at.best_gradient, at.gradient)
    at.rises = torch.zeros_like(at.rises)


def _pictures(flags: Tensor) -> Tensor:
    """Flags (N,) as they go with pictures."""
    return flags[:, None, None, None]


@hookimpl
def phosphene_methods():
    return [apgd]
