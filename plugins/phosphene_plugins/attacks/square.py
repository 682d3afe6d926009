"""Square attack: random squares of colour, kept where the scores fall."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, SameShape, WithinBall, param, size

from ._gradients import cross_entropy, margin
from ._lp_balls import Norm, length, project
from ._query_oracle import Decisions

#: After so many of 10,000 queries the squares' area is halved.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def reaches_the_corner_of_a_linear_model() -> None:
    """On a linear model of two classes the best is clip(x + eps sign(w_other - w_true)), and it is found."""
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]])
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    images = torch.tensor([[[[0.9, 0.1], [0.5, 0.1]]]])
    true = model(images).argmax(1)
    away = (linear.weight[1 - true] - linear.weight[true]).detach().view_as(images)
    corner = (images + 0.1 * away.sign()).clamp(0, 1)
    found = square(model, images, true, eps=0.1, max_queries=200, seed=0)
    assert not found.success.any(), "the corner itself is no adversarial example"
    torch.testing.assert_close(found.adversarial, corner)


@method(
    family="attacks",
    title="Square attack",
    references=[
        Reference(
            key="andriushchenko2020",
            title="Square Attack: a query-efficient black-box adversarial attack via random search",
            authors="Andriushchenko, Croce, Flammarion, Hein",
            year=2020,
            url="https://arxiv.org/abs/1912.00049",
        )
    ],
    invariants=[
        WithinBall(radius="eps", norm="norm"),
        PixelRange(field="adversarial"),
        SameShape(field="adversarial"),
    ],
    cost=Cost(forward=size.images * param.max_queries),
    tags=["black-box", "fixed-radius"],
    oracle=reaches_the_corner_of_a_linear_model,
    quick={"max_queries": 15},
    demo={"max_queries": 1000},
)
def square(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    max_queries: Annotated[
        int, Field(ge=1, le=1_000_000, description="the most pictures shown to the model for one image")
    ] = 5000,
    share: Annotated[
        float, Field(gt=0, le=1, description="of the picture's area that the first squares cover")
    ] = 0.8,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    seed: Seed = None,
) -> AdversarialExamples:
    """Change one random square at a time, as much as the ball allows, and keep what lowers the score.

    linf: x' = clip(P(x_t + c on a square)),  c = -2 eps or 2 eps for each channel;  kept where L(x') < L(x_t)

    with L the margin z_y - max_(k != y) z_k of ``labels`` (targeted: their cross-entropy) and P the
    projection onto the ball around the image; it begins with vertical stripes of +-eps. In "l2" the change's
    own length moves from one square into another, heaped up towards the middles of its two halves, one
    lighter, one darker, and all of it is brought to the length eps; so it is in "l1". The squares' area
    begins at ``share`` of the picture and is halved at 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of
    10,000 queries, or as many of ``max_queries``. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    All images see the same squares. Each stops at its first success; ``queries`` (N,) counts every
    picture that the model was shown, the image among them. An image that is taken for another class
    from the outset (targeted: for the one wanted) comes back as it is, one without success as the best
    change found.

    Source: Andriushchenko et al. 2020, algorithms 1 to 3; in l1 Croce & Hein 2021, section 5.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    found = Decisions(model, images, labels, targeted=targeted, norm=norm, most=max_queries, sure=False)

    def loss(logits: Tensor, who: Tensor) -> Tensor:
        return cross_entropy(logits, labels[who]) if targeted else -margin(logits, labels[who])

    everyone = torch.arange(len(images), device=images.device)
    best, answers, lowest = images.clone(), found.before.clone(), loss(found.before, everyone) + torch.inf
    for query in progress_bar(range(max_queries - 1), "placing squares"):
        area = share / 2 ** sum(query * 10_000 > passed * max_queries for passed in _HALVED_AFTER)
        who = found.left().nonzero()[:, 0]
        if not len(who):
            break
        here = best[who]
        if query == 0:
            tried = _stripes(here, eps, generator) if norm == "linf" else _tiles(here, eps, norm, generator)
        elif norm == "linf":
            tried = _colour(here, area, eps, generator)
        else:
            tried = _heap(here, images[who], area, eps, norm, generator)
        tried = project(tried, images[who], eps, norm)
        logits = found.answers(tried, who)
        values = loss(logits, who)
        better = who[(lower := values < lowest[who])]
        best[better], answers[better], lowest[better] = tried[lower], logits[lower], values[lower]
    return found.examples(best, answers)


def _random(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _signs(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(2, shape, generator=generator) * 2.0 - 1


def _side(area: float, images: Tensor, least: int) -> int:
    """The side of a square of this share of the picture's area, and no larger than the picture."""
    height, width = images.shape[2:]
    return min(max(round(math.sqrt(area * height * width)), least), height, width)


def _place(images: Tensor, side: int, generator: Generator) -> tuple[slice, slice]:
    top, left = (_random(extent - side + 1, generator) for extent in images.shape[2:])
    return slice(top, top + side), slice(left, left + side)


def _stripes(images: Tensor, eps: float, generator: Generator) -> Tensor:
    """Each column of each channel lighter or darker by ``eps``."""
    return images + eps * _signs(generator, 1, images.shape[1], 1, images.shape[3]).to(images)


def _colour(points: Tensor, area: float, eps: float, generator: Generator) -> Tensor:
    """Each channel of a square lighter or darker by the ball's whole width."""
    rows, columns = _place(points, _side(area, points, 1), generator)
    changed = points.clone()
    changed[:, :, rows, columns] += 2 * eps * _signs(generator, 1, points.shape[1], 1, 1).to(points)
    return changed


def _tiles(images: Tensor, eps: float, norm: Norm, generator: Generator) -> Tensor:
    """Five by five heaps over the whole picture, of length ``eps`` together."""
    height, width = images.shape[2:]
    side = max(1, min(height, width) // 5)
    delta = torch.zeros(1, *images.shape[1:])
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            signs = _signs(generator, 1, images.shape[1], 1, 1)
            delta[:, :, top : top + side, left : left + side] = _heaped(side, generator) * signs
    delta = delta.to(images)
    return images + eps * _at_unit_length(delta, norm)


def _heap(
    points: Tensor, images: Tensor, area: float, eps: float, norm: Norm, generator: Generator
) -> Tensor:
    """A heap on one square, made of its own change, of another square's, and of what is left of ``eps``."""
    side = _side(area, points, 3)
    here, there = _place(points, side, generator), _place(points, side, generator)
    signs = _signs(generator, 1, points.shape[1], 1, 1)
    heap = (_heaped(side, generator) * signs).to(points)
    delta = points - images
    inside = torch.zeros_like(delta[:1, :1], dtype=torch.bool)
    inside[:, :, *here] = inside[:, :, *there] = True
    power = 2 if norm == "l2" else 1

    def mass(numbers: Tensor) -> Tensor:
        return numbers.abs().pow(power).sum((2, 3), keepdim=True)

    # Per channel: what the two squares hold, and an equal share of what the clipping had taken.
    spare = (eps**power - mass(delta).sum(1, keepdim=True)).clamp(min=0) / points.shape[1]
    new = heap / mass(heap) ** (1 / power) + _at_unit_length(delta[:, :, *here], norm)
    new = new * ((mass(delta * inside) + spare) / mass(new).clamp(min=1e-12)) ** (1 / power)
    delta = delta.clone()
    delta[:, :, *there] = 0
    delta[:, :, *here] = new
    return images + eps * _at_unit_length(delta, norm)


def _at_unit_length(delta: Tensor, norm: Norm) -> Tensor:
    size = length(delta) if norm == "l2" else delta.abs().sum((1, 2, 3), keepdim=True)
    return delta / size.clamp(min=1e-12)


def _heaped(side: int, generator: Generator) -> Tensor:
    """(side, side) of unit length: one half rises towards its middle, the other falls; upright or lying."""
    halves = []
    for sign, rows in ((1, side // 2), (-1, side - side // 2)):
        y, x = torch.arange(rows)[:, None], torch.arange(side)[None, :]
        rings = torch.maximum((y - rows // 2).abs(), (x - side // 2).abs())
        # A place in ring r is in every square around the middle from the r-th on, which weighs 1 / (r + 1)^2.
        weights = 1 / torch.arange(1.0, max(rows, side) // 2 + 2).square()
        halves.append(sign * weights.flip(0).cumsum(0).flip(0)[rings.clamp(max=len(weights) - 1)])
    heap = torch.cat(halves)
    heap = heap / heap.square().sum().sqrt()
    return heap.T if _random(2, generator) else heap


@hookimpl
def phosphene_methods():
    return [square]
