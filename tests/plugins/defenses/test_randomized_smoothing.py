"""Randomized smoothing: the paper's numbers, closed forms on linear models, no attack inside a radius."""

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


def linear_classifier(seed: int, classes: int = 2) -> Model:
    """A linear classifier: smoothed, of two classes, it is itself."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        linear = nn.Linear(12, classes).double()
    nn.init.zeros_(linear.bias)
    return load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 2, 2))


def random_images(seed: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64)


def test_bound_equals_scipys_clopper_pearson_bound() -> None:
    counts = np.array([0, 1, 500, 990, 1000])
    expected = [
        scipy.stats.binomtest(int(k), 1000, alternative="greater").proportion_ci(0.999, "exact").low
        for k in counts
    ]
    np.testing.assert_allclose(clopper_pearson_lower_bound(counts, 1000, 0.001), expected, atol=1e-12)


def test_bound_of_unanimous_votes_is_the_papers_limit() -> None:
    bound = clopper_pearson_lower_bound(np.array([100_000]), 100_000, 0.001)
    assert bound[0] == pytest.approx(0.99993092, abs=1e-8)
    assert scipy.stats.norm.ppf(bound[0]) == pytest.approx(3.8115, abs=5e-5)


def test_unanimous_votes_have_the_largest_radius() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.zeros_(module[1].weight)
    result = smoothing(
        load_model(module, input_size=(3, 2, 2)), torch.rand(2, 3, 2, 2), samples=50, sigma=0.5
    )
    assert result.radius.tolist() == pytest.approx([0.5 * scipy.stats.norm.ppf(0.001 ** (1 / 50))] * 2)
    assert not result.abstained.any() and result.vote_share.eq(1).all()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_pgd_fails_inside_the_certified_radius(seed: int) -> None:
    model, images = linear_classifier(seed), random_images(seed)
    result = smoothing(model, images, sigma=0.25, samples=300, selection=30, alpha=1e-6, seed=seed)
    for n in (~result.abstained).nonzero()[:, 0].tolist():
        eps = float(result.radius[n])
        if eps > 0:
            attack = methods["pgd"](
                model, images[n : n + 1], result.labels[n : n + 1], eps=eps, step_size=eps / 4, steps=12,
                norm="l2", seed=seed,
            )  # fmt: skip
            assert not attack.success.any()


def test_radius_is_close_to_the_distance_to_the_boundary() -> None:
    model, images = linear_classifier(3), random_images(3, 6)
    weight = model.module[1].weight.detach()
    distance = (images.flatten(1) @ (weight[0] - weight[1])).abs() / (weight[0] - weight[1]).norm()
    result = smoothing(model, images, sigma=float(distance.mean()), samples=20_000, seed=1)
    is_certified = ~result.abstained & (distance < 2.5 * distance.mean())
    assert is_certified.sum() >= 3
    assert (result.radius <= distance).all()
    assert (distance - result.radius)[is_certified].max() < 0.1 * distance.mean()


def test_abstains_where_votes_are_even() -> None:
    model = linear_classifier(0)
    on_the_plane = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    for task in ("certify", "predict"):
        result = smoothing(model, on_the_plane, samples=400, task=task, seed=0)
        assert result.abstained.all() and not result.radius.any()


def test_prediction_abstains_by_a_binomial_test_and_certifies_no_radius() -> None:
    model, images = linear_classifier(5), random_images(5, 8)
    result = smoothing(model, images, samples=60, alpha=0.01, sigma=0.5, task="predict", seed=0)
    tested = [scipy.stats.binomtest(round(60 * s), 60).pvalue > 0.01 for s in result.vote_share.tolist()]
    assert result.abstained.tolist() == tested
    assert not result.radius.any()


def test_noise_does_not_depend_on_the_batch_size() -> None:
    model, images = linear_classifier(2, classes=5), random_images(2, 5)
    result = smoothing(model, images, samples=33, seed=4)
    for n in range(5):
        single = smoothing(model, images[n : n + 1], samples=33, seed=4)
        assert torch.equal(single.vote_share, result.vote_share[n : n + 1])


def test_lines_name_radii_and_abstentions() -> None:
    model = load_model("builtin:shapes-vgg")
    result = smoothing(model, torch.rand(3, 3, 64, 64), samples=20, selection=5, sigma=1.0, seed=0)
    for line, abstained in zip(result.lines(), result.abstained.tolist(), strict=True):
        assert ("abstains" in line) == abstained
    assert result.png()
