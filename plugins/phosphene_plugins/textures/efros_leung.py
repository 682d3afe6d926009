"""Efros-Leung texture synthesis by non-parametric sampling: pixels copied from matching neighborhoods."""

from collections import deque
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from phosphene import InputError, Reference, float64_device, hookimpl, method, progress_bar
from phosphene.results import Synthesis
from phosphene.roles import Seed, Texture
from phosphene.spec import Cost, PixelRange

from ._texture_samples import Periodic, Size, Window, check_window, output_size, sampled_texture

#: Window side in standard deviations of the Gaussian weights, as in the authors' implementation.
WINDOW_SIGMAS = 6.4
#: Absolute tolerance of the errors: rounding gives equal windows different errors.
ROUNDING_ERROR = 1e-12
#: Largest number of errors (template by window) in memory at once: 128 MiB.
# equivalent mutants: a limit of memory changes no pixel
MAX_ERRORS = 1 << 24


class SampleWindows:
    """All N windows inside a sample (C, H, W), and the pixel at the center of each."""

    def __init__(self, sample: Tensor, window: int, error_threshold: float) -> None:
        self.error_threshold = error_threshold
        channels, radius = len(sample), window // 2
        offsets = torch.arange(-radius, radius + 1, device=sample.device).double()
        gaussian = torch.exp(-0.5 * (offsets / (window / WINDOW_SIGMAS)) ** 2)
        self.weights = torch.outer(gaussian, gaussian).flatten()
        patches = F.unfold(sample[None].double(), window)[0]
        squares = patches.unflatten(0, (channels, -1)).square().sum(0)
        # (p - s)^2 = p^2 - 2 p s + s^2: this table holds what depends on the windows s.
        self.table = torch.cat([squares, -2 * patches]) / channels
        self.centers = F.unfold(sample[None, :, radius:-radius, radius:-radius], 1)[0]

    def match(self, templates: Tensor, filled: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a window for each template (B, C, w^2), filled at ``filled`` (B, w^2): index and error, (B,).

        d(p, s) = sum G m (p - s)^2 / (C sum G m), for all windows by one matrix product; among those within
        (1 + error_threshold) of the smallest d, in the order of the sample, ``draws`` (B,) in [0, 1) picks
        one.
        """
        weights = self.weights * filled
        weights /= weights.sum(1, keepdim=True)
        weighted = weights[:, None] * templates
        errors = torch.cat([weights, weighted.flatten(1)], 1) @ self.table
        errors += (weighted * templates).sum((1, 2))[:, None] / templates.shape[1]
        smallest = errors.amin(1, keepdim=True).clamp(min=0)
        is_candidate = errors <= smallest * (1 + self.error_threshold) + ROUNDING_ERROR
        row, window = is_candidate.nonzero(as_tuple=True)
        counts = row.bincount(minlength=len(templates))
        drawn = window[counts.cumsum(0) - counts + (draws * counts).long()]
        return drawn, errors.gather(1, drawn[:, None])[:, 0]


def seed_canvas(
    sample: Tensor, height: int, width: int, *, start: str, generator: Generator
) -> tuple[Tensor, Tensor]:
    """An image with the sample (C, H, W), or a random 3 x 3 patch of it, at its center; its filled pixels."""
    if start == "patch":
        top, left = (int(torch.randint(side - 2, (), generator=generator)) for side in sample.shape[1:])
        sample = sample[:, top : top + 3, left : left + 3]
    down, across = height - sample.shape[1], width - sample.shape[2]
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(sample, margins), F.pad(torch.ones_like(sample[0], dtype=torch.bool), margins)


def boundary_pixels(filled: Tensor, generator: Generator, *, periodic: bool = False) -> Tensor:
    """Empty pixels (R, 2) next to filled ones (H, W), most filled neighbors first, ties shuffled."""
    surrounded = F.pad(filled[None].double(), [1] * 4, mode="circular" if periodic else "constant")
    neighbors = F.avg_pool2d(surrounded, 3, 1)[0] * ~filled
    pixels = neighbors.nonzero()
    pixels = pixels[torch.randperm(len(pixels), generator=generator).to(filled.device)]
    return pixels[neighbors[pixels[:, 0], pixels[:, 1]].argsort(descending=True, stable=True)]


def independent_batches(
    pixels: Tensor, filled: Tensor, window: int, *, periodic: bool = False
) -> tuple[Tensor, ...]:
    """Group pixels (R, 2) into batches, as indices, that can be filled together.

    Two pixels are in one batch only if neither lies in the other's window, and a pixel comes in a later batch
    than the earlier pixels in its window, so the result equals filling one pixel after another.
    """
    radius, span = window // 2, np.arange(window)
    margin = 0 if periodic else radius
    batch = np.zeros([side + 2 * margin for side in filled.shape], int)
    height, width = batch.shape
    for y, x in (pixels + margin).tolist():
        rows, columns = (y - radius + span) % height, (x - radius + span) % width
        batch[y, x] = batch[rows[:, None], columns].max() + 1
    batches = torch.from_numpy(batch).to(pixels.device)[pixels[:, 0] + margin, pixels[:, 1] + margin]
    # equivalent mutants: the pixels of a batch do not depend on each other
    return batches.argsort(stable=True).split(batches.bincount()[1:].tolist())


def fill(
    windows: SampleWindows,
    image: Tensor,
    filled: Tensor,
    order: str,
    max_error: float,
    periodic: bool,
    generator: Generator,
) -> Iterator[Tensor]:
    """Fill the empty pixels (H, W) of an image (C, H, W); yields the image after each pixel.

    Windows wrap around: of a periodic image at its edges, else at those of an empty margin.
    """
    window = round(len(windows.weights) ** 0.5)
    radius, span = window // 2, torch.arange(window, device=image.device)
    margin = 0 if periodic else radius
    padded_image, padded_filled = F.pad(image, [margin] * 4), F.pad(filled, [margin] * 4)
    padded_height, padded_width = padded_filled.shape
    inside = slice(margin, padded_height - margin), slice(margin, padded_width - margin)
    image, filled = (t[..., *inside] for t in (padded_image, padded_filled))
    batch_size = max(1, MAX_ERRORS // windows.table.shape[1])
    while not filled.all():
        pixels, progressed = boundary_pixels(filled, generator, periodic=periodic), False
        draws = torch.rand(len(pixels), dtype=torch.float64, generator=generator).to(image.device)
        if order == "exact":
            batches = independent_batches(pixels, filled, window, periodic=periodic)
        else:
            batches = (torch.arange(len(pixels)),)
        for indices in (part for batch in batches for part in batch.split(batch_size)):
            y, x = pixels[indices].T
            rows = ((y[:, None] + margin - radius + span) % padded_height)[:, :, None]
            columns = ((x[:, None] + margin - radius + span) % padded_width)[:, None]
            templates = padded_image[:, rows, columns].movedim(0, 1).flatten(2).double()
            matches, errors = windows.match(
                templates, padded_filled[rows, columns].flatten(1), draws[indices]
            )
            # equivalent mutants: no error equals the limit
            accepted = errors < max_error
            y, x = y[accepted], x[accepted]
            image[:, y, x] = windows.centers[:, matches[accepted]]
            filled[y, x] = True
            for _ in range(len(y)):
                progressed = True
                yield image
        if not progressed:
            max_error *= 1.1


def sizes_and_windows_are_checked() -> None:
    """The default size; even windows, windows larger than the sample, and too many of them are refused."""
    sample = torch.zeros(1, 1, 8, 9)
    sizes = [output_size(each, size) for each in (sample, sample[0]) for size in (None, 12, (5, 6))]
    assert sizes == [(8, 9), (12, 12), (5, 6)] * 2
    # 2 x 9 x 5461 x 5461 numbers are the most below 2^29.
    for height, width, window, accepted in (
        (8, 9, 7, True),
        (8, 9, 8, False),
        (7, 9, 9, False),
        (9, 7, 9, False),
        (5463, 5463, 3, True),
        (5464, 5463, 3, False),
        (5463, 5464, 3, False),
    ):
        refused = False
        try:
            check_window(torch.zeros(1, 1, 1, 1).expand(1, 1, height, width), window)
        except InputError:
            refused = True
        assert refused != accepted, f"windows of {window} in {height} x {width}"


def textbook_loops_copy_the_same_pixels() -> None:
    """Equal to loops over pixels and windows; a periodic texture is continued for all random draws."""
    tested: Any = efros_leung  # its result has every field here
    sizes_and_windows_are_checked()
    from . import _textbook_textures

    noise = torch.rand(2, 2, 8, 9, generator=Generator().manual_seed(0))
    cases: tuple[tuple[Any, Any], ...] = (
        ({"size": (10, 8), "max_error": 0.02}, {"max_error": 0.02}),
        ({"size": (8, 11), "order": "ring", "error_threshold": 0.5}, {"ring": True, "error_threshold": 0.5}),
        ({"size": (9, 12), "order": "ring", "start": "sample"}, {"ring": True, "from_sample": True}),
        ({"size": (11, 8), "periodic": True}, {"periodic": True}),
        ({"size": (8, 10), "order": "ring", "periodic": True}, {"ring": True, "periodic": True}),
    )
    for options, textbook_options in cases:
        result = tested(noise, window=5, seed=1, **options)
        assert torch.equal(result.sources, noise) and result.scores.shape == (0, 2)
        for image, sample in zip(result.images, noise, strict=True):
            steps = _textbook_textures.efros_leung(
                sample, *options["size"], window=5, seed=1, **textbook_options
            )
            (expected,) = deque(steps, maxlen=1)
            assert torch.equal(image.double(), expected), f"{options}: pixels differ from the textbook's"
    y, x = torch.arange(24)[:, None], torch.arange(28)
    tile = torch.rand(2, 3, 4, 5, generator=Generator().manual_seed(0), dtype=torch.float64)
    texture = tile[:, :, y % 4, x % 5]
    result = tested(texture[:, :, 5:17, 6:19], size=(24, 28), window=9, start="sample")
    shifted = texture[:, :, (y + 5 - 6) % 4, (x + 6 - 7) % 5]
    assert torch.equal(result.images, shifted), "the pattern is not continued"


@method(
    family="textures",
    title="Efros-Leung",
    references=[
        Reference(
            key="efros1999",
            title="Texture Synthesis by Non-parametric Sampling",
            authors="Efros, Leung",
            year=1999,
            url="https://doi.org/10.1109/ICCV.1999.790383",
        )
    ],
    invariants=[PixelRange()],
    cost=Cost(),  # no model
    oracle=textbook_loops_copy_the_same_pixels,
    quick={"size": 20, "window": 5, "order": "ring"},
    demo={"sample": ["builtin:pebbles"], "window": 13, "size": 80},
)
def efros_leung(
    sample: Texture,
    *,
    size: Size = None,
    window: Window = 11,
    order: Annotated[
        Literal["exact", "ring"],
        Field(description="whether pixels are filled one by one, or all next to filled ones at once"),
    ] = "exact",
    start: Annotated[
        Literal["patch", "sample"],
        Field(description="initial pixels: a random 3 x 3 patch of the sample, or the sample"),
    ] = "patch",
    error_threshold: Annotated[
        float, Field(ge=0, le=10, description="relative excess over the smallest error that a match may have")
    ] = 0.1,
    max_error: Annotated[
        float, Field(ge=0.01, le=1, description="error that a match stays below; increased where none does")
    ] = 0.3,
    periodic: Periodic = False,
    seed: Seed = None,
) -> Synthesis:
    """Efros-Leung texture synthesis by non-parametric sampling: textures of any size grown from a sample.

    p = center(s),  s drawn from { s : d(s) <= (1 + error_threshold) min d },
    d(s) = sum G m (I - s)^2 / (C sum G m)

    with s the windows inside the sample, m the filled pixels in the window around p, and G a Gaussian of
    sigma = window / 6.4. The empty pixels next to filled ones are filled in the order of their number of
    filled neighbors, ties shuffled. A match with an error above ``max_error`` is postponed, and
    ``max_error`` grows by a tenth where all are. ``order`` "ring" matches all pixels of a ring before
    filling any: faster, and less exact.

    Growth starts at the center, from a random 3 x 3 patch of the sample (``start`` "patch") or from the
    sample ("sample"). The windows of a ``periodic`` output wrap around at its edges. Samples are (N, C, H, W)
    with any number of channels.

    Returns:
        ``images`` (N, C, H', W') of that ``size``, each pixel a pixel of its sample; ``sources``
        (N, C, H, W) the samples; ``scores`` (0, N), as there are no optimization steps.

    Raises:
        InputError: a window that is even or larger than the sample, windows that need more than 4 GiB, or a
            size that is not larger than the sample that growth starts from.

    Example::
        from phosphene import run

        result = run("efros_leung", sample="builtin:bricks", size=16, window=7, order="ring", seed=0)
        result.images.shape  # (1, 3, 16, 16)

    Source: Efros and Leung 1999, section 2.
    """
    height, width = output_size(sample, size)
    sample_height, sample_width = sample.shape[2:]
    check_window(sample, window)
    grows = sample_height <= height and sample_width <= width and sample.shape[2:] != (height, width)
    if start == "sample" and not grows:
        raise InputError(
            f"start='sample' needs a size larger than the sample's, {sample_height} x {sample_width}"
        )
    images: list[Tensor] = []
    for single in sample.to(float64_device(sample.device)):
        generator = Generator().manual_seed(seed or 0)
        image, filled = seed_canvas(single, height, width, start=start, generator=generator)
        windows = SampleWindows(single, window, error_threshold)
        filling = fill(windows, image, filled, order, max_error, periodic, generator)
        (image,) = deque(progress_bar(filling, "Filling", int((~filled).sum())), maxlen=1)
        images.append(image.to(sample.device))
    return sampled_texture(sample, images)


@hookimpl
def phosphene_methods():
    return [efros_leung]
