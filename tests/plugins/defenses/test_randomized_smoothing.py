"""Randomized smoothing: the paper's numbers, closed forms on planes, and no attack inside a radius."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene_plugins.defenses.randomized_smoothing import clopper_pearson_lower_bound

smoothing = methods["defenses.randomized_smoothing"]


def plane(seed: int, classes: int = 2) -> Model:
    """A linear classifier: smoothed, of two classes, it is itself."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        linear = nn.Linear(12, classes).double()
    nn.init.zeros_(linear.bias)
    return load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2))


def pictures(seed: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64)


def test_bound_is_clopper_and_pearsons() -> None:
    counts = np.array([0, 1, 500, 990, 1000])
    want = [
        scipy.stats.binomtest(int(k), 1000, alternative="greater").proportion_ci(0.999, "exact").low
        for k in counts
    ]
    np.testing.assert_allclose(clopper_pearson_lower_bound(counts, 1000, 0.001), want, atol=1e-12)


def test_all_votes_alike_prove_no_more_than_the_papers_cap() -> None:
    bound = clopper_pearson_lower_bound(np.array([100_000]), 100_000, 0.001)
    assert bound[0] == pytest.approx(0.99993092, abs=1e-8)
    assert scipy.stats.norm.ppf(bound[0]) == pytest.approx(3.8115, abs=5e-5)


def test_agreeing_votes_give_the_cap_as_radius() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.zeros_(module[1].weight)
    found = smoothing(load_model(module, input_size=(3, 2, 2)), torch.rand(2, 3, 2, 2), samples=50, sigma=0.5)
    assert found.radius.tolist() == pytest.approx([0.5 * scipy.stats.norm.ppf(0.001 ** (1 / 50))] * 2)
    assert not found.abstained.any() and found.vote_share.eq(1).all()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_pgd_finds_nothing_inside_a_radius_of_a_smoothed_plane(seed: int) -> None:
    model, images = plane(seed), pictures(seed)
    found = smoothing(model, images, sigma=0.25, samples=300, selection=30, alpha=1e-6, seed=seed)
    for n in (~found.abstained).nonzero()[:, 0].tolist():
        eps = float(found.radius[n])
        if eps > 0:
            attack = methods["pgd"](
                model, images[n : n + 1], found.labels[n : n + 1], eps=eps, step_size=eps / 4, steps=12,
                norm="l2", seed=seed,
            )  # fmt: skip
            assert not attack.success.any()


def test_radius_is_nearly_the_distance_to_the_plane() -> None:
    model, images = plane(3), pictures(3, 6)
    weight = model.module[1].weight.detach()
    distance = (images.flatten(1) @ (weight[0] - weight[1])).abs() / (weight[0] - weight[1]).norm()
    found = smoothing(model, images, sigma=float(distance.mean()), samples=20_000, seed=1)
    sure = ~found.abstained & (distance < 2.5 * distance.mean())
    assert sure.sum() >= 3
    assert (found.radius <= distance).all()
    assert (distance - found.radius)[sure].max() < 0.1 * distance.mean()


def test_it_abstains_where_votes_are_even() -> None:
    model = plane(0)
    on_the_plane = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    for task in ("certify", "predict"):
        found = smoothing(model, on_the_plane, samples=400, task=task, seed=0)
        assert found.abstained.all() and not found.radius.any()


def test_prediction_abstains_by_a_binomial_test_and_proves_no_radius() -> None:
    model, images = plane(5), pictures(5, 8)
    found = smoothing(model, images, samples=60, alpha=0.01, sigma=0.5, task="predict", seed=0)
    tested = [scipy.stats.binomtest(round(60 * s), 60).pvalue > 0.01 for s in found.vote_share.tolist()]
    assert found.abstained.tolist() == tested
    assert not found.radius.any()


def test_noise_does_not_depend_on_how_many_are_run_at_once() -> None:
    model, images = plane(2, classes=5), pictures(2, 5)
    found = smoothing(model, images, samples=33, seed=4)
    for n in range(5):
        alone = smoothing(model, images[n : n + 1], samples=33, seed=4)
        assert torch.equal(alone.vote_share, found.vote_share[n : n + 1])


def test_picture_tells_radii_and_abstentions() -> None:
    model = load_model("builtin:shapes-vgg")
    found = smoothing(model, torch.rand(3, 3, 64, 64), samples=20, selection=5, sigma=1.0, seed=0)
    for line, abstained in zip(found.lines(), found.abstained.tolist(), strict=True):
        assert ("abstains" in line) == abstained
    assert found.png()
