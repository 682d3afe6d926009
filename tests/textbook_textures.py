"""Texture synthesis as the papers tell it: pixel after pixel, one window after another, nothing clever."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Generator, Tensor


def efros_leung(
    sample: Tensor, height: int, width: int, *, window: int, seed: int, ring: bool = False,
    threshold: float = 0.1, max_error: float = 0.3, whole: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """The image (C, height, width) after each pixel that a sample (C, H, W) gives it."""
    generator = Generator().manual_seed(seed)
    source = sample.double().numpy()
    channels, high, wide = source.shape
    image, known = np.zeros((channels, height, width)), np.zeros((height, width), bool)
    if whole:
        planted = source
    else:
        top, left = (int(torch.randint(side - 2, (), generator=generator)) for side in (high, wide))
        planted = source[:, top : top + 3, left : left + 3]
    top, left = (height - planted.shape[1]) // 2, (width - planted.shape[2]) // 2
    image[:, top : top + planted.shape[1], left : left + planted.shape[2]] = planted
    known[top : top + planted.shape[1], left : left + planted.shape[2]] = True
    radius, sigma = window // 2, window / 6.4
    places = [(y, x) for y in range(radius, high - radius) for x in range(radius, wide - radius)]
    offsets = [(y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]
    gauss = np.array([np.exp(-(y * y + x * x) / (2 * sigma**2)) for y, x in offsets]).reshape(window, window)

    def neighbors(y: int, x: int) -> int:
        return int(known[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].sum())

    while not known.all():
        pixels = [(y, x) for y in range(height) for x in range(width) if not known[y, x] and neighbors(y, x)]
        pixels = [pixels[n] for n in torch.randperm(len(pixels), generator=generator).tolist()]
        pixels.sort(key=lambda pixel: -neighbors(*pixel))
        draws = torch.rand(len(pixels), dtype=torch.float64, generator=generator).tolist()
        grown = False
        seen, visible = image, known
        if ring:
            seen, visible = image.copy(), known.copy()
        for (y, x), draw in zip(pixels, draws, strict=True):
            template = np.zeros((channels, window, window))
            weights = np.zeros((window, window))
            for dy, dx in offsets:
                if 0 <= y + dy < height and 0 <= x + dx < width and visible[y + dy, x + dx]:
                    template[:, dy + radius, dx + radius] = seen[:, y + dy, x + dx]
                    weights[dy + radius, dx + radius] = gauss[dy + radius, dx + radius]
            weights /= weights.sum() * channels
            errors = np.empty(len(places))
            for number, (v, u) in enumerate(places):
                patch = source[:, v - radius : v + radius + 1, u - radius : u + radius + 1]
                errors[number] = (weights * (template - patch) ** 2).sum()
            matches = np.flatnonzero(errors <= errors.min() * (1 + threshold))
            match = matches[int(draw * len(matches))]
            if errors[match] < max_error:
                v, u = places[match]
                image[:, y, x], known[y, x], grown = source[:, v, u], True, True
                yield torch.from_numpy(image)
        if not grown:
            max_error *= 1.1


def wei_levoy(sample: Tensor, height: int, width: int, *, window: int, levels: int, seed: int) -> Tensor:
    """An image (C, height, width) after a sample (C, H, W): every pixel by a search through all of it."""
    generator = Generator().manual_seed(seed)
    pyramid = [sample.double().permute(1, 2, 0).numpy()]
    for _ in range(levels - 1):
        pyramid.append(gaussian_filter(pyramid[-1], (1, 1, 0), mode="reflect")[::2, ::2])
    radius, margin = window // 2, (window // 2 + 1) // 2
    above = None
    for level in range(levels - 1, -1, -1):
        fine = pyramid[level]
        coarse = pyramid[level + 1] if level + 1 < levels else None
        pixels = fine.reshape(-1, fine.shape[2])
        high, wide = -(-height // 2**level), -(-width // 2**level)
        image = pixels[torch.randint(len(pixels), (high, wide), generator=generator).numpy()]

        def around(image, parent, y, x):  # type: ignore[no-untyped-def]
            found = []
            for dy in range(-radius, 1):
                for dx in range(-radius, radius + 1):
                    if (dy, dx) < (0, 0):
                        found.append(image[(y + dy) % len(image), (x + dx) % image.shape[1]])
            if parent is not None:
                for dy in range(-margin, margin + 1):
                    for dx in range(-margin, margin + 1):
                        found.append(parent[(y // 2 + dy) % len(parent), (x // 2 + dx) % parent.shape[1]])
            return np.array(found)

        def within(y, x, coarse=coarse):  # type: ignore[no-untyped-def]
            if coarse is None:
                return True
            rows, columns = len(coarse) - margin, coarse.shape[1] - margin
            return margin <= y // 2 < rows and margin <= x // 2 < columns

        places = [(y, x) for y in range(radius, len(fine)) for x in range(radius, fine.shape[1] - radius)]
        inside = [(y, x, around(fine, coarse, y, x)) for y, x in places if within(y, x)]
        for y in range(high):
            for x in range(wide):
                wanted = around(image, above, y, x)
                errors = [((wanted - found) ** 2).sum() for _, _, found in inside]
                v, u, _ = inside[int(np.argmin(errors))]
                image[y, x] = fine[v, u]
        above = image
    return torch.from_numpy(image).permute(2, 0, 1)
