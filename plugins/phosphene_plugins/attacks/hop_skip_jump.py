"""HopSkipJump: a small change that changes the answer, found from answers alone, along the boundary."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Reference, hookimpl, load_model, method, progress_bar
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed, Start
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._lp_balls import length, unit
from ._query_oracle import Decisions

#: So many directions are drawn at once, whatever fits into a batch, so that the draws are always the same.
_DRAWN = 32
#: How often a step is halved before it is given up.
_HALVINGS = 25


def comes_near_the_boundary_of_a_linear_model() -> None:
    """Within 15 % of the distance to where two classes are level: (z_y - z_k) / ||w_y - w_k||, dual norm."""
    weight = torch.randn(48, generator=torch.Generator().manual_seed(1))
    images = 0.5 + 0.05 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))

    def label(pictures: Tensor) -> Tensor:
        return ((pictures - 0.5).flatten(1) @ weight > 0.5).long()

    model = load_model(label, input_size=(3, 4, 4), classes=["below", "above"])
    off = ((images - 0.5).flatten(1) @ weight - 0.5).abs()
    ways: tuple[tuple[Literal["l2", "linf"], Tensor], ...]
    ways = (("l2", off / weight.norm()), ("linf", off / weight.abs().sum()))
    for norm, nearest in ways:
        found = hop_skip_jump(
            model, images, label(images), norm=norm, steps=25, max_queries=20_000, seed=0
        )  # fmt: skip
        assert found.success.all()
        ratio = found.distance(norm) / nearest
        assert ratio.min() >= 1 and ratio.max() <= 1.15, f"{ratio.tolist()} times the nearest ({norm})"


@method(
    family="attacks",
    title="HopSkipJump",
    references=[
        Reference(
            key="chen2020",
            title="HopSkipJumpAttack: A Query-Efficient Decision-Based Attack",
            authors="Chen, Jordan, Wainwright",
            year=2020,
            url="https://arxiv.org/abs/1904.02144",
        )
    ],
    invariants=[PixelRange(field="adversarial"), SameShape(field="adversarial")],
    cost=Cost(forward=size.images * param.max_queries),
    tags=["black-box", "labels-only", "minimum-norm"],
    oracle=comes_near_the_boundary_of_a_linear_model,
    quick={"max_queries": 45, "steps": 1},
    demo={"images": "builtin:scenes/2", "max_queries": 500},
)
def hop_skip_jump(
    model: Model,
    images: Images,
    labels: Labels,
    start: Start = None,
    *,
    norm: Annotated[Literal["l2", "linf"], Field(description="what is to be small")] = "l2",
    max_queries: Annotated[
        int, Field(ge=1, le=1_000_000, description="the most pictures shown to the model for one image")
    ] = 5000,
    steps: Annotated[int, Field(ge=1, le=1000, description="the most jumps")] = 64,
    first_directions: Annotated[
        int, Field(ge=2, le=10_000, description="directions that the first gradient is estimated from")
    ] = 100,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    seed: Seed = None,
) -> AdversarialExamples:
    """Walk along the boundary towards the image, asking only which class the model sees.

    x_t on the boundary, found by bisection towards the image x, to theta = 1 / (d sqrt d) of the way;

    v = 1/(B - 1) sum_b (phi(x_t + delta u_b) - mean phi) u_b,  B = first_directions sqrt(t)

    x_(t+1) = bisection of x_t + s v / ||v||,  s = ||x_t - x|| / sqrt(t), halved until it succeeds

    with phi = 1 where the model says what is wanted, else -1, u_b random unit vectors (normal; uniform
    in linf, where the step is s sign v), d the number of pixels' values and delta = ||x_t - x||_2 / d, at
    first 0.1. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). All of it for each image alone, with the
    same draws.

    The search begins at ``start``, a picture of each wanted class, or where there is none at random
    noise; an image for which no such picture is found comes back as it is, and so does one that is taken
    for another class from the outset (targeted: for the one wanted). ``adversarial`` is the nearest
    picture met, a thousandth further out, so that rounding does not take it back. ``queries`` (N,) counts
    every picture that the model was shown, never more than ``max_queries``. Neither delta nor theta goes
    below what the numbers' precision can tell apart.

    Source: Chen, Jordan & Wainwright 2020, algorithm 2.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    found = Decisions(model, images, labels, targeted=targeted, norm=norm, most=max_queries)
    size = images[0].numel()
    finest = torch.finfo(images.dtype).eps
    precision = max(size**-1.5, 4 * finest)
    # What a jump needs after its gradient: a few halvings and a bisection.
    reserve = 4 + math.ceil(-math.log2(precision))

    points = found.begin(start, seed or 0)
    who = found.reach.isfinite().nonzero()[:, 0]
    points[who] = found.bisect(points[who], who, precision)
    for step in progress_bar(range(1, steps + 1), "jumping"):
        # Each step draws from its own generator: how many directions others ask for changes nothing.
        draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        who = (found.reach.isfinite() & (found.left() > reserve + 1)).nonzero()[:, 0]
        if not len(who):
            break
        here, far = points[who], found.distance(points[who], who)
        delta = 0.1 if step == 1 else length(here - images[who]) / size
        delta = torch.as_tensor(delta).to(images).clamp(min=8 * finest * size**0.5).expand(len(who), 1, 1, 1)
        count = (found.left()[who] - reserve).clamp(max=round(first_directions * step**0.5))
        way = _estimate(found, here, who, delta, count, draws)
        way = way.sign() if norm == "linf" else unit(way)
        jumped = _jump(found, here, who, way, far / step**0.5)
        there = found.bisect(jumped, who, precision)
        points[who] = there
    return found.examples()


def _estimate(
    found: Decisions, points: Tensor, owners: Tensor, delta: Tensor, count: Tensor, generator: torch.Generator
) -> Tensor:
    """The direction (M, C, H, W) in which the wanted answers lie, from ``count`` (M,) random ones each."""
    won_sum, sum_all, wins = torch.zeros_like(points), torch.zeros_like(points), torch.zeros_like(delta)
    together = max(1, found.size // _DRAWN)
    for first in range(0, int(count.max()), _DRAWN):
        drawn = torch.rand if found.norm == "linf" else torch.randn
        noise = drawn(_DRAWN, *points.shape[1:], generator=generator).to(points)
        noise = unit(2 * noise - 1 if found.norm == "linf" else noise)
        asked = [(row, noise[: int(count[row]) - first]) for row in range(len(points)) if count[row] > first]
        for begin in range(0, len(asked), together):
            some = asked[begin : begin + together]
            rows = torch.tensor([row for row, part in some for _ in part], device=points.device)
            tried = (points[rows] + delta[rows] * torch.cat([part for _, part in some])).clamp(0, 1)
            moved = (tried - points[rows]) / delta[rows]
            won = found.ask(tried, owners[rows]).to(points)[:, None, None, None] * 2 - 1
            won_sum.index_add_(0, rows, won * moved)
            sum_all.index_add_(0, rows, moved)
            wins.index_add_(0, rows, won)
    total = count.to(points)[:, None, None, None]
    mean = wins / total
    # All alike: straight towards them, or away.
    alike = mean.abs() == 1
    return torch.where(alike, mean * sum_all, won_sum - mean * sum_all) / total


def _jump(found: Decisions, points: Tensor, owners: Tensor, way: Tensor, far: Tensor) -> Tensor:
    """The points moved ``far`` (M,) along ``way``, half as far until it succeeds; else where they were."""
    landed = points.clone()
    rows = torch.arange(len(points), device=points.device)
    for _ in range(_HALVINGS):
        rows = rows[found.left()[owners[rows]] > 0]
        if not len(rows):
            break
        tried = (points[rows] + far[rows, None, None, None] * way[rows]).clamp(0, 1)
        won = found.ask(tried, owners[rows])
        landed[rows[won]] = tried[won]
        rows = rows[~won]
        far = far / 2
    return landed


@hookimpl
def phosphene_methods():
    return [hop_skip_jump]
