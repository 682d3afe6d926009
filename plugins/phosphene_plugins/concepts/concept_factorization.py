"""Concept factorization: a layer's maps as a product of concepts and where they occur."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    Direction,
    InputError,
    Reference,
    at_least_float32,
    batch_size,
    hookimpl,
    layer_gradients,
    load_model,
    max_batch,
    method,
    progress_bar,
    scores,
    unit_centers,
)
from phosphene.images import Centers, enlarge_maps, overlay, resize, to_display
from phosphene.results import Panel, Result
from phosphene.roles import Images, LayerName, Model, Seed, Target
from phosphene.spec import Cost, InvariantTo, ScalesWith, ceil, either, param, size
from phosphene.targets import Objective, parse_target

from ..embeddings._features import layer_vectors
from ..embeddings._principal_components import principal_axes
from ._sobol_indices import sobol_designs, sobol_indices, total_indices

#: Crops of each concept in the result.
CROPS = 8
#: How many crops an image is cut into.
_CROPS = (ceil(2 / either(param.crop, 1) - 2) + 1) * (ceil(2 / either(param.crop, 1) - 2) + 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptMaps(Result):
    """Concepts of a layer and where they occur in images.

    ``maps`` (N, K, h, w): how strongly concept k occurs at each position; ``vectors`` (K, C): the concepts,
    directions of the layer's channels; ``mean`` (C,): the part that all positions share (zeros for NMF and
    k-means); ``importance`` (N, K): contribution of the concept to each image's score, gradient times
    occurrence; ``sobol`` (N, K): total Sobol indices of the score, or None; ``explained``: the share of the
    maps' squared deviation that the product explains. ``crop_images`` (K, B, C, H, W): of a factorization of
    crops those in which each concept is strongest.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N K h w",
        "vectors": "K channels",
        "mean": "channels",
        "importance": "N K",
        "targets": "N",
        "sobol": "N K",
        "crop_images": "K B C p q",
    }

    images: Tensor
    maps: Tensor
    vectors: Tensor
    mean: Tensor
    importance: Tensor
    explained: Tensor
    targets: tuple[str, ...]
    layer: str
    algorithm: str
    centers: Centers | None = None
    sobol: Tensor | None = None
    crop_images: Tensor | None = None

    def direction(self, concept: int) -> Direction:
        """A concept as the target of other methods. Raises InputError for a number that does not exist."""
        if not 0 <= concept < len(self.vectors):
            raise InputError(f"there are {len(self.vectors)} concepts, so there is no number {concept}")
        return Direction(self.layer, self.vectors[concept])

    def panels(self) -> list[list[Panel]]:
        # One scale for a concept in all images; figures have the concepts of largest importance.
        weights = self.importance if self.sobol is None else self.sobol
        order = weights.mean(0).abs().sort(descending=True, stable=True).indices[:6].tolist()
        tops = self.maps.amax((0, 2, 3)).clamp(min=1e-12)
        groups = []
        for n, (image, maps) in enumerate(zip(self.images, self.maps, strict=True)):
            group = [Panel(image, self.targets[n])]
            for k in order:
                heat = (maps[k] / tops[k]).clamp(0, 1)[None].float()
                enlarged = enlarge_maps(heat, image.shape[1:], self.centers)[0]
                title = f"concept {k}: {float(weights[n, k]):{'.2f' if self.sobol is not None else '+.2g'}}"
                group.append(Panel(overlay(to_display(image), enlarged), title, is_output=True))
            groups.append(group)
        if self.crop_images is not None:
            for k in order:
                crops = self.crop_images[k, : len(order) + 1]
                titles = [f"crops of concept {k}"] + [""] * (len(crops) - 1)
                pairs = zip(crops, titles, strict=True)
                groups.append([Panel(crop, title, is_output=True) for crop, title in pairs])
        return groups

    def lines(self) -> list[str]:
        shares = ", ".join(f"{k}: {value:+.3g}" for k, value in enumerate(self.importance.mean(0).tolist()))
        head = f"{self.algorithm} of {self.layer}: {float(self.explained):.1%} explained"
        lines = [head, f"mean importance of the concepts {shares}"]
        if self.sobol is not None:
            indices = ", ".join(f"{k}: {value:.2f}" for k, value in enumerate(self.sobol.mean(0).tolist()))
            lines.append(f"mean total Sobol indices {indices}")
        return lines


def _oracle() -> None:
    """Maps that are a product of two nonnegative factors are decomposed into these, up to order and scale."""
    copy, linear = nn.Conv2d(3, 3, 1, bias=False).double(), nn.Linear(3, 2).double()
    network = nn.Sequential(copy, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear, nn.ReLU())
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.6, -2.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        copy.weight.copy_(torch.eye(3)[:, :, None, None])
        linear.weight.copy_(weight)
        linear.bias.copy_(torch.tensor([0.0, 0.7]))  # scores are above 0, where the network is linear
    model = load_model(network, mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 4, 6))
    concepts = torch.tensor([[0.6, 0.2, 0.0], [0.0, 0.1, 0.5]], dtype=torch.float64)
    strength = torch.zeros(2, 2, 4, 6, dtype=torch.float64)
    strength[0, 0, :2], strength[0, 1, 2:], strength[1, 0, :, :3], strength[1, 1, :, 1:] = 1.0, 0.5, 0.7, 1.0
    images = torch.einsum("nkhw,kc->nchw", strength, concepts)
    options: dict[str, Any] = {"layer": "0", "concepts": 2, "seed": 0}
    result = concept_factorization(model, images, 0, **options)
    assert result.layer == "0" and result.centers == (tuple(range(4)), tuple(range(6)))
    assert torch.equal(result.direction(1).vector, result.vectors[1])
    assert result.explained > 0.999 and (result.maps >= 0).all() and (result.vectors >= 0).all()
    # The order is by importance: the mean over images of gradient times occurrence, weight / 24 each.
    product = torch.einsum("nkhw,kc->nkchw", strength, concepts)
    expected = torch.einsum("nkchw,c->nk", product, weight[0]) / 24
    order = expected.mean(0).argsort(descending=True)
    assert result.importance.mean(0).diff() <= 0
    torch.testing.assert_close(result.importance, expected[:, order], rtol=0.02, atol=0.01)
    parts = torch.einsum("nkhw,kc->nkchw", result.maps, result.vectors)
    torch.testing.assert_close(parts, product[:, order], rtol=0.02, atol=0.01)
    torch.testing.assert_close(result.vectors.norm(dim=1), torch.ones(2, dtype=torch.float64))
    # All algorithms reconstruct the maps, whose rank is two, but k-means, which has one concept a position.
    for algorithm in ("pca", "ica", "semi_nmf"):
        result = concept_factorization(model, images, 1, algorithm=algorithm, **options)
        rebuilt = torch.einsum("nkhw,kc->nchw", result.maps, result.vectors) + result.mean[:, None, None]
        torch.testing.assert_close(rebuilt, images, rtol=0.02, atol=0.01)
        assert result.explained > 0.999
        if algorithm != "semi_nmf":
            torch.testing.assert_close(result.mean, images.mean((0, 2, 3)))
    # The score is linear in the occurrences: the total index of a concept is its share of the variance.
    call: Any = concept_factorization
    for algorithm, target in (("nmf", Class(1)), ("nmf", Class((1, 0))), ("pca", Class(0))):
        with max_batch(300):
            result = call(model, images, target, algorithm=algorithm, designs=256, **options)
        assert result.sobol is not None
        squares = result.importance.square()
        torch.testing.assert_close(result.sobol, squares / squares.sum(1, keepdim=True), rtol=0, atol=0.03)
        assert result.sobol.mean(0).diff() <= 0
        weights = weight[torch.tensor(target.index)].expand(2, 3)
        importance = torch.einsum("nkhw,kc,nc->nk", result.maps, result.vectors, weights) / 24
        torch.testing.assert_close(result.importance, importance)
    # Crops of half the sides: the same concepts, and the crops in which they fill the image.
    result = concept_factorization(model, images, 0, crop=0.5, **options)
    parts = torch.einsum("nkhw,kc->nkchw", result.maps, result.vectors)
    torch.testing.assert_close(parts, product[:, order], rtol=0.02, atol=0.01)
    assert result.crop_images is not None and result.crop_images.shape == (2, 8, 3, 4, 6)
    for k, concept in enumerate(order.tolist()):
        pooled = result.crop_images[k].mean((0, 2, 3))
        assert torch.nn.functional.cosine_similarity(pooled, concepts[concept], dim=0) > 0.9
    _crops_are_half_a_crop_apart(images)
    _indices_have_closed_forms()
    # The predicted class is that of the image, whatever part of its concepts is left.
    predicted = Class(tuple(model(images).argmax(1).tolist()))
    assert predicted.index == (1, 0)
    none = concept_factorization(model, images, designs=64, **options)
    with max_batch(1):
        named = concept_factorization(model, images, predicted, designs=64, **options)
    torch.testing.assert_close(none.sobol, named.sobol)
    torch.testing.assert_close(none.importance, named.importance)
    _factors_are_those_of_their_algorithms()
    # Without a layer, the last map; in single precision; more concepts than channels, and one of zeros.
    images[:, :, 3] = 0
    single = load_model(network.float(), mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 4, 6))
    options |= {"layer": None, "algorithm": "kmeans", "concepts": 4}
    clusters = concept_factorization(single, images.float(), 1, **options)
    assert clusters.layer == "0" and clusters.maps.dtype == torch.float32
    assert clusters.vectors.norm(dim=1).round(decimals=5).sort().values.tolist() == [0, 1, 1, 1]
    assert ((clusters.maps > 0).sum(1) <= 1).all() and clusters.targets == ("class 1", "class 1")
    rebuilt = torch.einsum("nkhw,kc->nchw", clusters.maps, clusters.vectors)
    deviation = images.sub(images.mean((0, 2, 3), keepdim=True)).square().sum()
    expected = 1 - (images - rebuilt).square().sum() / deviation
    assert expected < 0.99
    torch.testing.assert_close(clusters.explained, expected.float(), rtol=0, atol=1e-5)


def _crops_are_half_a_crop_apart(images: Tensor) -> None:
    """Crops of the share p of a side start every p / 2 of it, or closer, from the first pixel to the last."""
    assert _starts(8, 4, 0.5) == [0, 2, 4] and _starts(5, 5, 1.0) == [0]
    assert _starts(10, 2, 0.25) == [0, 1, 3, 4, 5, 7, 8]
    assert _starts(10, 3, 0.3) == [0, 1, 3, 4, 6, 7] and _starts(10, 7, 0.7) == [0, 3]
    assert (_cut(torch.arange(24.0).view(1, 1, 4, 6) / 24, 0.1)[-1] == 23 / 24).all()  # of one pixel
    crops = _cut(images, 0.5).unflatten(0, (2, 3, 3))
    for row, column in ((0, 0), (1, 2), (2, 1)):
        part = images[:, :, row : row + 2, (0, 2, 3)[column] : (0, 2, 3)[column] + 3]
        torch.testing.assert_close(crops[:, row, column], resize(part, (4, 6)))


def _factors_are_those_of_their_algorithms() -> None:
    """PCA's concepts are singular vectors; semi-NMF's occurrences least squares; ICA's signs are fixed."""
    values = torch.randn(40, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3 + 0.5
    singular = torch.linalg.svd(values - values.mean(0)).Vh[:2]
    _, vectors, _ = _pca(values, 2, 0)
    torch.testing.assert_close((vectors @ singular.T).abs(), torch.eye(2, dtype=torch.float64))
    occurrences, vectors, mean = _ica(values, 5, 0)
    torch.testing.assert_close(occurrences @ vectors + mean, values)
    assert torch.equal(vectors.abs().amax(1), vectors.amax(1))
    # Two factors with noise, and a position of zeros.
    draw = torch.Generator().manual_seed(1)
    concepts = torch.randn(2, 4, generator=draw, dtype=torch.float64)
    values = torch.rand(12, 2, generator=draw, dtype=torch.float64) @ concepts
    values += 0.1 * torch.randn(12, 4, generator=draw, dtype=torch.float64)
    values[0] = 0
    occurrences, vectors, _ = _semi_nmf(values, 2, 0)
    torch.testing.assert_close(occurrences, _nonnegative_least_squares(values, vectors))


def _indices_have_closed_forms() -> None:
    """Total Sobol indices of a sum, a product and Ishigami's function are those of their integrals."""
    functions: list[tuple[Callable[[Tensor], Tensor], list[float]]] = [
        (lambda x: 3 * x[:, 0] - x[:, 1] + 0 * x[:, 2], [0.9, 0.1, 0.0]),
        (lambda x: x[:, 0] * x[:, 1], [4 / 7, 4 / 7, 0.0]),  # (1/3 1/12) / (1/9 - 1/16)
        (_ishigami, [0.5576, 0.4424, 0.2437]),
        (lambda x: x[:, 0] * 0 + 2, [0.0, 0.0, 0.0]),
    ]
    for function, expected in functions:
        indices = sobol_indices(function, 3, 2048, seed=0)
        assert (indices - torch.tensor(expected)).abs().max() < 0.01, f"{indices.tolist()}, not {expected}"


def _ishigami(x: Tensor) -> Tensor:
    """sin y_1 + 7 sin^2 y_2 + 0.1 y_3^4 sin y_1 with y uniform in [-pi, pi], Ishigami and Homma 1990."""
    y = (2 * x - 1) * torch.pi
    return y[:, 0].sin() + 7 * y[:, 1].sin().square() + 0.1 * y[:, 2] ** 4 * y[:, 0].sin()


@method(
    family="concepts",
    references=[
        Reference(
            key="collins2018",
            title="Deep Feature Factorization for Concept Discovery",
            authors="Collins, Achanta, Susstrunk",
            year=2018,
            url="https://arxiv.org/abs/1806.10206",
        ),
        Reference(
            key="fel2023",
            title="CRAFT: Concept Recursive Activation FacTorization for Explainability",
            authors="Fel, Picard, Bethune, Boissin, Vigouroux, Colin, Cadene, Serre",
            year=2023,
            url="https://arxiv.org/abs/2211.10154",
        ),
    ],
    relations=[
        InvariantTo("logit_shift", fields=("maps", "importance"), where={"algorithm": "pca"}),
        ScalesWith("logits", power=1, fields=("importance",), where={"algorithm": "pca"}),
        ScalesWith("logits", power=0, fields=("explained",), where={"algorithm": "pca"}),
    ],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (3 + _CROPS + param.designs * (param.concepts + 2)), backward=size.images
    ),
    batch_independent=False,
    oracle=_oracle,
    quick={"concepts": 2},
    demo={"images": "builtin:scenes/8", "concepts": 6},
)
def concept_factorization(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to factorize; default: the last map")] = None,
    concepts: Annotated[int, Field(ge=1, le=1000, description="number of concepts")] = 6,
    algorithm: Annotated[
        Literal["nmf", "semi_nmf", "kmeans", "pca", "ica"],
        Field(description="NMF, semi-NMF for layers with negative values, k-means, PCA or FastICA"),
    ] = "nmf",
    crop: Annotated[
        float | None,
        Field(ge=0.05, le=1, description="share of the image's sides of crops to factorize; None: positions"),
    ] = None,
    designs: Annotated[
        int, Field(ge=0, le=2**16, description="designs of the Sobol indices, a power of two; 0: none")
    ] = 0,
    seed: Seed = None,
) -> ConceptMaps:
    """Concept factorization: a layer's activations as concepts times occurrences (DFF, CRAFT).

    A ~ U V + m,  min ||A - U V - m||^2;  importance_k = sum_p U_pk V_k . dS / dA_p

    sobol_k = E Var(S(c) | c_j, j != k) / Var S(c),  S(c) the score with A = sum_k c_k U_k V_k + m

    with c uniform in [0, 1], the rows of A the layer's activations at all positions of all images, V (K, C)
    the concepts, of length 1, and U their occurrences. "nmf": U, V >= 0, m = 0, for layers after a ReLU;
    "semi_nmf": U >= 0; "kmeans": one concept at each position; "pca" and "ica": U of any sign, m the mean.
    Importance is gradient times occurrence, for each image and its target. Concepts are ordered by mean
    importance, or by the Sobol indices where they are computed. NMF and ICA are not unique: compare seeds
    before reading a concept as one. By scikit-learn.

    CRAFT is ``crop=0.25, designs=32``: NMF of the activations of overlapping crops, enlarged to the image's
    size and averaged over their positions; U of the images then minimizes |A - U V| with U >= 0. It is
    recursive: ``crop_images[k]`` are the images of a second run at a layer further down, which splits concept
    k into parts. ``designs`` are the points of a scrambled Sobol sequence at which the score is computed, for
    each concept, with the concepts scaled by c; what the concepts do not explain of A is left out. The total
    index is the share of the score's variance that a concept has a part in, alone or with others (estimator
    of Jansen): it has no sign, and sums to 1 or more.

    Returns:
        ``maps`` (N, K, h, w), U; ``vectors`` (K, C), V; ``importance`` and ``sobol`` (N, K); ``explained``,
        the share of the squared deviation of A from its mean; ``crop_images`` (K, B, C, H, W).
        ``result.direction(k)`` is a target for any method.

    Raises:
        InputError: more concepts than positions or channels allow, "nmf" of a layer with negative values,
            crops of another algorithm, or ``designs`` that are no power of two.
        ModelError: the layer's output is no map, or the target does not depend on it.

    Example::
        from phosphene import run

        result = run("concept_factorization", images="builtin:scenes/4", concepts=3, seed=0)
        result.maps.shape  # (4, 3, 8, 8)
        run("class_visualization", target=result.direction(0), steps=2)
        options = {"concepts": 2, "seed": 0}
        crafted = run("concept_factorization", images="builtin:scenes/4", crop=0.5, designs=8, **options)
        run("concept_factorization", images=crafted.crop_images[0], layer="features.8", **options)

    Source:
        Collins et al. 2018, section 3 (NMF); Fel et al. 2023, sections 3.1 to 3.3 (crops, recursion, Sobol).
    """
    if crop is not None and algorithm != "nmf":
        raise InputError(f"crops are factorized by NMF, not by {algorithm}: algorithm='nmf', or crop=None")
    if designs & (designs - 1):
        raise InputError(
            "designs are points of a Sobol sequence, a power of two: "
            f"{2 ** round(math.log2(designs))}, not {designs}"
        )
    layer = layer if layer is not None else model.last_map
    objective = parse_target(target, model)
    maps, gradients = [], []
    for start in range(0, len(images), batch_size(model)):
        rows = range(start, min(start + batch_size(model), len(images)))
        ((part, gradient),) = layer_gradients(
            model, images[rows.start : rows.stop], objective.select(rows), layer
        )
        maps.append(at_least_float32(part))
        gradients.append(at_least_float32(gradient))
    features = torch.cat(maps)
    count, channels, height, width = features.shape
    positions = features.movedim(1, -1).flatten(0, 2)
    crops = None if crop is None else _cut(images, crop)
    rows_of_a = positions if crops is None else _pooled(model, crops, layer)
    most = min(rows_of_a.shape) if algorithm in ("pca", "ica", "nmf") else len(rows_of_a)
    if concepts > most:
        raise InputError(
            f"{algorithm} of {len(rows_of_a)} {'positions' if crops is None else 'crops'} and {channels} "
            f"channels has at most {most} concepts, not {concepts}"
        )
    if algorithm == "nmf" and float(positions.min()) < 0:
        raise InputError(
            f'layer {layer!r} has negative values, which NMF cannot have: use algorithm="semi_nmf", '
            "or the layer of the ReLU after it"
        )
    if not float((positions - positions[0]).abs().max()) > 0:
        raise InputError(f"the output of layer {layer!r} is the same at all positions: it has no concepts")
    sklearn_seed = int(torch.randint(2**31, ()))
    values = positions.cpu().double()
    occurrences, vectors, mean = _ALGORITHMS[algorithm](rows_of_a.cpu().double(), concepts, sklearn_seed)
    in_crops = occurrences
    if crops is not None:
        occurrences = _nonnegative_least_squares(values, vectors)
    lengths = vectors.norm(dim=1).clamp(min=1e-300)
    occurrences, vectors = occurrences * lengths, vectors / lengths[:, None]
    # equivalent mutants: activations that are all the same are refused
    deviation = (values - values.mean(0)).square().sum().clamp(min=1e-300)
    explained = 1 - (values - occurrences @ vectors - mean).square().sum() / deviation
    slopes = torch.einsum("nchw,kc->nkhw", torch.cat(gradients).cpu().double(), vectors)
    grid = occurrences.view(count, height, width, -1).movedim(-1, 1)
    importance = (grid * slopes).sum((2, 3))
    sobol = None
    if designs:
        rebuilt = torch.einsum("nkhw,kc->nkchw", grid, vectors).to(features), mean.to(features)
        sobol = _total_sobol_indices(model, images, objective, layer, *rebuilt, designs, sklearn_seed)
    # equivalent mutants: a sum has the same order as a mean, and sorting on a CPU is stable
    order = (importance if sobol is None else sobol).mean(0).sort(descending=True, stable=True).indices
    best = None
    if crops is not None:
        best = torch.stack([crops[in_crops[:, k].argsort(descending=True)[:CROPS]] for k in order])

    def convert(tensor: Tensor) -> Tensor:
        return tensor.contiguous().to(model.device, model.dtype)

    return ConceptMaps(
        images=images,
        maps=convert(grid[:, order]),
        vectors=convert(vectors[order]),
        mean=convert(mean),
        importance=convert(importance[:, order]),
        explained=convert(explained),
        targets=objective.names(model, count),
        layer=layer,
        algorithm=algorithm,
        centers=unit_centers(model, layer, images.shape[2:]),
        sobol=None if sobol is None else convert(sobol[:, order]),
        crop_images=best,
    )


def _cut(images: Tensor, share: float) -> Tensor:
    """Crops (M, C, H, W) of a share of the sides, every half crop apart, enlarged to the image's size."""
    height, width = (max(1, round(share * side)) for side in images.shape[2:])
    crops = []
    for top in _starts(images.shape[2], height, share):
        for left in _starts(images.shape[3], width, share):
            crops.append(images[:, :, top : top + height, left : left + width])
    return resize(torch.stack(crops, 1).flatten(0, 1), (images.shape[2], images.shape[3]))


def _starts(side: int, length: int, share: float) -> list[int]:
    """Where crops of a side start, evenly from the first to the last."""
    count = math.ceil(2 / share - 2) + 1
    return [round(n * (side - length) / max(1, count - 1)) for n in range(count)]


def _pooled(model: Model, images: Tensor, layer: str) -> Tensor:
    """A layer's activations (M, C), averaged over the positions."""
    with torch.no_grad():
        parts = images.split(batch_size(model))
        return torch.cat([layer_vectors(model, model.features(part, layer), part, layer) for part in parts])


def _nonnegative_least_squares(values: Tensor, vectors: Tensor) -> Tensor:
    """U (P, K) >= 0 of least |values - U vectors| for values (P, C) and vectors (K, C)."""
    from scipy.optimize import nnls

    basis = vectors.T.numpy()  # equivalent mutants: SciPy converts tensors
    # equivalent mutants: SciPy converts tensors
    return torch.stack([torch.from_numpy(nnls(basis, row)[0]) for row in values.numpy()])


def _total_sobol_indices(
    model: Model,
    images: Tensor,
    target: Objective,
    layer: str,
    parts: Tensor,
    mean: Tensor,
    designs: int,
    seed: int,
) -> Tensor:
    """Total indices (N, K) of the score with the concepts' parts (N, K, C, h, w) of the maps scaled."""
    factors = parts.shape[1]
    points = sobol_designs(factors, designs, seed)
    indices = []
    for n in progress_bar(range(len(images)), "Sobol indices", len(images)):
        # equivalent mutants: the target of the first of the images is used
        single = target.select([n]).resolve(model, images[n : n + 1])
        values = []
        for masks in points.split(batch_size(model)):
            batch = images[n : n + 1].expand(len(masks), -1, -1, -1)
            scaled = torch.einsum("mk,kchw->mchw", masks.to(parts), parts[n]) + mean[:, None, None]

            def replace(output: Tensor, batch: Tensor = batch, scaled: Tensor = scaled) -> Tensor:
                model.maps(output, batch, layer)[:] = scaled.to(output)  # a view of the output
                return output

            with torch.no_grad(), model.tap(layer, replace=replace):
                values.append(scores(model, batch, single.select([0] * len(masks))).cpu().double())
        indices.append(total_indices(torch.cat(values), factors))
    return torch.stack(indices)


# Each returns occurrences (P, K), concepts (K, C) and the mean (C,) of activations (P, C).


def _nmf(values: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    # equivalent mutants: the start of this kind is not random
    estimator = NMF(count, init="nndsvda", max_iter=1000, tol=1e-6, random_state=seed)
    with warnings.catch_warnings():  # the factors after 1,000 steps are as good as they get
        # equivalent mutants: a warning changes no result
        warnings.simplefilter("ignore", ConvergenceWarning)
        occurrences = estimator.fit_transform(values.numpy())  # equivalent mutants: it converts tensors
    zero = values.new_zeros(values.shape[1])
    return torch.from_numpy(occurrences), torch.from_numpy(estimator.components_), zero


def _semi_nmf(values: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Semi-NMF by alternating steps of Ding, Li and Jordan 2010: V by least squares, U by their product."""
    occurrences, _, zero = _kmeans(values, count, seed)
    occurrences = (occurrences > 0).double() + 0.2
    for _ in range(500):
        vectors = torch.linalg.lstsq(occurrences, values).solution
        target, gram = values @ vectors.T, vectors @ vectors.T
        numerator = target.clamp(min=0) + occurrences @ (-gram).clamp(min=0)
        denominator = (-target).clamp(min=0) + occurrences @ gram.clamp(min=0)
        occurrences = occurrences * (numerator / denominator.clamp(min=1e-12)).sqrt()
    return occurrences, torch.linalg.lstsq(occurrences, values).solution, zero


def _kmeans(values: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.cluster import KMeans

    # equivalent mutants: the same clusters where any run finds the minimum
    estimator = KMeans(count, n_init=10, random_state=seed).fit(values.numpy())
    labels = torch.from_numpy(estimator.labels_).long()
    occurrences = torch.nn.functional.one_hot(labels, count).double()
    return occurrences, torch.from_numpy(estimator.cluster_centers_), values.new_zeros(values.shape[1])


def _pca(values: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = values.mean(0)
    axes, _ = principal_axes(values - mean, count)
    return (values - mean) @ axes, axes.T, mean


def _ica(values: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    estimator = FastICA(count, whiten="unit-variance", max_iter=1000, random_state=seed)
    with warnings.catch_warnings():
        # equivalent mutants: a warning changes no result
        warnings.simplefilter("ignore", ConvergenceWarning)
        # equivalent mutants: scikit-learn converts tensors
        occurrences = torch.from_numpy(estimator.fit_transform(values.numpy()))
    vectors = torch.from_numpy(estimator.mixing_.T)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    # equivalent mutants: a component whose largest entry is 0 has no sign
    signs = torch.where(largest < 0, -1.0, 1.0)
    # equivalent mutants: a sign is its own inverse
    return occurrences * signs[:, 0], vectors * signs, torch.from_numpy(estimator.mean_)


_ALGORITHMS: dict[str, Callable[[Tensor, int, int], tuple[Tensor, Tensor, Tensor]]] = {
    "nmf": _nmf,
    "semi_nmf": _semi_nmf,
    "kmeans": _kmeans,
    "pca": _pca,
    "ica": _ica,
}


@hookimpl
def phosphene_methods():
    return [concept_factorization]
