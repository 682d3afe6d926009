"""The nearest of many vectors, exactly: one matrix product a block, and the best so far kept."""

import importlib.util

import torch
from torch import Tensor

from phosphene import InputError


class Nearest:
    """The k nearest of a stream of vectors to each query, by one matrix product a block.

    Where the extra ``faiss`` is installed, it ranks large blocks: its exact index, with the same answers.
    """

    #: Numbers to wait for before a block is ranked: 16 MB of them.
    BLOCK = 4_000_000
    #: ||x||^2 - 2 q.x ranks as the distance does, but loses digits between near vectors. So all are
    #: taken from the queries' mean, and a few more than k are kept, to be measured again.
    SPARE = 8
    #: Pairs of a query and a vector from which on a block is faiss's, which is faster there.
    LARGE = 5_000_000

    def __init__(self, queries: Tensor, k: int) -> None:
        self._mean, self._k = queries.mean(0), k
        self._queries = queries - self._mean
        self._ranks = queries.new_empty(len(queries), 0)
        self._indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        self._vectors = queries.new_empty(len(queries), 0, queries.shape[1])
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def meet(self, vectors: Tensor, indices: tuple[int, ...], never: Tensor) -> None:
        """Rank these vectors too; ``never`` (queries, vectors) is where one is no neighbour."""
        self._waiting.append((vectors - self._mean, torch.tensor(indices, device=vectors.device), never.T))
        if sum(v.numel() for v, _, _ in self._waiting) >= self.BLOCK:
            self._rank()

    def _rank(self) -> None:
        vectors, indices, never = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        if self._for_faiss(len(vectors)) and not never.any():
            ranks, new = self._by_faiss(vectors)
        else:
            ranks = torch.addmm(vectors.square().sum(1), self._queries, vectors.T, alpha=-2)
            ranks, new = self._smallest(ranks.masked_fill_(never.T, torch.inf))
        self._ranks, chosen = self._smallest(torch.cat([self._ranks, ranks], 1))
        self._indices = torch.cat([self._indices, indices[new]], 1).gather(1, chosen)
        rows = torch.arange(len(chosen), device=chosen.device)[:, None]
        self._vectors = torch.cat([self._vectors, vectors[new]], 1)[rows, chosen]

    def _for_faiss(self, count: int) -> bool:
        plain = self._queries.dtype == torch.float32 and self._queries.device.type == "cpu"
        large = len(self._queries) * count >= self.LARGE
        return plain and large and importlib.util.find_spec("faiss") is not None

    def _by_faiss(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The same ranks, which leave out ||q||^2, and places."""
        import faiss

        most = min(self._k + self.SPARE, len(vectors))
        squares, places = faiss.knn(self._queries.numpy(), vectors.contiguous().numpy(), most)
        squared = self._queries.square().sum(1, keepdim=True)
        return torch.from_numpy(squares) - squared, torch.from_numpy(places)

    def _smallest(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        values, order = ranks.topk(min(self._k + self.SPARE, ranks.shape[1]), dim=1, largest=False)
        return values, order

    def found(self) -> tuple[Tensor, Tensor]:
        """(N, k) indices and L2 distances, nearest first, of equal ones the earlier."""
        if self._waiting:
            self._rank()
        found = int(self._ranks.isfinite().sum(1).min())
        if not found:
            raise InputError("the data set holds no picture but the image itself")
        distances = (self._queries[:, None] - self._vectors[:, :found]).norm(dim=2)
        indices, order = self._indices[:, :found].sort(dim=1)
        distances, nearest = distances.gather(1, order).sort(dim=1, stable=True)
        return indices.gather(1, nearest)[:, : self._k], distances[:, : self._k]
