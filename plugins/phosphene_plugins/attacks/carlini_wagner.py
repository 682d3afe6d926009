"""Carlini-Wagner: minimum-norm adversarial examples that trade the perturbation's norm against the margin."""

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import (
    build_result,
    distance,
    is_adversarial,
    is_zero,
    not_adversarial,
    per_image,
    predict_logits,
    shrink_to_boundary,
)
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model
from phosphene.spec import Cost, Monotone, param, size
from phosphene.testing import linear_model

from ._adam import adam_step
from ._gradients import differentiable_logits, loss_gradient
from ._losses import margin
from ._oracle_models import LinearCase, assert_predictions, five_classes, rectified
from ._parameters import GRADIENT_RELATIONS, IN_RANGE, MinimizedNorm, Targeted
from ._reference_attacks import carlini_wagner_of_one_image
from .deepfool import nearest_boundary, top_other_classes

#: Bisection steps between the nearest example and the image, and the factor of tau after a success.
_BISECTIONS, _TAU = 10, 0.9
#: The first descent starts at the step to the nearest linearized boundary times ``_BEYOND``, of the
#: ``_CANDIDATES`` most likely classes.
_BEYOND, _CANDIDATES = 1.02, 10
#: An image is finished after a descent that left more than this fraction of its distance.
_NEARER = 0.999
#: A descent of an image ends when the lowest objective falls by less than this between two checks.
_FALLING = 0.999


def is_within_three_percent_of_the_minimum_on_a_linear_model() -> None:
    """The minimum is min_k (z_y - z_k) / ||w_k - w_y||_q; else every descent is that of a plain loop."""
    case = five_classes(2)
    weight, logits, y = case.pixel_weight().flatten(1), case.model(case.images).detach(), case.labels
    normal, gap = weight - weight[y][:, None], logits.gather(1, y[:, None]) - logits
    norms: list[tuple[MinimizedNorm, float]] = [("l2", 2.0), ("linf", 1.0)]
    for norm, dual in norms:
        least = (gap / normal.norm(dual, dim=2)).scatter(1, y[:, None], torch.inf).amin(1)
        result = carlini_wagner(case.model, case.images, y, norm=norm, steps=25, search_steps=4)
        ratio = result.distance(norm) / least
        assert result.success.all() and ratio.min() > 0.9999 and ratio.max() < 1.03, ratio
    single = linear_model(torch.ones(1, 3, 2, 3, dtype=torch.float64))  # no class to change to
    case = rectified(4)
    unchanged = carlini_wagner(single, case.images, torch.zeros_like(case.labels), steps=1)
    assert torch.equal(unchanged.adversarial, case.images)
    _constants_follow_the_last_descent(case)
    case = replace(case, images=(3 * (case.images[1:] - 0.5) + 0.5).clamp(0, 1))
    case = replace(case, labels=case.model(case.images).argmax(1))
    for norm, targeted, kappa, steps in _ORACLE_CASES:
        labels = (case.labels + targeted).index_fill(0, torch.tensor([1]), int(case.labels[1])) % 5
        result = carlini_wagner(
            case.model, case.images, labels, norm=norm, steps=steps, search_steps=4, kappa=kappa,
            targeted=targeted,
        )  # fmt: skip
        for n, (image, label) in enumerate(zip(case.images, labels.tolist(), strict=True)):
            expected = image
            if not (targeted and n == 1):
                expected = carlini_wagner_of_one_image(
                    case.model, image, label, norm, targeted, steps, 4, kappa
                )
            torch.testing.assert_close(result.adversarial[n], expected)
        assert_predictions(result, case, labels, targeted=targeted)


def _constants_follow_the_last_descent(case: LinearCase) -> None:
    """c, tau and the step size after two hits and two misses, and the first term of the objective in linf."""
    x, norms = case.images.clone().requires_grad_(), list[MinimizedNorm](["l2", "linf"])
    l2, linf = (_Search(case.model, x, case.model(x), case.labels, 0.0, False, norm) for norm in norms)
    hit, distances = torch.tensor([True, True, False, False]), torch.tensor([0.1, 0.2, torch.inf, 0.3])
    for search in (l2, linf):
        search.c, search.distances = torch.tensor([8.0, 4.0, 8.0, 1.0]), distances
        search.step_size, search.tau = torch.tensor([0.01, 0.06, 0.01, 0.03]), torch.full((4,), 0.5)
        search.low, search.high = torch.tensor([0.0, 0.25, 0.0, 0.25]), torch.tensor([9, 9, torch.inf, 16])
        search._update_constants(hit)
        torch.testing.assert_close(search.step_size, torch.tensor([0.01, 0.05, 0.04, 0.03]))
    assert l2.c.tolist() == [4, 1, 32, 4] and linf.c.tolist() == [8, 4, 16, 2]
    assert l2.low.tolist() == [0, 0.25, 8, 1] and l2.high.tolist() == [8, 4, torch.inf, 16]
    torch.testing.assert_close(linf.tau, torch.tensor([0.09, 0.18, 0.5, 0.5]))
    delta = torch.tensor([0.6, -0.7, 0.4], dtype=torch.float64).repeat(6).view(1, 3, 2, 3)
    at = _Descent.at_start(torch.tensor([3]), linf.images[3:] + delta)
    size, gradient = linf._perturbation_size(at)
    torch.testing.assert_close(size, torch.tensor([1.8], dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.tensor([1.0, -1, 0]).double().repeat(6).view(1, 3, 2, 3))


#: Norm, targeted, kappa and steps of the comparisons with a plain loop.
_ORACLE_CASES: list[tuple[MinimizedNorm, bool, float, int]] = [
    ("l2", False, 0.0, 12),
    ("l2", True, 0.5, 11),
    ("linf", False, 0.3, 45),
    ("linf", True, 0.0, 25),
]


@method(
    family="attacks",
    title="Carlini-Wagner",
    references=[
        Reference(
            key="carlini2017",
            title="Towards Evaluating the Robustness of Neural Networks",
            authors="Carlini, Wagner",
            year=2017,
            url="https://arxiv.org/abs/1608.04644",
        )
    ],
    invariants=IN_RANGE,
    relations=[*GRADIENT_RELATIONS, Monotone("kappa", values=(0.0, 1.0, 3.0), measure="distance")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (param.search_steps * param.steps + (_BISECTIONS + 3)),
        backward=size.images * (param.search_steps * param.steps + (_CANDIDATES - 1)),
    ),
    tags=["white-box", "minimum-norm"],
    oracle=is_within_three_percent_of_the_minimum_on_a_linear_model,
    quick={"steps": 6, "search_steps": 2},
    demo={"images": "builtin:scenes/3", "steps": 40, "search_steps": 4},
)
def carlini_wagner(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    norm: MinimizedNorm = "l2",
    steps: Annotated[int, Field(ge=1, le=100_000, description="number of Adam steps for each c")] = 100,
    search_steps: Annotated[int, Field(ge=1, le=100, description="number of values of c, or of tau")] = 6,
    kappa: Annotated[
        float, Field(ge=0, le=1e6, description="margin by which the adversarial logit must lead (confidence)")
    ] = 0.0,
    targeted: Targeted = False,
) -> AdversarialExamples:
    """Carlini-Wagner (C&W): minimum-norm adversarial examples by penalized optimization with Adam.

    "l2":   min ||d||_2^2 + c f(x + d)      "linf": min sum_i max(|d_i| - tau, 0) + c f(x + d)

    f = max(z_y - max_{k != y} z_k + kappa, 0), for a target class t max(max_{k != t} z_k - z_t + kappa, 0).
    In "l2" the c of every image is bisected on a logarithmic scale between the largest that failed and the
    smallest that succeeded; in "linf" its tau becomes 0.9 of the largest |d_i| at every success, and c
    doubles without success. An image whose objective no longer falls stops early, and in "l2" one is
    finished whose last c led to no nearer example. The last example is moved towards the image by bisection.

    Three differences from the paper. Pixels are clipped after every step (its "projected gradient descent"),
    not squashed by tanh, under which black and white pixels hardly move. c and the step size start at their
    values for a linear model with the first gradient g, c about 2 |z_y - z_k| / ||g||^2, so that neither the
    logits' scale nor the image size matters. And the first descent starts just beyond the nearest linearized
    boundary, DeepFool's first step, since the class with the second largest logit, to which a descent from
    the image itself leads, may be further away.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). An image without success is returned unchanged.

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W) and ``success`` (N,); ``distance(norm)`` is the
        norm of each perturbation.

    Raises:
        ModelError: no gradient flows from the model's logits to the images.
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("carlini_wagner", images="builtin:scenes/2", steps=10, search_steps=2)
        result.distance("l2")  # (2,)

    Source: Carlini & Wagner 2017, sections V and VI.
    """
    x = images.detach().requires_grad_()
    logits = differentiable_logits(model, x)
    before = logits.detach()  # equivalent mutants: results are detached
    adversarial = images.clone()
    active = not_adversarial(before, labels, targeted)
    zero = torch.zeros_like(active, dtype=torch.bool)
    if len(active) and before.shape[1] > 1:
        # equivalent mutants: a second pass computes the same logits
        if len(active) < len(images):  # one more forward pass costs less than backward passes for all
            x = images[active].requires_grad_()
            logits = differentiable_logits(model, x)
        search = _Search(model, x, logits, labels[active], kappa, targeted, norm)
        for _ in progress_bar(range(search_steps), "Carlini-Wagner"):
            search.descend(steps)
        zero = search.zero_gradient
        adversarial[active] = search.shrink_to_boundary()
    return build_result(model, images, adversarial, labels, before, targeted=targeted, zero_gradient=zero)


class _Search:
    """The images that are attacked, each with its own c and tau and the nearest example so far."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        logits: Tensor,
        labels: Tensor,
        kappa: float,
        targeted: bool,
        norm: MinimizedNorm,
    ) -> None:
        self.model, self.images, self.labels, self.kappa = model, x.detach(), labels, kappa
        self.targeted, self.norm = targeted, norm
        # The constants for the model linearized at the images, on the graph from x to logits.
        own, rivals = labels, top_other_classes(logits, labels, _CANDIDATES)
        if targeted:
            own, rivals = logits.argmax(1), labels[:, None]
        boundary = nearest_boundary(logits, x, own, rivals, norm)
        self.start = (self.images + _BEYOND * boundary.step(norm)).clamp(0, 1)
        self.zero_gradient = is_zero(boundary.gradient)
        tiny = torch.finfo(x.dtype).tiny ** 0.5
        slope, size = boundary.slopes[:, 0].clamp(min=tiny), x.shape[1:].numel()
        needed = (boundary.gaps[:, 0] + kappa) / slope
        self.c = ((3 * needed if norm == "l2" else size) / slope).clamp(tiny, 1 / tiny)
        self.step_size = (needed / math.sqrt(size if norm == "l2" else 64)).clamp(1e-7, 0.05)
        self.low, self.high = torch.zeros_like(self.c), torch.full_like(self.c, torch.inf)
        self.tau, self.finished = torch.ones_like(self.c), torch.zeros_like(self.labels, dtype=torch.bool)
        self.distances, self.best = torch.full_like(self.c, torch.inf), self.images.clone()

    def f(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The second term of the objective, (n,): how far the margin is from kappa."""
        lead = margin(logits, labels)
        return (self.kappa + lead if self.targeted else self.kappa - lead).clamp(min=0)

    def descend(self, steps: int) -> None:
        """One descent of every unfinished image, then the c and tau of the next."""
        distances_before = self.distances.clone()
        hit = torch.zeros_like(self.finished)
        indices = (~self.finished).nonzero()[:, 0]
        at = _Descent.at_start(indices, self.start[indices])
        for step in range(steps if len(indices) else 0):
            f, f_gradient, logits = loss_gradient(self.model, at.x, self.labels[at.indices], self.f)
            c = self.c[at.indices]
            size, size_gradient = self._perturbation_size(at)
            hit[at.indices] |= self._keep_nearest(at, logits)
            at.lowest = torch.minimum(at.lowest, size + c * f)
            gradient = size_gradient + per_image(c) * f_gradient
            going = ~hit[at.indices] if self.norm == "linf" else torch.ones_like(hit[at.indices])
            if step % max(1, steps // 10) == 0:
                going &= at.lowest < _FALLING * at.lowest_before
                at.lowest_before = at.lowest
            if not going.all():
                at, gradient = at.select(going), gradient[going]
                if not len(at.indices):
                    break
            # The step size falls to zero along a cosine, so that the last steps settle on the boundary.
            step_size = self.step_size[at.indices] * (1 + math.cos(math.pi * step / steps)) / 2
            update, at.mean, at.square = adam_step(gradient, at.mean, at.square, step, per_image(step_size))
            at.x = (at.x - update).clamp(0, 1)
        self.start = self.images  # only the first descent starts at the linearized boundary
        self._update_constants(hit)
        self.finished = (self.distances > _NEARER * distances_before) & self.high.isfinite()

    def _perturbation_size(self, at: "_Descent") -> tuple[Tensor, Tensor]:
        """The first term of the objective, (n,), and its gradient (n, C, H, W)."""
        delta = at.x - self.images[at.indices]
        if self.norm == "l2":
            return delta.square().sum((1, 2, 3)), 2 * delta
        excess = (delta.abs() - per_image(self.tau[at.indices])).clamp(min=0)
        return excess.sum((1, 2, 3)), delta.sign() * (excess > 0)

    def _keep_nearest(self, at: "_Descent", logits: Tensor) -> Tensor:
        """Store examples nearer than before; (n,) which points are examples, in "linf" within tau."""
        success = self._is_adversarial(logits, at.indices)
        distances = distance(at.x, self.images[at.indices], self.norm)
        closer = success & (distances < self.distances[at.indices])
        self.distances[at.indices[closer]], self.best[at.indices[closer]] = distances[closer], at.x[closer]
        return success & (distances <= self.tau[at.indices]) if self.norm == "linf" else success

    def _update_constants(self, hit: Tensor) -> None:
        """c, tau and the step size of the next descent, from where this one succeeded."""
        # Without any example the linear model underestimated the distance: longer steps.
        longer = torch.where(self.distances.isinf(), 4 * self.step_size, self.step_size)
        self.step_size = longer.clamp(max=0.05)
        if self.norm == "linf":
            self.tau = torch.where(hit, _TAU * self.distances, self.tau)
            self.c = torch.where(hit, self.c, 2 * self.c)
            return
        self.high = torch.where(hit, torch.minimum(self.high, self.c), self.high)
        self.low = torch.where(hit, self.low, torch.maximum(self.low, self.c))
        between = torch.where(self.low > 0, (self.low.sqrt() * self.high.sqrt()), self.c / 2)
        self.c = torch.where(self.high.isinf(), self.c * 4, between)

    def _is_adversarial(self, logits: Tensor, indices: Tensor) -> Tensor:
        """(n,) whether the predicted class is adversarial by a margin of kappa."""
        confident = self.f(logits, self.labels[indices]) <= 0
        return is_adversarial(logits, self.labels[indices], self.targeted) & confident

    def shrink_to_boundary(self) -> Tensor:
        """The nearest examples (n, C, H, W), each moved to the smallest ball that bisection finds."""
        indices = self.distances.isfinite().nonzero()[:, 0]

        def succeeds(points: Tensor) -> Tensor:
            return self._is_adversarial(predict_logits(self.model, points), indices)

        points = shrink_to_boundary(
            self.best[indices], self.images[indices], self.norm, succeeds, _BISECTIONS
        )
        return self.images.index_copy(0, indices, points)


@dataclass
class _Descent:
    """The images that one descent still moves: every field has a row for each."""

    #: Positions among the images of the search.
    indices: Tensor
    x: Tensor
    #: Adam's moments.
    mean: Tensor
    square: Tensor
    #: The lowest objective so far, and at the last check whether it falls.
    lowest: Tensor
    lowest_before: Tensor

    @classmethod
    def at_start(cls, indices: Tensor, x: Tensor) -> "_Descent":
        """The state before the first step."""
        zeros, infinite = torch.zeros_like(x), x.new_full((len(x),), torch.inf)
        return cls(indices, x, zeros, zeros, infinite, infinite)

    def select(self, selected: Tensor) -> "_Descent":
        """The state of these images alone."""
        return _Descent(*(getattr(self, f.name)[selected] for f in fields(self)))


@hookimpl
def phosphene_methods():
    return [carlini_wagner]
