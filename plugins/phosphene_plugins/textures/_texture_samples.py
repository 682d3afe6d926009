"""Sample-based texture synthesis: output size, window size, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from phosphene import InputError
from phosphene.results import Synthesis

_Side: TypeAlias = Annotated[int, Field(ge=8, le=4096)]

Size: TypeAlias = Annotated[
    _Side | tuple[_Side, _Side] | None,
    Field(description="side of the output in pixels, or its height and width; default: the sample's size"),
]

Window: TypeAlias = Annotated[
    int, Field(ge=3, le=101, description="side of the square neighborhood that is compared, odd")
]

Periodic: TypeAlias = Annotated[
    bool,
    Field(description="whether the output continues at its opposite edges, so that it can be tiled"),
]

#: Largest number of elements in all windows of a sample: 4 GiB in double precision.
MAX_ELEMENTS = 1 << 29


def output_size(sample: Tensor, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the output for a sample (..., H, W)."""
    height, width = (size, size) if isinstance(size, int) else size or sample.shape[-2:]
    return height, width


def check_window(sample: Tensor, window: int) -> None:
    """Raise InputError unless a window is odd and fits into the samples (N, C, H, W), and memory suffices."""
    _, channels, height, width = sample.shape
    if window % 2 == 0 or window > min(height, width):
        raise InputError(f"window must be odd and fit into the sample of {height} x {width}, not {window}")
    count = (height - window + 1) * (width - window + 1)
    if (channels + 1) * window**2 * count > MAX_ELEMENTS:
        memory = f"{count} windows of {window} x {window} need more than 4 GiB"
        raise InputError(f"{memory}; use a sample smaller than {height} x {width}, or a smaller window")


def sampled_texture(sample: Tensor, images: Sequence[Tensor]) -> Synthesis:
    """The result for images (C, H', W') copied pixel by pixel from samples (N, C, H, W), without scores."""
    return Synthesis(
        images=torch.stack(list(images)),
        scores=sample.new_zeros(0, len(sample)),
        targets=("texture",) * len(sample),
        sources=sample,
    )
