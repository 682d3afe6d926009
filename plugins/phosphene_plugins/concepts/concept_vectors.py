"""Concept activation vectors (CAV), Kim et al. 2018."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, fork_random_state, hookimpl, load_model, method
from phosphene.roles import Dataset, LayerName, Model, Seed
from phosphene.spec import Cost, InvariantTo, UnitRange, size

from ._concept_result import ConceptVectors
from ._pooled_activations import LEAST_IMAGES, by_concept, fit_vector, pooled_activations
from ._vectors_oracle import vectors_are_of_their_definition

KIM_2018 = Reference(
    key="kim2018",
    title="Interpretability Beyond Feature Attribution: Quantitative Testing with Concept Activation Vectors",
    authors="Kim, Wattenberg, Gilmer, Cai, Wexler, Viegas, Sayres",
    year=2018,
    url="https://arxiv.org/abs/1711.11279",
)

Classifier = Annotated[
    Literal["linear", "mean_difference"],
    Field(description="logistic regression, or the difference of the two means"),
]
Strength = Annotated[
    float, Field(gt=0, le=1e6, description="weight of the squared norm of the logistic regression's weights")
]


def _oracle() -> None:
    """Two clusters on a line are separated along it; the difference of their means is the vector."""
    vectors_are_of_their_definition()
    colors = nn.Conv2d(3, 3, 1, bias=False)
    later = nn.Conv2d(3, 4, 1, bias=False)
    network = nn.Sequential(colors, later, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        colors.weight.copy_(torch.eye(3)[[2, 0, 1], :, None, None])  # blue, red, green
    model = load_model(network, mean=[0.5] * 3, std=[0.5, 0.25, 1.0], input_size=(3, 2, 4))
    draw = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.rand(40, 3, 2, 4, generator=draw, dtype=torch.float64)
    images = 0.4 + noise
    images[:20, 0], images[20:30, 1] = images[:20, 0] + 0.4, images[20:30, 1] - 0.3
    concepts = TensorDataset(images[:30], ["red"] * 20 + ["not green"] * 10)
    random = TensorDataset(images[30:])
    options: dict[str, Any] = {"layer": "0", "held_out": 0.5, "seed": 0}
    result = concept_vectors(model, concepts, random, classifier="mean_difference", **options)
    assert result.concepts == ("not green", "red") and result.counts.tolist() == [[10, 10], [20, 10]]
    assert result.accuracy.tolist() == [1.0, 1.0]
    assert result.vectors.dtype == result.offsets.dtype == result.accuracy.dtype == torch.float64
    torch.testing.assert_close(result.vectors.norm(dim=1), torch.ones(2, dtype=torch.float64))
    # The channels are blue, red and green; normalized, red counts twice and green four times.
    for vector, axis, sign in zip(result.vectors, (2, 1), (-1, 1), strict=True):
        assert float(vector[axis]) * sign > 0.98
    linear = concept_vectors(model, concepts, random, strength=0.01, **options)
    assert linear.accuracy.tolist() == [1.0, 1.0]
    assert ((linear.vectors * result.vectors).sum(1) > 0.9).all()
    features = model.features(images, "0").mean((2, 3))
    has_concept = features @ linear.vectors.T > linear.offsets
    assert has_concept[:20, 1].all() and not has_concept[30:].any() and has_concept[20:30, 0].all()
    target = result.direction("red")
    assert target.name == "0" and torch.equal(target.vector, result.vectors[1])
    # Fitted without the images that are held out; of the last map by default, in the model's precision.
    single = load_model(network.float(), mean=[0.5] * 3, std=[0.5, 0.25, 1.0], input_size=(3, 2, 4))
    result = concept_vectors(single, concepts, random, held_out=0.3, seed=0)
    features = single.features(images.float(), "1").detach().mean((2, 3))
    with fork_random_state():
        torch.manual_seed(0)
        for number, rows in enumerate((features[20:30], features[:20])):
            (fitted, test), (others, rest) = _split(rows, 0.3), _split(features[30:], 0.3)
            vector, offset = fit_vector(fitted, others, "linear", 1.0)
            torch.testing.assert_close(result.vectors[number], vector.float())
            torch.testing.assert_close(float(result.offsets[number]), offset)
            right = int((test.double() @ vector > offset).sum() + (rest.double() @ vector <= offset).sum())
            assert abs(float(result.accuracy[number]) - right / (len(test) + len(rest))) < 1e-6
    assert result.layer == "1" and result.vectors.dtype == torch.float32
    for count, share, length in ((7, 0.25, 2), (7, 0.95, 6), (2, 0.1, 1), (5, 0.5, 2)):
        fitted, test = _split(torch.arange(count), share)
        assert len(test) == length and sorted(torch.cat([fitted, test]).tolist()) == list(range(count))


@method(
    family="concepts",
    title="Concept activation vectors",
    references=[KIM_2018],
    invariants=[UnitRange(field="accuracy")],
    relations=[
        InvariantTo("normalization", fields=("accuracy",)),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    quick={"held_out": 0.5},
    demo={"dataset": "builtin:scenes/200", "random": "builtin:textures/64"},
)
def concept_vectors(
    model: Model,
    dataset: Dataset,
    random: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to read; default: the last map")] = None,
    classifier: Classifier = "linear",
    strength: Strength = 1.0,
    held_out: Annotated[
        float, Field(gt=0, lt=1, description="share of the images that the accuracy is of")
    ] = 0.25,
    seed: Seed = None,
) -> ConceptVectors:
    """Concept activation vectors: directions of a layer that separate images of a concept from random ones.

    v = w / |w|,  min over w, b of sum_i log(1 + exp(-y_i (w . x_i + b))) + strength/2 |w|^2

    with x_i the layer's activations averaged over its positions, divided by their deviation, and y_i = 1 for
    images of the concept, -1 for random ones, both kinds with the same total weight. Logistic regression by
    scikit-learn; ``classifier="mean_difference"`` is v ~ mean x (concept) - mean x (random), in closed form.
    Every class of ``dataset`` is a concept; without classes all of it is one. A vector always exists, also
    for images with nothing in common: read ``accuracy``, and test it with ``tcav``.

    Returns:
        ``vectors`` (K, C) of length 1, ``offsets`` (K,) and the held-out ``accuracy`` (K,).
        ``result.direction(name)`` is a target for any method: an attribution, a drawing, an attack.

    Raises:
        InputError: a concept, or the random images, with fewer than two images.
        ModelError: the layer's output does not have one row per image.

    Example::
        from phosphene import run

        result = run("concept_vectors", dataset="builtin:scenes/64", random="builtin:textures/32", seed=0)
        result.vectors.shape  # a row for each of the ten shapes
        run("grad_cam", images="builtin:scenes/2", target=result.direction("star"), layer="features.11")

    Source:
        Kim et al. 2018, section 3.2; mean difference: Martin and Weller 2019.
    """
    layer = layer if layer is not None else model.last_map
    features, labels = pooled_activations(model, dataset, layer, "concepts")
    groups = by_concept(features, labels, dataset)
    other, _ = pooled_activations(model, random, layer, "random images")
    if len(other) < LEAST_IMAGES:
        raise InputError(f"there is {len(other)} random image; vectors need at least {LEAST_IMAGES}")
    vectors, offsets, accuracies = [], [], []
    for rows in groups.values():
        parts = [_split(part, held_out) for part in (rows, other)]
        vector, offset = fit_vector(parts[0][0], parts[1][0], classifier, strength)
        hits = [parts[0][1].double() @ vector > offset, parts[1][1].double() @ vector <= offset]
        vectors.append(vector)
        offsets.append(offset)
        accuracies.append(float(torch.cat(hits).double().mean()))
    counts = [[len(rows), len(other)] for rows in groups.values()]
    return ConceptVectors(
        layer=layer,
        concepts=tuple(groups),
        vectors=torch.stack(vectors).to(model.device, model.dtype),
        offsets=torch.tensor(offsets).to(model.device, model.dtype),
        accuracy=torch.tensor(accuracies).to(model.device, model.dtype),
        counts=torch.tensor(counts, device=model.device),
    )


def _split(rows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to test, at least one of each, in random order."""
    order = torch.randperm(len(rows))
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    return rows[order[count:]], rows[order[:count]]


@hookimpl
def phosphene_methods():
    return [concept_vectors]
