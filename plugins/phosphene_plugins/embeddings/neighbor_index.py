"""Neighbor index: features of a data set in lists, for nearest neighbors of new images."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, TensorDataset, hookimpl, load_model, method
from phosphene.results import Embedding
from phosphene.roles import Dataset, Features, Model, Seed
from phosphene.spec import Cost, size

from ._features import FeatureLayer, load_features, require_images
from ._nearest_neighbor_search import NearestNeighborSearch
from ._neighbor_index_result import (
    NeighborIndex,
    build_lists,
    import_faiss,
    search_lists,
    unit_vectors,
)
from ._relations import NeedsImages, features_of
from .nearest_neighbors import nearest_neighbors

#: Images and neighbors with which the recall is measured.
TEST_IMAGES, TEST_NEIGHBORS = 256, 10
#: Rows of features that are read at once.
# equivalent mutants: the result does not depend on the blocks
BLOCK_ROWS = 8192


def _oracle() -> None:
    """Two separate clusters are two lists: the neighbors are in the own list, so one probe suffices."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    noise = 0.02 * torch.rand(24, 2, generator=torch.Generator().manual_seed(0))
    halves = noise + torch.tensor([[0.1, 0.1], [0.9, 0.9]]).repeat_interleave(12, 0)
    images = halves[:, None, None].expand(-1, 1, 2, 2)
    index = neighbor_index(model, TensorDataset(images), lists=2, seed=0)
    assert torch.equal(index.lists[:12], index.lists[:1].expand(12)) and index.lists.unique().tolist() == [
        0,
        1,
    ]
    assert torch.equal(index.lists[12:], 1 - index.lists[:12])
    means = torch.stack([halves[index.lists == n].mean(0) for n in (0, 1)])
    assert torch.allclose(index.centers, means, atol=1e-6)
    assert index.probes == 1 and float(index.metrics["recall"]) == 1
    of_features = neighbor_index(features=Embedding(**_embedding(index)), lists=2, seed=0)
    assert torch.equal(of_features.lists, index.lists)
    few = neighbor_index(model, TensorDataset(images[:3]), lists=1, seed=0)
    assert float(few.metrics["recall"]) == 1 and len(few.lists) == 3
    many = torch.rand(512, 2, generator=torch.Generator().manual_seed(1))
    center, _ = _cluster(many, 1)  # of every second vector: 256 per list
    torch.testing.assert_close(center, many[::2].mean(0, keepdim=True))
    queries = images[[0, 20]] + 0.001
    approximate = nearest_neighbors(model, queries, features=index, k=5, search="approximate")
    exact = nearest_neighbors(model, queries, features=index, k=5)
    assert torch.equal(approximate.indices, exact.indices) and approximate.recall == 1
    assert torch.allclose(approximate.distances, exact.distances) and exact.recall is None
    # More neighbors than the list has: all lists are searched.
    every = nearest_neighbors(model, queries, features=index, k=30, search="approximate")
    assert every.indices.shape == (2, 24) and every.indices[0].sort().values.tolist() == list(range(24))
    for other in ({"features": index, "metric": "cosine"}, {"features": Embedding(**_embedding(index))}):
        try:
            nearest_neighbors(model, queries, search="approximate", **other)
        except InputError:
            continue
        raise AssertionError("an index of another metric, or none, is searched")
    # In a circle of features every list borders on two others: to reach the recall takes several probes.
    angles = torch.linspace(0, 6.2, 240)
    circle = 0.5 + 0.4 * torch.stack([angles.cos(), angles.sin()], 1)
    around = TensorDataset(circle[:, None, None].expand(-1, 1, 2, 2))
    low = neighbor_index(model, around, lists=12, recall=0.1, seed=0)
    high = neighbor_index(model, around, lists=12, recall=1, seed=0)
    assert low.probes == 1 < high.probes and 0.1 <= low.metrics["recall"] < high.metrics["recall"] == 1
    cosine = neighbor_index(model, around, metric="cosine", seed=0)
    assert len(cosine.centers) == 15 and cosine.metric == "cosine"  # the square root of 240 images


def _embedding(index: NeighborIndex) -> dict[str, Any]:
    return {name: getattr(index, name) for name in ("ids", "features", "thumbnails", "labels")}


@method(
    family="embeddings",
    references=[
        Reference(
            key="jegou2011",
            title="Product Quantization for Nearest Neighbor Search",
            authors="Jégou, Douze, Schmid",
            year=2011,
            url="https://doi.org/10.1109/TPAMI.2010.57",
        ),
        Reference(
            key="douze2024",
            title="The Faiss library",
            authors="Douze, Guzhva, Deng, Johnson, Szilvasy, Mazaré, Lomeli, Hosseini, Jégou",
            year=2024,
            url="https://arxiv.org/abs/2401.08281",
        ),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    relations=[*features_of("features"), NeedsImages(2, where={"lists": 1})],
    exempt={
        "parameters_matter": "the lists of the check's few images are searched completely: every recall is 1"
    },
    quick={"lists": 2},
)
def neighbor_index(
    model: Model | None = None,
    dataset: Dataset | None = None,
    features: Features | None = None,
    *,
    layer: FeatureLayer = None,
    metric: Annotated[Literal["l2", "cosine"], Field(description="distance between features")] = "l2",
    lists: Annotated[
        int | None,
        Field(
            ge=1, le=65536, description="number of lists; default: the square root of the number of images"
        ),
    ] = None,
    recall: Annotated[
        float,
        Field(
            gt=0, le=1, description="fraction of the nearest neighbors that an approximate search must return"
        ),
    ] = 0.95,
    seed: Seed = None,
) -> NeighborIndex:
    """Neighbor index of a data set's features (inverted file), for nearest neighbors of new images.

    c(i) = argmin_c ||phi_i - m_c||,  candidates(q) = {i: m_c(i) is among the p nearest centers to phi(q)}

    The centers m are those of k-means, by faiss. ``nearest_neighbors(features=index)`` searches all images,
    exactly, or with ``search="approximate"`` the p lists whose centers are nearest. p is the smallest power
    of two, at most all lists, for which the measured recall is at least ``recall``: the fraction of the 10
    nearest other images that the search returns, on average over 256 images of the data set, evenly spaced.
    The recall for images unlike the data set's may be lower.

    Returns:
        ``centers`` (C, D) and ``lists`` (N,), the list of each image; ``probes``, p; ``metrics``: ``recall``,
        as measured. ``features`` (N, D), ``ids``, ``labels``, ``thumbnails`` as ``embed`` returns them.

    Raises:
        InputError: fewer than two images, or more lists than images.
        MissingExtra: faiss is not installed.
        ModelError: no layer is named and the model has no linear classifier.

    Example::
        from phosphene import run

        index = run("neighbor_index", dataset="builtin:scenes/32", seed=0)
        run("nearest_neighbors", images="builtin:scenes/2", features=index, search="approximate").ids

    Source:
        Jégou et al. 2011, section IV (inverted file); Douze et al. 2024.
    """
    count = require_images(dataset, features, 2, "an index")
    if lists is not None and lists > count:
        raise InputError(f"{count} images make at most {count} lists, not {lists}")
    import_faiss()
    embedding = load_features(model, dataset, features, layer)
    vectors = unit_vectors(embedding.features, metric)
    centers, numbers = _cluster(vectors, lists or round(count**0.5))
    probes, measured = _probes(vectors, centers, numbers, recall)
    index = {"centers": centers, "lists": numbers, "probes": probes, "metric": metric}
    metrics = {"recall": embedding.features.new_tensor(measured)}
    return NeighborIndex(**dict(embedding.fields()) | index | {"metrics": metrics})


def _cluster(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centers (C, D) of k-means, and the number of the nearest center to each vector (N,)."""
    faiss = import_faiss()
    seed = int(torch.randint(2**31, ()))
    # equivalent mutants: the number of steps and of vectors per center only change the speed of the search
    k_means = faiss.Kmeans(vectors.shape[1], count, niter=20, seed=seed, min_points_per_centroid=1)
    step = max(1, len(vectors) // (256 * count))  # faiss would draw at most 256 vectors per center itself
    k_means.train(_array(vectors[::step]))
    centers = torch.from_numpy(k_means.centroids.copy())
    blocks = [vectors[n : n + BLOCK_ROWS] for n in range(0, len(vectors), BLOCK_ROWS)]
    numbers = [torch.from_numpy(faiss.knn(_array(block), centers.numpy(), 1)[1][:, 0]) for block in blocks]
    return centers.to(vectors), torch.cat(numbers).to(vectors.device)


def _array(vectors: Tensor) -> Any:
    """Vectors as faiss reads them: single precision, row after row."""
    # equivalent mutants: faiss converts tensors to arrays
    return vectors.detach().cpu().float().contiguous().numpy()


def _probes(vectors: Tensor, centers: Tensor, numbers: Tensor, recall: float) -> tuple[int, float]:
    """How many lists have to be searched for a recall, and the recall that is measured."""
    count = len(vectors)
    sample = min(count, TEST_IMAGES)
    rows = torch.tensor([n * count // sample for n in range(sample)], device=vectors.device)
    queries, k = vectors[rows], min(TEST_NEIGHBORS, count - 1)
    exact = NearestNeighborSearch(queries, k)
    for block in torch.arange(count, device=vectors.device).split(BLOCK_ROWS):
        part = vectors[int(block[0]) : int(block[-1]) + 1]
        exact.add(part, tuple(block.tolist()), exclude=rows[:, None] == block)
    farthest = exact.result()[1][:, -1:]
    lists, probes = build_lists(vectors, centers, numbers), 1
    while True:
        # equivalent mutants: what is beyond the farthest does not count
        indices, distances = search_lists(lists, vectors, queries, k + 1, probes)
        # A tie with the farthest is as near. The exact search subtracts a mean first: rounding differs.
        near = (distances <= farthest * (1 + 1e-5)) & (indices != rows[:, None])
        measured = float(near.sum(1).clamp(max=k).cpu().double().mean() / k)
        if measured >= recall or probes == len(centers):
            return probes, measured
        probes = min(2 * probes, len(centers))


@hookimpl
def phosphene_methods():
    return [neighbor_index]
