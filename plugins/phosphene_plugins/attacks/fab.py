"""FAB: along the boundary of the model made linear, and drawn to the image all the time."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, SameShape, either, maximum, param, size

from ._gradients import TargetClasses, judged, reached, unreached
from ._hyperplane_projection import onto_plane
from ._lp_balls import Norm, distance, drawn_back, random_point
from .deepfool import likeliest, nearest_boundary

#: How often the last picture's way back to the image is halved.
_HALVINGS = 10
#: Where nothing is known yet a random start lies in a ball of this radius.
_START: dict[Norm, float] = {"linf": 0.3, "l2": 1.0, "l1": 5.0}


def finds_the_nearest_boundary_that_the_pixel_range_allows() -> None:
    """On a linear model (z_y - z_k) / ||w_k - w_y||_q over the pixels that are not yet at their bounds."""
    linear = nn.Linear(12, 2).double()
    away = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    linear.weight.data = torch.stack([torch.zeros(12), away]).double()
    stuck = torch.arange(12) % 3 == 0
    image = torch.where(stuck, (away > 0).double(), 0.5)
    linear.bias.data = torch.tensor([0.0, -float(away @ image) - 0.2], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2))
    free = away[~stuck]
    norms: list[tuple[Norm, float]] = [("linf", 1.0), ("l2", 2.0), ("l1", torch.inf)]
    for norm, dual in norms:
        least = 0.2 / float(free.norm(dual))
        found = fab(model, image.view(1, 3, 2, 2), torch.tensor([0]), norm=norm, steps=10, seed=0)
        assert found.success.all()
        assert 1 <= float(found.distance(norm)) / least < 1.002, (norm, found.distance(norm), least)


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
    invariants=[PixelRange(field="adversarial"), SameShape(field="adversarial")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (2 * param.restarts * maximum(1, param.target_classes) * param.steps + (_HALVINGS + 2)),
        backward=size.images
        * param.restarts
        * either(param.target_classes, param.candidates - 1)
        * param.steps,
    ),
    tags=["white-box", "minimum-norm"],
    oracle=finds_the_nearest_boundary_that_the_pixel_range_allows,
    quick={"steps": 2, "candidates": 3, "restarts": 2, "target_classes": 0},
    demo={"images": "builtin:scenes/3", "steps": 20},
)
def fab(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    norm: Annotated[Norm, Field(description="what is to be small")] = "linf",
    steps: Annotated[int, Field(ge=1, le=10_000, description="how many steps")] = 100,
    restarts: Annotated[int, Field(ge=1, le=1000, description="all but the first from a random point")] = 1,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    target_classes: TargetClasses = 0,
    candidates: Annotated[
        int, Field(ge=2, le=100_000, description="how many of the likeliest classes compete else")
    ] = 10,
    alpha: Annotated[float, Field(ge=0, le=1, description="how strongly it is drawn to the image")] = 0.1,
    beta: Annotated[float, Field(gt=0, lt=1, description="what is kept of the way at a success")] = 0.9,
    eta: Annotated[float, Field(ge=1, le=10, description="how far beyond the boundary to step")] = 1.05,
    seed: Seed = None,
) -> AdversarialExamples:
    """Step onto the boundary of the model made linear, from here and from the image, and mix the two.

    x <- clip((1 - a) (x + eta d) + a (x_0 + eta d_0)),  a = min(||d|| / (||d|| + ||d_0||), alpha)

    with d and d_0 the smallest changes of x and of the image x_0 that lie on the nearest boundary of the
    model made linear at x, and in the range of pixels. A point that is taken for another class is kept if it
    is the nearest so far, and the next step begins on the way back: x <- x_0 + beta (x - x_0). Of the classes
    those ``candidates`` compete that the model finds likeliest in the image itself. With
    ``target_classes`` (FAB-T) only one competes at a time, each of so many in its turn, which takes one
    gradient a step and not one for each candidate. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    All ``restarts`` but the first begin at a random point, half as far away as what was found. What was
    found last is drawn back towards the image for as long as it stays adversarial, by bisection (in
    the paper three steps of a search). An image that is taken for another class from the outset
    (targeted: for the one wanted) comes back as it is, and one for which nothing was found, too.

    Source: Croce & Hein 2020, algorithm 1 and section 3; FAB-T: Croce & Hein 2020b, section 5.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        before = model(images)
    rows = unreached(before, labels, targeted)
    some, theirs = images[rows], labels[rows]
    rivals = likeliest(before[rows], theirs, candidates)
    turns = [rivals]
    if target_classes and not targeted:
        turns = list(likeliest(before[rows], theirs, target_classes + 1).split(1, dim=1))
    best, nearest = some.clone(), torch.full_like(before[rows, 0], torch.inf)
    for restart in range(restarts):
        for competing in turns:
            start = some
            if restart:
                radius = torch.where(nearest.isfinite(), nearest, _START[norm]) / 2
                start = random_point(some, radius[:, None, None, None], norm, generator)
            points, far = _along_the_boundary(
                model, some, theirs, competing, start, norm=norm, steps=steps, targeted=targeted,
                alpha=alpha, beta=beta, eta=eta,
            )  # fmt: skip
            closer = far < nearest
            best[closer], nearest[closer] = points[closer], far[closer]
    found = nearest.isfinite()

    def holds(points: Tensor) -> Tensor:
        with torch.no_grad():
            return reached(model(points), theirs[found], targeted)

    best[found] = drawn_back(best[found], some[found], norm, holds, _HALVINGS)
    return judged(model, images, images.index_copy(0, rows, best), labels, before, targeted=targeted)


def _along_the_boundary(
    model: AnyModel,
    images: Tensor,
    labels: Tensor,
    rivals: Tensor,
    x: Tensor,
    *,
    norm: Norm,
    steps: int,
    targeted: bool,
    alpha: float,
    beta: float,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """One walk from ``x``: the nearest examples (n, C, H, W) and how far they are, or infinity."""
    best, nearest = images.clone(), images.new_full((len(images),), torch.inf)
    rows = torch.arange(len(images), device=images.device)
    for _ in progress_bar(range(steps), "along the boundary"):
        if not len(rows):
            break
        place = x.detach().requires_grad_()
        logits = model(place)
        own, other = labels[rows], rivals[rows]
        if targeted:  # the boundary to the class wanted, of whichever class stands before it
            own, other = logits.detach().scatter(1, own[:, None], -torch.inf).argmax(1), own[:, None]
        gap, slope, way, *_ = nearest_boundary(logits, place, own, other, norm)
        if not (there := way.isfinite()).all():  # nothing leads anywhere
            rows, x, gap, slope = rows[there], x[there], gap[there], slope[there]
            if not len(rows):
                break
        image = images[rows]
        rise = torch.cat([gap, gap + (slope * (x - image)).sum((1, 2, 3))])
        changes = onto_plane(torch.cat([x, image]), torch.cat([slope, slope]), rise, norm)
        sizes = distance(changes, torch.zeros_like(changes), norm)
        (d, d_0), (size, size_0) = changes.chunk(2), sizes.chunk(2)
        share = size / (size + size_0).clamp(min=torch.finfo(x.dtype).tiny)
        a = share.clamp(max=alpha)[:, None, None, None]
        x = ((1 - a) * (x + eta * d) + a * (image + eta * d_0)).clamp(0, 1)
        with torch.no_grad():
            won = reached(model(x), labels[rows], targeted)
        far = distance(x, image, norm)
        closer = won & (far < nearest[rows])
        best[rows[closer]], nearest[rows[closer]] = x[closer], far[closer]
        x = torch.where(won[:, None, None, None], image + beta * (x - image), x)
    return best, nearest


@hookimpl
def phosphene_methods():
    return [fab]
