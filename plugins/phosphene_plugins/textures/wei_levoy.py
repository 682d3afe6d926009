"""Wei-Levoy texture synthesis: matching neighborhoods, coarse to fine, found by tree-structured search."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Reference, hookimpl, method, progress_bar
from phosphene.images import gaussian_blur
from phosphene.results import Synthesis
from phosphene.roles import Seed, Texture
from phosphene.spec import Cost, PixelRange

from ._texture_samples import Size, Window, check_window, output_size, sampled_texture
from ._vector_quantization import Array, Fork, Leaf, build_codebook, nearest_index


def coarse_window(window: int) -> int:
    """The side of the window in the coarser level: about half as long, and odd."""
    return 2 * ((window // 2 + 1) // 2) + 1


def neighborhoods(fine: Array, coarse: Array | None, y: Array, x: Array, window: int) -> Array:
    """The neighborhoods of pixels (n,), (n,) of an image (H, W, C) that is repeated beyond its edges: (n, D).

    In the coarser level, if there is one, the square around the parent pixel; in the pixel's own level the
    preceding pixels in scanline order, those to its left last.
    """

    def gather(image: Array, y: Array, x: Array, down: Array, across: Array) -> Array:
        rows, columns = (y[:, None] + down) % image.shape[0], (x[:, None] + across) % image.shape[1]
        values: Array = image[rows, columns].reshape(len(y), -1)
        return values

    def square_offsets(window: int) -> Array:
        radius = window // 2
        return np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)

    preceding = gather(fine, y, x, *square_offsets(window)[:, : window**2 // 2])
    if coarse is None:
        return preceding
    parents = gather(coarse, y // 2, x // 2, *square_offsets(coarse_window(window)))
    return np.concatenate([parents, preceding], 1)


def interior_pixels(fine: Array, coarse: Array | None, window: int) -> tuple[Array, Array]:
    """The pixels (n,), (n,) of a sample whose neighborhoods lie inside it, at both levels."""
    radius, margin = window // 2, coarse_window(window) // 2
    height, width, _ = fine.shape
    y, x = np.arange(radius, height), np.arange(radius, width - radius)
    if coarse is not None:
        y, x = (
            line[(line >= 2 * margin) & (line < 2 * (side - margin))]
            for line, side in zip((y, x), coarse.shape[:2], strict=True)
        )
    return np.repeat(y, len(x)), np.tile(x, len(y))


def gaussian_pyramid(image: Tensor, levels: int) -> list[Array]:
    """An image (C, H, W) as (H, W, C), and blurred and halved again and again, finest first."""
    scales = [image[None]]
    for _ in range(levels - 1):
        scales.append(gaussian_blur(scales[-1], 1.0)[:, :, ::2, ::2])
    return [scale[0].permute(1, 2, 0).cpu().double().numpy() for scale in scales]


def synthesize(
    pyramid: Sequence[Array], height: int, width: int, *, window: int, leaf_size: int | None, seed: int
) -> Iterator[Array]:
    """Synthesize level after level, the last one (height, width, C); yields the level after each pixel."""
    generator, left = Generator().manual_seed(seed), np.arange(-(window // 2), 0)
    coarse_image: Array | None = None
    for level in reversed(range(len(pyramid))):
        fine, coarse = pyramid[level], pyramid[level + 1] if level + 1 < len(pyramid) else None
        y, x = interior_pixels(fine, coarse, window)
        codebook = build_codebook(neighborhoods(fine, coarse, y, x, window), np.arange(len(y)), leaf_size)
        rows, columns = (np.arange(-(-side // 2**level)) for side in (height, width))
        pixels = fine.reshape(-1, fine.shape[2])
        image = pixels[torch.randint(len(pixels), (len(rows), len(columns)), generator=generator).numpy()]
        for row in rows:
            vectors = neighborhoods(image, coarse_image, np.full_like(columns, row), columns, window)
            for column, vector in zip(columns, vectors, strict=True):
                # The pixels to the left have changed since the row's neighborhoods were gathered.
                left_pixels = image[row, (column + left) % len(columns)]
                vector[-left_pixels.size :] = left_pixels.ravel()
                match = nearest_index(codebook, vector)
                image[row, column] = fine[y[match], x[match]]
                yield image
        coarse_image = image


def exhaustive_search_copies_the_same_pixels() -> None:
    """One leaf: equal to loops over pixels and neighborhoods; in a tree each vector is nearest to itself."""
    tested: Any = wei_levoy  # its result has every field here
    from ._textbook_textures import wei_levoy as textbook

    sample = torch.rand(2, 2, 13, 12, dtype=torch.float64, generator=Generator().manual_seed(1))
    for rows, size, window, levels, used in (
        (13, (8, 9), 5, 1, 1),
        (13, (12, 13), 3, 3, 2),
        (11, (12, 13), 3, 3, 1),
    ):
        cropped = sample[:, :, :rows]
        result = tested(cropped, size=size, window=window, levels=levels, leaf_size=None, seed=2)
        assert torch.equal(result.sources, cropped) and result.scores.shape == (0, 2)
        for image, single in zip(result.images, cropped, strict=True):
            expected = textbook(single, *size, window=window, levels=used, seed=2)
            assert torch.equal(image, expected), f"{used} levels: not the result of an exhaustive search"
    # Not tileable: the corner of an image that is larger by the radius of the coarser level's window, 1 x 2.
    cropped = tested(sample, size=(12, 14), window=3, levels=2, leaf_size=None, periodic=False, seed=2)
    expected = textbook(sample[0], 14, 16, window=3, levels=2, seed=2)
    assert torch.equal(cropped.images[0], expected[:, :12, :14])
    on_tree = tested(sample, size=(8, 9), window=3, levels=1, leaf_size=4, seed=2)
    exhaustive = tested(sample, size=(8, 9), window=3, levels=1, leaf_size=None, seed=2)
    assert not torch.equal(on_tree.images, exhaustive.images), "the tree is not used"
    vectors = sample.flatten().numpy().reshape(-1, 4)
    indices = np.arange(0, len(vectors), 2)
    codebook = build_codebook(vectors, indices, leaf_size=3)
    clusters = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 2.0], [10.0, 2.0], [10.0, 4.0]])
    fork = build_codebook(clusters, np.arange(5), leaf_size=3)
    assert isinstance(fork, Fork) and fork.normal.tolist() == [10, 1] and fork.offset == 51.5
    leaves = [leaf.indices.tolist() for leaf in (fork.near, fork.far) if isinstance(leaf, Leaf)]
    assert leaves == [[1, 3, 4], [0, 2]]
    assert isinstance(build_codebook(clusters, np.arange(3), leaf_size=2), Fork), "one vector is not apart"
    rectangle = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 6.0], [10.0, 6.0]])
    for points, normal, offset in (
        (rectangle, [10, 0], 50),  # split along the longer side
        ([[0.0], [4.0], [5.0], [7.0]], [4], 16),  # 4 is the mean, and later as near to 2 as to 6
        ([[0.0], [6.0], [7.0], [8.0], [8.0], [10.0], [11.0]], [25 / 3], 34.722),  # after several steps
    ):
        fork = build_codebook(np.array(points), np.arange(len(points)), leaf_size=len(points) - 1)
        assert isinstance(fork, Fork) and np.allclose([*fork.normal, fork.offset], [*normal, offset], 1e-4)
    assert isinstance(build_codebook(np.ones((5, 2)), np.arange(5), leaf_size=2), Leaf)
    assert all(nearest_index(codebook, vectors[n]) == n for n in indices), "a vector is not nearest to itself"


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
    oracle=exhaustive_search_copies_the_same_pixels,
    quick={"size": 16, "window": 3},
    demo={"sample": ["builtin:bricks"]},
)
def wei_levoy(
    sample: Texture,
    *,
    size: Size = None,
    window: Window = 9,
    levels: Annotated[
        int, Field(ge=1, le=10, description="largest number of levels of the Gaussian pyramid")
    ] = 4,
    leaf_size: Annotated[
        int | None,
        Field(
            ge=1,
            description="largest number of vectors in a leaf of the search tree; None: exhaustive search",
        ),
    ] = 512,
    periodic: Annotated[
        bool, Field(description="whether the output continues at its opposite edges, so that it can be tiled")
    ] = True,
    seed: Seed = None,
) -> Synthesis:
    """Wei-Levoy texture synthesis with tree-structured vector quantization: tileable textures from a sample.

    I(p) = S(q),  q = argmin_q |N(p) - N(q)|^2

    with N(p) the neighborhood of a pixel: in its own level the preceding pixels in scanline order in a
    ``window``, in the next coarser level of a Gaussian pyramid, already synthesized, all pixels in half
    that window. Each level starts as randomly drawn pixels of the sample. Neighborhoods wrap around at the
    edges, so the result can be tiled; without ``periodic`` it is cropped from an image that is larger by half
    a window of the coarsest level. Neighborhoods of the sample are sorted into a tree by recursive 2-means;
    a search descends to the closer centroid and compares all vectors in the leaf.

    Levels at which sample or image would be less than two windows wide are left out. Samples are
    (N, C, H, W) with any number of channels.

    Returns:
        ``images`` (N, C, H', W') of that ``size``, each pixel a pixel of its sample; ``sources``
        (N, C, H, W) the samples; ``scores`` (0, N), as there are no optimization steps.

    Raises:
        InputError: a window that is even or larger than the sample, or windows that need more than 4 GiB.

    Example::
        from phosphene import run

        result = run("wei_levoy", sample="builtin:bricks", size=16, window=5, seed=0)
        result.images.shape  # (1, 3, 16, 16)

    Source: Wei and Levoy 2000, section 2 (synthesis) and the section on acceleration.
    """
    height, width = output_size(sample, size)
    check_window(sample, window)
    sides = (height, width, *sample.shape[2:])
    levels = 1 + sum(min(sides) >= 2 * window * 2**level for level in range(1, levels))
    margin = 0 if periodic else window // 2 * 2 ** (levels - 1)
    canvas = (height + margin, width + margin)
    # equivalent mutants: only the length of the progress bar
    total = sum(-(-canvas[0] // 2**level) * -(-canvas[1] // 2**level) for level in range(levels))
    images = []
    for single in sample:
        pyramid = gaussian_pyramid(single, levels)
        synthesis = synthesize(pyramid, *canvas, window=window, leaf_size=leaf_size, seed=seed or 0)
        (image,) = deque(progress_bar(synthesis, "Synthesizing", total), maxlen=1)
        images.append(torch.from_numpy(image[:height, :width]).permute(2, 0, 1).to(sample))
    return sampled_texture(sample, images)


@hookimpl
def phosphene_methods():
    return [wei_levoy]
