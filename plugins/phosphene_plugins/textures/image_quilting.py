"""Image quilting (Efros and Freeman): texture synthesis and transfer from overlapping blocks of a sample."""

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from phosphene import InputError, Reference, float64_device, hookimpl, method, progress_bar
from phosphene.results import Synthesis
from phosphene.roles import Guide, Seed, Texture
from phosphene.spec import Cost, PixelRange

from ._guidance import guidance_maps, guided_size
from ._texture_samples import Periodic, Size, sampled_texture

#: Absolute tolerance of the mean errors: rounding gives equal blocks different errors.
ROUNDING_ERROR = 1e-10


def block_starts(length: int, block: int, overlap: int, periodic: bool) -> list[int]:
    """Starts of the fewest blocks that cover a side of the output with at least ``overlap`` between them.

    They are evenly spaced. A periodic output is a circle, whose last block overlaps the first.
    """
    if periodic:
        count = math.ceil(length / (block - overlap))
        return [n * length // count for n in range(count)]
    count = 1 + math.ceil((length - block) / (block - overlap))
    return [n * (length - block) // max(1, count - 1) for n in range(count)]


def minimum_error_cut(errors: Tensor) -> Tensor:
    """The column (H,) of the path of least total error from the top to the bottom of errors (H, W).

    E_ij = e_ij + min(E_i-1,j-1, E_i-1,j, E_i-1,j+1): neighboring rows differ by at most one column.
    """
    totals = errors.cpu().clone()
    for row in range(1, len(totals)):
        neighbors = F.pad(totals[row - 1], (1, 1), value=math.inf).unfold(0, 3, 1)
        totals[row] += neighbors.amin(1)
    columns = [int(totals[-1].argmin())]
    for row in reversed(range(len(totals) - 1)):
        left = max(0, columns[-1] - 1)
        columns.append(left + int(totals[row, left : columns[-1] + 2].argmin()))
    return torch.tensor(columns[::-1])


def cut_mask(errors: Tensor, filled: Tensor) -> Tensor:
    """The pixels (b, b) that a new block replaces, by cuts through its overlaps with filled pixels (b, b).

    An overlap is a band of filled pixels along one side of the block; its cut runs through the squared
    differences ``errors`` (b, b) of the two contents.
    """
    mask = torch.ones_like(filled)
    for turns in range(4):  # left, top, right and bottom: each turned to the left
        turned, turned_filled = (t.rot90(turns) for t in (errors, filled))
        width = int(turned_filled.all(0).long().cumprod(0).sum())
        if 0 < width < len(filled):
            cut = minimum_error_cut(turned[:, :width]).to(filled.device)
            side = torch.arange(len(filled), device=filled.device) >= cut[:, None]
            mask &= side.rot90(-turns)
    return mask


class SampleBlocks:
    """All blocks inside a sample (C, H, W), compared with others by the Fourier transform."""

    def __init__(self, sample: Tensor, block: int) -> None:
        self.block, self.size = block, sample.shape[1:]
        # The last row is the sum of squares: (t - s)^2 = t^2 - 2 t s + s^2.
        self.spectrum = torch.fft.rfft2(torch.cat([-2 * sample, sample.square().sum(0, keepdim=True)]))

    def mean_errors(self, template: Tensor, weights: Tensor) -> Tensor:
        """The mean of (t - s)^2 over the weighted pixels (b, b) of t (C, b, b), for all blocks s: (h, w)."""
        kernels = torch.cat([weights * template, weights[None].to(template)])
        # Correlations wrap around only beyond the last block.
        correlation = self.spectrum * torch.fft.rfft2(kernels, s=self.size).conj()
        height, width = (side - self.block + 1 for side in self.size)
        total = torch.fft.irfft2(correlation.sum(0), s=self.size)[:height, :width]
        return (total + (weights * template.square()).sum()) / (len(template) * weights.sum())


def quilt(
    sample: Tensor,
    sample_map: Tensor,
    output_map: Tensor,
    *,
    block: int,
    overlap: int,
    error_threshold: float,
    guide_weight: float,
    periodic: bool,
    generator: Generator,
) -> Iterator[Tensor]:
    """Fill an output of the size of its map (G, H', W') with blocks of a sample (C, H, W), in raster order.

    ``sample_map`` (G, H, W) are the sample's guidance maps. Yields the output (C, H', W') after each block.
    """
    height, width = output_map.shape[1:]
    image = sample.new_zeros(len(sample), height, width)
    filled = torch.zeros(height, width, dtype=torch.bool, device=sample.device)
    span = torch.arange(block, device=sample.device)
    blocks, map_blocks = SampleBlocks(sample, block), SampleBlocks(sample_map, block)
    for top in block_starts(height, block, overlap, periodic):
        for left in block_starts(width, block, overlap, periodic):
            rows, columns = ((top + span) % height)[:, None], (left + span) % width
            old, is_old = image[:, rows, columns], filled[rows, columns]
            errors = sample.new_zeros(sample.shape[1] - block + 1, sample.shape[2] - block + 1)
            if is_old.any():
                errors += (1 - guide_weight) * blocks.mean_errors(old, is_old)
            if len(sample_map):
                guide = output_map[:, rows, columns]
                errors += guide_weight * map_blocks.mean_errors(guide, torch.ones_like(is_old))
            smallest = errors.min().clamp(min=0)
            candidates = (errors <= smallest * (1 + error_threshold) + ROUNDING_ERROR).nonzero()
            drawn = int(torch.rand((), dtype=torch.float64, generator=generator) * len(candidates))
            y, x = candidates[drawn].tolist()
            new = sample[:, y : y + block, x : x + block]
            mask = cut_mask((new - old).square().sum(0), is_old)
            image[:, rows, columns] = torch.where(mask, new, old)
            filled[rows, columns] = True
            yield image


def cuts_minimize_the_error() -> None:
    """The path of least error of all paths; blocks at both ends of a side, and around a circle."""
    errors = torch.rand(5, 4, dtype=torch.float64, generator=Generator().manual_seed(3))
    paths = [[column] for column in range(4)]
    for _ in range(4):
        paths = [[*p, p[-1] + step] for p in paths for step in (-1, 0, 1) if 0 <= p[-1] + step < 4]
    best = min(paths, key=lambda path: float(sum(errors[row, column] for row, column in enumerate(path))))
    assert minimum_error_cut(errors).tolist() == best
    assert block_starts(8, 8, 2, periodic=False) == [0] and block_starts(8, 8, 2, periodic=True) == [0, 4]
    assert block_starts(20, 8, 2, periodic=False) == [0, 6, 12]
    assert block_starts(21, 8, 2, periodic=False) == [0, 4, 8, 13]
    assert block_starts(19, 8, 2, periodic=True) == [0, 4, 9, 14]


def guidance_maps_by_hand() -> None:
    """The output's size; a guide without contrast; a sample guide for two samples; guides that do not fit."""
    sample, guide = (
        torch.rand(2, 3, 4, 5, generator=Generator().manual_seed(0)).double(),
        torch.ones(1, 3, 6, 7),
    )
    sizes = [guided_size(sample, g, size) for g in (None, guide) for size in (None, 9, (8, 3))]
    assert sizes == [(4, 5), (9, 9), (8, 3), (6, 7), (9, 9), (8, 3)]
    sample_map, output_map = guidance_maps(sample, None, guide, 6, 7)
    luminance = 0.299 * sample[:, :1] + 0.587 * sample[:, 1:2] + 0.114 * sample[:, 2:]
    torch.testing.assert_close(sample_map, luminance)
    # A guide without contrast has the mean of the sample.
    mean = luminance.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(output_map, mean.expand(-1, -1, 6, 7), rtol=0, atol=1e-6)
    own = torch.rand(1, 3, 4, 5, generator=Generator().manual_seed(1))
    for shared, own_guide in zip(guidance_maps(sample, own, guide, 6, 7), (own, guide), strict=True):
        assert torch.equal(shared, own_guide.double().expand(2, -1, -1, -1))
    gray, _ = guidance_maps(sample[:, :2], None, guide[:, :2], 6, 7)
    torch.testing.assert_close(gray, sample[:, :2].mean(1, keepdim=True))
    for sample_guide, output_guide, message in (
        (own, None, "it needs a guide"),
        (None, guide.expand(3, -1, -1, -1), "guide must be one map, or one for each of 2 samples, not 3"),
        (
            own.expand(3, -1, -1, -1),
            guide,
            "sample_guide must be one map, or one for each of 2 samples, not 3",
        ),
        (own[:, :2], guide, "(3, 4, 5), not (2, 4, 5)"),
        (own[:, :, :3], guide, "(3, 4, 5), not (3, 3, 5)"),
        (own[..., :3], guide, "(3, 4, 5), not (3, 4, 3)"),
    ):
        refusal = ""
        try:
            guidance_maps(sample, sample_guide, output_guide, 6, 7)
        except InputError as error:
            refusal = str(error)
        assert message in refusal, refusal


def textbook_loops_copy_the_same_pixels() -> None:
    """Equal to loops over blocks and pixels, with guidance and periodic; a periodic texture is continued."""
    tested: Any = image_quilting  # its result has every field here
    cuts_minimize_the_error()
    guidance_maps_by_hand()
    from . import _textbook_textures

    noise = torch.rand(2, 2, 9, 10, dtype=torch.float64, generator=Generator().manual_seed(0))
    guide = torch.rand(1, 3, 8, 13, dtype=torch.float64, generator=Generator().manual_seed(1))
    sample_guide = torch.rand(2, 3, 9, 10, dtype=torch.float64, generator=Generator().manual_seed(2))
    cases: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({}, {"size": (11, 13), "block": 5, "overlap": 2}),
        ({}, {"size": (11, 9), "block": 5, "periodic": True, "error_threshold": 0.7}),
        ({"guide": guide, "sample_guide": sample_guide}, {"block": 4, "overlap": 1, "guide_weight": 0.3}),
        ({"guide": guide}, {"size": 10, "block": 4, "overlap": 2, "periodic": True}),
    )
    for guides, options in cases:
        result = tested(noise, seed=1, **guides, **options)
        assert torch.equal(result.sources, noise) and result.scores.shape == (0, 2)
        for n, image in enumerate(result.images):
            expected = _textbook_textures.image_quilting(
                noise[n], *image.shape[1:], guide=guides.get("guide"), seed=1,
                sample_guide=sample_guide[n] if "sample_guide" in guides else None,
                **{name: value for name, value in options.items() if name != "size"},
            )  # fmt: skip
            assert torch.equal(image, expected), f"{options}: pixels differ from the textbook's"
    y, x = torch.arange(24)[:, None], torch.arange(25)
    tile = torch.rand(1, 3, 4, 5, generator=Generator().manual_seed(0), dtype=torch.float64)
    texture = tile[:, :, y % 4, x % 5]
    for periodic in (False, True):
        result = tested(texture[:, :, 1:14, 2:16], size=(24, 25), block=9, periodic=periodic, seed=0)
        shifts = [texture.roll((-down, -across), (2, 3)) for down in range(4) for across in range(5)]
        assert any(torch.equal(result.images, shift) for shift in shifts), "the pattern is not continued"


@method(
    family="textures",
    references=[
        Reference(
            key="efros2001",
            title="Image Quilting for Texture Synthesis and Transfer",
            authors="Efros, Freeman",
            year=2001,
            url="https://doi.org/10.1145/383259.383296",
        )
    ],
    invariants=[PixelRange()],
    cost=Cost(),  # no model
    oracle=textbook_loops_copy_the_same_pixels,
    quick={"size": 20, "block": 8},
    demo={"sample": ["builtin:pebbles"], "size": 192, "block": 36},
    exempt={"parameters_matter": "guide_weight matters only with a guide"},
)
def image_quilting(
    sample: Texture,
    guide: Guide = None,
    sample_guide: Guide = None,
    *,
    size: Size = None,
    block: Annotated[int, Field(ge=3, le=512, description="side of the square blocks, in pixels")] = 24,
    overlap: Annotated[
        int | None,
        Field(ge=1, le=256, description="smallest overlap of neighboring blocks; default: block // 6"),
    ] = None,
    error_threshold: Annotated[
        float, Field(ge=0, le=10, description="relative excess over the smallest error that a block may have")
    ] = 0.1,
    guide_weight: Annotated[
        float, Field(ge=0, le=1, description="weight of the guidance error; 1 - guide_weight: of the overlap")
    ] = 0.5,
    periodic: Periodic = False,
    seed: Seed = None,
) -> Synthesis:
    """Image quilting (Efros-Freeman): textures from overlapping blocks joined along minimum-error cuts.

    B drawn from { B : d(B) <= (1 + error_threshold) min d }

    d(B) = (1 - guide_weight) mean_overlap (B - I)^2 + guide_weight mean (g_B - g)^2

    Blocks are added in raster order. In each overlap, the new block replaces the old content beyond the path
    of least squared difference, E_ij = e_ij + min(E_i-1,j-1, E_i-1,j, E_i-1,j+1).

    A ``guide`` (texture transfer, non-stationary textures) prescribes where in the output which part of the
    sample appears. With a ``sample_guide`` of the sample's size, g_B is that map in the block, and g the
    guide's. Without one both are luminances, and the guide's is given the sample's mean and standard
    deviation: an image is redrawn in the texture. Without a guide the guidance error is 0. ``periodic``
    outputs continue at their opposite edges, so they can be tiled.

    Samples are (N, C, H, W) with any number of channels; guides are one for all samples or one each.

    Returns:
        ``images`` (N, C, H', W') of that ``size``, by default the guide's or else the sample's, each pixel a
        pixel of its sample; ``sources`` (N, C, H, W) the samples; ``scores`` (0, N), as there are no
        optimization steps.

    Raises:
        InputError: a block that does not fit into sample and output, an overlap that is not smaller than the
            block, or guides that do not fit.

    Example::
        from phosphene import run

        result = run("image_quilting", sample="builtin:bricks", size=40, block=16, seed=0)
        result.images.shape  # (1, 3, 40, 40)

    Source: Efros and Freeman 2001, sections 2 and 3.
    """
    height, width = guided_size(sample, guide, size)
    overlap = max(1, block // 6) if overlap is None else overlap
    largest = min(height, width, *sample.shape[2:])
    if block > largest or overlap >= block:
        raise InputError(
            f"blocks must fit into the sample and the output, at most {largest} pixels a side, and be larger "
            f"than their overlap, not {block} with an overlap of {overlap}"
        )
    device = float64_device(sample.device)
    maps = guidance_maps(sample.to(device).double(), sample_guide, guide, height, width)
    counts = [len(block_starts(side, block, overlap, periodic)) for side in (height, width)]
    images = []
    for single, sample_map, output_map in zip(sample, *maps, strict=True):
        blocks = quilt(
            single.to(device).double(),
            sample_map,
            output_map,
            block=block,
            overlap=overlap,
            error_threshold=error_threshold,
            guide_weight=guide_weight,
            periodic=periodic,
            generator=Generator().manual_seed(seed or 0),
        )
        *_, image = progress_bar(blocks, "Quilting", math.prod(counts))
        images.append(image.to(sample))
    return sampled_texture(sample, images)


@hookimpl
def phosphene_methods():
    return [image_quilting]
