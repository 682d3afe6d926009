"""``NeighborIndex``: features in lists around centers, and the approximate search in the nearest lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene import InputError, MissingExtra
from phosphene.results import Embedding

Metric = Literal["l2", "cosine"]


@dataclass(frozen=True, eq=False, kw_only=True)
class NeighborIndex(Embedding):
    """Features of a data set in lists: each image is in the list of the nearest center.

    ``centers`` (C, D); ``lists`` (N,): the number of each image's list; ``probes``: how many lists are searched
    for a query; ``metric``: the distance. ``metrics["recall"]``: the fraction of the nearest neighbors that the
    search returned in its test.
    """

    shapes: ClassVar[Mapping[str, str]] = {**Embedding.shapes, "centers": "C D", "lists": "N"}

    centers: Tensor
    lists: Tensor
    probes: int
    metric: Metric


def import_faiss() -> Any:
    """The library faiss. Raises MissingExtra."""
    try:
        import faiss
    except ImportError:
        raise MissingExtra("approximate search", "faiss") from None
    return faiss


def search_index(index: Embedding, queries: Tensor, k: int, metric: Metric) -> tuple[Tensor, Tensor, float]:
    """Indices and distances (queries, k) of near vectors, nearest first, and the recall of the index.

    Distances are those of ``metric`` "l2" between the vectors, which are normalized for "cosine". Raises
    InputError for an embedding without lists or with those of another metric.
    """
    if not isinstance(index, NeighborIndex):
        raise InputError(
            "an approximate search needs the lists of an index: pass a saved result of neighbor_index as features"
        )
    if index.metric != metric:
        raise InputError(f"the index was built for metric={index.metric!r}, not {metric!r}")
    vectors = unit_vectors(index.features, metric)
    lists = build_lists(vectors, index.centers, index.lists)
    indices, distances = search_lists(lists, vectors, queries, k, index.probes)
    return indices, distances, float(index.metrics["recall"])


def unit_vectors(features: Tensor, metric: Metric) -> Tensor:
    """Features as they are compared by Euclidean distance: normalized for the cosine."""
    return F.normalize(features) if metric == "cosine" else features


def build_lists(vectors: Tensor, centers: Tensor, lists: Tensor) -> Any:
    """faiss's inverted file of the vectors, whose lists are known."""
    faiss = import_faiss()
    size = centers.shape[1]
    quantizer = faiss.IndexFlatL2(size)
    quantizer.add(centers.cpu().float().contiguous().numpy())
    index = faiss.IndexIVFFlat(quantizer, size, len(centers))
    index.is_trained = True
    for start in range(0, len(vectors), 65536):
        block = vectors[start : start + 65536].cpu().float().contiguous().numpy()
        numbers = lists[start : start + 65536].cpu().contiguous().numpy()
        index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(numbers))
    return index


def search_lists(lists: Any, vectors: Tensor, queries: Tensor, k: int, probes: int) -> tuple[Tensor, Tensor]:
    """Indices and distances (queries, k) of near vectors in the lists of the ``probes`` nearest centers.

    Of equal distances the smaller index first. All lists are searched for a query where these hold fewer than
    k vectors.
    """
    count = min(k, len(vectors))
    candidates = min(
        count + 8, len(vectors)
    )  # more than k: faiss's distances lose digits between near vectors
    array = queries.detach().cpu().float().contiguous().numpy()
    lists.nprobe = probes
    rows = torch.from_numpy(lists.search(array, candidates)[1])
    if (short := (rows[:, :count] < 0).any(1)).any():
        lists.nprobe = lists.nlist
        rows[short] = torch.from_numpy(lists.search(array[short.numpy()], candidates)[1])
    indices, _ = rows.to(queries.device).sort(dim=1)
    distances = (queries[:, None] - vectors[indices.clamp(min=0)].to(queries)).norm(dim=2)
    distances = distances.masked_fill(indices < 0, torch.inf)
    distances, nearest = distances.sort(dim=1, stable=True)
    return indices.gather(1, nearest)[:, :count], distances[:, :count]
