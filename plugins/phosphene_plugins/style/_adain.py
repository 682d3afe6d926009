"""Adaptive instance normalization (AdaIN): the channel statistics of one set of feature maps for another."""

from __future__ import annotations

import math

from torch import Tensor


def channel_statistics(features: Tensor, *, per_image: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1) of each channel over all positions of all maps (S, C, h, w).

    ``per_image``: over the positions of each image alone, (S, C, 1, 1).
    """
    dims = (2, 3) if per_image else (0, 2, 3)
    count = math.prod(features.shape[dim] for dim in dims)
    variance = features.var(dims, keepdim=True, correction=min(1, count - 1))
    return features.mean(dims, keepdim=True), (variance + 1e-5).sqrt()


def match_statistics(content: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """std (c - mu(c)) / sigma(c) + mean, with mu and sigma of each image of the maps (N, C, h, w)."""
    content_mean, content_std = channel_statistics(content, per_image=True)
    return std * (content - content_mean) / content_std + mean


def adain(content: Tensor, style: Tensor) -> Tensor:
    """AdaIN(c, s) = sigma(s) (c - mu(c)) / sigma(c) + mu(s) of maps (N, C, h, w) and (S, C, h', w').

    The style's statistics are those of all its S images together.

    Source: Huang and Belongie 2017, equation 8.
    """
    return match_statistics(content, *channel_statistics(style))
