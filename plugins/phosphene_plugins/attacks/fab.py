"""FAB, fast adaptive boundary attack: minimum-norm adversarial examples by linearized projections."""

from itertools import product
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import Norm as LpNorm
from phosphene.attacks import (
    build_result,
    distance,
    is_adversarial,
    is_zero,
    not_adversarial,
    per_image,
    predict_logits,
    random_point,
    shrink_to_boundary,
)
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, Monotone, maximum, minimum, param, size
from phosphene.testing import linear_model

from ._hyperplane_projection import project_onto_hyperplane
from ._oracle_models import NORMS, LinearCase, assert_predictions, assert_zero_gradients, rectified
from ._parameters import GRADIENT_RELATIONS, IN_RANGE, Candidates, Restarts, Steps, TargetClasses, Targeted
from ._reference_attacks import fab_of_one_image
from .deepfool import nearest_boundary, top_other_classes

#: Bisection steps between the nearest example and the image.
_BISECTIONS = 10
#: Distance assumed for an image without an example so far; half of it is the radius of its random start.
_ASSUMED_DISTANCE: dict[LpNorm, float] = {"linf": 0.3, "l2": 1.0, "l1": 5.0}


def finds_the_nearest_boundary_that_the_pixel_range_allows() -> None:
    """On a linear model (z_y - z_k) / ||w_k - w_y||_q over the pixels that are not yet at their bounds."""
    normal = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_bound = torch.arange(12) % 3 == 0
    image = torch.where(at_bound, (normal > 0).double(), 0.5)
    weight = torch.stack([torch.zeros_like(normal), normal]).view(2, 3, 2, 2)
    model = linear_model(weight, bias=[0.0, -float(normal @ image) - 0.2])
    free = normal[~at_bound]
    for norm, dual in zip(NORMS, (1.0, 2.0, torch.inf), strict=True):
        exact = 0.2 / float(free.norm(dual))
        result = fab(model, image.view(1, 3, 2, 2), torch.tensor([0]), norm=norm, steps=10, seed=0)
        assert result.success.all()
        assert 1 <= float(result.distance(norm)) / exact < 1.002, (norm, result.distance(norm), exact)
        _projects_onto_hyperplanes(norm)
    case = rectified(5)
    for norm, targeted, target_classes in (("linf", False, 0), ("l2", False, 2), ("l1", True, 0)):
        _equals_plain_runs(case, norm, targeted, target_classes)
    # The most likely other class is four times as far away as the next one, which counts only with two.
    weight = torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.0, 2.0]], dtype=torch.float64).view(3, 1, 1, 2)
    half, label = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    model = linear_model(weight, bias=[0.0, -0.225, -1.2])
    for target_classes, exact in ((1, 0.4), (2, 0.1)):
        result = fab(model, half, label, norm="l2", steps=10, target_classes=target_classes)
        assert 1 <= float(result.distance("l2")) / exact < 1.002
    # On the boundary itself no step has a length.
    result = fab(linear_model(0.1 * torch.eye(2).double().view(2, 1, 1, 2)), half, label, steps=2)
    assert torch.equal(result.adversarial, half) and not result.success.any()
    assert_zero_gradients(fab, steps=2)


def _projects_onto_hyperplanes(norm: LpNorm) -> None:
    """The changes are min(limit, k speed) with k by bisection; in "l1" the largest gains come first."""
    generator = torch.Generator().manual_seed(3)
    points = (2 * torch.rand(6, 1, 2, 4, generator=generator, dtype=torch.float64) - 0.5).clamp(0, 1)
    normal = torch.randn(6, 1, 2, 4, generator=generator, dtype=torch.float64)
    offset = torch.tensor([0.3, -0.3, 1.0, -1e-200, 99.0, 0.5], dtype=torch.float64)
    normal[0, 0, 0, 0], normal[5] = 0, 0
    normal[3] *= 1e-200
    changes = project_onto_hyperplane(points, normal, offset, norm)
    for x, w, missing, change in zip(points, normal, offset.tolist(), changes, strict=True):
        sign, gain = w.sign() * (1 if missing > 0 else -1), w.abs() / max(float(w.abs().max()), 1e-300)
        limit, missing = torch.where(sign > 0, 1 - x, x), abs(missing) / max(float(w.abs().max()), 1e-300)
        size = torch.zeros_like(x)
        if norm == "l1":
            for i in gain.flatten().argsort(descending=True).tolist():
                size.view(-1)[i] = min(
                    float(limit.view(-1)[i]), missing / max(float(gain.view(-1)[i]), 1e-300)
                )
                missing -= float(size.view(-1)[i] * gain.view(-1)[i])
        else:
            low, high, speed = 0.0, 1e4, gain if norm == "l2" else sign.abs()
            for _ in range(70):
                k = (low + high) / 2
                size = torch.minimum(limit, k * speed)
                low, high = (k, high) if float((gain * size).sum()) < missing else (low, k)
        torch.testing.assert_close(change, sign * size)


def _equals_plain_runs(case: LinearCase, norm: LpNorm, targeted: bool, target_classes: int) -> None:
    """Two runs of 6 steps, the second from a random point, are those of plain loops over each image."""
    labels = (case.labels + 1) % 5 if targeted else case.labels
    result = fab(
        case.model, case.images, labels, norm=norm, steps=6, restarts=2, targeted=targeted,
        target_classes=target_classes, candidates=3, alpha=0.2, beta=0.8, eta=1.1, seed=target_classes,
    )  # fmt: skip
    assert_predictions(result, case, labels, targeted=targeted)
    order = case.model(case.images).scatter(1, labels[:, None], -torch.inf).argsort(descending=True)
    runs = order[:, :target_classes].split(1, dim=1) if target_classes else [order[:, :2]]
    for n, (image, label) in enumerate(zip(case.images, labels.tolist(), strict=True)):
        generator, best, nearest = torch.Generator().manual_seed(target_classes), image, torch.inf
        for restart, rivals in product((0, 1), runs):
            radius = (nearest if nearest < torch.inf else {"linf": 0.3, "l2": 1.0, "l1": 5.0}[norm]) / 2
            start = random_point(image[None], radius, norm, generator)[0] if restart else image
            point, size = fab_of_one_image(
                case.model, image, label, rivals[n].tolist(), start, norm, targeted, 6, 0.2, 0.8, 1.1
            )
            if size < nearest:
                best, nearest = point, size
        if nearest < torch.inf:
            (best,) = shrink_to_boundary(
                best[None], image[None], norm,
                lambda x: case.model(x).argmax(1).eq(label) == targeted, 10,  # noqa: B023
            )  # fmt: skip
        torch.testing.assert_close(result.adversarial[n], best)


@method(
    family="attacks",
    title="FAB",
    references=[
        Reference(
            key="croce2020fab",
            title="Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack",
            authors="Croce, Hein",
            year=2020,
            url="https://arxiv.org/abs/1907.02044",
        )
    ],
    invariants=IN_RANGE,
    relations=[
        *(relation.model_copy(update={"where": {"restarts": 1}}) for relation in GRADIENT_RELATIONS),
        Monotone("restarts", values=(1, 4), measure="success"),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (2 * param.restarts * maximum(1, param.target_classes) * param.steps + (_BISECTIONS + 2)),
        backward=size.images
        * param.restarts
        * (param.target_classes + (1 - minimum(1, param.target_classes)) * (param.candidates - 1))
        * param.steps,
    ),
    tags=["white-box", "minimum-norm"],
    oracle=finds_the_nearest_boundary_that_the_pixel_range_allows,
    exempt={"parameters_matter": "candidates matters only where the nearest class is none of the likeliest"},
    quick={"steps": 2, "candidates": 3, "restarts": 2, "target_classes": 0},
    demo={"images": "builtin:scenes/3", "steps": 20},
)
def fab(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    norm: Annotated[LpNorm, Field(description="norm of the perturbation that is minimized")] = "linf",
    steps: Steps = 100,
    restarts: Restarts = 1,
    targeted: Targeted = False,
    target_classes: TargetClasses = 0,
    candidates: Candidates = 10,
    alpha: Annotated[float, Field(ge=0, le=1, description="largest weight of the step from the image")] = 0.1,
    beta: Annotated[
        float, Field(gt=0, lt=1, description="factor of the perturbation after each success")
    ] = 0.9,
    eta: Annotated[float, Field(ge=1, le=10, description="factor of the step to the boundary")] = 1.05,
    seed: Seed = None,
) -> AdversarialExamples:
    """Fast adaptive boundary attack (FAB): minimum-norm adversarial examples by linearized projections.

    x <- clip((1 - a) (x + eta d) + a (x_0 + eta d_0)),  a = min(||d|| / (||d|| + ||d_0||), alpha)

    with d and d_0 the smallest changes of x and of the image x_0 that reach the nearest decision boundary of
    the model linearized at x with pixels in [0, 1]. An adversarial point is stored if it is the nearest so
    far, and the next step starts closer to the image: x <- x_0 + beta (x - x_0). The boundaries of the
    ``candidates`` most likely classes of the image are considered; with ``target_classes`` (FAB-T) it runs
    once for each of that many classes alone, with one gradient per step instead of one per candidate.
    All ``restarts`` but the first begin at a random point, half as far away as the nearest example.
    The nearest example is moved towards the image by bisection (in the paper by a search of three steps).

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). An image without success is returned unchanged.

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W) and ``success`` (N,); ``distance(norm)`` is the
        norm of each perturbation.

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("fab", images="builtin:scenes/2", steps=5, candidates=3, seed=0)
        result.distance("linf")  # (2,)

    Source: Croce & Hein 2020, algorithm 1 and section 3; FAB-T: Croce & Hein 2020b, section 5.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    before = predict_logits(model, images)
    active = not_adversarial(before, labels, targeted)
    x, y = images[active], labels[active]
    rivals_per_run = [top_other_classes(before[active], y, candidates)]
    if target_classes and not targeted:
        rivals_per_run = list(top_other_classes(before[active], y, target_classes + 1).split(1, dim=1))
    best, nearest = x.clone(), torch.full_like(before[active, 0], torch.inf)
    # equivalent mutants: replaced in the first run
    zero = torch.zeros_like(y, dtype=torch.bool)
    for restart in range(restarts):
        for run, rivals in enumerate(rivals_per_run):
            start = x
            if restart:
                radius = torch.where(nearest.isfinite(), nearest, _ASSUMED_DISTANCE[norm]) / 2
                start = random_point(x, per_image(radius), norm, generator)
            points, distances, first_zero = _run(
                model, x, y, rivals, start, norm=norm, steps=steps, targeted=targeted, alpha=alpha,
                beta=beta, eta=eta,
            )  # fmt: skip
            zero = first_zero if restart == run == 0 else zero
            closer = distances < nearest
            best[closer], nearest[closer] = points[closer], distances[closer]
    success = nearest.isfinite()

    def succeeds(points: Tensor) -> Tensor:
        return is_adversarial(predict_logits(model, points), y[success], targeted)

    best[success] = shrink_to_boundary(best[success], x[success], norm, succeeds, _BISECTIONS)
    adversarial = images.index_copy(0, active, best)
    return build_result(model, images, adversarial, labels, before, targeted=targeted, zero_gradient=zero)


def _run(
    model: Model,
    images: Tensor,
    labels: Tensor,
    rivals: Tensor,
    x: Tensor,
    *,
    norm: LpNorm,
    steps: int,
    targeted: bool,
    alpha: float,
    beta: float,
    eta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run from ``x``: the nearest examples (n, C, H, W) and their distances (n,), or infinity.

    And whether no class had a gradient in the first step, (n,).
    """
    best, nearest = images.clone(), images.new_full((len(images),), torch.inf)
    active = torch.arange(len(images), device=images.device)
    zero = torch.zeros_like(labels, dtype=torch.bool)
    for step in progress_bar(range(steps), "FAB"):
        if not len(active):
            break
        x = x.detach().requires_grad_()
        logits = model(x)
        own, others = labels[active], rivals[active]
        if targeted:  # the boundary between the target class and the most likely other class
            own, others = logits.detach().scatter(1, own[:, None], -torch.inf).argmax(1), own[:, None]
        boundary = nearest_boundary(logits, x, own, others, norm)
        if step == 0:
            zero = is_zero(boundary.gradient)
        x, gap, normal = x.detach(), boundary.gap, boundary.gradient
        if not (reachable := boundary.distance.isfinite()).all():  # no class has a gradient: drop it
            active, x, gap, normal = active[reachable], x[reachable], gap[reachable], normal[reachable]
            if not len(active):
                break
        image = images[active]
        offsets = torch.cat([gap, gap + (normal * (x - image)).sum((1, 2, 3))])
        changes = project_onto_hyperplane(torch.cat([x, image]), torch.cat([normal, normal]), offsets, norm)
        sizes = distance(changes, torch.zeros_like(changes), norm)
        (d, d_0), (size, size_0) = changes.chunk(2), sizes.chunk(2)
        weight = size / (size + size_0).clamp(min=torch.finfo(x.dtype).tiny)
        a = per_image(weight.clamp(max=alpha))
        x = ((1 - a) * (x + eta * d) + a * (image + eta * d_0)).clamp(0, 1)
        success = is_adversarial(predict_logits(model, x), labels[active], targeted)
        distances = distance(x, image, norm)
        closer = success & (distances < nearest[active])
        best[active[closer]], nearest[active[closer]] = x[closer], distances[closer]
        x = torch.where(per_image(success), image + beta * (x - image), x)
    return best, nearest, zero


@hookimpl
def phosphene_methods():
    return [fab]
