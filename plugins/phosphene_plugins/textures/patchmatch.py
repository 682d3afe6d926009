"""PatchMatch texture synthesis: patches matched by a randomized search and averaged, coarse to fine."""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Reference, at_least_float32, hookimpl, method, progress_bar
from phosphene.images import gaussian_blur
from phosphene.results import Synthesis
from phosphene.roles import Guide, Seed, Texture
from phosphene.spec import Cost, PixelRange

from ._guidance import guidance_maps, guided_size
from ._texture_samples import Periodic, Size, Window, check_window, sampled_texture

#: Distances over which matches are propagated, in this order.
JUMPS = (8, 4, 2, 1)


class Patches(NamedTuple):
    """The patches (w x w) of an image (C, H, W) as rows (h w, D), and the size (h, w) of their grid."""

    rows: Tensor
    grid: tuple[int, int]


def extract_patches(image: Tensor, window: int, *, periodic: bool = False) -> Patches:
    """All patches inside an image, or, of a periodic image, one from each pixel on, around the edges."""
    if periodic:
        down, across = (torch.arange(side + window - 1) % side for side in image.shape[1:])
        image = image[:, down.to(image.device)][:, :, across.to(image.device)]
    grid = image.shape[1] - window + 1, image.shape[2] - window + 1
    return Patches(F.unfold(image[None], window)[0].T.contiguous(), grid)


def search(field: Tensor, queries: Patches, patches: Patches, generator: Generator) -> Tensor:
    """Improve a nearest-neighbor field (h, w, 2): the position (y, x) of the match of each query patch.

    Propagation tries the matches of neighbors, moved along, at several distances; random search tries
    patches around the match, in squares that are halved until they are one pixel wide. A candidate replaces
    a match where its squared distance is smaller.
    """
    height, width = patches.grid

    def errors(field: Tensor) -> Tensor:
        index = (field[..., 0] * width + field[..., 1]).flatten()
        return (queries.rows - patches.rows[index]).square().sum(1).view(queries.grid)

    best = errors(field)

    def offer(candidates: Tensor) -> None:
        nonlocal field, best
        candidates = clamp_positions(candidates, patches.grid)
        offered = errors(candidates)
        better = offered < best
        field, best = torch.where(better[..., None], candidates, field), torch.where(better, offered, best)

    for jump in JUMPS:
        for step in ((0, jump), (jump, 0), (0, -jump), (-jump, 0)):
            offer(field.roll(step, (0, 1)) + torch.tensor(step, device=field.device))
    radius = max(height, width)
    while radius >= 1:
        drawn = torch.rand(field.shape, dtype=torch.float64, generator=generator)
        offer(field + ((2 * drawn - 1) * radius).round().long().to(field.device))
        radius //= 2
    return field


def clamp_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (..., 2) moved into a grid."""
    return torch.stack([positions[..., axis].clamp(0, grid[axis] - 1) for axis in (0, 1)], -1)


def vote(
    coherent: Tensor,
    complete: Tensor,
    sample: Tensor,
    size: tuple[int, int],
    window: int,
    completeness: float,
) -> Tensor:
    """The output (C, H', W') whose patches agree best with their matches in a sample (C, H, W).

    Each pixel is a weighted mean. The match of every output patch votes with the weight 1 / |T| for its
    pixels; every patch of the sample votes with completeness / |S| for the pixels of its match. Votes around
    the edges are for periodic outputs.
    """
    (height, width), channels = size, len(sample)
    total, weights = sample.new_zeros(channels, height * width), sample.new_zeros(height * width)

    def add(at: Tensor, source: Tensor, weight: float) -> None:
        """Add pixels of the sample patches at positions ``source`` to the output patches ``at``, (..., 2)."""
        for down in range(window):
            for across in range(window):
                index = ((at[..., 0] + down) % height * width + (at[..., 1] + across) % width).flatten()
                values = sample[:, source[..., 0] + down, source[..., 1] + across].flatten(1)
                total.index_add_(1, index, weight * values)
                weights.index_add_(0, index, torch.full_like(values[0], weight))

    # equivalent mutants: there is one number for each position in both
    add(positions(coherent.shape[:2], sample), coherent, 1 / coherent[..., 0].numel())
    if completeness:
        # equivalent mutants: there is one number for each position in both
        add(complete, positions(complete.shape[:2], sample), completeness / complete[..., 0].numel())
    return (total / weights).view(channels, height, width)


def positions(grid: tuple[int, ...], like: Tensor) -> Tensor:
    """The positions (h, w, 2) of a grid."""
    return torch.stack(torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"), -1).to(
        like.device
    )


def grid_of(size: tuple[int, int], window: int, periodic: bool) -> tuple[int, int]:
    """The size of the grid of patches of an image."""
    height, width = size
    return size if periodic else (height - window + 1, width - window + 1)


def initial_field(
    grid: tuple[int, int], matched_grid: tuple[int, int], window: int, like: Tensor, generator: Generator
) -> Tensor:
    """A field (h, w, 2) of random matches that are moved along with the position inside squares."""
    squares = [-(-side // window) for side in grid]
    drawn = torch.rand(*squares, 2, dtype=torch.float64, generator=generator)
    matches = (drawn * torch.tensor(matched_grid)).long().to(like.device)
    y, x = (at := positions(grid, like)).unbind(-1)
    return clamp_positions(matches[y // window, x // window] + at % window, matched_grid)


def refined_field(field: Tensor, grid: tuple[int, int], matched_grid: tuple[int, int]) -> Tensor:
    """The field of the next coarser level, at twice the resolution."""
    at = positions(grid, field)
    y, x = clamp_positions(at // 2, (field.shape[0], field.shape[1])).unbind(-1)
    return clamp_positions(2 * field[y, x] + at % 2, matched_grid)


def synthesize(
    sample: Tensor,
    sample_map: Tensor,
    output_map: Tensor,
    *,
    window: int,
    levels: int,
    steps: int,
    completeness: float,
    guide_weight: float,
    periodic: bool,
    generator: Generator,
) -> Iterator[Tensor]:
    """Synthesize coarse to fine an output of the size of its map (G, H', W'); yields it after each step."""
    has_guide = len(sample_map) > 0
    pixel_scale = ((1 - guide_weight if has_guide else 1) / len(sample)) ** 0.5
    map_scale = (guide_weight / max(1, len(sample_map))) ** 0.5

    def patches(image: Tensor, guidance: Tensor, periodic: bool) -> Patches:
        return extract_patches(
            torch.cat([pixel_scale * image, map_scale * guidance]), window, periodic=periodic
        )

    pyramids = [gaussian_pyramid(t, levels) for t in (sample, sample_map, output_map)]
    coherent = complete = None
    for scaled, scaled_map, scaled_output_map in reversed(list(zip(*pyramids, strict=True))):
        height, width = scaled_output_map.shape[1:]
        grid = grid_of((height, width), window, periodic)
        source = patches(scaled, scaled_map, False)
        if coherent is None or complete is None:
            coherent = initial_field(grid, source.grid, window, scaled, generator)
            complete = initial_field(source.grid, grid, window, scaled, generator)
            image = vote(coherent, complete, scaled, (height, width), window, 0.0)
        else:
            coherent = refined_field(coherent, grid, source.grid)
            complete = refined_field(complete, source.grid, grid)
            image = vote(coherent, complete, scaled, (height, width), window, completeness)
        for _ in range(steps):
            output = patches(image, scaled_output_map, periodic)
            coherent = search(coherent, output, source, generator)
            if completeness:
                complete = search(complete, source, output, generator)
            image = vote(coherent, complete, scaled, (height, width), window, completeness)
            yield image


def gaussian_pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """An image (C, H, W), and blurred and halved again and again, finest first."""
    scales = [image]
    for _ in range(levels - 1):
        scales.append(gaussian_blur(scales[-1][None], 1.0)[0, :, ::2, ::2])
    return scales


def searches_find_the_nearest_patches() -> None:
    """After some searches the field of exhaustive search; of the sample itself the identity."""
    image, sample = torch.rand(2, 3, 8, 9, dtype=torch.float64, generator=Generator().manual_seed(2))
    generator = Generator().manual_seed(0)
    queries, patches = extract_patches(image, 5), extract_patches(sample, 5)
    distances = torch.cdist(queries.rows, patches.rows, compute_mode="donot_use_mm_for_euclid_dist")
    field = initial_field(queries.grid, patches.grid, 5, sample, generator)
    previous = float("inf")
    for _ in range(200):
        index = (field[..., 0] * patches.grid[1] + field[..., 1]).flatten()
        total = float(distances.gather(1, index[:, None]).square().sum())
        assert total <= previous, "a search increases an error"
        field, previous = search(field, queries, patches, generator), total
    index = (field[..., 0] * patches.grid[1] + field[..., 1]).flatten()
    assert torch.equal(index, distances.argmin(1)), "matches are not the nearest patches"
    identity = positions(patches.grid, sample)
    assert torch.equal(search(identity, patches, patches, generator), identity)
    voted = vote(identity, identity, sample, (8, 9), 5, 0.7)
    assert (voted - sample).abs().max() < 1e-12, "the identity does not return the sample"


def textbook_loops_average_the_same_patches() -> None:
    """Equal to loops over patches and pixels, with guidance and periodic."""
    tested: Any = patchmatch  # its result has every field here
    searches_find_the_nearest_patches()
    from . import _textbook_textures

    noise = torch.rand(2, 2, 12, 13, dtype=torch.float64, generator=Generator().manual_seed(0))
    guide = torch.rand(1, 3, 9, 11, dtype=torch.float64, generator=Generator().manual_seed(1))
    sample_guide = torch.rand(2, 3, 8, 9, dtype=torch.float64, generator=Generator().manual_seed(2))
    small = noise[:, :, :8, :9]
    cases: tuple[tuple[Tensor, dict[str, Any], dict[str, Any], int], ...] = (
        (small, {}, {"size": (9, 10), "window": 5, "levels": 3, "steps": 2}, 1),
        (small, {}, {"size": (10, 8), "levels": 1, "steps": 1, "completeness": 0.0}, 1),
        (small, {"guide": guide, "sample_guide": sample_guide}, {"guide_weight": 0.3, "steps": 1}, 1),
        (small[:, :, :, :8], {"guide": guide}, {"size": 8, "window": 5, "steps": 1}, 1),
        (noise[:1], {}, {"size": (12, 14), "periodic": True, "completeness": 0.6, "steps": 1}, 2),
    )
    for sample, guides, options, levels in cases:
        result = tested(sample, seed=1, **guides, **({"window": 3} | options))
        assert torch.equal(result.sources, sample) and result.scores.shape == (0, len(sample))
        for n, image in enumerate(result.images):
            expected = _textbook_textures.patchmatch(
                sample[n], *image.shape[1:], guide=guides.get("guide"), seed=1,
                sample_guide=sample_guide[n] if "sample_guide" in guides else None,
                **{"window": 3} | {name: value for name, value in options.items() if name != "size"}
                | {"levels": levels},
            )  # fmt: skip
            assert (image - expected).abs().max() < 1e-9, f"{options}: pixels differ from the textbook's"


@method(
    family="textures",
    title="PatchMatch",
    references=[
        Reference(
            key="barnes2009",
            title="PatchMatch: A Randomized Correspondence Algorithm for Structural Image Editing",
            authors="Barnes, Shechtman, Finkelstein, Goldman",
            year=2009,
            url="https://doi.org/10.1145/1531326.1531330",
        ),
        Reference(
            key="simakov2008",
            title="Summarizing Visual Data Using Bidirectional Similarity",
            authors="Simakov, Caspi, Shechtman, Irani",
            year=2008,
            url="https://doi.org/10.1109/CVPR.2008.4587842",
        ),
    ],
    invariants=[PixelRange()],
    cost=Cost(),  # no model
    oracle=textbook_loops_average_the_same_patches,
    quick={"size": 20, "window": 3, "steps": 2},
    exempt={"parameters_matter": "guide_weight matters only with a guide"},
    demo={"sample": ["builtin:pebbles"], "size": 160},
)
def patchmatch(
    sample: Texture,
    guide: Guide = None,
    sample_guide: Guide = None,
    *,
    size: Size = None,
    window: Window = 7,
    levels: Annotated[
        int, Field(ge=1, le=10, description="largest number of levels of the Gaussian pyramid")
    ] = 5,
    steps: Annotated[int, Field(ge=1, le=1000, description="number of searches and votes at each level")] = 6,
    completeness: Annotated[
        float,
        Field(ge=0, le=100, description="weight of the term that every part of the sample appears somewhere"),
    ] = 1.0,
    guide_weight: Annotated[
        float,
        Field(ge=0, le=1, description="weight of guidance maps in distances; 1 - guide_weight: of pixels"),
    ] = 0.5,
    periodic: Periodic = False,
    seed: Seed = None,
) -> Synthesis:
    """PatchMatch texture synthesis: an output whose patches resemble the sample's, and the reverse.

    d(S, T) = 1/|T| sum_t min_s D(s, t) + completeness 1/|S| sum_s min_t D(s, t)

    with s and t the patches of sample and output, and D their mean squared difference. Two steps alternate,
    coarse to fine. PatchMatch improves the fields of nearest neighbors: good matches are propagated to
    neighboring patches, and random patches around each match are tried at all distances. Then each pixel of
    the output becomes the weighted mean of what the patches that cover it vote for. Without
    ``completeness`` the output may repeat the smoothest part of the sample.

    Propagation runs for all patches at once, over 8, 4, 2 and 1 pixels. The coarsest output begins as random
    squares of the sample. Levels at which sample or output would be less than two windows wide are left out.

    A ``guide`` (texture transfer, non-stationary textures) prescribes where in the output which part of the
    sample appears: D = (1 - guide_weight) mean (s - t)^2 + guide_weight mean (g_s - g_t)^2. With a
    ``sample_guide`` of the sample's size, g_s is that map, and g_t the guide's. Without one both are
    luminances, and the guide's is given the sample's mean and standard deviation. ``periodic`` outputs
    continue at their opposite edges, so they can be tiled.

    Samples are (N, C, H, W) with any number of channels; guides are one for all samples or one each.

    Returns:
        ``images`` (N, C, H', W') of that ``size``, by default the guide's or else the sample's; ``sources``
        (N, C, H, W) the samples; ``scores`` (0, N), as the distance is not computed.

    Raises:
        InputError: a window that is even or does not fit into sample and output, or guides that do not fit.

    Example::
        from phosphene import run

        result = run("patchmatch", sample="builtin:bricks", size=40, steps=2, seed=0)
        result.images.shape  # (1, 3, 40, 40)

    Source: Barnes et al. 2009, sections 3 and 4; Simakov et al. 2008, sections 2 and 3 (bidirectional
    similarity).
    """
    height, width = guided_size(sample, guide, size)
    check_window(sample, window)
    check_window(sample.new_zeros(()).expand(*sample.shape[:2], height, width), window)
    levels = 1 + sum(
        min(height, width, *sample.shape[2:]) >= 2 * window * 2**level for level in range(1, levels)
    )
    pixels = at_least_float32(sample)
    images = []
    for single, *maps in zip(pixels, *guidance_maps(pixels, sample_guide, guide, height, width), strict=True):
        steps_done = synthesize(
            single,
            *maps,
            window=window,
            levels=levels,
            steps=steps,
            completeness=completeness,
            guide_weight=guide_weight,
            periodic=periodic,
            generator=Generator().manual_seed(seed or 0),
        )
        *_, image = progress_bar(steps_done, "Synthesizing", levels * steps)
        images.append(image.clamp(0, 1).to(sample))
    return sampled_texture(sample, images)


@hookimpl
def phosphene_methods():
    return [patchmatch]
