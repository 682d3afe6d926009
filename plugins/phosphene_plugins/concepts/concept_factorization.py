"""Concept factorization: a layer's maps as a product of concepts and where they occur."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
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
    unit_centers,
)
from phosphene.images import Centers, enlarge_maps, overlay, to_display
from phosphene.results import Panel, Result
from phosphene.roles import Images, LayerName, Model, Seed, Target
from phosphene.spec import Cost, InvariantTo, ScalesWith, size
from phosphene.targets import parse_target

from ..embeddings._principal_components import principal_axes


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptMaps(Result):
    """Concepts of a layer and where they occur in images.

    ``maps`` (N, K, h, w): how strongly concept k occurs at each position; ``vectors`` (K, C): the concepts,
    directions of the layer's channels; ``mean`` (C,): the part that all positions share (zeros for NMF and
    k-means); ``importance`` (N, K): contribution of the concept to each image's score, gradient times
    occurrence; ``explained``: the share of the maps' squared deviation that the product explains.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N K h w",
        "vectors": "K channels",
        "mean": "channels",
        "importance": "N K",
        "targets": "N",
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

    def direction(self, concept: int) -> Direction:
        """A concept as the target of other methods. Raises InputError for a number that does not exist."""
        if not 0 <= concept < len(self.vectors):
            raise InputError(f"there are {len(self.vectors)} concepts, so there is no number {concept}")
        return Direction(self.layer, self.vectors[concept])

    def panels(self) -> list[list[Panel]]:
        # One scale for a concept in all images; figures have the concepts of largest importance.
        order = self.importance.mean(0).abs().sort(descending=True, stable=True).indices[:6].tolist()
        tops = self.maps.amax((0, 2, 3)).clamp(min=1e-12)
        groups = []
        for n, (image, maps) in enumerate(zip(self.images, self.maps, strict=True)):
            group = [Panel(image, self.targets[n])]
            for k in order:
                heat = (maps[k] / tops[k]).clamp(0, 1)[None].float()
                enlarged = enlarge_maps(heat, image.shape[1:], self.centers)[0]
                title = f"concept {k}: {float(self.importance[n, k]):+.2g}"
                group.append(Panel(overlay(to_display(image), enlarged), title, is_output=True))
            groups.append(group)
        return groups

    def lines(self) -> list[str]:
        shares = ", ".join(f"{k}: {value:+.3g}" for k, value in enumerate(self.importance.mean(0).tolist()))
        head = f"{self.algorithm} of {self.layer}: {float(self.explained):.1%} explained"
        return [head, f"mean importance of the concepts {shares}"]


def _oracle() -> None:
    """Maps that are a product of two nonnegative factors are decomposed into these, up to order and scale."""
    network = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        list(network.parameters())[0].copy_(weight)
    model = load_model(network, mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 4, 6))
    concepts = torch.tensor([[0.6, 0.2, 0.0], [0.0, 0.1, 0.5]], dtype=torch.float64)
    strength = torch.zeros(2, 2, 4, 6, dtype=torch.float64)
    strength[0, 0, :2], strength[0, 1, 2:], strength[1, 0, :, :3], strength[1, 1, :, 1:] = 1.0, 0.5, 0.7, 1.0
    images = torch.einsum("nkhw,kc->nchw", strength, concepts)
    options: dict[str, Any] = {"layer": "0", "concepts": 2, "seed": 0}
    with max_batch(1):
        result = concept_factorization(model, images, 0, **options)
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
    clusters = concept_factorization(model, images, 1, algorithm="kmeans", **options)
    assert ((clusters.maps > 0).sum(1) <= 1).all() and 0.3 < clusters.explained < 1
    assert clusters.targets == ("class 1", "class 1")


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
    cost=Cost(forward=size.images * 2, backward=size.images),
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
    seed: Seed = None,
) -> ConceptMaps:
    """Concept factorization: a layer's activations as concepts times occurrences (DFF, CRAFT).

    A ~ U V + m,  min ||A - U V - m||^2;  importance_k = sum_p U_pk V_k . dS / dA_p

    with the rows of A the layer's activations at all positions of all images, V (K, C) the concepts, of
    length 1, and U their occurrences. "nmf": U, V >= 0, m = 0, for layers after a ReLU; "semi_nmf": U >= 0;
    "kmeans": one concept at each position; "pca" and "ica": U of any sign, m the mean. Importance is gradient
    times occurrence, for each image and its target. Concepts are ordered by mean importance. NMF and ICA are
    not unique: compare seeds before reading a concept as one. By scikit-learn.

    Returns:
        ``maps`` (N, K, h, w), U; ``vectors`` (K, C), V; ``importance`` (N, K); ``explained``, the share of
        the squared deviation of A from its mean. ``result.direction(k)`` is a target for any method.

    Raises:
        InputError: more concepts than positions or channels allow, or "nmf" of a layer with negative values.
        ModelError: the layer's output is no map, or the target does not depend on it.

    Example::
        from phosphene import run

        result = run("concept_factorization", images="builtin:scenes/4", concepts=3, seed=0)
        result.maps.shape  # (4, 3, 8, 8)
        run("class_visualization", target=result.direction(0), steps=2)

    Source:
        Collins et al. 2018, section 3 (NMF); Fel et al. 2023, section 3 (importance of concepts).
    """
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
    most = min(positions.shape) if algorithm in ("pca", "ica", "nmf") else len(positions)
    if concepts > most:
        raise InputError(
            f"{algorithm} of {len(positions)} positions and {channels} channels has at most {most} concepts, "
            f"not {concepts}"
        )
    if algorithm == "nmf" and float(positions.min()) < 0:
        raise InputError(
            f'layer {layer!r} has negative values, which NMF cannot have: use algorithm="semi_nmf", '
            "or the layer of the ReLU after it"
        )
    if not float((positions - positions[0]).abs().max()) > 0:
        raise InputError(f"the output of layer {layer!r} is the same at all positions: it has no concepts")
    sklearn_seed = int(torch.randint(2**31, ()))
    values = positions.double().cpu()
    occurrences, vectors, mean = _ALGORITHMS[algorithm](values, concepts, sklearn_seed)
    lengths = vectors.norm(dim=1).clamp(min=1e-300)
    occurrences, vectors = occurrences * lengths, vectors / lengths[:, None]
    deviation = (values - values.mean(0)).square().sum().clamp(min=1e-300)
    explained = 1 - (values - occurrences @ vectors - mean).square().sum() / deviation
    slopes = torch.einsum("nchw,kc->nkhw", torch.cat(gradients).double().cpu(), vectors)
    grid = occurrences.view(count, height, width, -1).movedim(-1, 1)
    importance = (grid * slopes).sum((2, 3))
    order = importance.mean(0).sort(descending=True, stable=True).indices

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
    )


# Each returns occurrences (P, K), concepts (K, C) and the mean (C,) of activations (P, C).


def _nmf(values: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    estimator = NMF(count, init="nndsvda", max_iter=1000, tol=1e-6, random_state=seed)
    with warnings.catch_warnings():  # the factors after 1,000 steps are as good as they get
        warnings.simplefilter("ignore", ConvergenceWarning)
        occurrences = estimator.fit_transform(values.numpy())
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
        warnings.simplefilter("ignore", ConvergenceWarning)
        occurrences = torch.from_numpy(estimator.fit_transform(values.numpy()))
    vectors = torch.from_numpy(estimator.mixing_.T)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
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
