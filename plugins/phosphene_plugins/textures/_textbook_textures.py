"""Reference implementations of texture synthesis: loops over all pixels and windows, without shortcuts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Generator, Tensor

from phosphene.images import resize

from ._vector_quantization import Array


def efros_leung(
    sample: Tensor, height: int, width: int, *, window: int, seed: int, ring: bool = False,
    error_threshold: float = 0.1, max_error: float = 0.3, from_sample: bool = False, periodic: bool = False,
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
        if periodic:
            return int(
                sum(filled[(y + dy) % height, (x + dx) % width] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
            )
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
                v, u = ((y + dy) % height, (x + dx) % width) if periodic else (y + dy, x + dx)
                if 0 <= v < height and 0 <= u < width and visible[v, u]:
                    template[:, dy + radius, dx + radius] = values[:, v, u]
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


def guidance(
    source: Array, height: int, width: int, guide: Tensor | None, sample_guide: Tensor | None
) -> tuple[Array, Array]:
    """Guidance maps (G, H, W) of a sample (C, H, W) and (G, height, width) of the output."""
    if guide is None:
        return source[:0], np.zeros((0, height, width))
    resized = resize(guide.double(), (height, width))[0].numpy()
    if sample_guide is not None:
        return sample_guide.double().numpy(), resized
    own = source.mean(0) if len(source) != 3 else np.tensordot([0.299, 0.587, 0.114], source, 1)
    other = np.tensordot([0.299, 0.587, 0.114], resized, 1)
    return own[None], ((other - other.mean()) / other.std() * own.std() + own.mean())[None]


def image_quilting(
    sample: Tensor, height: int, width: int, *, block: int, overlap: int | None = None, seed: int,
    error_threshold: float = 0.1, guide: Tensor | None = None, sample_guide: Tensor | None = None,
    guide_weight: float = 0.5, periodic: bool = False,
) -> Tensor:  # fmt: skip
    """Image quilting: an image (C, height, width) from blocks of a sample (C, H, W), pixel by pixel."""
    generator = Generator().manual_seed(seed)
    source = sample.double().numpy()
    channels, sample_height, sample_width = source.shape
    overlap = max(1, block // 6) if overlap is None else overlap
    maps = guidance(source, height, width, guide, sample_guide)

    def starts(length: int) -> list[int]:
        step, count = block - overlap, 1
        if periodic:
            while count * step < length:
                count += 1
            return [math.floor(n * length / count) for n in range(count)]
        while block + (count - 1) * step < length:
            count += 1
        return [math.floor(n * (length - block) / (count - 1)) if n else 0 for n in range(count)]

    def cut(errors):  # type: ignore[no-untyped-def]
        totals = errors.copy()
        for row in range(1, len(totals)):
            for column in range(totals.shape[1]):
                totals[row, column] += totals[row - 1, max(0, column - 1) : column + 2].min()
        path = [int(totals[-1].argmin())]
        for row in range(len(totals) - 2, -1, -1):
            left = max(0, path[-1] - 1)
            path.append(left + int(totals[row, left : path[-1] + 2].argmin()))
        return path[::-1]

    image, filled = np.zeros((channels, height, width)), np.zeros((height, width), bool)
    inside = range(block)
    for top in starts(height):
        for left in starts(width):
            at = {(i, j): ((top + i) % height, (left + j) % width) for i in inside for j in inside}
            errors = np.zeros((sample_height - block + 1, sample_width - block + 1))
            for v in range(errors.shape[0]):
                for u in range(errors.shape[1]):
                    overlaps = [
                        ((source[:, v + i, u + j] - image[:, y, x]) ** 2).mean()
                        for (i, j), (y, x) in at.items() if filled[y, x]
                    ]  # fmt: skip
                    guides = [
                        ((maps[0][:, v + i, u + j] - maps[1][:, y, x]) ** 2).mean()
                        for (i, j), (y, x) in at.items() if len(maps[0])
                    ]  # fmt: skip
                    errors[v, u] = (1 - guide_weight) * np.mean(overlaps) if overlaps else 0
                    errors[v, u] += guide_weight * np.mean(guides) if guides else 0
            matches = np.argwhere(errors <= errors.min() * (1 + error_threshold) + 1e-12)
            draw = float(torch.rand((), dtype=torch.float64, generator=generator))
            v, u = matches[int(draw * len(matches))]
            new = source[:, v : v + block, u : u + block]
            old = np.array([[image[:, *at[i, j]] for j in inside] for i in inside]).transpose(2, 0, 1)
            is_old = np.array([[filled[at[i, j]] for j in inside] for i in inside])
            difference, keeps_old = ((new - old) ** 2).sum(0), np.zeros((block, block), bool)
            for side in ("left", "right", "top", "bottom"):
                # The block as it is read with this side on the left, its rows in the order of the cut.
                e, f = difference, is_old
                if side in ("top", "bottom"):
                    e, f = e.T, f.T
                if side in ("right", "bottom"):
                    e, f = e[:, ::-1], f[:, ::-1]
                if side in ("right", "top"):
                    e, f = e[::-1], f[::-1]
                span = 0
                while span < block and f[:, span].all():
                    span += 1
                if not 0 < span < block:
                    continue
                old_side = np.zeros((block, block), bool)
                for row, column in enumerate(cut(e[:, :span])):
                    old_side[row, :column] = True
                if side in ("right", "top"):
                    old_side = old_side[::-1]
                if side in ("right", "bottom"):
                    old_side = old_side[:, ::-1]
                keeps_old |= old_side.T if side in ("top", "bottom") else old_side
            for (i, j), (y, x) in at.items():
                if not keeps_old[i, j]:
                    image[:, y, x] = new[:, i, j]
            for y, x in at.values():
                filled[y, x] = True
    return torch.from_numpy(image)


def patchmatch(
    sample: Tensor, height: int, width: int, *, window: int, levels: int = 1, steps: int = 6, seed: int,
    completeness: float = 1.0, guide: Tensor | None = None, sample_guide: Tensor | None = None,
    guide_weight: float = 0.5, periodic: bool = False,
) -> Tensor:  # fmt: skip
    """PatchMatch synthesis: an image (C, height, width) from a sample (C, H, W), patch by patch."""
    generator = Generator().manual_seed(seed)
    source = sample.double().numpy()
    pyramid = [(source, *guidance(source, height, width, guide, sample_guide))]
    for _ in range(levels - 1):
        blurred = (gaussian_filter(t, (0, 1, 1), mode="reflect") if len(t) else t for t in pyramid[-1])
        pyramid.append(tuple(t[:, ::2, ::2] for t in blurred))  # type: ignore[arg-type]
    cells = [(i, j) for i in range(window) for j in range(window)]

    def draw(*shape: int) -> Array:
        drawn: Array = torch.rand(*shape, 2, dtype=torch.float64, generator=generator).numpy()
        return drawn

    def inside(position, grid):  # type: ignore[no-untyped-def]
        return tuple(int(min(max(p, 0), side - 1)) for p, side in zip(position, grid, strict=True))

    def improve(field, grid, other_grid, distance):  # type: ignore[no-untyped-def]
        best = {p: distance(p, q) for p, q in field.items()}

        def offer(candidates):  # type: ignore[no-untyped-def]
            for p, candidate in candidates.items():
                candidate = inside(candidate, other_grid)
                error = distance(p, candidate)
                if error < best[p]:
                    field[p], best[p] = candidate, error

        for jump in (8, 4, 2, 1):
            for dy, dx in ((0, jump), (jump, 0), (0, -jump), (-jump, 0)):
                neighbor = {(y, x): field[(y - dy) % grid[0], (x - dx) % grid[1]] for y, x in field}
                offer({p: (q[0] + dy, q[1] + dx) for p, q in neighbor.items()})
        radius = max(other_grid)
        while radius:
            drawn = draw(*grid)
            offer({p: np.round((2 * drawn[p] - 1) * radius) + q for p, q in field.items()})
            radius //= 2

    def start(grid, other_grid):  # type: ignore[no-untyped-def]
        drawn = draw(*(-(-side // window) for side in grid))
        field = {}
        for y in range(grid[0]):
            for x in range(grid[1]):
                top, left = np.floor(drawn[y // window, x // window] * other_grid)
                field[y, x] = inside((top + y % window, left + x % window), other_grid)
        return field

    def refine(coarse, coarse_grid, grid, other_grid):  # type: ignore[no-untyped-def]
        field = {}
        for y in range(grid[0]):
            for x in range(grid[1]):
                v, u = coarse[inside((y // 2, x // 2), coarse_grid)]
                field[y, x] = inside((2 * v + y % 2, 2 * u + x % 2), other_grid)
        return field

    def vote(coherent, complete, pixels, size, weight):  # type: ignore[no-untyped-def]
        total, weights = np.zeros((len(pixels), *size)), np.zeros(size)
        pairs = [(t, s, 1 / len(coherent)) for t, s in coherent.items()]
        pairs += [(t, s, weight / len(complete)) for s, t in complete.items() if weight]
        for (y, x), (v, u), w in pairs:
            for i, j in cells:
                total[:, (y + i) % size[0], (x + j) % size[1]] += w * pixels[:, v + i, u + j]
                weights[(y + i) % size[0], (x + j) % size[1]] += w
        return total / weights

    fields = coarse_grids = None
    for pixels, sample_map, output_map in reversed(pyramid):
        size = output_map.shape[1:]
        grids = (
            tuple(side if periodic else side - window + 1 for side in size),
            tuple(side - window + 1 for side in pixels.shape[1:]),
        )
        if fields is None or coarse_grids is None:
            fields = start(*grids), start(*grids[::-1])
            image = vote(*fields, pixels, size, 0)
        else:
            fields = (
                refine(fields[0], coarse_grids[0], *grids),
                refine(fields[1], coarse_grids[1], *grids[::-1]),
            )
            image = vote(*fields, pixels, size, completeness)
        coarse_grids = grids
        for _ in range(steps):

            def distance(
                t, s, current=image, pixels=pixels, sample_map=sample_map, output_map=output_map, size=size
            ):  # type: ignore[no-untyped-def]
                error = guide_error = 0.0
                for i, j in cells:
                    at, source_at = ((t[0] + i) % size[0], (t[1] + j) % size[1]), (s[0] + i, s[1] + j)
                    error += ((current[:, *at] - pixels[:, *source_at]) ** 2).mean()
                    if len(sample_map):
                        guide_error += ((output_map[:, *at] - sample_map[:, *source_at]) ** 2).mean()
                if not len(sample_map):
                    return error
                return (1 - guide_weight) * error + guide_weight * guide_error

            improve(fields[0], *grids, distance)
            if completeness:
                improve(fields[1], *grids[::-1], lambda s, t: distance(t, s))
            image = vote(*fields, pixels, size, completeness)
    return torch.from_numpy(image)
