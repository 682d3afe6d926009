"""The nearest of many vectors, exactly: one matrix product a block, and the best so far kept."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from phosphene import InputError


class Nearest:
    """The k nearest of a stream of vectors to each query, by one matrix product a block.

    Where the extra ``faiss`` is installed, its exact index ranks large blocks, with the same answers: it
    never holds the ranks of all pairs, but takes longer on small ones.
    """

    #: Numbers to wait for before a block is ranked: 64 MB of them.
    BLOCK = 16_000_000
    #: ||x||^2 - 2 q.x ranks as the distance does, but loses digits between near vectors. So all are
    #: taken from the queries' mean, and a few more than k are kept, to be measured again.
    SPARE = 8
    #: Pairs of a query and a vector whose ranks are held at once: 200 MB of them. A block of more is faiss's.
    LARGE = 50_000_000

    def __init__(self, queries: Tensor, k: int) -> None:
        self._mean, self._k = queries.mean(0), k
        self._queries = queries - self._mean
        self._ranks = queries.new_empty(len(queries), 0)
        self._indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        self._vectors = queries.new_empty(len(queries), 0, queries.shape[1])
        self._waiting: list[tuple[Tensor, tuple[int, ...], Tensor | None]] = []
        self._waiting_numbers = 0

    def meet(self, vectors: Tensor, indices: tuple[int, ...], never: Tensor | None = None) -> None:
        """Rank these vectors too; ``never`` (queries, vectors) is where one is no neighbour."""
        self._waiting.append((vectors, indices, never))
        self._waiting_numbers += vectors.numel()
        if self._waiting_numbers >= self.BLOCK:
            self._rank()

    def _rank(self) -> None:
        vectors = torch.cat([met for met, _, _ in self._waiting]).sub_(self._mean)
        indices = torch.tensor([i for _, met, _ in self._waiting for i in met], device=vectors.device)
        never = self._never()
        self._waiting, self._waiting_numbers = [], 0
        if never is None and self._for_faiss(len(vectors)):
            ranks, new = self._by_faiss(vectors)
        else:
            ranks, new = self._by_product(vectors, never)
        held = self._ranks.shape[1]
        self._ranks, chosen = self._smallest(torch.cat([self._ranks, ranks], 1))
        self._indices = torch.cat([self._indices, indices[new]], 1).gather(1, chosen)
        # Their places among all vectors there are: those held, query by query, and the block's.
        rows = torch.arange(len(new), device=new.device)[:, None] * held
        places = torch.cat([rows + torch.arange(held, device=new.device), new + len(new) * held], 1)
        known = torch.cat([self._vectors.flatten(0, 1), vectors]) if held else vectors
        self._vectors = known[places.gather(1, chosen)]

    def _never(self) -> Tensor | None:
        """Where a vector that waits is no neighbour, (queries, vectors); None where all may be."""
        if not any(never is not None and never.any() for _, _, never in self._waiting):
            return None
        nobody = torch.zeros((), dtype=torch.bool, device=self._queries.device)
        parts = [
            nobody.expand(len(self._queries), len(met)) if never is None else never
            for met, _, never in self._waiting
        ]
        return torch.cat(parts, 1)

    def _for_faiss(self, count: int) -> bool:
        plain = self._queries.dtype == torch.float32 and self._queries.device.type == "cpu"
        large = len(self._queries) * count > self.LARGE
        return plain and large and importlib.util.find_spec("faiss") is not None

    def _by_product(self, vectors: Tensor, never: Tensor | None) -> tuple[Tensor, Tensor]:
        """What of ||q - x||^2 tells the vectors apart, of the nearest, and their places."""
        squares, found = vectors.square().sum(1), []
        for rows in torch.arange(len(self._queries)).split(max(1, self.LARGE // len(vectors))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            ranks = torch.addmm(squares, self._queries[part], vectors.T, alpha=-2)
            if never is not None:
                ranks.masked_fill_(never[part], torch.inf)
            found.append(self._smallest(ranks))
        ranks, places = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ranks, places

    def _by_faiss(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The same ranks, which leave out ||q||^2, and places."""
        import faiss

        most = min(self._k + self.SPARE, len(vectors))
        squares, places = faiss.knn(self._queries.numpy(), vectors.numpy(), most)
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
