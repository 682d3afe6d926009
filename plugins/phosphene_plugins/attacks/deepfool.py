"""DeepFool: minimum-norm adversarial examples by steps to the nearest boundary of the linearized model."""

from itertools import product
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import dual_norm, is_zero, normalize_l2, not_adversarial, per_image
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model
from phosphene.spec import Cost, Monotone, param, size
from phosphene.testing import linear_model

from ._gradients import differentiable_logits
from ._oracle_models import assert_predictions, assert_zero_gradients, five_classes, rectified, unit_step
from ._parameters import GRADIENT_RELATIONS, IN_RANGE, Candidates, MinimizedNorm, Norm, Steps
from ._reference_attacks import deepfool_of_one_image

#: The shortest step, for pixels in [0, 1]: on the boundary itself the linearized model asks for a zero step.
_MIN_STEP = 1e-6


def crosses_the_nearest_boundary_of_a_linear_model() -> None:
    """x + 1.02 min_k (z_y - z_k) / ||w_k - w_y||_q in the steepest direction; else step by step."""
    norms: tuple[MinimizedNorm, ...] = ("l2", "linf")
    case = five_classes(6)
    weight, logits, y = case.pixel_weight(), case.model(case.images).detach(), case.labels
    normal = weight - weight[y][:, None]
    gap = logits.gather(1, y[:, None]) - logits
    for norm, dual in zip(norms, (2.0, 1.0), strict=True):
        distances = (gap / normal.flatten(2).norm(dual, dim=2)).scatter(1, y[:, None], torch.inf)
        direction = unit_step(normal[torch.arange(6), distances.argmin(1)], norm)
        result = deepfool(case.model, case.images, y, norm=norm)
        expected = case.images + 1.02 * per_image(distances.amin(1)) * direction
        torch.testing.assert_close(result.adversarial, expected)
        assert_predictions(result, case)
    case = rectified(7)
    labels = case.labels.index_fill(0, torch.tensor([0]), 0)
    for norm, (steps, candidates) in product(norms, ((1, 4), (2, 2), (50, 10))):
        result = deepfool(
            case.model, case.images, labels, norm=norm, steps=steps, overshoot=0.1, candidates=candidates
        )
        for image, label, point in zip(case.images, labels.tolist(), result.adversarial, strict=True):
            expected = deepfool_of_one_image(case.model, image, label, norm, steps, 0.1, candidates)
            torch.testing.assert_close(point, expected)
        assert_predictions(result, case, labels)
    # A class that wins already is as far away behind its boundary; one of the same gradient has none.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64, requires_grad=True)
    z = linear_model(rows.view(3, 1, 1, 2))(x)
    nearest = nearest_boundary(z, x, torch.tensor([0]), torch.tensor([[1, 2]]), "l2")
    torch.testing.assert_close(nearest.distance, torch.tensor([0.5 / 5**0.5], dtype=torch.float64))
    torch.testing.assert_close(nearest.gap, torch.tensor([-0.5], dtype=torch.float64))
    # On the boundary itself the linearized model would not move at all; without one nothing moves.
    weight = torch.tensor([[0.1, 0.0], [0.0, 0.1]], dtype=torch.float64).view(2, 1, 1, 2)
    half = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    result = deepfool(linear_model(weight), half, torch.tensor([0]))
    torch.testing.assert_close(result.distance("l2"), torch.tensor([1.02e-6]).double(), rtol=1e-6, atol=0)
    overflow = torch.tensor([[0.0, 0.0], [-1.5e308, 1.5e308]], dtype=torch.float64).view(2, 1, 1, 2)
    image = torch.tensor([[[[0.5, 0.3]]]], dtype=torch.float64)
    for model in (linear_model(weight[:1]), linear_model(overflow)):
        assert torch.equal(deepfool(model, image, torch.tensor([0]), norm="linf").adversarial, image)
    assert_zero_gradients(deepfool)


@method(
    family="attacks",
    title="DeepFool",
    references=[
        Reference(
            key="moosavi2016",
            title="DeepFool: a simple and accurate method to fool deep neural networks",
            authors="Moosavi-Dezfooli, Fawzi, Frossard",
            year=2016,
            url="https://arxiv.org/abs/1511.04599",
        )
    ],
    invariants=IN_RANGE,
    relations=[*GRADIENT_RELATIONS, Monotone("steps", values=(1, 2, 6), measure="success")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (2 * param.steps + 1),
        backward=size.images * param.steps * (param.candidates - 1),
    ),
    tags=["white-box", "minimum-norm"],
    oracle=crosses_the_nearest_boundary_of_a_linear_model,
    exempt={"parameters_matter": "candidates matters only where the nearest class is none of the likeliest"},
    quick={"steps": 3, "candidates": 3},
)
def deepfool(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    norm: MinimizedNorm = "l2",
    steps: Steps = 50,
    overshoot: Annotated[
        float, Field(ge=0, le=10, description="distance beyond the boundary, as a fraction of the total step")
    ] = 0.02,
    candidates: Candidates = 10,
) -> AdversarialExamples:
    """DeepFool: minimum-norm adversarial examples by steps to the nearest linearized decision boundary.

    x <- x + |f_k| / ||w_k||_2^2 w_k,  f_k = z_k - z_y,  w_k = df_k/dx,  k of the least |f_k| / ||w_k||_2

    and in "linf" |f_k| / ||w_k||_1 sign(w_k), with the least |f_k| / ||w_k||_1. The sum of all steps is
    multiplied by 1 + ``overshoot`` and the image clipped to [0, 1]. Only the boundaries of the
    ``candidates`` most likely classes of the image itself, the label among them, are considered.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). Each image stops where its predicted class is not its
    label, which may be so from the outset, and where every candidate's gradient is zero.

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W) and ``success`` (N,); ``distance(norm)`` is the
        norm of each perturbation.

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("deepfool", images="builtin:scenes/2", steps=20)
        result.distance("l2")  # (2,)

    Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, algorithm 2 and section 3.3.
    """
    active = torch.arange(len(images), device=images.device)
    points, total_step = images.clone(), torch.zeros_like(images)
    zero = torch.zeros_like(labels, dtype=torch.bool)
    # equivalent mutants: replaced in the first step
    before = after = rivals = torch.empty(0)
    # equivalent mutants: the loop ends at the last step by itself
    for step in progress_bar(range(steps + 1), "DeepFool"):
        x = points[active].requires_grad_()
        logits = differentiable_logits(model, x)
        if step == 0:
            # equivalent mutants: results are detached
            before = after = logits.detach()
            rivals = top_other_classes(before, labels, candidates)
        else:
            # equivalent mutants: results are detached
            after = after.index_copy(0, active, logits.detach())
        remaining = not_adversarial(logits, labels[active], targeted=False)
        if not len(remaining) or step == steps:
            break
        # equivalent mutants: a second pass computes the same logits
        if len(remaining) < len(active):  # one more forward pass costs less than backward passes for all
            active = active[remaining]
            x = points[active].requires_grad_()
            logits = differentiable_logits(model, x)
        boundary = nearest_boundary(logits, x, labels[active], rivals[active], norm)
        reachable = boundary.distance.isfinite()
        if step == 0:
            zero[active] = is_zero(boundary.gradient)
        active, change = active[reachable], boundary.step(norm)[reachable]
        if not len(active):
            break
        total_step[active] += change
        points[active] = (images[active] + (1 + overshoot) * total_step[active]).clamp(0, 1)
    return AdversarialExamples.from_logits(
        model, images, points, labels, before, after, targeted=False, zero_gradient=zero
    )


def top_other_classes(logits: Tensor, labels: Tensor, candidates: int) -> Tensor:
    """The ``candidates`` - 1 most likely classes other than the labels, (N, k), in descending order.

    Fewer where there are fewer classes, none (k = 0) for a single class.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    # equivalent mutants: the classes are the last axis
    return others.topk(min(candidates, logits.shape[1]) - 1, dim=1).indices


class Boundary(NamedTuple):
    """The nearest decision boundary of the linearized model, between a class (n,) and its rivals (n, k).

    ``gap`` (n,): logit of the class minus that of the nearest rival. ``gradient`` (n, C, H, W): of the
    rival's logit minus that of the class; zero where no rival has a gradient. ``distance`` (n,): to the
    boundary; infinity where there is none. ``gaps``, ``slopes`` (n, k): gap and dual norm of the gradient
    for every rival.
    """

    gap: Tensor
    gradient: Tensor
    distance: Tensor
    gaps: Tensor
    slopes: Tensor

    def step(self, norm: Norm) -> Tensor:
        """The step to the boundary, (n, C, H, W); zero where there is none."""
        # equivalent mutants: without a boundary the direction is zero
        size = torch.where(self.distance.isfinite(), self.distance.clamp(min=_MIN_STEP), 0)
        direction = normalize_l2(self.gradient) if norm == "l2" else self.gradient.sign()
        return per_image(size) * direction


def nearest_boundary(logits: Tensor, x: Tensor, own: Tensor, rivals: Tensor, norm: Norm) -> Boundary:
    """The nearest boundary between classes ``own`` (n,) and ``rivals`` (n, k).

    ``logits`` (n, K) on the graph of ``x`` (n, C, H, W); takes k backward passes.
    """
    differences = logits.gather(1, own[:, None]) - logits.gather(1, rivals)
    # equivalent mutants: results are detached
    gaps, slopes = differences.detach(), torch.zeros_like(differences).detach()
    gap = torch.zeros_like(logits[:, 0]).detach()
    distance = torch.full_like(logits[:, 0], torch.inf).detach()
    gradient = torch.zeros_like(x)
    for n in range(rivals.shape[1]):
        # equivalent mutants: a graph that is retained once more changes no gradient
        (ascent,) = torch.autograd.grad(-differences[:, n].sum(), x, retain_graph=n + 1 < rivals.shape[1])
        slopes[:, n] = slope = dual_norm(ascent, norm)
        candidate = torch.where((slope > 0) & slope.isfinite(), gaps[:, n].abs() / slope, torch.inf)
        closer = candidate < distance
        gap, distance = torch.where(closer, gaps[:, n], gap), torch.minimum(candidate, distance)
        gradient = torch.where(per_image(closer), ascent, gradient)
    return Boundary(gap, gradient, distance, gaps, slopes)


@hookimpl
def phosphene_methods():
    return [deepfool]
