"""Gaussian noise images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator, Tensor


def seeded_generator(seed: int | None) -> Generator:
    """A generator on the CPU, so that a seed means the same on every device."""
    generator = Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    return generator


def broadcast_color(center: float | Tensor, images: Tensor) -> Tensor:
    """A number or a colour (C,) as something that broadcasts against (N, C, H, W)."""
    return torch.as_tensor(center, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


def noise_images(
    shape: Iterable[int], *, seed: int | None, mean: float | Tensor = 0.5, sd: float | Tensor = 0.1
) -> Tensor:
    """Gaussian noise images (N, C, H, W), clipped into [0, 1]: the usual start.

    All images of the batch get the same noise, so that a batch gives what its images give alone.
    mean, sd: a number or a colour (C,) each; of the mean's precision, on its device.
    """
    count, *size = shape
    draw = torch.randn(1, *size, generator=seeded_generator(seed)).to(torch.as_tensor(mean))
    return (broadcast_color(mean, draw) + broadcast_color(sd, draw) * draw).clamp(0, 1).repeat(count, 1, 1, 1)
