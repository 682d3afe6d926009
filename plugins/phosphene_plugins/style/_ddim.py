"""DDIM: deterministic sampling of a diffusion model, and its inversion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene import progress_bar
from phosphene.generative import Denoiser

from ._diffusion_hooks import Predict


def ddim(denoiser: Denoiser, predict: Predict, x: Tensor, times: Sequence[int], description: str) -> Tensor:
    """x moved along the time steps, upwards (inversion) or downwards (sampling), by the same update.

    x_t' = sqrt(abar_t') (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) + sqrt(1 - abar_t') eps

    or, of a flow-matching model, x_t' = x_t + (sigma_t' - sigma_t) v, with ``predict`` at x_t and at the
    noisier of t and t', so that both directions evaluate the network at the same times. ``description`` is
    the title of the progress bar.

    Source: Song, Meng and Ermon 2021, equation 12 with sigma = 0.
    """
    for t, next_t in progress_bar(list(pairwise(times)), description):
        x = denoiser.step(x, predict(x, max(t, next_t)), t, next_t)
    return x


def timesteps(count: int, steps: int) -> list[int]:
    """Time steps from 0 to count - 1 in ``steps`` equal intervals, or all of them where there are fewer."""
    return (
        torch.linspace(0, count - 1, min(steps, count - 1) + 1, dtype=torch.float64).round().long().tolist()
    )


def encode_padded(denoiser: Denoiser, images: Tensor) -> Tensor:
    """x_0 of images, whose edges are repeated until the denoiser accepts their height and width."""
    padding = [-side % denoiser.multiple for side in images.shape[:1:-1]]
    images = F.pad(images, (0, padding[0], 0, padding[1]), mode="replicate")
    return denoiser.encode(images.to(next(denoiser.parameters(), images).device))
