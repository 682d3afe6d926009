"""Optimal-transport style losses: relaxed earth mover's distance, moments and self-similarity of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def cosine_distances(features: Tensor, others: Tensor) -> Tensor:
    """1 - <x, y> / (|x| |y|) of feature vectors (N, n, D) and (N or 1, m, D): (N, n, m)."""
    return 1 - F.normalize(features, dim=2) @ F.normalize(others, dim=2).mT


def relaxed_emd(distances: Tensor) -> Tensor:
    """max(mean_i min_j d_ij, mean_j min_i d_ij) of distances (N, n, m): (N,).

    Each mean is an earth mover's distance with one of its two constraints removed, so it is a lower bound.
    """
    return torch.maximum(distances.amin(2).mean(1), distances.amin(1).mean(1))


def moment_distance(features: Tensor, others: Tensor) -> Tensor:
    """Mean absolute differences of means and of covariances of vectors (N, n, D), (N or 1, m, D): (N,)."""
    means, covariances = [], []
    for vectors in (features, others):
        mean = vectors.mean(1, keepdim=True)
        means.append(mean[:, 0])
        covariances.append((vectors - mean).mT @ (vectors - mean) / vectors.shape[1])
    mean_difference = (means[0] - means[1]).abs().mean(1)
    return mean_difference + (covariances[0] - covariances[1]).abs().mean((1, 2))


def self_similarity_distance(features: Tensor, others: Tensor) -> Tensor:
    """Mean absolute difference of self-similarities of vectors (N, n, D) at the same positions: (N,).

    A self-similarity is the matrix of cosine distances with each column divided by its sum; the mean is n
    times that of its entries, so that it does not depend on n.
    """
    similarities = []
    for vectors in (features, others):
        distances = cosine_distances(vectors, vectors)
        similarities.append(distances / distances.sum(1, keepdim=True).clamp(min=1e-12))
    return (similarities[0] - similarities[1]).abs().sum((1, 2)) / features.shape[1]


def sliced_distance(features: Tensor, others: Tensor, directions: Tensor) -> Tensor:
    """Mean squared difference of sorted projections on directions (K, D) of vectors (N, n, D): (N,).

    Where others (N or 1, m, D) are of another number, their quantiles at the ranks (i + 1/2) / n are used.
    """
    projections, targets = ((v @ directions.to(v).T).sort(1).values for v in (features, others))
    ranks = (torch.arange(features.shape[1], device=targets.device) + 0.5) * (
        targets.shape[1] / features.shape[1]
    )
    return (projections - targets[:, ranks.long()]).square().mean((1, 2))


def draw_positions(size: Sequence[int], count: int, generator: Generator) -> Tensor:
    """Up to ``count`` different pixel centers (n, 2) of an image of size (H, W), as (x, y) in [-1, 1]."""
    height, width = size
    index = torch.arange(height * width)
    if count < len(index):
        index = torch.randperm(len(index), generator=generator)[:count]
    y, x = (index // width).double(), (index % width).double()
    return torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 1)


def hypercolumns(maps: Sequence[Tensor], positions: Tensor) -> Tensor:
    """The bilinear samples of all feature maps (N, C_l, h_l, w_l) at positions (n, 2): (N, n, sum C_l)."""
    sampled = [
        F.grid_sample(
            m, positions.to(m).expand(len(m), 1, -1, -1), padding_mode="border", align_corners=False
        )
        for m in maps
    ]
    return torch.cat(sampled, 1)[:, :, 0].mT
