"""Multifaceted feature visualization: one prototype image per facet of a unit, Nguyen et al. 2016."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Channel,
    Class,
    Fold,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    scores,
)
from phosphene.data import Batch, Rows, State
from phosphene.roles import Dataset, Frames, Model, Seed, Target
from phosphene.spec import Cost, Equivariant, InvariantTo, PixelRange, minimum, param, size
from phosphene.targets import Objective, Predicted, class_values

from ..embeddings._features import FeatureLayer, image_features
from ..embeddings.clusters import k_means
from ._activation_maximization import (
    ActivationMaximization,
    LearningRate,
    Regularizers,
    Steps,
    maximize_activation,
)
from ._facets_result import Facets

#: Number of example images per facet in the result.
EXAMPLES = 4

#: Nothing random, and steps on the pixels, which flip with the images.
SYMMETRIC = {"jitter": 0, "parametrization": "pixels"}


class _Maximum(nn.Module):
    """The larger of two numbers: a unit with two facets."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)


def two_templates_make_two_facets() -> None:
    """S = max(w_1.I, w_2.I) - lambda ||I - m||^2 has two local maxima, m + w_i / (2 lambda)."""
    weight = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    weight[0, :, :2], weight[1, :, 2:] = 0.4, 0.4
    weight[..., 0] *= 0.5  # so that a shifted image differs
    linear = nn.Linear(48, 2, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(weight.flatten(1))
        (head := nn.Linear(1, 2).double()).weight.copy_(torch.tensor([[1.0], [-1.0]]))
    network = nn.Sequential(nn.Flatten(), linear, _Maximum(), head)
    model = load_model(network, mean=[0.5] * 3, std=[1.0] * 3, input_size=(3, 4, 4))
    random = torch.Generator().manual_seed(0)
    images = 0.1 * torch.rand(24, 3, 4, 4, dtype=torch.float64, generator=random)
    images[:8, :, :2] += 0.8
    images[8:13, :, 2:] += 0.8
    plain: Any = {"l2": 1.0, "blur_every": 0, "jitter": 0, "parametrization": "pixels"}
    result = facets(
        model, Class(0), TensorDataset(images), layer="1", k=2, top=13, lr=0.01, steps=150, seed=0, **plain
    )
    assert result.sizes.tolist() == [8, 5], "not the two clusters"
    assert (result.images - (0.5 + weight / 2)).abs().max() < 0.02, "not at m + w_i / (2 lambda)"
    assert result.targets == ("class 0, facet 1", "class 0, facet 2") and result.scores.shape == (150, 2)
    with torch.no_grad():
        values, features = model(images)[:, 0], model.features(images, "1")
    clusters = (torch.arange(8), torch.arange(8, 13))
    torch.testing.assert_close(result.mean_scores, torch.stack([values[c].mean() for c in clusters]))
    torch.testing.assert_close(result.sources, torch.stack([images[c].mean(0) for c in clusters]))
    # Of each facet the four nearest to its center; with ``nearest=2`` the start is the mean of two.
    order = [c[(features[c] - features[c].mean(0)).norm(dim=1).argsort()] for c in clusters]
    # Two images are equally far from their mean: they stay in their order.
    pair = torch.tensor([[0.1, 0.7], [0.3, 0.2]], dtype=torch.float64)
    assert _nearest_first(pair).tolist() == _nearest_first(pair.flip(0)).tolist() == [0, 1]
    examples = torch.cat([c[:4] for c in order])
    assert result.ids == tuple(map(str, examples.tolist())) and result.example_counts.tolist() == [4, 4]
    assert torch.equal(result.examples, images[examples])
    few: Any = plain | {"layer": "1", "k": 2, "top": 13, "nearest": 2, "lr": 0.03, "steps": 1, "frames": 1}
    with max_batch(5):
        pairs = facets(model, Class((0,)), TensorDataset(images), seed=2**32, **few)
    torch.testing.assert_close(pairs.sources, torch.stack([images[c[:2]].mean(0) for c in order]))
    # The first step of Adam is of length lr.
    steps = (pairs.images - pairs.sources).abs()
    torch.testing.assert_close(steps.amax((1, 2, 3)), steps.new_full((2,), 0.03), atol=1e-5, rtol=0)
    assert pairs.frames is not None and len(pairs.frames) == 1
    for seed in range(6):
        assert [len(c) for c in cluster_images(model, images[:13], "1", 2, seed)] == [8, 5]
    # A channel of a layer as the target: only the first template has images of a positive score.
    # Images of another precision are converted to the model's.
    unit = facets(model, Channel("1", 0), TensorDataset(images.float()), **few | {"k": 1, "top": 8})
    assert unit.sizes.tolist() == [8] and unit.examples.dtype == images.dtype
    torch.testing.assert_close(unit.mean_scores[0], features[:8, 0].mean(), atol=1e-6, rtol=0)


@method(
    family="synthesis",
    title="Facets of a unit",
    references=[
        Reference(
            key="nguyen2016facets",
            title="Multifaceted Feature Visualization: Uncovering the Different Types of Features Learned By "
            "Each Neuron in Deep Neural Networks",
            authors="Nguyen, Yosinski, Clune",
            year=2016,
            url="https://arxiv.org/abs/1602.03616",
        )
    ],
    invariants=[PixelRange(), PixelRange(field="sources")],
    needs=["gradients", "dataset"],
    cost=Cost(
        forward=size.dataset + size.images * (minimum(param.top, size.dataset) + param.steps),
        backward=size.images * param.steps,
    ),
    oracle=two_templates_make_two_facets,
    relations=[
        *(
            Equivariant(transform, where=SYMMETRIC, fields=("images", "sources"), tolerance=1e-6)
            for transform in ("hflip", "vflip")
        ),
        InvariantTo("normalization", where={"l2": 0}, tolerance=1e-6),
        InvariantTo("logit_shift", tolerance=1e-6),
    ],
    quick={"k": 2, "top": 4, "steps": 2},
    demo={
        "model": "builtin:parts-resnet",
        "dataset": "builtin:part-scenes/240",
        "target": "layer3[41]",
        "k": 3,
        "top": 36,
        "blur_every": 0,
        "steps": 60,
        "lr": 0.02,
    },
)
def facets(
    model: Model,
    target: Target,
    dataset: Dataset,
    *,
    layer: FeatureLayer = None,
    k: Annotated[int, Field(ge=1, le=100, description="number of facets (clusters)")] = 4,
    top: Annotated[
        int, Field(ge=1, le=10_000, description="number of images to cluster, those of highest score")
    ] = 80,
    nearest: Annotated[
        int,
        Field(
            ge=1, le=10_000, description="number of images, nearest to a facet's center, in its mean image"
        ),
    ] = 15,
    regularizers: Regularizers = Regularizers(l2=1e-3, blur_every=4, jitter=4),
    steps: Steps = 100,
    lr: LearningRate = 0.01,
    frames: Frames = 0,
    seed: Seed = None,
) -> Facets:
    """Multifaceted feature visualization: one prototype image for each cluster of a unit's top images.

    I_f = argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I),  started at the mean image of facet f

    The ``top`` images of a data set with the highest score S are clustered into ``k`` facets by k-means on
    the input of the classifier, or on a ``layer`` averaged over its positions. The prototype of a facet is
    the result of activation maximization (see ``class_visualization``) from the mean of its ``nearest``
    images, which selects the local maximum of S. k-means returns k clusters of any data: compare a prototype
    with its examples before reading it as one kind of image.

    Returns:
        Prototypes ``images`` (K, C, H, W) in [0, 1]: at most k for each class of the target or for its unit,
        largest facet first (empty clusters are left out); ``scores`` (steps, K), S at every step;
        ``sources``, the mean images; ``sizes``, ``mean_scores`` and ``examples`` of the facets.

    Raises:
        InputError: more facets than images, or no target (the predicted class differs between images).

    Example::
        from phosphene import run

        result = run("facets", target="star", dataset="builtin:scenes/12", k=2, top=6, steps=3, seed=0)
        result.images.shape  # (2, 3, 64, 64)
        result.sizes  # number of images in each facet

    Source:
        Nguyen, Yosinski, Clune 2016, with k-means on the features instead of on their t-SNE embedding.
    """
    if isinstance(target, Predicted):
        raise InputError('facets need a unit or named classes as the target: for example target="star"')
    count = min(top, len(dataset))
    if k > count:
        raise InputError(f"{count} images form at most {count} facets, not {k}")
    params = ActivationMaximization(**regularizers.model_dump(), rotate=0, rescale=1, steps=steps, lr=lr)
    has_classes = isinstance(target, Class) and isinstance(target.index, tuple)
    units = list(map(Class, target.index)) if has_classes else [target]
    results: list[Facets] = []
    for unit, unit_scores in zip(units, dataset_scores(model, dataset, units), strict=True):
        # equivalent mutants: on the CPU every sort of torch is stable
        top_scores, indices = (values[:count] for values in unit_scores.sort(descending=True, stable=True))
        images = dataset.read(indices.tolist()).to(model.device, model.dtype)
        clusters = cluster_images(model, images, layer, k, seed)
        sources = torch.stack([images[cluster[:nearest]].mean(0) for cluster in clusters])
        score = partial(scores, model, target=unit)
        optimization = maximize_activation(
            model, score, len(sources), sources, params, frames=frames, seed=seed
        )
        (name,) = unit.names(model, 1)
        examples = torch.cat([cluster[:EXAMPLES] for cluster in clusters])
        results.append(
            Facets(
                **optimization._asdict(),
                targets=tuple(f"{name}, facet {n + 1}" for n in range(len(clusters))),
                sources=sources,
                sizes=examples.new_tensor([len(cluster) for cluster in clusters]),
                mean_scores=torch.stack([top_scores[c.sort().values.cpu()].mean() for c in clusters]).to(
                    sources
                ),
                examples=images[examples],
                example_counts=examples.new_tensor([min(EXAMPLES, len(cluster)) for cluster in clusters]),
                ids=tuple(map(dataset.id, indices[examples.cpu()].tolist())),
            )
        )
    return Facets.concatenate(results)


def cluster_images(model: Model, images: Tensor, layer: str | None, k: int, seed: int | None) -> list[Tensor]:
    """k-means of the images' features: indices of each cluster, nearest to its mean first, largest first."""
    with torch.no_grad():
        features = torch.cat([image_features(model, part, layer) for part in images.split(batch_size(model))])
    # equivalent mutants: the same clusters where any run finds the minimum
    labels, _, _ = k_means(features, k, (seed or 0) % 2**32)
    clusters = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    clusters.sort(key=len, reverse=True)
    return [cluster[_nearest_first(features[cluster])] for cluster in clusters]


def _nearest_first(features: Tensor) -> Tensor:
    """Indices by distance to the mean; images that are equally far up to rounding stay in their order."""
    distances = (features - features.mean(0)).norm(dim=1)
    fractions = distances / distances.max().clamp(min=torch.finfo(distances.dtype).tiny)
    return (fractions * 1e5).round().argsort(stable=True)


def dataset_scores(model: Model, dataset: Dataset, units: Sequence[Objective]) -> Tensor:
    """Score of every image of a data set for every unit, (U, N); resumes after an interruption."""
    return _Scores(model, units).run(dataset, batch_size(model))


@dataclass
class _Scores(Fold[Tensor]):
    """The scores of every image for every unit."""

    title = "top images"
    model: Model
    units: Sequence[Objective]

    def start(self) -> State:
        return {"scores": Rows()}

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        if isinstance(self.units[0], Class):
            logits = class_values(self.model, images)
            new = torch.stack([unit.score(logits) for unit in self.units], 1)
        else:
            new = torch.stack([scores(self.model, images, unit) for unit in self.units], 1)
        state["scores"].write(batch.indices[0], new)
        return state

    def finish(self, state: State) -> Tensor:
        scores: Tensor = state["scores"].tensor().T
        return scores


@hookimpl
def phosphene_methods():
    return [facets]
