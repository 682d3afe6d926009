"""DeepFool: to the nearest boundary of the model made linear, again and again until it is crossed."""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._gradients import logits_on_graph, unreached
from ._lp_balls import Norm, steepness, unit

#: The shortest step, in pixels: on the boundary itself the model made linear asks for none.
_LEAST = 1e-6


def goes_just_beyond_the_nearest_boundary_of_a_linear_model() -> None:
    """x + 1.02 min_k (z_y - z_k) / ||w_k - w_y||_q in the steepest direction, in one step."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(12, 5).double()
    linear.weight.data = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    linear.bias.data.zero_()
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2))
    images = 0.5 + 0.02 * torch.randn(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    logits = model(images).detach()
    labels = logits.argmax(1)
    away = linear.weight.detach() - linear.weight.detach()[labels][:, None]
    gap = logits.gather(1, labels[:, None]) - logits
    norms: list[tuple[Literal["l2", "linf"], float]] = [("l2", 2.0), ("linf", 1.0)]
    for norm, dual in norms:
        distance = (gap / away.norm(dual, dim=2)).scatter(1, labels[:, None], torch.inf).amin(1)
        found = deepfool(model, images, labels, norm=norm)
        assert found.success.all()
        torch.testing.assert_close(found.distance(norm), 1.02 * distance, rtol=1e-9, atol=0)


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
    invariants=[PixelRange(field="adversarial"), SameShape(field="adversarial")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (2 * param.steps + 1),
        backward=size.images * param.steps * (param.candidates - 1),
    ),
    tags=["white-box", "minimum-norm"],
    oracle=goes_just_beyond_the_nearest_boundary_of_a_linear_model,
    quick={"steps": 3, "candidates": 3},
)
def deepfool(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    norm: Annotated[Literal["l2", "linf"], Field(description="what is to be small")] = "l2",
    steps: Annotated[int, Field(ge=1, le=10_000, description="how many steps at most")] = 50,
    overshoot: Annotated[float, Field(ge=0, le=10, description="how far beyond the boundary to go")] = 0.02,
    candidates: Annotated[
        int, Field(ge=2, le=100_000, description="how many of the likeliest classes are considered")
    ] = 10,
) -> AdversarialExamples:
    """Cross the nearest boundary: step to where the model, made linear, would change its mind, until it does.

    x <- x + |f_k| / ||w_k||_2^2 w_k,  f_k = z_k - z_y,  w_k = df_k/dx,  k of the least |f_k| / ||w_k||_2

    and in "linf" |f_k| / ||w_k||_1 sign(w_k), with the least |f_k| / ||w_k||_1. The sum of all steps is
    lengthened by ``overshoot`` and the picture clipped to [0, 1]. Of the classes those ``candidates`` compete
    that the model finds likeliest in the image itself, its own among them. ``images`` (N, C, H, W) in [0, 1],
    ``labels`` (N,). Each image stops where it is taken for another class, at the outset too, and where no
    class's gradient leads anywhere; ``success`` tells which.

    Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, algorithm 2 and section 3.3.
    """
    rows = torch.arange(len(images), device=images.device)
    points, moved = images.clone(), torch.zeros_like(images)
    before = after = rivals = torch.empty(0)
    for step in progress_bar(range(steps + 1), "crossing boundaries"):
        place = points[rows].requires_grad_()
        logits = logits_on_graph(model, place)
        if step == 0:
            before = after = logits.detach()
            rivals = likeliest(before, labels, candidates)
        else:
            after = after.index_copy(0, rows, logits.detach())
        left = unreached(logits, labels[rows], targeted=False)
        if not len(left) or step == steps:
            break
        if len(left) < len(rows):  # a pass more costs less than the way back for those who are done
            rows = rows[left]
            place = points[rows].requires_grad_()
            logits = logits_on_graph(model, place)
        boundary = nearest_boundary(logits, place, labels[rows], rivals[rows], norm)
        found = boundary.far.isfinite()
        rows, change = rows[found], boundary.step(norm)[found]
        if not len(rows):
            break
        moved[rows] += change
        points[rows] = (images[rows] + (1 + overshoot) * moved[rows]).clamp(0, 1)
    return AdversarialExamples.from_logits(model, images, points, labels, before, after, targeted=False)


def likeliest(logits: Tensor, labels: Tensor, candidates: int) -> Tensor:
    """The other classes that compete, (N, k): none where the model knows one class alone."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(candidates, logits.shape[1]) - 1, dim=1).indices


class Boundary(NamedTuple):
    """Of the model made linear the nearest boundary between classes (n,) and one of their rivals (n, k).

    ``gap`` (n,) by how much the rival trails, ``slope`` (n, C, H, W) on which it catches up, ``far`` (n,) how
    far away the boundary is: infinitely where there is none, and the slope is zero. ``leads``, ``steep``
    (n, k) of each rival: by how much it trails, and how steeply that falls, the dual norm of its slope.
    """

    gap: Tensor
    slope: Tensor
    far: Tensor
    leads: Tensor
    steep: Tensor

    def step(self, norm: Norm) -> Tensor:
        """The step to it, (n, C, H, W), none where there is none."""
        size = torch.where(self.far.isfinite(), self.far.clamp(min=_LEAST), 0)[:, None, None, None]
        return size * (unit(self.slope) if norm == "l2" else self.slope.sign())


def nearest_boundary(logits: Tensor, place: Tensor, own: Tensor, rivals: Tensor, norm: Norm) -> Boundary:
    """The nearest of the boundaries of ``own`` with ``rivals``, on the graph from ``place`` to ``logits``."""
    leads = logits.gather(1, own[:, None]) - logits.gather(1, rivals)
    trails, steep = leads.detach(), torch.zeros_like(leads).detach()
    gap, far = torch.zeros_like(logits[:, 0]).detach(), torch.full_like(logits[:, 0], torch.inf).detach()
    slope = torch.zeros_like(place)
    for n in range(rivals.shape[1]):
        (rising,) = torch.autograd.grad(-leads[:, n].sum(), place, retain_graph=n + 1 < rivals.shape[1])
        steep[:, n] = falls = steepness(rising, norm)
        away = torch.where((falls > 0) & falls.isfinite(), trails[:, n].abs() / falls, torch.inf)
        closer = away < far
        gap, far = torch.where(closer, trails[:, n], gap), torch.minimum(away, far)
        slope = torch.where(closer[:, None, None, None], rising, slope)
    return Boundary(gap, slope, far, trails, steep)


@hookimpl
def phosphene_methods():
    return [deepfool]
