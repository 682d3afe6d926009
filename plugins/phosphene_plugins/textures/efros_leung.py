"""Efros-Leung: a texture grown pixel by pixel, each copied from where the sample looks most alike."""

from collections import deque
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from phosphene import InputError, Reference, hookimpl, method, progress_bar
from phosphene.results import Synthesis
from phosphene.roles import Seed, Texture
from phosphene.spec import Cost, PixelRange

from ._texture_samples import Size, Window, check_window, copied, output_size

#: Errors below this are rounding: the windows are alike.
ALIKE = 1e-12
#: The most errors that are held at once: 128 MiB.
AT_ONCE = 1 << 24


class Windows:
    """All whole windows of a sample (C, H, W): N of them, each known by the pixel in its middle."""

    def __init__(self, sample: Tensor, window: int, threshold: float) -> None:
        self.threshold = threshold
        channels, radius = len(sample), window // 2
        offsets = torch.arange(-radius, radius + 1, device=sample.device).double()
        bell = torch.exp(-0.5 * (offsets / (window / 6.4)) ** 2)
        self.gauss = torch.outer(bell, bell).flatten()
        patches = F.unfold(sample[None].double(), window)[0]
        squares = patches.unflatten(0, (channels, -1)).square().sum(0)
        self.table = torch.cat([squares, -2 * patches]) / channels
        self.middles = F.unfold(sample[None, :, radius:-radius, radius:-radius], 1)[0]

    def find(self, templates: Tensor, valid: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """For templates (B, C, w^2), known where ``valid`` (B, w^2), a window each and its error, (B,).

        d(p, s) = sum G m (p - s)^2 / (C sum G m), for all windows by one matrix product; of those within
        (1 + threshold) of the least d, in the order of the sample, ``draws`` (B,) in [0, 1) picks one.
        """
        weights = self.gauss * valid
        weights /= weights.sum(1, keepdim=True)
        weighted = weights[:, None] * templates
        errors = torch.cat([weights, weighted.flatten(1)], 1) @ self.table
        errors += (weighted * templates).sum((1, 2))[:, None] / templates.shape[1]
        most = errors.amin(1, keepdim=True).clamp(min=0) * (1 + self.threshold) + ALIKE
        row, window = (errors <= most).nonzero(as_tuple=True)
        matches = row.bincount(minlength=len(templates))
        picked = window[matches.cumsum(0) - matches + (draws * matches).long()]
        return picked, errors.gather(1, picked[:, None])[:, 0]


def plant(
    sample: Tensor, height: int, width: int, *, whole: bool, generator: Generator
) -> tuple[Tensor, Tensor]:
    """An image with the sample (C, H, W), or 3 x 3 pixels of it, in the middle, and where it is known."""
    if not whole:
        top, left = (int(torch.randint(side - 2, (), generator=generator)) for side in sample.shape[1:])
        sample = sample[:, top : top + 3, left : left + 3]
    down, across = height - sample.shape[1], width - sample.shape[2]
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(sample, margins), F.pad(torch.ones_like(sample[0], dtype=torch.bool), margins)


def frontier(known: Tensor, generator: Generator) -> Tensor:
    """The pixels (R, 2) beside known ones (H, W), those with most known neighbours first, else shuffled."""
    neighbors = F.avg_pool2d(known[None].double(), 3, 1, 1)[0] * ~known
    pixels = neighbors.nonzero()
    pixels = pixels[torch.randperm(len(pixels), generator=generator).to(known.device)]
    return pixels[neighbors[pixels[:, 0], pixels[:, 1]].argsort(descending=True, stable=True)]


def waves(pixels: Tensor, known: Tensor, window: int) -> tuple[Tensor, ...]:
    """One after the other, but all at once that do not see each other: the same pixels, sooner.

    Places in the list of pixels (R, 2), in waves: a pixel waits for the earlier ones in its window.
    """
    turn, radius = np.zeros([side + window - 1 for side in known.shape], int), window // 2
    for y, x in pixels.tolist():
        turn[y + radius, x + radius] = turn[y : y + window, x : x + window].max() + 1
    turns = torch.from_numpy(turn).to(pixels.device)[pixels[:, 0] + radius, pixels[:, 1] + radius]
    return turns.argsort(stable=True).split(turns.bincount()[1:].tolist())


def grow(
    windows: Windows, image: Tensor, known: Tensor, order: str, max_error: float, generator: Generator
) -> Iterator[Tensor]:
    """Fill what is not known (H, W) of an image (C, H, W); gives the image so far after every pixel."""
    window = round(len(windows.gauss) ** 0.5)
    radius, span = window // 2, torch.arange(window, device=image.device)
    canvas, seen = F.pad(image, [radius] * 4), F.pad(known, [radius] * 4)
    image, known = (padded[..., radius:-radius, radius:-radius] for padded in (canvas, seen))
    at_once = max(1, AT_ONCE // windows.table.shape[1])
    while not known.all():
        pixels, grown = frontier(known, generator), False
        draws = torch.rand(len(pixels), dtype=torch.float64, generator=generator).to(image.device)
        turns = waves(pixels, known, window) if order == "exact" else (torch.arange(len(pixels)),)
        for batch in (part for turn in turns for part in turn.split(at_once)):
            y, x = pixels[batch].T
            rows, columns = (y[:, None] + span)[:, :, None], (x[:, None] + span)[:, None]
            templates = canvas[:, rows, columns].movedim(0, 1).flatten(2).double()
            found, errors = windows.find(templates, seen[rows, columns].flatten(1), draws[batch])
            good = errors < max_error
            y, x = y[good], x[good]
            image[:, y, x] = windows.middles[:, found[good]]
            known[y, x] = True
            for _ in range(len(y)):
                grown = True
                yield image
        if not grown:
            max_error *= 1.1


def stripes_go_on() -> None:
    """A periodic texture has one exact match everywhere, so it continues exactly, whatever is drawn."""
    y, x = torch.arange(24)[:, None], torch.arange(28)
    tile = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = tile[:, :, y % 4, x % 5]
    for order in ("exact", "ring"):
        made = efros_leung(whole[:, :, 5:17, 6:19], size=(24, 28), window=9, start="sample", order=order)
        shifted = whole[:, :, (y + 5 - 6) % 4, (x + 6 - 7) % 5]
        assert torch.equal(made.images, shifted), f"{order}: the pattern does not go on"


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
    oracle=stripes_go_on,
    quick={"size": 20, "window": 5, "order": "ring"},
    demo={"sample": ["builtin:pebbles"], "window": 13, "size": 80},
)
def efros_leung(
    sample: Texture,
    *,
    size: Size = None,
    window: Window = 11,
    order: Annotated[
        Literal["exact", "ring"], Field(description="pixel after pixel, or a whole ring of them at once")
    ] = "exact",
    start: Annotated[
        Literal["patch", "sample"], Field(description="grow from 3 x 3 pixels, or go on with the sample")
    ] = "patch",
    error_threshold: Annotated[float, Field(ge=0, le=10, description="share above the least error")] = 0.1,
    max_error: Annotated[float, Field(ge=0.01, le=1, description="a match has less; grows if none")] = 0.3,
    seed: Seed = None,
) -> Synthesis:
    """Grow a texture outwards, each pixel copied from a place in the sample that looks like its surroundings.

    p = middle(s),  s drawn from { s : d(s) <= (1 + error_threshold) min d },
    d(s) = sum G m (I - s)^2 / (C sum G m)

    with s the whole windows of the sample, m the pixels of the window around p that are known, and G a
    Gaussian of sigma = window / 6.4. The ring of pixels beside known ones is filled in the order of how many
    of their eight neighbours are known, ties shuffled; a match of an error above ``max_error`` is left for
    later, and ``max_error`` grows by a tenth where all are. ``order`` "ring" matches all pixels of a
    ring before it fills any: sooner, and rougher.

    ``start`` "patch": from a random 3 x 3 patch of the sample in the middle; "sample": from the
    whole sample there. Gives images (N, C, H, W) of any ``size`` for N samples of C channels, each pixel a
    pixel of its sample; there are no steps, so ``scores`` is (0, N). Raises InputError for a window
    that is even or larger than the sample. Source: Efros and Leung 1999.
    """
    height, width = output_size(sample, size)
    high, wide = sample.shape[2:]
    check_window(sample, window)
    if start == "sample" and (high > height or wide > width or (high, wide) == (height, width)):
        raise InputError(f"to go on with a sample of {high} x {wide} the size must be larger than it")
    made: list[Tensor] = []
    for one in sample:
        generator = Generator().manual_seed(seed or 0)
        image, known = plant(one, height, width, whole=start == "sample", generator=generator)
        windows = Windows(one, window, error_threshold)
        growth = grow(windows, image, known, order, max_error, generator)
        made += deque(progress_bar(growth, "Growing", int((~known).sum())), maxlen=1)
    return copied(sample, made)


@hookimpl
def phosphene_methods():
    return [efros_leung]
