"""Wei-Levoy: a texture painted line by line, from coarse to fine, by looking up what comes next."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.images import gaussian_blur
from phosphene.results import Synthesis
from phosphene.roles import Seed, Texture
from phosphene.spec import Cost, PixelRange

from ._texture_samples import Size, Window, check_window, copied, output_size
from ._vector_quantization import Array, codebook, nearest


def parents(window: int) -> int:
    """The side of the window in the coarser level: half as large, and odd."""
    return 2 * ((window // 2 + 1) // 2) + 1


def neighbors(fine: Array, coarse: Array | None, y: Array, x: Array, window: int) -> Array:
    """What surrounds pixels (n,) of an image (H, W, C) that goes on beyond its edges: (n, D).

    All around its parent in the coarser level, if there is one; in its own only what comes before it, line
    by line, and what is to its left comes last.
    """

    def around(image: Array, y: Array, x: Array, down: Array, across: Array) -> Array:
        rows, columns = (y[:, None] + down) % image.shape[0], (x[:, None] + across) % image.shape[1]
        found: Array = image[rows, columns].reshape(len(y), -1)
        return found

    def square(window: int) -> Array:
        radius = window // 2
        return np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)

    before = around(fine, y, x, *square(window)[:, : window**2 // 2])
    if coarse is None:
        return before
    return np.concatenate([around(coarse, y // 2, x // 2, *square(parents(window))), before], 1)


def inside(fine: Array, coarse: Array | None, window: int) -> tuple[Array, Array]:
    """The pixels (n,), (n,) of a sample whose surroundings lie in it, at both levels."""
    radius, margin = window // 2, parents(window) // 2
    height, width, _ = fine.shape
    y, x = np.arange(radius, height), np.arange(radius, width - radius)
    if coarse is not None:
        y, x = (
            line[(line // 2 >= margin) & (line // 2 < side - margin)]
            for line, side in zip((y, x), coarse.shape[:2], strict=True)
        )
    return np.repeat(y, len(x)), np.tile(x, len(y))


def gaussian_pyramid(image: Tensor, levels: int) -> list[Array]:
    """An image (C, H, W) as (H, W, C), and blurred and halved again and again."""
    scales = [image[None]]
    for _ in range(levels - 1):
        scales.append(gaussian_blur(scales[-1], 1.0)[:, :, ::2, ::2])
    return [scale[0].permute(1, 2, 0).double().cpu().numpy() for scale in scales]


def paint(
    pyramid: Sequence[Array], height: int, width: int, *, window: int, leaf_size: int | None, seed: int
) -> Iterator[Array]:
    """Each level of a new picture, the last of them (height, width, C), as it is after each of its pixels."""
    draw, left = Generator().manual_seed(seed), np.arange(-(window // 2), 0)
    parent: Array | None = None
    for level in reversed(range(len(pyramid))):
        fine, coarse = pyramid[level], pyramid[level + 1] if level + 1 < len(pyramid) else None
        y, x = inside(fine, coarse, window)
        book = codebook(neighbors(fine, coarse, y, x, window), np.arange(len(y)), leaf_size)
        rows, columns = (np.arange(-(-side // 2**level)) for side in (height, width))
        pixels = fine.reshape(-1, fine.shape[2])
        image = pixels[torch.randint(len(pixels), (len(rows), len(columns)), generator=draw).numpy()]
        for row in rows:
            around = neighbors(image, parent, np.full_like(columns, row), columns, window)
            for column, vector in zip(columns, around, strict=True):
                beside = image[row, (column + left) % len(columns)]
                vector[-beside.size :] = beside.ravel()
                found = nearest(book, vector)
                image[row, column] = fine[y[found], x[found]]
                yield image
        parent = image


def one_leaf_searches_all() -> None:
    """One leaf, one level: each pixel is the sample's whose four pixels before it are nearest, all tried."""
    sample = torch.rand(1, 1, 9, 9, dtype=torch.float64, generator=Generator().manual_seed(1))
    made = wei_levoy(sample, size=8, window=3, levels=1, leaf_size=None, seed=0).images[0, 0]
    start = torch.randint(81, (8, 8), generator=Generator().manual_seed(0))
    source, image = sample[0, 0].tolist(), sample.flatten()[start].tolist()

    def far(y: int, x: int, v: int, u: int) -> float:
        before = ((-1, -1), (-1, 0), (-1, 1), (0, -1))
        return sum((image[(y + b) % 8][(x + a) % 8] - source[v + b][u + a]) ** 2 for b, a in before)

    for y in range(8):
        for x in range(8):
            _, v, u = min((far(y, x, v, u), v, u) for v in range(1, 9) for u in range(1, 8))
            image[y][x] = source[v][u]
    assert made.tolist() == image, "it is not what a search through all of the sample finds"


@method(
    family="textures",
    title="Wei-Levoy",
    references=[
        Reference(
            key="wei2000",
            title="Fast Texture Synthesis Using Tree-structured Vector Quantization",
            authors="Wei, Levoy",
            year=2000,
            url="https://doi.org/10.1145/344779.345009",
        )
    ],
    invariants=[PixelRange()],
    cost=Cost(),  # no model
    oracle=one_leaf_searches_all,
    quick={"size": 16, "window": 3},
    demo={"sample": ["builtin:bricks"]},
)
def wei_levoy(
    sample: Texture,
    *,
    size: Size = None,
    window: Window = 9,
    levels: Annotated[int, Field(ge=1, le=10, description="of the pyramid, at most")] = 4,
    leaf_size: Annotated[
        int | None, Field(ge=1, description="vectors that a search ends among; all of them, exhaustively")
    ] = 512,
    seed: Seed = None,
) -> Synthesis:
    """Paint a texture line by line, at several scales: each pixel is the sample's that fits what is there.

    I(p) = S(q),  q = argmin_q |N(p) - N(q)|^2

    with N(p) what surrounds a pixel: of its own level, in a ``window``, the pixels before it in the order
    of the lines; of the next coarser level of a Gaussian pyramid, already painted, all in half that
    window. Every level starts as pixels of the sample, shuffled, and goes on beyond its edges at the
    opposite ones: the picture can be laid side by side with itself. Surroundings that lie in the sample
    are sorted into a tree, parted in two by 2-means again and again; a search goes down to the nearer
    centroid and compares all that is in the leaf. ``leaf_size`` None is one leaf: exhaustive search.

    Of the ``levels`` there are as many as leave sample and picture two windows wide. Gives images
    (N, C, H, W) of any ``size`` for N samples of C channels, each pixel a pixel of its sample; there
    are no steps, so ``scores`` is (0, N). Raises InputError for a window that is even or larger than the
    sample. Source: Wei and Levoy 2000.
    """
    height, width = output_size(sample, size)
    check_window(sample, window)
    sides = (height, width, *sample.shape[2:])
    levels = 1 + sum(min(sides) >= 2 * window * 2**level for level in range(1, levels))
    total = sum(-(-height // 2**level) * -(-width // 2**level) for level in range(levels))
    made = []
    for one in sample:
        pyramid = gaussian_pyramid(one, levels)
        painting = paint(pyramid, height, width, window=window, leaf_size=leaf_size, seed=seed or 0)
        (image,) = deque(progress_bar(painting, "Painting", total), maxlen=1)
        made.append(torch.from_numpy(image).permute(2, 0, 1).to(sample))
    return copied(sample, made)


@hookimpl
def phosphene_methods():
    return [wei_levoy]
