"""Randomized smoothing: majority vote under Gaussian noise, with a certified l2 radius."""

from typing import Annotated, Literal

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Reference, batch_size, hookimpl, method, progress_bar
from phosphene.roles import Images, Model, Seed
from phosphene.spec import Cost, InvariantTo, Monotone, Nonnegative, ScalesWith, param, size
from phosphene.testing import linear_model

from ._certificates import Certificates


def clopper_pearson_lower_bound(counts: NDArray[np.int64], samples: int, alpha: float) -> NDArray[np.float64]:
    """Lower bound, at confidence 1 - alpha, of the probability of an event with ``counts`` of ``samples``."""
    positive = np.maximum(counts, 1)
    bound = scipy.stats.beta.ppf(alpha, positive, samples - positive + 1)
    return np.where(counts > 0, bound, 0.0)


def radius_approaches_the_distance_to_the_decision_boundary() -> None:
    """For two classes separated by a plane the radius is close to the distance to it, and never larger."""
    weight = torch.tensor([[0.0, 0, 0, 0], [0.6, -0.8, 0, 0]], dtype=torch.float64)
    model = linear_model(weight.view(2, 1, 2, 2))
    images = torch.tensor([[[[0.9, 0.3], [0.5, 0.5]]], [[[0.3, 0.8], [0.0, 1.0]]]], dtype=torch.float64)
    distance = (images.flatten(1) @ weight[1]).abs()
    result = randomized_smoothing(model, images, sigma=0.5, samples=4000, selection=20, alpha=1e-3, seed=0)
    assert result.labels.tolist() == [1, 0]
    assert (result.radius <= distance).all() and (result.radius > 0.85 * distance).all()
    assert result.vote_share is not None
    votes = np.round(result.vote_share.numpy() * 4000).astype(np.int64)
    bounds = scipy.stats.norm.ppf(clopper_pearson_lower_bound(votes, 4000, 1e-3))
    torch.testing.assert_close(result.radius, 0.5 * torch.from_numpy(bounds))
    # At least k of n successes have the probability alpha where p is the bound.
    k, n = np.array([0, 1, 2, 7, 9]), 9
    bounds = clopper_pearson_lower_bound(k, n, 0.05)
    np.testing.assert_allclose(scipy.stats.binom.sf(k[1:] - 1, n, bounds[1:]), 0.05)
    assert bounds[0] == 0
    # Predicting with a third class that gets no votes: of 40 votes 27 are enough at 0.05.
    model = linear_model(torch.cat([weight, weight[:1]]).view(3, 1, 2, 2), bias=[0.0, 0.0, -9.0])
    result = randomized_smoothing(model, images, sigma=1.2, samples=40, alpha=0.05, task="predict", seed=3)
    generator = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(1, 2, 2, generator=generator) for _ in range(40)]).double()
    noisy = (images[:, None] + 1.2 * noise).flatten(2) @ weight[1]
    positive = (noisy > 0).sum(1)
    majority = torch.maximum(positive, 40 - positive)
    assert result.labels.tolist() == (positive > 20).long().tolist() and not result.radius.any()
    torch.testing.assert_close(result.vote_share, majority.double() / 40)
    assert result.abstained.tolist() == (majority < 27).tolist() == [True, False]
    # Six votes of six are enough, five of six are not.
    result = randomized_smoothing(model, images, sigma=1e-6, samples=6, alpha=0.05, task="predict", seed=0)
    assert not result.abstained.any()


@method(
    family="defenses",
    references=[
        Reference(
            key="cohen2019",
            title="Certified Adversarial Robustness via Randomized Smoothing",
            authors="Cohen, Rosenfeld, Kolter",
            year=2019,
            url="https://arxiv.org/abs/1902.02918",
        )
    ],
    invariants=[Nonnegative(field="radius")],
    relations=[
        ScalesWith("logits", power=0, fields=("radius", "vote_share")),
        InvariantTo("logit_shift", fields=("radius", "vote_share")),
        InvariantTo("batch_order", fields=("radius", "vote_share")),
        Monotone("alpha", values=(0.001, 0.01, 0.1, 0.4), measure="radius"),
    ],
    cost=Cost(forward=size.images * (param.selection + param.samples)),
    tags=["certificate"],
    oracle=radius_approaches_the_distance_to_the_decision_boundary,
    quick={"samples": 30, "selection": 4},
    demo={"sigma": 0.12, "samples": 300, "selection": 50},
)
def randomized_smoothing(
    model: Model,
    images: Images,
    *,
    sigma: Annotated[
        float, Field(gt=0, le=100, description="standard deviation of the noise, pixels in [0, 1]")
    ] = 0.25,
    samples: Annotated[
        int, Field(ge=1, le=10_000_000, description="noisy copies of each image that vote, n")
    ] = 1000,
    selection: Annotated[
        int, Field(ge=1, le=100_000, description="noisy copies that select the class beforehand, n0")
    ] = 100,
    alpha: Annotated[
        float, Field(gt=0, lt=0.5, description="probability that a certificate is wrong")
    ] = 0.001,
    task: Annotated[
        Literal["certify", "predict"],
        Field(description="certify: class and radius; predict: the class alone"),
    ] = "certify",
    seed: Seed = None,
) -> Certificates:
    """Randomized smoothing: majority vote under Gaussian noise, with a certified l2 radius.

    g(x) = argmax_c P[f(x + e) = c],  e ~ N(0, sigma^2),   R = sigma Phi^-1(p),
    p = Beta^-1(alpha; k, n - k + 1)

    with k of the n = ``samples`` votes for the class selected by ``selection`` other samples, and p its
    Clopper-Pearson lower bound: with probability 1 - ``alpha``, g is constant within R. It abstains, radius
    0, where p <= 1/2. If all votes agree, R = sigma Phi^-1(alpha^(1/n)), the largest possible radius
    (3.8115 sigma for 100,000 votes at 0.001). With task="predict" it abstains where a two-sided binomial
    test cannot separate the two most frequent classes, and certifies no radius; ``selection`` is not used.

    The certificate is about g, not about the model f: both agree only as far as f is accurate under noise,
    and a network that was not trained with noise of this ``sigma`` often is not. All images get the same
    noise; noisy pixels may leave [0, 1].

    Returns:
        ``labels`` (N,) the classes predicted by g; ``radius`` (N,) in l2; ``abstained`` (N,); ``vote_share``
        (N,) the share of the votes for the class.

    Raises:
        InputError: ``images`` do not fit the model.

    Example::
        from phosphene import run

        result = run("randomized_smoothing", images="builtin:scenes/2", sigma=0.1, samples=50, selection=10)
        result.radius, result.abstained  # (2,), (2,)

    Source: Cohen, Rosenfeld & Kolter 2019, section 3 (CERTIFY and PREDICT).
    """
    generator = torch.Generator().manual_seed(seed or 0)
    if task == "certify":
        labels = count_votes(model, images, sigma, selection, generator).argmax(1)
        counts = count_votes(model, images, sigma, samples, generator)
    else:
        counts = count_votes(model, images, sigma, samples, generator)
        labels = counts.argmax(1)
    votes = counts.gather(1, labels[:, None])[:, 0].cpu().numpy()
    if task == "certify":
        p = clopper_pearson_lower_bound(votes, samples, alpha)
        radius, abstained = sigma * scipy.stats.norm.ppf(p.clip(0.5)), p <= 0.5
    else:
        second = counts.scatter(1, labels[:, None], 0).amax(1).tolist()
        # equivalent mutants: there is one number for each image in both
        pairs = zip(votes.tolist(), second, strict=True)
        p_values = [scipy.stats.binomtest(first, first + other).pvalue for first, other in pairs]
        radius, abstained = np.zeros(len(images)), np.array(p_values) > alpha
    return Certificates.build(
        model,
        images,
        labels,
        torch.from_numpy(radius),
        abstained=torch.from_numpy(abstained),
        vote_share=torch.from_numpy(votes / samples).to(images),
        norm="l2",
        subject=f"the majority under noise of {sigma:.3g}",
    )


def count_votes(model: Model, images: Tensor, sigma: float, samples: int, generator: Generator) -> Tensor:
    """(N, K) how many of ``samples`` noisy copies of each image are classified as each class."""
    max_samples = max(1, batch_size(model) // len(images))
    counts: Tensor | None = None
    for start in progress_bar(range(0, samples, max_samples), "voting"):
        # Drawn one by one: a single draw of several would depend on the batch size.
        indices = range(min(max_samples, samples - start))
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for _ in indices]).to(images)
        logits = model((images[:, None] + sigma * noise).flatten(0, 1))
        votes = logits.argmax(1).view(len(images), -1)
        counts = torch.zeros_like(logits[: len(images)], dtype=torch.int64) if counts is None else counts
        counts.scatter_add_(1, votes, torch.ones_like(votes))
    assert counts is not None
    return counts


@hookimpl
def phosphene_methods():
    return [randomized_smoothing]
