"""Gaussian noise images and seeded generators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Generator, Tensor


def seeded_generator(seed: int | None) -> Generator:
    """Generator on the CPU, so that a seed draws the same numbers for every device; None: a random seed."""
    generator = Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    return generator


def broadcast_color(center: float | Tensor, images: Tensor) -> Tensor:
    """A number or a color (C,) as a tensor that broadcasts against images (N, C, H, W)."""
    return torch.as_tensor(center, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)


def noise_images(
    shape: Iterable[int], *, seed: int | None, mean: float | Tensor = 0.5, sd: float | Tensor = 0.1
) -> Tensor:
    """Gaussian noise images (N, C, H, W), clipped to [0, 1], with the data type and device of the mean.

    All images of the batch have the same noise, so that a batch has the same result as its images alone.

    Args:
        mean: a number or a color (C,).
        sd: standard deviation, a number or one per channel (C,).
    """
    count, *size = shape
    noise = torch.randn(1, *size, generator=seeded_generator(seed)).to(torch.as_tensor(mean))
    image = broadcast_color(mean, noise) + broadcast_color(sd, noise) * noise
    return image.clamp(0, 1).repeat(count, 1, 1, 1)
