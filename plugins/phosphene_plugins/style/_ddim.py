"""DDIM: deterministic sampling of a diffusion model, and its inversion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import InputError, progress_bar
from phosphene.generative import Denoiser
from phosphene.spec import ceil, maximum, minimum, param

from ._diffusion_hooks import Predict

Guidance: TypeAlias = Annotated[
    float, Field(ge=0, le=100, description="weight of the text against the empty text in the sampling")
]

#: Evaluations of the network without the text for each one with it: none where ``guidance`` is 1.
WITHOUT_TEXT = minimum(1, ceil(maximum(param.guidance - 1, 1 - param.guidance)))


def ddim(
    denoiser: Denoiser, predict: Predict, x: Tensor, times: Sequence[int], description: str | None = None
) -> Tensor:
    """x moved along the time steps, upwards (inversion) or downwards (sampling), by the same update.

    x_t' = sqrt(abar_t') (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) + sqrt(1 - abar_t') eps

    or, of a flow-matching model, x_t' = x_t + (sigma_t' - sigma_t) v, with ``predict`` at x_t and at the
    noisier of t and t', so that both directions evaluate the network at the same times. ``description`` is
    the title of a progress bar; None for none.

    Source: Song, Meng and Ermon 2021, equation 12 with sigma = 0.
    """
    steps = list(pairwise(times))
    for t, next_t in steps if description is None else progress_bar(steps, description):
        x = denoiser.step(x, predict(x, max(t, next_t)), t, next_t)
    return x


def guided(with_text: Predict, empty: Predict, guidance: float) -> Predict:
    """predict(x, t) = empty + guidance (with_text - empty); ``with_text`` alone where guidance is 1."""

    def predict(x: Tensor, t: int) -> Tensor:
        output = with_text(x, t)
        if guidance == 1:
            return output
        away = empty(x, t)
        return away + guidance * (output - away)

    return predict


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


def decode_cropped(denoiser: Denoiser, x: Tensor, images: Tensor) -> Tensor:
    """Images of x_0 in the size of ``images``, without the padding of ``encode_padded``, not clipped."""
    return denoiser.decode(x)[..., : images.shape[2], : images.shape[3]]


def require_channels_of(denoiser: Denoiser, **batches: Tensor) -> None:
    """Raise InputError for images, by their name, with other channels than the denoiser takes."""
    for name, batch in batches.items():
        if batch.shape[1] != denoiser.channels:
            raise InputError(
                f"the diffusion model takes {denoiser.channels} channels, the {name} have {batch.shape[1]}"
            )
