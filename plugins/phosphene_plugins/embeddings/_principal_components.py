"""Principal components of a feature matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._feature_folds import Moments, RowFunction, is_large, map_rows, moments


def center(features: Tensor) -> Tensor:
    """Features (N, D) minus their mean. A constant feature becomes exactly zero, not rounding error."""
    centered = features - features.mean(0)
    low, high = features.amin(0), features.amax(0)  # ten times as fast as aminmax(dim=0)
    # equivalent mutants: rounding errors are smaller, other differences far larger
    rounding = 16 * torch.finfo(features.dtype).eps * torch.maximum(-low.min(), high.max())
    # equivalent mutants: where both are 0, the centered feature is 0
    centered[:, high - low <= rounding] = 0
    return centered


def principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Coordinates (N, count) on the first principal components, and each one's fraction of the variance.

    From the eigenvectors of the covariance matrix, or of the N x N Gram matrix if there are more features
    than images. Signs are such that the largest entry of a component, by absolute value, is positive. The
    covariance of a large matrix is added up block by block, in double precision.
    """
    if is_large(features):
        return _components_of_blocks(features, count)
    centered = center(features)
    axes, fractions = principal_axes(centered, count)
    return centered @ axes, fractions


def principal_axes(centered: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal components (D, count) of centered features, and each one's fraction of the variance."""
    # equivalent mutants: a square matrix has the same components in both ways
    tall = centered.shape[0] >= centered.shape[1]
    values, directions = torch.linalg.eigh(centered.T @ centered if tall else centered @ centered.T)
    # equivalent mutants: only rounding errors are below 0
    values, directions = values.flip(0).clamp(min=0), directions.flip(1)[:, :count]
    if not tall:
        directions = centered.T @ directions
        directions = directions / directions.norm(dim=0)
        # Without variance, as in the last of N components of N images, the direction is rounding errors, or
        # not a number.
        # equivalent mutants: rounding errors are smaller, other variances far larger
        rounding = max(16, len(centered)) * torch.finfo(centered.dtype).eps * values[0]
        directions = torch.where(values[:count] > rounding, directions, 0)
    total = values.sum()
    # equivalent mutants: values of a sum of 0 are 0
    return _with_signs(directions), values[:count] / torch.where(total > 0, total, 1)


def _with_signs(directions: Tensor) -> Tensor:
    """Components (D, count) whose largest entries are positive."""
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    # equivalent mutants: a component whose largest entry is 0 has no sign
    return torch.where(largest < 0, -directions, directions)


def _components_of_blocks(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``principal_components`` without a copy of the features."""
    about = moments(features)
    values, directions = torch.linalg.eigh(about.scatter)
    # equivalent mutants: only rounding errors are below 0
    values, directions = values.flip(0).clamp(min=0), _with_signs(directions.flip(1)[:, :count])
    points = map_rows(features, _Coordinates(about, directions), "principal components")
    total = values.sum()
    # equivalent mutants: values of a sum of 0 are 0
    return points.to(features), (values[:count] / torch.where(total > 0, total, 1)).to(features)


@dataclass
class _Coordinates(RowFunction):
    """The coordinates (n, count) of rows on components (D, count) through the mean."""

    about: Moments
    directions: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return self.about.center(rows.cpu()) @ self.directions
