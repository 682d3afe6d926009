"""l_p balls, steepest directions and the success criterion, on random vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phosphene.attacks import (
    Norm,
    build_result,
    distance,
    dual_norm,
    is_adversarial,
    normalize_l2,
    not_adversarial,
    per_image,
    project,
    random_point,
    shrink_to_boundary,
    steepest,
)
from phosphene.testing import linear_model

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
ORDERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
norms = st.sampled_from(NORMS)
seeds = st.integers(0, 10_000)
radii = st.sampled_from([1e-3, 0.05, 0.3, 1.0, 4.0])
dtypes = st.sampled_from([torch.float32, torch.float64])
quick = settings(max_examples=40, deadline=None)


def draw(seed: int, dtype: torch.dtype = torch.float64, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """Images with pixels at 0 and 1 and inside, and points around them."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(3, 2, 3, 4, generator=generator, dtype=dtype) * 1.6 - 0.3).clamp(0, 1)
    return images, images + spread * torch.randn(images.shape, generator=generator, dtype=dtype)


def sizes(change: Tensor, norm: Norm) -> Tensor:
    return change.double().flatten(1).norm(ORDERS[norm], dim=1)


@quick
@given(seeds, norms, radii, dtypes)
def test_projection_is_inside_ball_and_pixel_range(seed: int, norm: Norm, eps: float, dtype) -> None:
    images, points = draw(seed, dtype)
    projected = project(points, images, eps, norm)
    assert projected.min() >= 0 and projected.max() <= 1 and projected.dtype == dtype
    assert (sizes(projected - images, norm) <= eps).all()
    again = project(projected, images, eps, norm)
    torch.testing.assert_close(again, projected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@quick
@given(seeds, norms)
def test_points_inside_are_unchanged(seed: int, norm: Norm) -> None:
    images, points = draw(seed, spread=0.01)
    inside = points.clamp(0, 1)
    torch.testing.assert_close(project(inside, images, 4.0, norm), inside, rtol=0, atol=1e-15)


@quick
@given(seeds, norms, radii)
def test_projection_is_the_nearest_point(seed: int, norm: Norm, eps: float) -> None:
    """No point of ball and pixel range is nearer: <points - P, q - P> <= 0 for every such q.

    In l2 clipping follows the projection onto the ball, so pixels are chosen far from their bounds there.
    """
    images, points = draw(seed)
    if norm == "l2":
        images, eps = 0.4 + 0.2 * images, min(eps, 0.3)
    projected = project(points, images, eps, norm)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(20):
        other = random_point(images, eps, norm, generator)
        products = ((points - projected) * (other - projected)).flatten(1).sum(1)
        assert (products <= 1e-9).all()


@quick
@given(seeds, norms)
def test_each_image_has_its_own_radius(seed: int, norm: Norm) -> None:
    images, points = draw(seed)
    eps = torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64)
    together = project(points, images, per_image(eps), norm)
    for n in range(3):
        alone = project(points[n : n + 1], images[n : n + 1], float(eps[n]), norm)
        torch.testing.assert_close(together[n : n + 1], alone)


@quick
@given(seeds, norms)
def test_distance_and_dual_norm(seed: int, norm: Norm) -> None:
    """|<g, d>| <= ||g||_q ||d||_p, with equality for the steepest direction."""
    images, points = draw(seed)
    gradient, change = points, (points - images).flip(0)
    torch.testing.assert_close(distance(images + change, images, norm), sizes(change, norm))
    largest = dual_norm(gradient, norm)
    torch.testing.assert_close(
        largest, gradient.flatten(1).norm({"l1": torch.inf, "l2": 2.0, "linf": 1.0}[norm], dim=1)
    )
    assert ((gradient * change).flatten(1).sum(1).abs() <= largest * sizes(change, norm) + 1e-12).all()
    step = steepest(gradient, norm)
    torch.testing.assert_close(sizes(step, norm), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close((gradient * step).flatten(1).sum(1), largest)


def test_l1_step_moves_the_largest_hundredth() -> None:
    gradient = torch.arange(1.0, 301).flip(0).view(1, 3, 10, 10) * -1
    step = steepest(gradient, "l1").flatten()
    assert step[:3].tolist() == pytest.approx([-1 / 3] * 3) and not step[3:].any()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e25])
def test_unit_vectors_of_tiny_and_huge_gradients(size: float) -> None:
    gradient = size * torch.tensor([3.0, -4.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(normalize_l2(gradient).flatten(), torch.tensor([0.6, -0.8]))
    torch.testing.assert_close(dual_norm(gradient, "l2"), torch.tensor([5 * size]))
    assert not normalize_l2(gradient * 0).any() and not steepest(gradient * 0, "linf").any()


@quick
@given(seeds, norms, radii)
def test_random_points_share_one_offset(seed: int, norm: Norm, eps: float) -> None:
    images, _ = draw(seed)
    points = random_point(images, eps, norm, torch.Generator().manual_seed(seed))
    assert (sizes(points - images, norm) <= eps).all() and points.min() >= 0 and points.max() <= 1
    for n in range(3):
        alone = random_point(images[n : n + 1], eps, norm, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(points[n : n + 1], alone)


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_are_uniform(norm: Norm) -> None:
    """In two dimensions the fraction within r eps is r^2, and each quadrant has a quarter."""
    image = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    changes = torch.cat([random_point(image, 0.2, norm, generator) - image for _ in range(2000)])
    fraction = sizes(changes, norm) / 0.2
    for r in (0.25, 0.5, 0.75):
        assert float((fraction <= r).double().mean()) == pytest.approx(r**2, abs=0.035)
    quadrant = (changes.flatten(1) > 0).long() @ torch.tensor([1, 2])
    assert quadrant.bincount(minlength=4).double().div(2000).sub(0.25).abs().max() < 0.035


@quick
@given(seeds, norms, st.floats(0.05, 0.95))
def test_shrinking_ends_at_the_boundary(seed: int, norm: Norm, fraction: float) -> None:
    images, points = draw(seed)
    points = points.clamp(0, 1)
    full = distance(points, images, norm)
    limit = fraction * full

    def succeeds(tried: Tensor) -> Tensor:
        return distance(tried, images, norm) >= limit

    shrunk = shrink_to_boundary(points, images, norm, succeeds, 12)
    ratio = distance(shrunk, images, norm) / full
    if norm != "l2":  # in l2 clipping after the projection may end nearer
        assert (ratio >= fraction).all()
    assert (ratio <= fraction + 2**-12 + 1e-9).all()
    assert torch.equal(shrink_to_boundary(points, images, norm, succeeds, 0), points)
    never = shrink_to_boundary(points, images, norm, lambda x: torch.zeros(len(x), dtype=torch.bool), 5)
    assert torch.equal(never, points)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6), st.booleans())
def test_success_criterion(pairs: list[tuple[int, int]], targeted: bool) -> None:
    predicted, labels = torch.tensor(pairs).T
    logits = torch.eye(4)[predicted]
    expected = [(p == y) if targeted else (p != y) for p, y in pairs]
    assert is_adversarial(logits, labels, targeted).tolist() == expected
    remaining = not_adversarial(logits, labels, targeted).tolist()
    assert remaining == [n for n, success in enumerate(expected) if not success]


@pytest.mark.parametrize("targeted", [False, True])
def test_result_leaves_images_that_are_adversarial_unchanged(targeted: bool) -> None:
    model = linear_model()
    images = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = model(images).detach()
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    result = build_result(model, images, 1 - images, labels, before, targeted=targeted)
    at_once = is_adversarial(before, labels, targeted)
    assert at_once.any() and not at_once.all()
    torch.testing.assert_close(result.adversarial, torch.where(per_image(at_once), images, 1 - images))
    after = model(result.adversarial).detach()
    assert torch.equal(result.after, after.argmax(1)) and torch.equal(result.before, before.argmax(1))
    torch.testing.assert_close(result.confidence_after, after.softmax(1).amax(1))
    assert torch.equal(result.success, is_adversarial(after, labels, targeted))
    assert result.targeted is targeted
