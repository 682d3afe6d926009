"""Centered kernel alignment (CKA) of the layers of two models, Kornblith et al. 2019."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    to_float64,
)
from phosphene.data import Batch, State
from phosphene.images import resize
from phosphene.roles import Dataset, LayerName, Model, OtherModel
from phosphene.spec import Agrees, Calls, Cost, InvariantTo, ScalesWith, size

from ._similarity_result import LayerSimilarity

#: The unbiased estimate of HSIC needs four images.
LEAST_IMAGES = 4


def _oracle() -> None:
    """CKA is 1 for a rotated and scaled representation, and that of its equation for other ones."""
    draw = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=draw, dtype=torch.float64))
    linear = nn.Linear(12, 12), nn.Linear(12, 5), nn.Linear(5, 2)
    network = nn.Sequential(nn.Flatten(), *linear[:2], nn.Tanh(), linear[2]).double()
    with torch.no_grad():
        linear[0].weight.copy_(3 * rotation)
        for layer in linear[1:]:
            layer.weight.normal_(generator=draw)
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], input_size=(3, 2, 2))
    images = torch.rand(11, 3, 2, 2, generator=draw, dtype=torch.float64)
    result = cka(model, TensorDataset(images), layers=["0", "1", "2", "3"], group=11)
    assert result.layers == result.other_layers == ("0", "1", "2", "3")
    torch.testing.assert_close(result.similarity.diagonal(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(result.similarity[0, 1], torch.ones((), dtype=torch.float64))
    features = [model.features(images, layer).detach() for layer in ("0", "2", "3")]
    for kernel in ("linear", "rbf"):
        result = cka(model, TensorDataset(images), layers=["0", "2", "3"], group=11, kernel=kernel, sigma=0.7)
        expected = torch.tensor([[_similarity(x, y, kernel, 0.7) for y in features] for x in features])
        torch.testing.assert_close(result.similarity, expected.double())
    # Two groups of five images: the sums of their estimates. The image that is left over does not count.
    result = cka(model, TensorDataset(images), layers=["2"], other_layers=["3"], group=5)
    x, y = (features[1][:5], features[1][5:10]), (features[2][:5], features[2][5:10])
    sums = []
    for first, second in ((x, y), (x, x), (y, y)):
        pairs = zip(first, second, strict=True)
        sums.append(
            torch.stack([_hsic(_gram(a, "linear", 1), _gram(b, "linear", 1)) for a, b in pairs]).sum()
        )
    torch.testing.assert_close(result.similarity[0, 0], sums[0] / (sums[1] * sums[2]).sqrt())
    assert result.count == 10
    # Of another model, whose images are twice as large.
    larger = nn.Sequential(nn.Upsample(scale_factor=0.5), nn.Flatten(), nn.Linear(12, 2)).double()
    other = load_model(larger, mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 4, 4))
    result = cka(model, TensorDataset(images), other, layers=["2"], other_layers=["1"], group=11)
    larger_features = other.features(resize(images, (4, 4)), "1").detach()
    expected = torch.tensor([[_similarity(features[1], larger_features, "linear", 1)]]).double()
    torch.testing.assert_close(result.similarity, expected)
    # Of four images, and layers of the same name.
    result = cka(model, TensorDataset(images[:4]), other, layers=["1"])
    own = model.features(images[:4], "1").detach()
    expected = torch.tensor([[_similarity(own, larger_features[:4], "linear", 1)]]).double()
    torch.testing.assert_close(result.similarity, expected)
    assert (result.measure, result.names) == ("CKA (linear)", (model.name, other.name))


def _similarity(x: Tensor, y: Tensor, kernel: str, sigma: float) -> float:
    """CKA of two representations by the definition of the unbiased estimate, term by term."""

    def estimate(a: Tensor, b: Tensor) -> float:
        n = len(a)
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        first = sum(float(a[i, j] * b[j, i]) for i, j in pairs)
        total = sum(float(a[p]) for p in pairs) * sum(float(b[p]) for p in pairs)
        crossed = sum(float(a[i, j] * b[j, k]) for i, j in pairs for k in range(n) if k != j)
        return (first + total / ((n - 1) * (n - 2)) - 2 * crossed / (n - 2)) / (n * (n - 3))

    def kernel_matrix(z: Tensor) -> Tensor:
        if kernel == "linear":
            return z @ z.T
        distances = (z[:, None] - z).square().sum(2)
        median = distances[~torch.eye(len(z), dtype=torch.bool)].median()
        return (-distances / (2 * sigma**2 * median)).exp()

    a, b = kernel_matrix(x), kernel_matrix(y)
    return estimate(a, b) / (estimate(a, a) * estimate(b, b)) ** 0.5


def similarity_by_definition(calls: Calls) -> Tensor:
    """CKA of the layers from the sums of its definition over pairs and triples of images."""
    images = calls.inputs["dataset"].images
    features = [
        calls.model.features(images, name).detach().double().flatten(1) for name in calls.result.layers
    ]
    kernel, sigma = calls.params["kernel"], calls.params["sigma"]
    return torch.tensor([[_similarity(x, y, kernel, sigma) for y in features] for x in features])


@method(
    family="comparison",
    title="CKA",
    references=[
        Reference(
            key="kornblith2019",
            title="Similarity of Neural Network Representations Revisited",
            authors="Kornblith, Norouzi, Lee, Hinton",
            year=2019,
            url="https://arxiv.org/abs/1905.00414",
        ),
        Reference(
            key="nguyen2021",
            title="Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network "
            "Representations Vary with Width and Depth",
            authors="Nguyen, Raghu, Kornblith",
            year=2021,
            url="https://arxiv.org/abs/2010.15327",
        ),
    ],
    relations=[
        Agrees(similarity_by_definition, fields=("similarity",), networks=("flat",)),
        InvariantTo("dataset_order"),
        InvariantTo("normalization"),
        ScalesWith("logits", power=0),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset * 2),
    oracle=_oracle,
    exempt={"reads_the_named_layer": "one layer is compared with itself: CKA is 1"},
)
def cka(
    model: Model,
    dataset: Dataset,
    other: OtherModel = None,
    *,
    layers: Annotated[
        list[LayerName] | None, Field(min_length=1, description="layers of the model; default: its stages")
    ] = None,
    other_layers: Annotated[
        list[str] | None,
        Field(min_length=1, description="layers of the other model; default: as ``layers``, or its stages"),
    ] = None,
    kernel: Annotated[
        Literal["linear", "rbf"], Field(description="inner products, or Gaussians of the distances")
    ] = "linear",
    sigma: Annotated[
        float, Field(gt=0, le=100, description="width of the Gaussians, in medians of the distances")
    ] = 1.0,
    group: Annotated[
        int,
        Field(
            ge=LEAST_IMAGES, le=4096, description="images of one estimate; all layers of them are in memory"
        ),
    ] = 64,
) -> LayerSimilarity:
    """CKA: similarity of the representations in the layers of two models, or of one.

    CKA(K, L) = sum_b HSIC(K_b, L_b) / (sum_b HSIC(K_b, K_b) sum_b HSIC(L_b, L_b))^1/2

    HSIC(K, L) = (tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1) / (n (n-3))

    with K_ij = k(x_i, x_j), K_ii = 0, x_i the layer's entire output for image i as a vector, and L of the
    other layer. k is the inner product or exp(-||x_i - x_j||^2 / (2 sigma^2 m)), m the median of the squared
    distances of the group. HSIC is an unbiased estimate for each group b of n = ``group`` images, so that its
    mean over many groups is right for groups of any size; images after the last full group do not count,
    unless there is no full one. CKA is 1 for representations that differ by a rotation and a scale, about 0
    for independent ones, and may be slightly negative. A constant layer has none (NaN would be its value) and
    is refused. Images are resized where the other model takes another size.

    Returns:
        ``similarity`` (P, Q) for the P ``layers`` of the model and the Q ``other_layers`` of the other one;
        without an ``other`` model, of the model itself.

    Raises:
        InputError: fewer than four images, or ``other_layers`` that do not exist.
        ModelError: a layer's output does not have one row per image, or is the same for all of them.

    Example::
        from phosphene import run

        result = run("cka", dataset="builtin:scenes/16", other="builtin:shapes-resnet")
        result.similarity.shape  # layers of the first, layers of the second model

    Source:
        Kornblith et al. 2019, sections 3 and 4; unbiased minibatch estimate: Nguyen et al. 2021, section 3.
    """
    count = len(dataset)
    if count < LEAST_IMAGES:
        raise InputError(f"CKA needs at least {LEAST_IMAGES} images, the data set has {count}")
    first = layers or list(model.stages)
    if other is None:
        second = [model.layer_name(layer) for layer in other_layers] if other_layers else first
    else:
        second = [other.layer_name(layer) for layer in other_layers] if other_layers else list(other.stages)
    group = min(group, count)
    stop = count // group * group
    sums = _Estimates(model, other or model, first, second, kernel, sigma).run(dataset, group, stop)
    scale = torch.outer(sums["first"], sums["second"])
    for names, own in ((first, sums["first"]), (second, sums["second"])):
        for name, value in zip(names, own.tolist(), strict=True):
            if not value > 0:
                raise ModelError(f"the output of layer {name!r} is the same for all images: it has no CKA")
    return LayerSimilarity(
        similarity=(sums["both"] / scale.sqrt()).to(model.device, model.dtype),
        layers=tuple(first),
        other_layers=tuple(second),
        names=(model.name, (other or model).name),
        measure=f"CKA ({kernel})",
        count=stop,
    )


@dataclass
class _Estimates(Fold[State]):
    """Sums over groups of HSIC(K, L), (P, Q), and of HSIC(K, K) and HSIC(L, L), (P,) and (Q,)."""

    title = "representations"
    model: Model
    other: Any
    layers: Sequence[str]
    other_layers: Sequence[str]
    kernel: str
    sigma: float

    def update(self, state: State, batch: Batch) -> State:
        first = self._grams(self.model, batch.images, self.layers)
        same = self.other is self.model and self.layers == self.other_layers
        second = first if same else self._grams(self.other, batch.images, self.other_layers)
        estimates = {
            "both": torch.stack([torch.stack([_hsic(a, b) for b in second]) for a in first]),
            "first": torch.stack([_hsic(a, a) for a in first]),
            "second": torch.stack([_hsic(b, b) for b in second]),
        }
        return self.merge(state, {name: value.cpu() for name, value in estimates.items()})

    def _grams(self, model: Model, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """The kernel matrix (n, n) of every layer."""
        if model is not self.model and images.shape[2:] != model.input_size[1:] and model.size_known:
            images = resize(images, model.input_size[1:])
        parts = images.to(model.device, model.dtype).split(batch_size(model))
        outputs = zip(*(model.features_of(part, layers) for part in parts), strict=True)
        return [_gram(_vectors(name, images, *values), self.kernel, self.sigma)
                for name, values in zip(layers, outputs, strict=True)]  # fmt: skip


def _vectors(name: str, images: Tensor, *outputs: Tensor) -> Tensor:
    """A layer's output as one vector per image, (n, D)."""
    values = torch.cat(outputs)
    if len(values) != len(images):
        raise ModelError(f"layer {name!r} returns {len(values)} rows for {len(images)} images")
    return values.flatten(1)


def _gram(vectors: Tensor, kernel: str, sigma: float) -> Tensor:
    """The kernel matrix (n, n) in double precision, zero on its diagonal."""
    vectors = to_float64(vectors)
    # Centered: HSIC does not depend on the mean, rounding errors of inner products do.
    # equivalent mutants: only rounding depends on the mean
    vectors = vectors - vectors.mean(0)
    products = vectors @ vectors.T
    if kernel == "rbf":
        squares = products.diagonal()
        distances = (squares[:, None] + squares - 2 * products).clamp(min=0)
        off_diagonal = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        median = distances[off_diagonal].median()
        # Equal images have distance 0; a constant layer then has the same value for all pairs.
        products = (-distances / (2 * sigma**2 * median.clamp(min=torch.finfo(median.dtype).tiny))).exp()
    return products.fill_diagonal_(0)


def _hsic(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased estimate of HSIC from kernel matrices (n, n) with a zero diagonal, Nguyen et al. eq. 3."""
    n = len(first)
    trace = (first * second.T).sum()
    totals = first.sum() * second.sum() / ((n - 1) * (n - 2))
    # equivalent mutants: kernel matrices are symmetric
    crossed = 2 / (n - 2) * (first.sum(0) @ second.sum(1))
    return (trace + totals - crossed) / (n * (n - 3))


@hookimpl
def phosphene_methods():
    return [cka]
