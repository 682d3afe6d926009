"""Reference implementations of texture synthesis: loops over all pixels and windows, without shortcuts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Generator, Tensor


def efros_leung(
    sample: Tensor, height: int, width: int, *, window: int, seed: int, ring: bool = False,
    error_threshold: float = 0.1, max_error: float = 0.3, from_sample: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """Efros-Leung: yields the image (C, height, width) after each pixel copied from a sample (C, H, W)."""
    generator = Generator().manual_seed(seed)
    source = sample.double().numpy()
    channels, sample_height, sample_width = source.shape
    image, filled = np.zeros((channels, height, width)), np.zeros((height, width), bool)
    if from_sample:
        seed_patch = source
    else:
        top, left = (int(torch.randint(side - 2, (), generator=generator)) for side in source.shape[1:])
        seed_patch = source[:, top : top + 3, left : left + 3]
    top, left = (height - seed_patch.shape[1]) // 2, (width - seed_patch.shape[2]) // 2
    image[:, top : top + seed_patch.shape[1], left : left + seed_patch.shape[2]] = seed_patch
    filled[top : top + seed_patch.shape[1], left : left + seed_patch.shape[2]] = True
    radius, sigma = window // 2, window / 6.4
    centers = [
        (y, x) for y in range(radius, sample_height - radius) for x in range(radius, sample_width - radius)
    ]
    offsets = [(y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]
    gauss = np.array([np.exp(-(y * y + x * x) / (2 * sigma**2)) for y, x in offsets]).reshape(window, window)

    def neighbors(y: int, x: int) -> int:
        return int(filled[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].sum())

    while not filled.all():
        pixels = [(y, x) for y in range(height) for x in range(width) if not filled[y, x] and neighbors(y, x)]
        pixels = [pixels[n] for n in torch.randperm(len(pixels), generator=generator).tolist()]
        pixels.sort(key=lambda pixel: -neighbors(*pixel))
        draws = torch.rand(len(pixels), dtype=torch.float64, generator=generator).tolist()
        progressed = False
        values, visible = image, filled
        if ring:
            values, visible = image.copy(), filled.copy()
        for (y, x), draw in zip(pixels, draws, strict=True):
            template = np.zeros((channels, window, window))
            weights = np.zeros((window, window))
            for dy, dx in offsets:
                if 0 <= y + dy < height and 0 <= x + dx < width and visible[y + dy, x + dx]:
                    template[:, dy + radius, dx + radius] = values[:, y + dy, x + dx]
                    weights[dy + radius, dx + radius] = gauss[dy + radius, dx + radius]
            weights /= weights.sum() * channels
            errors = np.empty(len(centers))
            for number, (v, u) in enumerate(centers):
                patch = source[:, v - radius : v + radius + 1, u - radius : u + radius + 1]
                errors[number] = (weights * (template - patch) ** 2).sum()
            matches = np.flatnonzero(errors <= errors.min() * (1 + error_threshold))
            match = matches[int(draw * len(matches))]
            if errors[match] < max_error:
                v, u = centers[match]
                image[:, y, x], filled[y, x], progressed = source[:, v, u], True, True
                yield torch.from_numpy(image)
        if not progressed:
            max_error *= 1.1


def wei_levoy(sample: Tensor, height: int, width: int, *, window: int, levels: int, seed: int) -> Tensor:
    """Wei-Levoy: an image (C, height, width) from a sample (C, H, W), each pixel by exhaustive search."""
    generator = Generator().manual_seed(seed)
    pyramid = [sample.double().permute(1, 2, 0).numpy()]
    for _ in range(levels - 1):
        pyramid.append(gaussian_filter(pyramid[-1], (1, 1, 0), mode="reflect")[::2, ::2])
    radius, margin = window // 2, (window // 2 + 1) // 2
    coarse_image = None
    for level in range(levels - 1, -1, -1):
        fine = pyramid[level]
        coarse = pyramid[level + 1] if level + 1 < levels else None
        pixels = fine.reshape(-1, fine.shape[2])
        level_height, level_width = -(-height // 2**level), -(-width // 2**level)
        image = pixels[torch.randint(len(pixels), (level_height, level_width), generator=generator).numpy()]

        def around(image, parent, y, x):  # type: ignore[no-untyped-def]
            values = []
            for dy in range(-radius, 1):
                for dx in range(-radius, radius + 1):
                    if (dy, dx) < (0, 0):
                        values.append(image[(y + dy) % len(image), (x + dx) % image.shape[1]])
            if parent is not None:
                for dy in range(-margin, margin + 1):
                    for dx in range(-margin, margin + 1):
                        values.append(parent[(y // 2 + dy) % len(parent), (x // 2 + dx) % parent.shape[1]])
            return np.array(values)

        def is_inside(y, x, coarse=coarse):  # type: ignore[no-untyped-def]
            if coarse is None:
                return True
            rows, columns = len(coarse) - margin, coarse.shape[1] - margin
            return margin <= y // 2 < rows and margin <= x // 2 < columns

        positions = [(y, x) for y in range(radius, len(fine)) for x in range(radius, fine.shape[1] - radius)]
        neighborhoods = [(y, x, around(fine, coarse, y, x)) for y, x in positions if is_inside(y, x)]
        for y in range(level_height):
            for x in range(level_width):
                target = around(image, coarse_image, y, x)
                errors = [((target - other) ** 2).sum() for _, _, other in neighborhoods]
                v, u, _ = neighborhoods[int(np.argmin(errors))]
                image[y, x] = fine[v, u]
        coarse_image = image
    return torch.from_numpy(image).permute(2, 0, 1)
