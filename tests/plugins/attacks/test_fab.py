"""FAB: projection onto a hyperplane within the pixel range, and distances no larger than DeepFool's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.attacks import distance
from phosphene_plugins.attacks._hyperplane_projection import project_onto_hyperplane

fab, deepfool = methods["attacks.fab"], methods["attacks.deepfool"]
NORMS = ("linf", "l2", "l1")
by_norm = pytest.mark.parametrize("norm", NORMS)


def least_norm(x: Tensor, slope: Tensor, offset: float, norm: str) -> float:
    """The least norm of a change within the pixel range that reaches the hyperplane, by a solver."""
    n = len(x)
    box = [(-float(v), 1 - float(v)) for v in x]
    w = slope.numpy()
    if norm == "l2":
        result = scipy.optimize.minimize(
            lambda d: d @ d, np.zeros(n), jac=lambda d: 2 * d, bounds=box, method="SLSQP",
            constraints={"type": "eq", "fun": lambda d: w @ d - offset, "jac": lambda d: w},
            options={"maxiter": 500, "ftol": 1e-14},
        )  # fmt: skip
        return float(np.sqrt(result.fun))
    eye = np.eye(n)
    if norm == "linf":  # of (d, t), -t <= d <= t
        one = np.ones((n, 1))
        sides = np.block([[eye, -one], [-eye, -one]])
        result = scipy.optimize.linprog(
            [0] * n + [1], sides, np.zeros(2 * n), [[*w, 0]], [offset], [*box, (0, None)]
        )
    else:  # of the positive and the negative part
        halves = [(0, high) for _, high in box] + [(0, -low) for low, _ in box]
        result = scipy.optimize.linprog([1] * 2 * n, A_eq=[[*w, *-w]], b_eq=[offset], bounds=halves)
    assert result.success
    return float(result.fun)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    norm=st.sampled_from(NORMS),
    fraction=st.floats(-0.99, 0.99),
    binary=st.booleans(),
    scale=st.sampled_from([1e-25, 1.0, 1e20]),
)
def test_projection_is_the_smallest_change_within_the_range(
    seed: int, norm: str, fraction: float, binary: bool, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(12, generator=generator, dtype=torch.float64)
    x = x.round() if binary else x
    slope = torch.randn(12, generator=generator, dtype=torch.float64)
    slope[seed % 12] = 0
    # At this fraction of the largest reachable offset.
    largest = torch.where(slope * fraction > 0, 1 - x, x).mul(slope.abs()).sum()
    offset = fraction * largest
    change = project_onto_hyperplane(
        x.view(1, 3, 2, 2), scale * slope.view(1, 3, 2, 2), (scale * offset).view(1), norm
    ).flatten()
    torch.testing.assert_close((slope * change).sum(), offset, rtol=1e-9, atol=1e-9)
    assert (x + change).min() >= -1e-12 and (x + change).max() <= 1 + 1e-12
    size = distance(change.view(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), norm)
    assert float(size) == pytest.approx(least_norm(x, slope, float(offset), norm), rel=1e-5, abs=1e-7)


@by_norm
def test_unreachable_hyperplane_is_approached(norm: str) -> None:
    x = torch.tensor([0.2, 0.5, 1.0, 0.0]).view(1, 1, 2, 2)
    slope = torch.tensor([1.0, -2.0, 3.0, 0.0]).view(1, 1, 2, 2)
    change = project_onto_hyperplane(x, slope, torch.tensor([100.0]), norm)
    torch.testing.assert_close(x + change, torch.tensor([1.0, 0, 1, 0]).view(1, 1, 2, 2))
    assert not project_onto_hyperplane(x, 0 * slope, torch.tensor([1.0]), norm).any()


def network(rough: float = 6.0) -> Model:
    """A network that is less linear for a larger ``rough``."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)
        ).double()
    module[0].weight.data *= rough
    return load_model(module, input_size=(3, 6, 6))


def random_images(count: int = 6) -> Tensor:
    pixels = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (pixels * 1.4 - 0.2).clamp(0, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distance_is_at_most_that_of_deepfool(norm: str) -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    fab_result, deepfool_result = (
        fab(model, images, labels, norm=norm, steps=20),
        deepfool(model, images, labels, norm=norm),
    )
    assert fab_result.success.all()
    ratio = fab_result.distance(norm) / deepfool_result.distance(norm)
    assert ratio.max() < 1.003 and ratio.min() < 0.998


@by_norm
def test_target_classes_one_by_one_are_no_worse_than_all_at_once(norm: str) -> None:
    """The nearest boundary is that of one of the four other classes."""
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    at_once, one_by_one = (fab(model, images, labels, norm=norm, steps=20, target_classes=k) for k in (0, 4))
    assert at_once.success.all() and one_by_one.success.all()
    assert (one_by_one.distance(norm) <= at_once.distance(norm) * 1.01).all()
    one = fab(model, images, labels, norm=norm, steps=20, target_classes=1)
    assert (one_by_one.distance(norm) <= one.distance(norm)).all()


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_restarts_only_shorten_distances(norm: str) -> None:
    model, images = network(rough=30), random_images()
    labels = model(images).argmax(1)
    one_start, restarted = (
        fab(model, images, labels, norm=norm, steps=2, restarts=n, seed=0) for n in (1, 4)
    )
    assert restarted.success.sum() > one_start.success.sum()
    successes = one_start.success
    assert (
        restarted.success[successes]
        & (restarted.distance(norm) <= one_start.distance(norm) * 1.001)[successes]
    ).all()


def test_targeted_distance_is_at_least_the_untargeted() -> None:
    model, images = network(), random_images()
    labels = model(images).argmax(1)
    untargeted = fab(model, images, labels, steps=20)
    targets = (labels + 2) % 5
    targeted_result = fab(model, images, targets, steps=20, targeted=True)
    assert targeted_result.success.all() and torch.equal(targeted_result.after, targets)
    assert (targeted_result.distance("linf") >= untargeted.distance("linf") * 0.999).all()
