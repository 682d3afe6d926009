"""Square attack: black-box adversarial examples by random search over squares, from the model's scores."""

import math
from dataclasses import replace
from itertools import product
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import l2_norm, project
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, InvariantTo, Monotone, param, size

from ._losses import cross_entropy, margin
from ._oracle_models import assert_predictions, five_classes, two_classes
from ._parameters import IN_BALL, Eps, MaxQueries, Norm, Targeted
from ._query_oracle import QueryOracle
from ._reference_attacks import square_of_one_image

#: The area of the squares is halved after so many of 10,000 queries.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def equals_a_plain_search_for_each_image() -> None:
    """The corner on two classes; else each image's result is that of algorithm 1 in a plain loop."""
    case = two_classes(margin=3.0)
    result = square(case.model, case.images[:1], case.labels[:1], eps=0.01, max_queries=200, seed=0)
    torch.testing.assert_close(result.adversarial, case.moved(0.01, "linf")[:1])
    case = five_classes(2, (11, 17))
    case = replace(case, images=(6 * (case.images - 0.5) + 0.5).clamp(0, 1))
    radii: tuple[tuple[Norm, float], ...] = (("linf", 0.006), ("l2", 0.4), ("l1", 3.0), ("linf", 0.5))
    for (norm, eps), targeted in product(radii, (False, True)):
        case = replace(case, labels=(case.model(case.images).argmax(1) + targeted) % 5)
        result = square(
            case.model, case.images, case.labels, eps=eps, norm=norm, max_queries=21, initial_area=0.9,
            targeted=targeted, seed=int(targeted),
        )  # fmt: skip
        areas = [_area(0.9, query, 21) for query in range(20)]
        for n in range(2):
            generator = Generator().manual_seed(int(targeted))
            expected, queries = square_of_one_image(case, n, eps, norm, areas, targeted, generator)
            torch.testing.assert_close(result.adversarial[n], expected)
            assert result.queries is not None and result.queries[n] == queries
        assert_predictions(result, case, targeted=targeted)
    areas = [_area(1.0, query, 10_000) for query in range(10_000)]
    assert [n for n in range(1, 10_000) if 2 * areas[n] == areas[n - 1]] == [
        11,
        51,
        201,
        501,
        1001,
        2001,
        4001,
        6001,
        8001,
    ]


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
    invariants=IN_BALL,
    relations=[
        InvariantTo("normalization", fields=("adversarial",)),
        InvariantTo("logit_shift", fields=("adversarial",)),
        InvariantTo("batch_order", fields=("adversarial",)),
        Monotone("eps", values=(0.001, 0.003, 0.01), measure="loss"),
    ],
    cost=Cost(forward=size.images * param.max_queries),
    tags=["black-box", "fixed-radius"],
    oracle=equals_a_plain_search_for_each_image,
    quick={"max_queries": 15},
    demo={"max_queries": 1000},
)
def square(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    eps: Eps = 8 / 255,
    norm: Norm = "linf",
    max_queries: MaxQueries = 5000,
    initial_area: Annotated[
        float, Field(gt=0, le=1, description="area of the first squares, as a fraction of the image")
    ] = 0.8,
    targeted: Targeted = False,
    seed: Seed = None,
) -> AdversarialExamples:
    """Square attack: black-box adversarial examples inside an l_p ball, by random search over squares.

    linf: x' = clip(P(x_t + c on a square)),  c = +-2 eps for each channel;  accepted if L(x') < L(x_t)

    with L the margin z_y - max_(k != y) z_k of ``labels`` (targeted: their cross-entropy) and P the
    projection onto the ball around the image; it begins with vertical stripes of +-eps. In "l2" and "l1" the
    perturbation of one square is moved into another one, in the shape of two concentric bumps of opposite
    sign, and the entire perturbation is scaled to the norm eps. The area of the squares begins at
    ``initial_area`` and is halved at 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries, in
    proportion to ``max_queries``. All images share the same squares.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,).

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W) inside the ball: the first adversarial point,
        else the point of lowest L; ``success`` (N,); ``queries`` (N,), the image itself included, never more
        than ``max_queries``.

    Raises:
        InputError: ``images`` and ``labels`` do not fit the model.

    Example::
        from phosphene import run

        result = run("square", images="builtin:scenes/2", max_queries=50, seed=0)
        result.queries  # (2,)

    Source: Andriushchenko et al. 2020, algorithms 1 to 3; in l1 Croce & Hein 2021, section 5.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    oracle = QueryOracle(
        model, images, labels, targeted=targeted, norm=norm, max_queries=max_queries, confirm=False
    )

    def loss(logits: Tensor, indices: Tensor) -> Tensor:
        return cross_entropy(logits, labels[indices]) if targeted else -margin(logits, labels[indices])

    best, best_logits = images.clone(), oracle.before.clone()
    best_loss = oracle.before.new_full((len(images),), torch.inf)
    # equivalent mutants: it ends where no image has a query left
    for query in progress_bar(range(max_queries - 1), "square attack"):
        area = _area(initial_area, query, max_queries)
        active = oracle.remaining().nonzero()[:, 0]
        if not len(active):
            break
        x = best[active]
        if query == 0:
            tried = _stripes(x, eps, generator) if norm == "linf" else _bump_grid(x, eps, norm, generator)
        elif norm == "linf":
            tried = _shift_square(x, area, eps, generator)
        else:
            tried = _move_bump(x, images[active], area, eps, norm, generator)
        tried = project(tried, images[active], eps, norm)
        logits = oracle.query(tried, active)
        losses = loss(logits, active)
        better = losses < best_loss[active]
        best[active[better]], best_logits[active[better]] = tried[better], logits[better]
        best_loss[active[better]] = losses[better]
    return oracle.build_result(best, best_logits)


def _area(initial: float, query: int, max_queries: int) -> float:
    """The squares' area at this query, as a fraction of the image."""
    return initial / 2 ** sum(query * 10_000 > limit * max_queries for limit in _HALVED_AFTER)


def _random_int(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _random_signs(generator: Generator, *shape: int) -> Tensor:
    return torch.randint(2, shape, generator=generator) * 2.0 - 1


def _square_side(area: float, images: Tensor, smallest: int) -> int:
    """The side of a square whose area is this fraction of the image, no larger than the image."""
    height, width = images.shape[2:]
    return min(max(round(math.sqrt(area * height * width)), smallest), height, width)


def _random_square(images: Tensor, side: int, generator: Generator) -> tuple[slice, slice]:
    top, left = (_random_int(extent - side + 1, generator) for extent in images.shape[2:])
    return slice(top, top + side), slice(left, left + side)


def _stripes(images: Tensor, eps: float, generator: Generator) -> Tensor:
    """Each column of each channel shifted by +-``eps``."""
    # equivalent mutants: a sign is its own inverse
    return images + eps * _random_signs(generator, 1, images.shape[1], 1, images.shape[3]).to(images)


def _shift_square(points: Tensor, area: float, eps: float, generator: Generator) -> Tensor:
    """Each channel of a square shifted by the ball's diameter, +-2 ``eps``."""
    rows, columns = _random_square(points, _square_side(area, points, 1), generator)
    # equivalent mutants: the caller's points are a copy already
    shifted = points.clone()
    # equivalent mutants: a longer shift is projected onto the ball
    shifted[:, :, rows, columns] += 2 * eps * _random_signs(generator, 1, points.shape[1], 1, 1).to(points)
    return shifted


def _bump_grid(images: Tensor, eps: float, norm: Norm, generator: Generator) -> Tensor:
    """Five by five bumps over the image, of norm ``eps`` together."""
    height, width = images.shape[2:]
    side = max(1, min(height, width) // 5)
    delta = torch.zeros(1, *images.shape[1:])
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            signs = _random_signs(generator, 1, images.shape[1], 1, 1)
            # equivalent mutants: a sign is its own inverse
            delta[:, :, top : top + side, left : left + side] = _bump(side, generator) * signs
    return images + eps * _normalize(delta.to(images), norm)


def _move_bump(
    points: Tensor, images: Tensor, area: float, eps: float, norm: Norm, generator: Generator
) -> Tensor:
    """A bump on one square, from its own perturbation, another square's, and what is left of ``eps``."""
    side = _square_side(area, points, 3)
    target, source = _random_square(points, side, generator), _random_square(points, side, generator)
    signs = _random_signs(generator, 1, points.shape[1], 1, 1)
    # equivalent mutants: a sign is its own inverse
    bump = (_bump(side, generator) * signs).to(points)
    delta = points - images
    inside = torch.zeros_like(delta[:1, :1])
    inside[:, :, *target] = inside[:, :, *source] = 1
    power = 2 if norm == "l2" else 1

    def mass(values: Tensor) -> Tensor:
        return values.abs().pow(power).sum((2, 3), keepdim=True)

    # Per channel: the mass of both squares, and an equal share of what clipping to the pixel range removed.
    # equivalent mutants: the projection leaves the norm below eps
    spare = (eps**power - mass(delta).sum(1, keepdim=True)).clamp(min=0) / points.shape[1]
    # equivalent mutants: the bump's mass is 1 in l2
    new = bump / mass(bump) ** (1 / power) + _normalize(delta[:, :, *target], norm)
    new = new * ((mass(delta * inside) + spare) / mass(new).clamp(min=1e-12)) ** (1 / power)
    delta[:, :, *source] = 0
    delta[:, :, *target] = new
    return images + eps * _normalize(delta, norm)


def _normalize(delta: Tensor, norm: Norm) -> Tensor:
    size = l2_norm(delta) if norm == "l2" else delta.abs().sum((1, 2, 3), keepdim=True)
    return delta / size.clamp(min=1e-12)


def _bump(side: int, generator: Generator) -> Tensor:
    """(side, side) of unit l2 norm: one half rises towards its center, the other falls; upright or lying."""
    halves = []
    for sign, rows in ((1, side // 2), (-1, side - side // 2)):
        y, x = torch.arange(rows)[:, None], torch.arange(side)[None, :]
        rings = torch.maximum((y - rows // 2).abs(), (x - side // 2).abs())
        # A pixel in ring r lies in all squares around the center from the r-th on, of weights 1 / (r + 1)^2.
        weights = 1 / torch.arange(1.0, side // 2 + 2).square()
        halves.append(sign * weights.flip(0).cumsum(0).flip(0)[rings])
    bump = torch.cat(halves)
    # equivalent mutants: a factor of all bumps cancels, in the grid and where the mass is set
    bump = bump / bump.square().sum().sqrt()
    return bump.T if _random_int(2, generator) else bump


@hookimpl
def phosphene_methods():
    return [square]
