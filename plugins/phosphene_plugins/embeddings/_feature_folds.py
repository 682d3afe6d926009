"""Folds over the rows of a feature matrix that is too large to compute with at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phosphene import Dataset, Fold, to_float64
from phosphene.data import Batch, Rows, State

#: Numbers of a feature matrix above which its rows are read block by block (256 MB in single precision).
LARGE = 64_000_000
#: Rows of a block.
# equivalent mutants: the result does not depend on the blocks
BLOCK_ROWS = 8192


def is_large(features: Tensor) -> bool:
    """Whether features (N, D) are read block by block: many numbers, and no fewer rows than columns.

    Otherwise the D x D matrices of the folds would be larger than the features.
    """
    return features.numel() > LARGE and len(features) >= features.shape[1]


@dataclass
class FeatureRows(Dataset):
    """The rows of features (N, D) as the images of a data set, in double precision."""

    features: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def read(self, indices: Sequence[int]) -> Tensor:
        return to_float64(self.features[list(indices)])


@dataclass(frozen=True)
class Moments:
    """Mean m (D,) and scatter sum_i (x_i - m)(x_i - m)^T (D, D) of N rows, and sum_i ||x_i - m||^4."""

    mean: Tensor
    scatter: Tensor
    fourth: Tensor

    def center(self, rows: Tensor) -> Tensor:
        """Rows minus the mean; features without variance are 0."""
        return torch.where(self.scatter.diagonal() > 0, rows - self.mean, 0)


def moments(features: Tensor) -> Moments:
    """The moments of the rows, in double precision."""
    rows = FeatureRows(features)
    total = _Sums("mean of features").run(rows, BLOCK_ROWS)
    mean = total["sum"] / len(features)
    # A constant feature is exactly 0 without its mean, not rounding error.
    rounding = 16 * torch.finfo(features.dtype).eps * torch.maximum(-total["low"].min(), total["high"].max())
    constant = total["high"] - total["low"] <= rounding
    return _Scatter(mean, constant, "covariance of features").run(rows, BLOCK_ROWS)


@dataclass
class _Sums(Fold[State]):
    """Sum, smallest and largest value of each feature."""

    title: str

    def update(self, state: State, batch: Batch) -> State:
        rows = batch.images
        part = {"sum": rows.sum(0).cpu(), "low": rows.amin(0).cpu(), "high": rows.amax(0).cpu()}
        return self.merge(state, part)

    def merge(self, first: State, second: State) -> State:
        if not first or not second:
            return first or second
        return {
            "sum": first["sum"] + second["sum"],
            "low": torch.minimum(first["low"], second["low"]),
            "high": torch.maximum(first["high"], second["high"]),
        }


@dataclass
class _Scatter(Fold[Moments]):
    """Scatter matrix and fourth moment about a mean."""

    mean: Tensor
    constant: Tensor
    title: str

    def update(self, state: State, batch: Batch) -> State:
        rows = batch.images - self.mean.to(batch.images.device)
        rows[:, self.constant.to(rows.device)] = 0
        part = {"scatter": (rows.T @ rows).cpu(), "fourth": rows.square().sum(1).square().sum().cpu()}
        return self.merge(state, part)

    def finish(self, state: State) -> Moments:
        return Moments(self.mean, state["scatter"], state["fourth"])


def map_rows(features: Tensor, function: RowFunction, title: str) -> Tensor:
    """``function`` of the rows of features, in double precision, block by block: (N, ...) as ``features``."""
    return _RowValues(function, title).run(FeatureRows(features), BLOCK_ROWS).to(features.device)


class RowFunction:
    """A function of rows (n, D), sent to other processes: an instance of a class, not a closure."""

    def __call__(self, rows: Tensor) -> Tensor:
        """The values (n, ...) of the rows."""
        raise NotImplementedError


@dataclass
class _RowValues(Fold[Tensor]):
    function: RowFunction
    title: str

    def start(self) -> State:
        return {"values": Rows()}

    def update(self, state: State, batch: Batch) -> State:
        state["values"].write(batch.indices[0], self.function(batch.images))
        return state

    def finish(self, state: State) -> Tensor:
        values: Tensor = state["values"].tensor()
        return values


@dataclass
class LloydStep(Fold[State]):
    """Of the rows nearest to each of the ``centers``: their sum (k, D), count (k,) and squared distances."""

    centers: Tensor
    saved: bool = False

    def update(self, state: State, batch: Batch) -> State:
        rows = batch.images
        nearest, distances = nearest_center(rows, self.centers.to(rows))
        sums = torch.zeros_like(self.centers).to(rows).index_add_(0, nearest, rows).cpu()
        counts = nearest.bincount(minlength=len(self.centers)).cpu()
        return self.merge(state, {"sums": sums, "counts": counts, "inertia": distances.square().sum().cpu()})


def nearest_center(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the nearest center to each row, the first of equally near ones, and the distance."""
    ranks = centers.square().sum(1) - 2 * rows @ centers.T
    nearest = ranks.argmin(1)
    return nearest, (rows - centers[nearest]).norm(dim=1)
