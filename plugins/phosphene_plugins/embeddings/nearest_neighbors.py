"""Nearest neighbors of images in feature space, beside those in pixel space."""

import itertools
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
)
from phosphene import Model as _Model
from phosphene.data import Batch, State
from phosphene.results import Embedding, Neighbors
from phosphene.roles import Dataset, Features, Images, Model
from phosphene.spec import Agrees, Cost, InvariantTo, Nonnegative, ScalesWith, size

from ._features import FeatureLayer, image_features, require_layer
from ._nearest_neighbor_search import NearestNeighborSearch, complete_columns, smallest_distances
from ._neighbor_index_result import Metric, search_index, unit_vectors
from ._relations import feature_distances, pixel_distances
from .embed import embed

DISTANCES = ("distances", "pixel_distances")
#: Rows of features that are searched at once.
# equivalent mutants: the result does not depend on the blocks
BLOCK_ROWS = 8192


def _oracle() -> None:
    """Images with two constant halves, whose features phi are the halves' levels, (level - 1/4) / (1/2)."""
    head = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(head, mean=[0.25], std=[0.5], input_size=(1, 4, 4))
    levels = torch.tensor([[0.75, 0.25], [0.75, 0.75], [0.25, 0.5], [0.3, 0.25], [0.75, 0.5]])
    images = levels[:, None, None].repeat_interleave(2, 3).expand(-1, 1, 4, 4)
    dataset, distances = TensorDataset(images), torch.tensor([0, 0.25, 0.45, 0.5])
    result = nearest_neighbors(model, images[[0, 3]], dataset, k=4)
    assert result.neighbors is not None and result.pixel_neighbors is not None
    assert result.pixel_indices is not None and result.pixel_distances is not None
    assert result.indices.tolist() == result.pixel_indices.tolist() == [[0, 4, 3, 1], [3, 2, 0, 4]]
    assert result.ids == (("0", "4", "3", "1"), ("3", "2", "0", "4"))
    assert torch.equal(result.neighbors, images[result.indices])
    assert torch.equal(result.pixel_neighbors, images[result.pixel_indices])
    assert torch.allclose(result.distances[0], distances / 0.5, atol=1e-6)
    assert torch.allclose(result.pixel_distances[0], distances * 8**0.5, atol=1e-6)
    # The same from small blocks of vectors and queries, and by faiss where it is installed.
    result = nearest_neighbors(model, images[[0, 3]], dataset, k=9)
    for numbers, pairs in ((1, 10**9), (4, 2), (1, 1)):
        blocks = mock.patch.multiple(NearestNeighborSearch, BLOCK_NUMBERS=numbers, MAX_PAIRS=pairs)
        with blocks, mock.patch.object(NearestNeighborSearch, "EXTRA_CANDIDATES", 0), max_batch(2):
            again = nearest_neighbors(model, images[[0, 3]], dataset, k=9)
        assert torch.equal(again.indices, result.indices)
        assert torch.allclose(again.distances, result.distances, atol=1e-6)
    neighbors_do_not_depend_on_blocks()
    # Of two queries the first is an image of the data set, so that both have four other neighbors.
    both = torch.cat([images[:1], images[:1] / 2])
    with max_batch(2):
        others = nearest_neighbors(model, both, dataset, k=9, exclude_self=True)
    assert others.indices.shape == (2, 4) and others.indices[0].tolist() == [4, 3, 1, 2]
    # phi = (1, 0) against (0.1, 0), (1, 0.5), (1, 1) and (0, 0.5).
    cosine = nearest_neighbors(model, images[:1], dataset, k=9, metric="cosine", exclude_self=True)
    assert cosine.pixel_indices is not None
    assert cosine.indices.tolist() == [[3, 4, 1, 2]] and cosine.pixel_indices.tolist() == [[4, 3, 1, 2]]
    expected = torch.tensor([[0, 1 - 0.8**0.5, 1 - 0.5**0.5, 1]])
    assert torch.allclose(cosine.distances, expected, atol=1e-6)
    # Averaged over the positions of a layer: the means of both halves, 0.5 against 0.625, 0.375 and 0.275.
    mean = nearest_neighbors(model, images[:1], dataset, layer="0", k=4).distances
    assert torch.allclose(mean, torch.tensor([[0, 0.125, 0.125, 0.225]]) / 0.5, atol=1e-6)
    # The same among features that were computed before, searched in blocks.
    for layer, metric in ((None, "l2"), (None, "cosine"), ("0", "l2")):
        options: dict[str, Any] = {"k": 9, "layer": layer, "metric": metric}
        among, features = (
            nearest_neighbors(model, images[[0, 3]], dataset, **options),
            embed(model, dataset, layer=layer),
        )
        with mock.patch.dict(globals(), BLOCK_ROWS=2):
            result = nearest_neighbors(model, images[[0, 3]], features=features, **options)
        assert torch.equal(result.indices, among.indices) and result.ids == among.ids
        assert torch.allclose(result.distances, among.distances, atol=1e-6)
        assert result.thumbnails is not None
        assert torch.equal(result.thumbnails, features.thumbnails[result.indices])


def neighbors_do_not_depend_on_blocks() -> None:
    """Of batches that are ranked one by one, some together, or all; with excluded pairs, in any order."""
    draw = torch.Generator().manual_seed(0)
    queries, vectors = (5 + torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (4, 23))
    names = torch.randperm(99, generator=draw)[:23]
    excluded = torch.rand(4, 23, generator=draw) < 0.3
    excluded[:, 6:12] = False  # two batches without any
    for numbers, exclude in itertools.product((1, 20, 10**9), (None, excluded)):
        with mock.patch.multiple(
            NearestNeighborSearch, BLOCK_NUMBERS=numbers, MAX_PAIRS=30, EXTRA_CANDIDATES=1
        ):
            search = NearestNeighborSearch(queries, 5)
            for rows in torch.arange(23).split(3):
                part = None if exclude is None else exclude[:, rows]
                search.add(vectors[rows], tuple(names[rows].tolist()), part)
            indices, distances = search.result()
        expected = (queries[:, None] - vectors).square().sum(2).sqrt()
        expected = expected if exclude is None else expected.masked_fill(exclude, torch.inf)
        nearest = expected.sort(dim=1)
        assert torch.equal(indices, names[nearest.indices[:, :5]]), numbers
        torch.testing.assert_close(distances, nearest.values[:, :5])
    # A query with two neighbors, and equal distances of which the smaller index comes first.
    search = NearestNeighborSearch(queries, 5)
    search.add(queries[[0, 0, 1, 0]], (7, 3, 5, 4), torch.tensor([[0, 0, 0, 1]] * 3 + [[1, 0, 0, 1]]).bool())
    indices, distances = search.nearest()
    assert indices[0].tolist() == [3, 7, 5, 4] and distances[0, :2].tolist() == [0, 0]
    assert distances.isinf().tolist() == [[False] * 3 + [True]] * 3 + [[False] * 2 + [True] * 2]
    assert search.result()[0].shape == (4, 2)


@method(
    family="embeddings",
    references=[
        Reference(
            key="krizhevsky2012",
            title="ImageNet Classification with Deep Convolutional Neural Networks",
            authors="Krizhevsky, Sutskever, Hinton",
            year=2012,
            url="https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks",
        )
    ],
    invariants=[Nonnegative(field="distances"), Nonnegative(field="pixel_distances")],
    needs=["dataset"],
    cost=Cost(forward=size.images + size.dataset),
    oracle=_oracle,
    relations=[
        Agrees(feature_distances, fields=("distances",), where={"k": 3}),
        Agrees(feature_distances, fields=("distances",), where={"k": 3, "metric": "cosine"}),
        Agrees(pixel_distances, fields=("pixel_distances",), where={"k": 3}),
        *(InvariantTo(change, fields=DISTANCES) for change in ("batch_order", "dataset_order")),
        InvariantTo("normalization", fields=DISTANCES),
        ScalesWith("logits", power=0, fields=DISTANCES),
    ],
    quick={"k": 2},
    demo={"k": 7, "exclude_self": True},
)
def nearest_neighbors(
    model: Model,
    images: Images,
    dataset: Dataset | None = None,
    features: Features | None = None,
    *,
    k: Annotated[int, Field(ge=1, le=1000, description="number of neighbors per image")] = 5,
    layer: FeatureLayer = None,
    metric: Annotated[Literal["l2", "cosine"], Field(description="distance between features")] = "l2",
    exclude_self: Annotated[
        bool, Field(description="leave out data set images equal to the query image, pixel for pixel")
    ] = False,
    search: Annotated[
        Literal["exact", "approximate"],
        Field(description="search of an index: exact, or approximate and fast"),
    ] = "exact",
) -> Neighbors:
    """Nearest neighbors of images in feature space, in a data set, beside those by pixel distance.

    d(q, x) = ||phi(q) - phi(x)||_2  or  1 - cos(phi(q), phi(x))

    phi(x) is the input of the model's linear classifier, or the output of ``layer`` averaged over its
    positions. The pixel distance is ||q - x||_2. Exact search in one pass over the data set, in which only
    the nearest candidates are stored. An image of the data set is its own neighbor at distance 0, unless
    ``exclude_self``. With the extra ``faiss``, large data sets are searched faster, with the same result.

    ``features`` are those of the data set's images, computed before by the same model; only the query images
    pass through it, and there are no pixel distances. Of a result of ``neighbor_index``, ``search`` may be
    "approximate": much faster, and a part of the neighbors, 1 - recall on average, are not the nearest.

    Returns:
        ``indices``, ``distances`` (N, k) and ``neighbors`` (N, k, C, H, W), nearest first; ``ids``. The
        same with ``pixel_`` for the pixel distance. Fewer than k if the data set has fewer images. With
        ``features``, ``thumbnails`` (N, k, 3, s, s) instead of ``neighbors``; with an approximate search its
        ``recall``.

    Raises:
        InputError: the data set holds nothing but the image itself, with ``exclude_self``; ``features`` of
            another model or layer; an approximate search without an index.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        result = run("nearest_neighbors", images="builtin:scenes/2", dataset="builtin:scenes/32", k=3)
        result.indices.shape  # (2, 3)

    Source:
        Krizhevsky et al. 2012, section 6.1 and figure 4.
    """
    size = batch_size(model)
    if features is not None:
        if exclude_self:
            raise InputError("exclude_self compares pixels, which features do not have: pass dataset instead")
        require_layer(model, features, layer)
    elif search == "approximate":
        raise InputError('an approximate search needs features="...", a saved result of neighbor_index')
    queries = torch.cat([_vectors(model, part, layer, metric) for part in images.split(size)])
    if features is not None:
        return _search_features(features, images, queries, k, metric, search)
    assert dataset is not None  # the call was checked: it has features or a data set
    state = _NearestImages(model, layer, metric, images, queries, k, exclude_self).run(dataset, size)
    nearest = {name: values.to(images.device) for name, values in state.items()}
    indices, distances = complete_columns(nearest["indices"], nearest["distances"])
    pixel_indices, pixel_distances = complete_columns(nearest["pixel_indices"], nearest["pixel_distances"])

    def read(indices: Tensor) -> Tensor:
        return torch.stack([dataset.read(row) for row in indices.tolist()]).to(images)

    return Neighbors(
        images=images,
        neighbors=read(indices),
        indices=indices,
        # For unit vectors, 1 - cos = ||a - b||^2 / 2.
        distances=distances.square() / 2 if metric == "cosine" else distances,
        ids=tuple(tuple(dataset.id(i) for i in row) for row in indices.tolist()),
        pixel_neighbors=read(pixel_indices),
        pixel_indices=pixel_indices,
        pixel_distances=pixel_distances,
    )


def _vectors(model: _Model, images: Tensor, layer: str | None, metric: Metric) -> Tensor:
    """Features (n, D) of images as they are compared by Euclidean distance."""
    return unit_vectors(image_features(model, images, layer), metric)


@dataclass
class _NearestImages(Fold[State]):
    """Indices and distances (N, k) of the images nearest to N images by features, and by ``pixel_``."""

    model: _Model
    layer: str | None
    metric: Metric
    images: Tensor
    queries: Tensor
    k: int
    exclude_self: bool
    title: str = "nearest neighbors"

    def update(self, state: State, batch: Batch) -> State:
        candidates, exclude = batch.images.to(self.images), None
        if self.exclude_self:
            exclude = torch.stack([(candidates == image).flatten(1).all(1) for image in self.images])
        vectors = _vectors(self.model, candidates, self.layer, self.metric)
        pairs = {"": (self.queries, vectors), "pixel_": (self.images.flatten(1), candidates.flatten(1))}
        part: State = {}
        for space, (queries, others) in pairs.items():
            search = NearestNeighborSearch(queries, self.k)
            search.add(others, batch.indices, exclude)
            indices, distances = search.nearest()
            part |= {f"{space}indices": indices.cpu(), f"{space}distances": distances.cpu()}
        return self.merge(state, part)

    def merge(self, first: State, second: State) -> State:
        if not first or not second:
            return first or second
        merged: State = {}
        for space in ("", "pixel_"):
            indices, distances = (
                torch.cat([first[f"{space}{name}"], second[f"{space}{name}"]], 1)
                for name in ("indices", "distances")
            )
            indices, distances = smallest_distances(indices, distances, self.k)
            merged |= {f"{space}indices": indices, f"{space}distances": distances}
        return merged


def _search_features(
    features: Embedding,
    images: Tensor,
    queries: Tensor,
    k: int,
    metric: Metric,
    search: Literal["exact", "approximate"],
) -> Neighbors:
    """The neighbors of query vectors among features that were computed before."""
    vectors, recall = features.features, None
    if vectors.shape[1] != queries.shape[1]:
        raise InputError(
            f"the images have {queries.shape[1]} features, those to search have {vectors.shape[1]}: they are "
            "of another model or layer"
        )
    if search == "approximate":
        indices, distances, recall = search_index(features, queries, k, metric)
    else:
        by_features = NearestNeighborSearch(queries, k)
        for rows in torch.arange(len(vectors)).split(BLOCK_ROWS):
            block = vectors[int(rows[0]) : int(rows[-1]) + 1].to(queries)
            by_features.add(unit_vectors(block, metric), tuple(rows.tolist()))
        indices, distances = by_features.result()
    return Neighbors(
        images=images,
        indices=indices,
        distances=distances.square() / 2 if metric == "cosine" else distances,
        ids=tuple(tuple(features.ids[i] for i in row) for row in indices.tolist()),
        thumbnails=features.thumbnails[indices.to(features.thumbnails.device)],
        recall=recall,
    )


@hookimpl
def phosphene_methods():
    return [nearest_neighbors]
