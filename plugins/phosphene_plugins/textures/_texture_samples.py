"""What the methods on a sample share: how large a texture is made, which windows fit, what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from phosphene import InputError
from phosphene.results import Synthesis

_Side: TypeAlias = Annotated[int, Field(ge=8, le=4096)]


#: A side in pixels, or height and width; None is the sample's own size.
Size: TypeAlias = Annotated[
    _Side | tuple[_Side, _Side] | None,
    Field(description="side in pixels, or height and width; the sample's own"),
]


Window: TypeAlias = Annotated[int, Field(ge=3, le=101, description="side of the neighbourhood, odd")]


#: The most numbers that a sample's windows may hold: 4 GiB.
_NUMBERS = 1 << 29


def output_size(sample: Tensor, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of what is made of a sample (..., H, W)."""
    height, width = (size, size) if isinstance(size, int) else size or sample.shape[-2:]
    return height, width


def check_window(sample: Tensor, window: int) -> None:
    """InputError unless the window is odd, fits into the samples (N, C, H, W), and its copies into memory."""
    _, channels, height, width = sample.shape
    if window % 2 == 0 or window > min(height, width):
        raise InputError(f"window must be odd and fit into the sample of {height} x {width}, not {window}")
    count = (height - window + 1) * (width - window + 1)
    if (channels + 1) * window**2 * count > _NUMBERS:
        told = f"{count} windows of {window} x {window} need more than 4 GiB"
        raise InputError(f"{told}; give a sample smaller than {height} x {width}, or a smaller window")


def copied(sample: Tensor, images: Sequence[Tensor]) -> Synthesis:
    """The result of copying pixels of samples (N, C, H, W) into images (C, H', W'); it took no steps."""
    return Synthesis(
        images=torch.stack(list(images)),
        scores=sample.new_zeros(0, len(sample)),
        targets=("texture",) * len(sample),
        sources=sample,
    )
