"""Layer outputs as feature maps: channels first, channels last, or tokens on a patch grid."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..errors import ModelError


def prefix_tokens(module: nn.Module) -> int | None:
    """The number of class and register tokens before the patch tokens; None where it is not an attribute."""
    count = getattr(module, "num_prefix_tokens", None)
    return count if isinstance(count, int) else None


def _maps(features: Tensor, size: tuple[int, int], prefix: int | None) -> Tensor | None:
    """A layer's output as maps of more than one position; None where it is not a map."""
    try:
        maps = as_maps(features, size, prefix)
    except ModelError:
        return None
    return maps if maps.shape[2] * maps.shape[3] > 1 else None


def as_maps(features: Tensor, size: tuple[int, int], prefix: int | None = None) -> Tensor:
    """(N, C, h, w) from a layer's output: convolutional, channels-last (Swin) or tokens (ViT).

    ``size`` is the image's (H, W); ``prefix`` the number of class and register tokens, derived from the
    number of tokens when None. Raises ModelError for an output that is not a map.
    """
    shape = tuple(features.shape)
    if features.ndim == 4:
        first, last = _grid_error(shape[2:], size), _grid_error(shape[1:3], size)
        if min(first, last) < math.inf:
            # Errors below one position are due to rounding, and most layers have channels first.
            return features if first < max(last, 1) or first == last else features.permute(0, 3, 1, 2)
    if features.ndim == 3:
        for skipped in range(17) if prefix is None else (prefix, 0):
            if (grid := _grid(shape[1] - skipped, *size)) is not None:
                return features[:, skipped:].transpose(1, 2).unflatten(2, grid)
    raise ModelError(
        f"an output of shape {shape} is not a map over a {size[0]}x{size[1]} image: neither "
        "(N, C, h, w), nor (N, h, w, C), nor (N, tokens, C) with a token grid of the image's shape"
    )


def _grid_error(grid: tuple[int, ...], size: tuple[int, int]) -> float:
    """By how many positions a grid's aspect ratio is off the image's; infinite where it is no map of it.

    Unpadded convolutions crop the same few positions in both directions.
    """
    (h, w), (height, width) = grid, size
    error = abs(width * h / height - w)
    allowed = 0.0 if height == width else max(2.0, 0.1 * w)
    return error if error <= allowed and h <= 2 * height and w <= 2 * width else math.inf


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The h x w grid of so many square patches that tiles the image; None where there is none."""
    h = round((max(tokens, 0) * height / width) ** 0.5)
    if h < 1 or tokens % h:
        return None
    return (h, tokens // h) if abs(height / h - width * h / tokens) < 0.5 else None
