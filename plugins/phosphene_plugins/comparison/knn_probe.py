"""k-nearest-neighbor probes: how well neighbors in each layer share a class, Wu et al. 2018."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.roles import Dataset, Model
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, UnitRange, size

from ._layer_features import ProbedLayers, classified_features
from ._probe_result import ProbeAccuracy, confusion_matrix

#: Rows of the similarity matrix that are computed at once.
# equivalent mutants: only how many are computed at once
ROWS = 1024


def _oracle() -> None:
    """On two circles of images, the nearest image is of the same class by its angle or by its distance."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 1, 2))
    angles = torch.tensor([0.1, 0.2, 0.5, 1.2, 1.3], dtype=torch.float64)
    images = torch.stack([angles.cos(), angles.sin()], 1)[:, None, None]
    images = images * torch.tensor([0.9, 0.3, 0.5, 0.8, 0.4])[:, None, None, None]
    data = TensorDataset(images, ["low", "low", "low", "high", "high"])
    with torch.no_grad():  # of equal features the first image is the nearest, of class "low"
        for parameter in network.parameters():
            parameter.zero_()
    result = knn_probe(model, data, layers=["1", "0"], k=1)
    torch.testing.assert_close(result.accuracy, torch.tensor([0.6, 1]).double())
    assert result.confusion.tolist() == [[2, 0], [0, 3]]
    result = knn_probe(model, data, layers=["0"], k=1)
    # By angle the neighbors are 1, 0, 1, 4 and 3.
    assert result.accuracy.tolist() == [1.0] and result.confusion.tolist() == [[2, 0], [0, 3]]
    assert result.classes == ("high", "low") and result.chance == 0.6 and result.count == 5
    # Three neighbors: the images of "high" have two of "low" and one of "high" each.
    result = knn_probe(model, data, layers=["0"], k=3, weights="uniform")
    assert result.confusion.tolist() == [[0, 2], [0, 3]]
    # Weighted by exp(similarity / 0.07), the one of "high" at an angle of 0.1 outweighs the others.
    assert knn_probe(model, data, layers=["0"], k=3).accuracy.tolist() == [1.0]
    # By distance the neighbor of the third image, (0.44, 0.24), is the fifth, (0.11, 0.39), or the second.
    result = knn_probe(model, data, layers=["0"], k=1, metric="euclidean")
    points = images.flatten(1)
    nearest = (torch.cdist(points, points) + 9 * torch.eye(5)).argmin(1)
    is_low = torch.tensor([True, True, True, False, False])
    assert float(result.accuracy[0]) == float((is_low[nearest] == is_low).double().mean())
    _votes_by_their_definition()
    result = knn_probe(model, data, layers=["0"], k=3, temperature=0.5)
    shares = _votes(points, (is_low).long(), 2, 3, "cosine", "exponential", 0.5)
    assert result.probability is not None
    torch.testing.assert_close(result.probability[0], shares[torch.arange(5), is_low.long()].mean())


def _votes_by_their_definition() -> None:
    """The shares of the classes from loops over images and neighbors."""
    draw = torch.Generator().manual_seed(2)
    features = torch.rand(7, 3, generator=draw, dtype=torch.float64)
    features[6] = features[5]
    numbers = torch.tensor([0, 2, 1, 2, 0, 0, 1])
    for metric, weights in itertools.product(("cosine", "euclidean"), ("exponential", "uniform")):
        expected = torch.zeros(7, 3, dtype=torch.float64)
        for n, row in enumerate(features):
            cosines = F.cosine_similarity(row[None], features)
            similarity = cosines if metric == "cosine" else -(features - row).norm(dim=1)
            near = sorted((m for m in range(7) if m != n), key=lambda m: -float(similarity[m]))[:4]
            scale = 1.0 if metric == "cosine" else -similarity[near].mean()
            for m in near:
                vote = (similarity[m] / scale / 0.2).exp() if weights == "exponential" else 1
                expected[n, numbers[m]] += vote
        expected = expected / expected.sum(1, keepdim=True)
        shares = _votes(features, numbers, 3, 4, metric, weights, 0.2)
        torch.testing.assert_close(shares, expected)
    # Neighbors at distance 0 have equal votes.
    same = _votes(torch.ones(3, 2), torch.tensor([0, 1, 1]), 2, 2, "euclidean", "exponential", 0.2)
    torch.testing.assert_close(same, torch.tensor([[0, 1], [0.5, 0.5], [0.5, 0.5]]).double())


@torch.no_grad()
def accuracy_of_all_pairs(calls: Calls) -> Tensor:
    """The accuracy of the most frequent class among the k nearest other images, from all pairs of images."""
    data, count = calls.inputs["dataset"], calls.params["k"]
    labels = data.labels(range(len(data)))
    accuracies = []
    for name in calls.result.layers:
        features = calls.model.features(data.images, name).double()
        features = (
            features if features.ndim == 2 else calls.model.maps(features, data.images, name).mean((2, 3))
        )
        hits = 0
        for n, row in enumerate(features):
            cosines = [float(F.cosine_similarity(row, other, dim=0)) for other in features]
            near = sorted((m for m in range(len(labels)) if m != n), key=lambda m: -cosines[m])[:count]
            votes = {label: sum(labels[m] == label for m in near) for label in sorted(set(labels))}
            hits += max(votes, key=lambda label: votes[label]) == labels[n]
        accuracies.append(hits / len(labels))
    return torch.tensor(accuracies)


@method(
    family="comparison",
    title="k-NN probe",
    references=[
        Reference(
            key="wu2018",
            title="Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
            authors="Wu, Xiong, Yu, Lin",
            year=2018,
            url="https://arxiv.org/abs/1805.01978",
        )
    ],
    invariants=[UnitRange(field="accuracy")],
    relations=[
        Agrees(accuracy_of_all_pairs, fields=("accuracy",), where={"k": 1}),
        InvariantTo("dataset_order", fields=("accuracy",), where={"k": 1}),
        InvariantTo("normalization", fields=("accuracy",)),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    quick={"k": 2},
    demo={"dataset": "builtin:scenes/400"},
)
def knn_probe(
    model: Model,
    dataset: Dataset,
    *,
    layers: ProbedLayers = None,
    k: Annotated[int, Field(ge=1, le=1000, description="number of neighbors")] = 20,
    metric: Annotated[Literal["cosine", "euclidean"], Field(description="similarity of features")] = "cosine",
    weights: Annotated[
        Literal["exponential", "uniform"],
        Field(description="vote of a neighbor: exp(s / temperature) by its similarity s, or 1"),
    ] = "exponential",
    temperature: Annotated[float, Field(gt=0, le=100, description="temperature of exponential votes")] = 0.07,
) -> ProbeAccuracy:
    """k-NN probe: accuracy of the vote of each image's nearest other images, by layer.

    y_i = argmax_c sum over the k nearest j != i of class c of exp(s_ij / temperature)

    with s_ij the cosine of the layer's outputs for images i and j, averaged over their positions; with
    ``metric="euclidean"`` the negative distance in units of the mean distance to the neighbors. Nothing is
    trained, and every image is left out of its own neighbors. Of classes with equal votes, and of images at
    equal distance, the first in alphabetical order, or in that of the data set, counts.

    Returns:
        ``accuracy`` (L,) by layer, and ``probability``, the mean share of the image's class in the votes;
        ``confusion`` (K, K) of the best layer; ``chance``.

    Raises:
        InputError: a data set without classes, or with at most ``k`` images.
        ModelError: a layer's output does not have one row per image.

    Example::
        from phosphene import run

        result = run("knn_probe", dataset="builtin:scenes/48", k=5)
        result.accuracy  # one for each stage

    Source:
        Wu et al. 2018, section 3.4; as a probe of frozen features: Caron et al. 2021, section 4.
    """
    if len(dataset) <= k:
        raise InputError(f"{k} neighbors need at least {k + 1} images, the data set has {len(dataset)}")
    names = layers or list(model.stages)
    features, labels = classified_features(model, dataset, names, "k-NN probe")
    classes = sorted(set(labels))
    numbers = torch.tensor([classes.index(label) for label in labels])
    shares = [
        _votes(features[name].to(model.device), numbers, len(classes), k, metric, weights, temperature)
        for name in names
    ]
    predictions = [votes.argmax(1) for votes in shares]
    accuracies = [float((predicted == numbers).double().mean()) for predicted in predictions]
    best = predictions[max(range(len(names)), key=lambda n: accuracies[n])]
    probabilities = [float(votes.gather(1, numbers[:, None]).mean()) for votes in shares]
    return ProbeAccuracy(
        layers=tuple(names),
        accuracy=torch.tensor(accuracies, device=model.device, dtype=model.dtype),
        probability=torch.tensor(probabilities, device=model.device, dtype=model.dtype),
        classes=tuple(classes),
        confusion=confusion_matrix(numbers, best, len(classes)).to(model.device),
        chance=float(torch.bincount(numbers).max()) / len(labels),
        count=len(labels),
        classifier=f"{k}-nearest-neighbor probe, {metric}",
    )


def _votes(
    features: Tensor, numbers: Tensor, classes: int, k: int, metric: str, weights: str, temperature: float
) -> Tensor:
    """The share of every class (N, K) in the votes of the k nearest other images of each image."""
    if metric == "cosine":
        features = F.normalize(features)
    shares = []
    for start in range(0, len(features), ROWS):
        rows = features[start : start + ROWS]
        similarity = rows @ features.T if metric == "cosine" else -torch.cdist(rows, features)
        own = torch.arange(len(rows), device=rows.device)
        similarity[own, start + own] = -torch.inf
        # equivalent mutants: axis 1 is the last, and on the CPU every sort of torch is stable
        values, order = similarity.sort(dim=1, descending=True, stable=True)
        values, nearest = values[:, :k], order[:, :k].cpu()
        if metric == "euclidean":
            values = values / (-values).mean(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        votes = torch.ones_like(values)
        if weights == "exponential":  # the largest vote is 1: exp of a large similarity would overflow
            # equivalent mutants: a factor of all votes of an image changes no share
            votes = ((values - values[:, :1]) / temperature).exp()
        sums = torch.zeros(len(rows), classes, dtype=torch.float64)
        sums = sums.scatter_add(1, numbers[nearest], votes.cpu().double())
        shares.append(sums / sums.sum(1, keepdim=True))
    return torch.cat(shares)


@hookimpl
def phosphene_methods():
    return [knn_probe]
