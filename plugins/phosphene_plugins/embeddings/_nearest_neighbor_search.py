"""Exact nearest-neighbor search over a stream of vectors: one matrix product per block, a running top k."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from phosphene import InputError


def smallest_distances(indices: Tensor, distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest distances of each row, and their indices; of equal distances the smaller index first."""
    indices, order = indices.sort(dim=1)
    distances, nearest = distances.gather(1, order).sort(dim=1, stable=True)
    return indices.gather(1, nearest)[:, :k], distances[:, :k]


def complete_columns(indices: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """The columns in which every row has a neighbor, at a finite distance. Raises InputError if none has."""
    if not (count := int(distances.isfinite().sum(1).min())):
        raise InputError("the data set holds no image but the query image itself")
    return indices[:, :count], distances[:, :count]


class NearestNeighborSearch:
    """The k nearest vectors of a stream to each query, by Euclidean distance.

    Call ``add`` for each batch of vectors, then ``result``. If the extra ``faiss`` is installed, its exact
    index searches large blocks, with the same result: it never stores the ranks of all pairs, but is
    slower for small blocks.
    """

    #: Numbers to collect before a block of vectors is ranked (64 MB).
    # equivalent mutants: the result does not depend on the blocks
    BLOCK_NUMBERS = 16_000_000
    #: Candidates beyond k. They are ranked by ||x||^2 - 2 q.x, which loses digits between near vectors, so
    #: all vectors are centered on the queries' mean, and the candidates' distances are computed again at
    #: the end.
    # equivalent mutants: a further candidate is not among the nearest
    EXTRA_CANDIDATES = 8
    #: Pairs of a query and a vector whose ranks are stored at once (200 MB); faiss ranks larger blocks.
    # equivalent mutants: the result does not depend on the blocks
    MAX_PAIRS = 50_000_000

    def __init__(self, queries: Tensor, k: int) -> None:
        self._mean, self._k = queries.mean(0), k
        self._queries = queries - self._mean
        # The candidates of each query so far.
        self._ranks = queries.new_empty(len(queries), 0)
        self._indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        # equivalent mutants: replaced before its first use
        self._vectors = queries.new_empty(len(queries), 0, queries.shape[1])
        # Batches that are not ranked yet.
        self._pending: list[tuple[Tensor, tuple[int, ...], Tensor | None]] = []
        # equivalent mutants: the result does not depend on the blocks
        self._pending_numbers = 0

    def add(self, vectors: Tensor, indices: tuple[int, ...], exclude: Tensor | None = None) -> None:
        """Add vectors (n, D) with their indices, except the pairs in ``exclude`` (queries, n) bool.

        Either every call has ``exclude`` or none.
        """
        self._pending.append((vectors, indices, exclude))
        # equivalent mutants: the result does not depend on the blocks
        self._pending_numbers += vectors.numel()
        # equivalent mutants: the result does not depend on the blocks
        if self._pending_numbers >= self.BLOCK_NUMBERS:
            self._rank_pending()

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices and distances (queries, k), nearest first; of equal distances the smaller index first.

        Fewer than k columns if a query has fewer neighbors.
        """
        return complete_columns(*self.nearest())

    def nearest(self) -> tuple[Tensor, Tensor]:
        """The same with at most k columns; the distances of missing neighbors are infinite."""
        if self._pending:
            self._rank_pending()
        distances = (self._queries[:, None] - self._vectors).norm(dim=2)
        distances = distances.masked_fill(self._ranks == torch.inf, torch.inf)
        return smallest_distances(self._indices, distances, self._k)

    def _rank_pending(self) -> None:
        """Merge the pending vectors into the candidates of each query."""
        vectors = torch.cat([batch for batch, _, _ in self._pending]).sub_(self._mean)
        indices = torch.tensor([i for _, batch, _ in self._pending for i in batch], device=vectors.device)
        exclude = self._pending_exclusions()
        # equivalent mutants: the result does not depend on the blocks
        self._pending, self._pending_numbers = [], 0
        if exclude is None and self._use_faiss(len(vectors)):
            ranks, rows = self._rank_with_faiss(vectors)
        else:
            ranks, rows = self._rank_with_product(vectors, exclude)
        old = self._ranks.shape[1]
        self._ranks, best = self._smallest(torch.cat([self._ranks, ranks], 1))
        self._indices = torch.cat([self._indices, indices[rows]], 1).gather(1, best)
        # Positions in the list of all old candidates, query by query, followed by the block's vectors.
        starts = torch.arange(len(rows), device=rows.device)[:, None] * old
        positions = torch.cat([starts + torch.arange(old, device=rows.device), rows + len(rows) * old], 1)
        pool = torch.cat([self._vectors.flatten(0, 1), vectors]) if old else vectors
        self._vectors = pool[positions.gather(1, best)]

    def _pending_exclusions(self) -> Tensor | None:
        """Excluded pairs (queries, vectors) of the pending vectors; None if there are none."""
        parts = [exclude for _, _, exclude in self._pending if exclude is not None]
        return torch.cat(parts, 1) if any(part.any() for part in parts) else None

    def _use_faiss(self, count: int) -> bool:
        supported = self._queries.dtype == torch.float32 and self._queries.device.type == "cpu"
        # equivalent mutants: the result is the same without faiss
        large = len(self._queries) * count > self.MAX_PAIRS
        return supported and large and importlib.util.find_spec("faiss") is not None

    def _rank_with_product(self, vectors: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """||x||^2 - 2 q.x of the nearest vectors, which orders them by distance, and their rows."""
        squares, parts = vectors.square().sum(1), []
        # equivalent mutants: the result does not depend on the blocks
        for queries in torch.arange(len(self._queries)).split(max(1, self.MAX_PAIRS // len(vectors))):
            part = slice(int(queries[0]), int(queries[-1]) + 1)
            ranks = torch.addmm(squares, self._queries[part], vectors.T, alpha=-2)
            if exclude is not None:
                ranks.masked_fill_(exclude[part], torch.inf)
            parts.append(self._smallest(ranks))
        return torch.cat([ranks for ranks, _ in parts]), torch.cat([rows for _, rows in parts])

    def _rank_with_faiss(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The same: faiss returns ||q - x||^2, from which ||q||^2 is subtracted."""
        import faiss

        count = min(self._k + self.EXTRA_CANDIDATES, len(vectors))
        squared_distances, rows = faiss.knn(self._queries.numpy(), vectors.numpy(), count)
        query_squares = self._queries.square().sum(1, keepdim=True)
        return torch.from_numpy(squared_distances) - query_squares, torch.from_numpy(rows)

    def _smallest(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        count = min(self._k + self.EXTRA_CANDIDATES, ranks.shape[1])
        values, order = ranks.topk(count, dim=1, largest=False)
        return values, order
