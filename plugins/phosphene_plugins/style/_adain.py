"""Adaptive instance normalisation: maps with the means and spreads of others."""

from __future__ import annotations

from torch import Tensor


def statistics(maps: Tensor, *, each: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1) of each channel over all places of all maps (S, C, h, w).

    ``each``: over the places of each alone, (S, C, 1, 1).
    """
    over = (2, 3) if each else (0, 2, 3)
    places = maps.numel() // maps.shape[1] // (len(maps) if each else 1)
    variance = maps.var(over, keepdim=True, correction=min(1, places - 1))
    return maps.mean(over, keepdim=True), (variance + 1e-5).sqrt()


def renormalized(content: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """deviation (c - mu(c)) / sigma(c) + mean, with mu and sigma of each of the maps (N, C, h, w) alone."""
    its_mean, its_deviation = statistics(content, each=True)
    return deviation * (content - its_mean) / its_deviation + mean


def adain(content: Tensor, style: Tensor) -> Tensor:
    """sigma(s) (c - mu(c)) / sigma(c) + mu(s): content (N, C, h, w) in the manner of style (S, C, h', w').

    Source: Huang and Belongie 2017.
    """
    return renormalized(content, *statistics(style))
