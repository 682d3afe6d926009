"""Adaptive instance normalisation: maps with the means and spreads of others."""

from torch import Tensor


def statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1) of each channel over all places of all maps (S, C, h, w)."""
    places = maps.numel() // maps.shape[1]
    variance = maps.var((0, 2, 3), keepdim=True, correction=min(1, places - 1))
    return maps.mean((0, 2, 3), keepdim=True), (variance + 1e-5).sqrt()


def adain(content: Tensor, style: Tensor) -> Tensor:
    """sigma(s) (c - mu(c)) / sigma(c) + mu(s): content (1, C, h, w) in the manner of style (S, C, h', w').

    Source: Huang and Belongie 2017.
    """
    (mean, deviation), (its_mean, its_deviation) = statistics(style), statistics(content)
    return deviation * (content - its_mean) / its_deviation + mean
