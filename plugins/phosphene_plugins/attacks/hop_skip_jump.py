"""HopSkipJump: minimum-norm adversarial examples from predicted classes, by gradient estimates."""

import math
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Model as AnyModel
from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.attacks import l2_norm, normalize_l2
from phosphene.results import AdversarialExamples
from phosphene.roles import Images, Labels, Model, Seed, Start
from phosphene.spec import Cost, InvariantTo, param, size

from ._oracle_models import assert_predictions, constant_model, five_classes, two_classes
from ._parameters import IN_RANGE, MaxQueries, MinimizedNorm, Targeted
from ._query_oracle import QueryOracle
from ._reference_decisions import PlainQueries, hop_skip_jump_of_one_image

#: Directions are drawn in blocks of this size, so that the draws do not depend on the batch size.
_BLOCK = 32
#: How often a step is halved at most.
_HALVINGS = 25


def equals_a_plain_loop_over_each_image() -> None:
    """Within 25 % of the distance (z_y - z_k) / ||w_y - w_k||_q; else algorithm 2 in a plain loop."""
    case = two_classes()
    images, labels = case.images[:1], case.labels[:1]
    gap = case.model(images).detach().diff().abs()[0]
    slopes: dict[MinimizedNorm, Tensor] = {"l2": case.ascent[0].norm(), "linf": case.ascent[0].abs().sum()}
    for norm, slope in slopes.items():
        result = hop_skip_jump(case.model, images, labels, norm=norm, steps=10, max_queries=2000, seed=0)
        ratio = float(result.distance(norm) / (gap / slope))
        assert result.success.all() and 1 <= ratio <= 1.25, f"{ratio} times the nearest ({norm})"
    # Where all directions are of one kind, the estimate is their mean, away from points of the other kind.
    oracle = QueryOracle(case.model, images, labels, targeted=False, norm="l2", max_queries=99)
    points = torch.cat([case.moved(1.0, "l2")[:1], images])
    owners, delta = torch.tensor([0, 0]), torch.full((2, 1, 1, 1), 1e-3, dtype=torch.float64)
    counts, draws = torch.tensor([5, 40]), torch.Generator().manual_seed(0)
    noise = [torch.randn(32, *images.shape[1:], generator=draws) for _ in range(2)]
    units = normalize_l2(torch.cat(noise).double())
    estimate = _estimate_gradient(oracle, points, owners, delta, counts, draws.manual_seed(0))
    torch.testing.assert_close(estimate, torch.stack([units[:5].mean(0), -units[:40].mean(0)]))
    # delta is a d-th of the distance, of which rounding leaves nothing near the image.
    moved = torch.stack([images[0], images[0] + 0.01])
    lengths = torch.tensor([8 * 2**-52 * 18**0.5, 0.01 / 18**0.5], dtype=torch.float64)
    torch.testing.assert_close(_probe_length(2, moved, images).flatten(), lengths, rtol=1e-6, atol=0)
    torch.testing.assert_close(_probe_length(1, moved, images).flatten(), torch.full_like(lengths, 0.1))
    _step_is_halved_until_it_succeeds(case.model, images, labels, case.ascent[:1], float(gap))
    # Without a start an image takes the tries, and no queries more.
    result = hop_skip_jump(constant_model(), images, torch.tensor([0]), max_queries=300, seed=0)
    assert torch.equal(result.adversarial, images)
    assert result.queries is not None and result.queries.tolist() == [101]
    case = five_classes(3, (5, 6))
    case = replace(case, images=(6 * (case.images - 0.5) + 0.5).clamp(0, 1))
    case = replace(case, labels=case.model(case.images).argmax(1))
    starts = case.images.roll(1, 0)
    for norm, targeted, start, max_queries, steps, directions in _ORACLE_CASES:
        labels = case.labels.roll(1) if targeted else case.labels
        result = hop_skip_jump(
            case.model, case.images, labels, start=starts if start else None, norm=norm, steps=steps,
            max_queries=max_queries, first_directions=directions, targeted=targeted, seed=max_queries % 5,
        )  # fmt: skip
        for n, image in enumerate(case.images):
            queries = PlainQueries(
                case.model, image, int(labels[n]), norm=norm, targeted=targeted, max_queries=max_queries
            )
            first = starts[n] if start else None
            expected = hop_skip_jump_of_one_image(queries, first, steps, directions, max_queries % 5)
            torch.testing.assert_close(result.adversarial[n], expected)
            assert result.queries is not None and result.queries[n] == queries.count
        assert_predictions(result, case, labels, targeted=targeted)


def _step_is_halved_until_it_succeeds(
    model: AnyModel, images: Tensor, labels: Tensor, ascent: Tensor, gap: float
) -> None:
    """From twice the distance d of the boundary a step back of 5 d is halved three times, to 5/8 d."""
    point, zero = images + 2 * gap * ascent / ascent.square().sum(), torch.zeros_like(images)
    owner, length = torch.tensor([0]), 5 * gap / ascent.norm()[None]
    back = -ascent / ascent.norm()
    for max_queries, start, direction, moved, queries in (
        (99, point, back, length / 8 * back, 5),
        (4, point, back, zero, 3),  # one query is left for the result
        (99, images, zero, zero, 26),  # never adversarial
    ):
        oracle = QueryOracle(model, images, labels, targeted=False, norm="l2", max_queries=max_queries)
        step = _geometric_step(oracle, start, owner, direction, length)
        torch.testing.assert_close(step, start + moved)
        assert oracle.queries.tolist() == [queries]


#: Norm, targeted, whether from a start, max_queries, steps and directions of comparisons with a plain loop.
_ORACLE_CASES: list[tuple[MinimizedNorm, bool, bool, int, int, int]] = [
    ("l2", False, False, 200, 2, 40),
    ("linf", False, False, 170, 4, 20),
    ("linf", True, True, 152, 4, 20),
    # What the first step takes at least, and one query less.
    ("l2", False, True, 29, 1, 20),
    ("l2", False, True, 28, 1, 20),
]


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
    invariants=IN_RANGE,
    relations=[
        InvariantTo("logit_shift", fields=("adversarial",)),
        InvariantTo("normalization", fields=("adversarial",)),
        InvariantTo("batch_order", fields=("adversarial",)),
    ],
    cost=Cost(forward=size.images * param.max_queries),
    tags=["black-box", "labels-only", "minimum-norm"],
    oracle=equals_a_plain_loop_over_each_image,
    quick={"max_queries": 45, "steps": 1},
    demo={"images": "builtin:scenes/2", "max_queries": 500},
)
def hop_skip_jump(
    model: Model,
    images: Images,
    labels: Labels,
    start: Start = None,
    *,
    norm: MinimizedNorm = "l2",
    max_queries: MaxQueries = 5000,
    steps: Annotated[int, Field(ge=1, le=1000, description="largest number of steps")] = 64,
    first_directions: Annotated[
        int, Field(ge=2, le=10_000, description="number of directions of the first gradient estimate")
    ] = 100,
    targeted: Targeted = False,
    seed: Seed = None,
) -> AdversarialExamples:
    """HopSkipJump: minimum-norm adversarial examples from predicted classes alone (decision-based).

    x_t on the boundary, found by bisection towards the image x, to theta = 1 / (d sqrt d) of the distance;

    v = 1/(B - 1) sum_b (phi(x_t + delta u_b) - mean phi) u_b,  B = first_directions sqrt(t)

    x_(t+1) = bisection of x_t + s v / ||v||,  s = ||x_t - x|| / sqrt(t), halved until it succeeds

    with phi = 1 for an adversarial point, else -1, u_b random unit vectors (normal; uniform in linf, where
    the step is s sign v), d the number of pixel values and delta = ||x_t - x||_2 / d, at first 0.1. Neither
    delta nor theta falls below the precision of the numbers. Every image is attacked independently, with the
    same random draws. It starts at ``start``, an image of each target class (or of any other class), else at
    random noise.

    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,). An image without a start is returned unchanged.

    Returns:
        AdversarialExamples with ``adversarial`` (N, C, H, W), the nearest example, a thousandth further out,
        so that rounding does not undo it; ``success`` (N,); ``queries`` (N,), the image itself included,
        never more than ``max_queries``.

    Raises:
        InputError: ``images``, ``labels`` or ``start`` do not fit the model.

    Example::
        from phosphene import run

        result = run("hop_skip_jump", images="builtin:scenes/2", max_queries=60, seed=0)
        result.distance("l2")  # (2,)

    Source: Chen, Jordan & Wainwright 2020, algorithm 2.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    oracle = QueryOracle(model, images, labels, targeted=targeted, norm=norm, max_queries=max_queries)
    size = images[0].numel()
    precision = max(size**-1.5, 4 * torch.finfo(images.dtype).eps)
    # What a step needs after its gradient estimate: a few halvings and a bisection.
    reserve = 4 + math.ceil(-math.log2(precision))

    points = oracle.find_start(start, seed or 0)
    active = oracle.distances.isfinite().nonzero()[:, 0]
    points[active] = oracle.bisect(points[active], active, precision)
    for step in progress_bar(range(1, steps + 1), "HopSkipJump"):
        # A generator for each step: how many directions other images draw must not change this one's.
        draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        active = (oracle.distances.isfinite() & (oracle.remaining() > reserve + 1)).nonzero()[:, 0]
        if not len(active):
            break
        x, distances = points[active], oracle.distance(points[active], active)
        delta = _probe_length(step, x, images[active])
        count = (oracle.remaining()[active] - reserve).clamp(max=round(first_directions * step**0.5))
        direction = _estimate_gradient(oracle, x, active, delta, count, draws)
        direction = direction.sign() if norm == "linf" else normalize_l2(direction)
        moved = _geometric_step(oracle, x, active, direction, distances / step**0.5)
        points[active] = oracle.bisect(moved, active, precision)
    return oracle.build_result()


def _probe_length(step: int, points: Tensor, images: Tensor) -> Tensor:
    """delta of a step (from 1): the length of the directions tried around the points, (M, 1, 1, 1)."""
    size = points[0].numel()
    delta = 0.1 if step == 1 else l2_norm(points - images) / size
    delta = torch.as_tensor(delta).to(images).clamp(min=8 * torch.finfo(images.dtype).eps * size**0.5)
    return delta.expand(len(points), 1, 1, 1)


def _estimate_gradient(
    oracle: QueryOracle,
    points: Tensor,
    owners: Tensor,
    delta: Tensor,
    count: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The direction (M, C, H, W) of adversarial points, from ``count`` (M,) random directions each."""
    signed_sum, total_sum = torch.zeros_like(points), torch.zeros_like(points)
    phi_sum = torch.zeros_like(delta)
    # equivalent mutants: the batch size does not change the result
    images_per_batch = max(1, oracle.batch_size // _BLOCK)
    for first in range(0, int(count.max()), _BLOCK):
        draw = torch.rand if oracle.norm == "linf" else torch.randn
        noise = draw(_BLOCK, *points.shape[1:], generator=generator).to(points)
        noise = normalize_l2(2 * noise - 1 if oracle.norm == "linf" else noise)
        blocks = [(row, noise[: int(count[row]) - first]) for row in range(len(points)) if count[row] > first]
        for begin in range(0, len(blocks), images_per_batch):
            batch = blocks[begin : begin + images_per_batch]
            rows = torch.tensor([row for row, block in batch for _ in block], device=points.device)
            tried = (points[rows] + delta[rows] * torch.cat([block for _, block in batch])).clamp(0, 1)
            direction = (tried - points[rows]) / delta[rows]
            phi = oracle.query_success(tried, owners[rows]).to(points)[:, None, None, None] * 2 - 1
            signed_sum.index_add_(0, rows, phi * direction)
            total_sum.index_add_(0, rows, direction)
            phi_sum.index_add_(0, rows, phi)
    total = count.to(points)[:, None, None, None]
    mean = phi_sum / total
    # Where all points are of one kind, the mean would cancel them: towards them, or away.
    uniform = mean.abs() == 1
    return torch.where(uniform, mean * total_sum, signed_sum - mean * total_sum) / total


def _geometric_step(
    oracle: QueryOracle, points: Tensor, owners: Tensor, direction: Tensor, size: Tensor
) -> Tensor:
    """The points moved by ``size`` (M,), halved until they are adversarial; else unchanged."""
    # equivalent mutants: the caller's points are a copy already
    moved = points.clone()
    rows = torch.arange(len(points), device=points.device)
    for _ in range(_HALVINGS):
        rows = rows[oracle.remaining()[owners[rows]] > 0]
        if not len(rows):
            break
        tried = (points[rows] + size[rows, None, None, None] * direction[rows]).clamp(0, 1)
        success = oracle.query_success(tried, owners[rows])
        moved[rows[success]] = tried[success]
        rows = rows[~success]
        size = size / 2
    return moved


@hookimpl
def phosphene_methods():
    return [hop_skip_jump]
