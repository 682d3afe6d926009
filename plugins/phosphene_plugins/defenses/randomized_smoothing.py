"""Randomized smoothing: the majority's answer under Gaussian noise, and how far it provably holds."""

from typing import Annotated, Literal

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator, Tensor, nn

from phosphene import Reference, batch_size, hookimpl, load_model, method, progress_bar
from phosphene.roles import Images, Model, Seed
from phosphene.spec import Cost, Nonnegative, param, size

from ._certificates import Certificates, rounded_down


def lower_bound(count: NDArray[np.int64], samples: int, alpha: float) -> NDArray[np.float64]:
    """What the probability of what came ``count`` times is at least, with confidence 1 - alpha."""
    bound = scipy.stats.beta.ppf(alpha, np.maximum(count, 1), samples - np.maximum(count, 1) + 1)
    return np.where(count > 0, bound, 0.0)


def approaches_the_distance_to_a_plane() -> None:
    """On two classes with a plane between them the radius is the distance to it, and never more."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.0, 0, 0, 0], [0.6, -0.8, 0, 0]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    images = torch.tensor([[[[0.9, 0.3], [0.5, 0.5]]], [[[0.3, 0.8], [0.0, 1.0]]]], dtype=torch.float64)
    distance = (images.flatten(1) @ linear.weight[1]).abs().detach()
    found = randomized_smoothing(model, images, sigma=0.5, samples=4000, selection=20, alpha=1e-3, seed=0)
    assert found.labels.tolist() == [1, 0]
    assert (found.radius <= distance).all() and (found.radius > 0.85 * distance).all()


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
    cost=Cost(forward=size.images * (param.selection + param.samples)),
    tags=["certificate"],
    oracle=approaches_the_distance_to_a_plane,
    quick={"samples": 30, "selection": 4},
    demo={"sigma": 0.12, "samples": 300, "selection": 50},
)
def randomized_smoothing(
    model: Model,
    images: Images,
    *,
    sigma: Annotated[
        float, Field(gt=0, le=100, description="deviation of the noise, pixels in [0, 1]")
    ] = 0.25,
    samples: Annotated[int, Field(ge=1, le=10_000_000, description="noisy pictures that vote")] = 1000,
    selection: Annotated[int, Field(ge=1, le=100_000, description="and that choose the class before")] = 100,
    alpha: Annotated[float, Field(gt=0, lt=0.5, description="probability that a statement is wrong")] = 0.001,
    task: Annotated[
        Literal["certify", "predict"], Field(description="a radius, or the answer alone")
    ] = "certify",
    seed: Seed = None,
) -> Certificates:
    """Answer by majority under Gaussian noise, and prove how far that answer holds in l2.

    g(x) = argmax_c P[f(x + e) = c],  e ~ N(0, sigma^2),   R = sigma Phi^-1(p),
    p = Beta^-1(alpha; k, n - k + 1)

    with k of n = ``samples`` votes for the class that ``selection`` others chose, and p its Clopper-Pearson
    lower bound: with probability 1 - ``alpha`` no picture nearer than R has another g. It abstains where
    p <= 1/2, radius 0; if all vote alike R = sigma Phi^-1(alpha^(1/n)), which no picture exceeds
    (3.8115 sigma for 100,000 votes at 0.001). For ``task="predict"`` it abstains where a binomial test does
    not tell the first class from the second, and proves no radius; ``selection`` is not used.

    The proof is about g, not about the model: what the model says is g's answer only as far as it withstands
    the noise, and a network that was not trained with noise of this ``sigma`` often does not. ``images`` (N,
    C, H, W) in [0, 1]; all get the same noise, which may leave [0, 1]. ``labels`` (N,) are g's answers,
    ``share`` (N,) of the votes.

    Source: Cohen, Rosenfeld & Kolter 2019, section 3 (CERTIFY and PREDICT).
    """
    generator = torch.Generator().manual_seed(seed or 0)
    chosen = votes(model, images, sigma, selection, generator).argmax(1) if task == "certify" else None
    counts = votes(model, images, sigma, samples, generator)
    answer = counts.argmax(1) if chosen is None else chosen
    for_it = counts.gather(1, answer[:, None])[:, 0].cpu().numpy()
    if task == "certify":
        bound = lower_bound(for_it, samples, alpha)
        radius, abstained = sigma * scipy.stats.norm.ppf(bound.clip(0.5)), bound <= 0.5
    else:
        others = counts.scatter(1, answer[:, None], 0).amax(1).cpu().numpy()
        test = [scipy.stats.binomtest(int(a), int(a + b)).pvalue for a, b in zip(for_it, others, strict=True)]
        radius, abstained = np.zeros(len(images)), np.array(test) > alpha
    return Certificates(
        images=images,
        labels=answer,
        names=tuple(map(model.class_name, answer.tolist())),
        radius=rounded_down(torch.from_numpy(radius).to(images.device), images),
        abstained=torch.from_numpy(abstained).to(images.device),
        share=torch.from_numpy(for_it / samples).to(images),
        norm="l2",
        subject=f"the majority under noise of {sigma:.3g}",
    )


def votes(model: Model, images: Tensor, sigma: float, samples: int, generator: Generator) -> Tensor:
    """(N, K) how often each class is the answer to so many noisy copies, the same noise for every image."""
    at_once = max(1, batch_size(model) // len(images))
    counts: Tensor | None = None
    for start in progress_bar(range(0, samples, at_once), "voting"):
        # One by one, for a draw of several at once is another draw.
        several = range(min(at_once, samples - start))
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for _ in several]).to(images)
        logits = model((images[:, None] + sigma * noise).flatten(0, 1))
        cast = logits.argmax(1).view(len(images), -1)
        counts = torch.zeros_like(logits[: len(images)], dtype=torch.int64) if counts is None else counts
        counts.scatter_add_(1, cast, torch.ones_like(cast))
    assert counts is not None
    return counts


@hookimpl
def phosphene_methods():
    return [randomized_smoothing]
