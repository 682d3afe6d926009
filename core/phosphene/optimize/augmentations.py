"""Random changes of pictures that gradients pass through: what a camera, a printer or a file does to them.

Each takes images (N, C, H, W) in [0, 1] and a generator, and draws once for the whole batch, so that a
batch gives what its images give alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from ..errors import InputError, UnknownName
from ..images.blur import gaussian_blur

Transform = Callable[[Tensor, Generator], Tensor]


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def affine(images: Tensor, *, degrees: float = 0.0, scale: float = 1.0) -> Tensor:
    """Turn (N, C, H, W) anticlockwise and enlarge it about its centre; outside it is its own mirror image."""
    height, width = images.shape[-2:]
    angle = math.radians(degrees)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # In the grid's own coordinates, which run from -1 to 1 along both sides.
    matrix = images.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    size = [len(images), *images.shape[1:]]
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), size, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, generator: Generator, *, pixels: int) -> Tensor:
    """Roll all images by one random shift of up to so many pixels each way."""
    down, across = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
    return torch.roll(images, (down, across), (-2, -1))


def rotate(images: Tensor, generator: Generator, *, degrees: float = 20.0) -> Tensor:
    """Turn by up to so many degrees either way."""
    return affine(images, degrees=_uniform(generator, -degrees, degrees))


def rescale(images: Tensor, generator: Generator, *, factor: float = 1.25) -> Tensor:
    """Enlarge about the centre by up to ``factor``, or shrink by as much."""
    return affine(images, scale=factor ** _uniform(generator, -1, 1))


def brightness(images: Tensor, generator: Generator, *, change: float = 0.2) -> Tensor:
    """Multiply and shift all pixels by up to ``change``."""
    gain, lift = 1 + _uniform(generator, -change, change), _uniform(generator, -change / 2, change / 2)
    return (images * gain + lift).clamp(0, 1)


def blur(images: Tensor, generator: Generator, *, sigma: float = 1.0) -> Tensor:
    """Blur by a Gaussian of up to ``sigma`` pixels."""
    return gaussian_blur(images, _uniform(generator, 0, sigma))


def resize_and_pad(images: Tensor, generator: Generator, *, smallest: float = 0.85) -> Tensor:
    """Half of the time shrink to as little as ``smallest`` of the size, somewhere on black.

    Source: Xie et al. 2019, "Improving Transferability of Adversarial Examples with Input Diversity".
    """
    part, asked = _uniform(generator, smallest, 1), _uniform(generator, 0, 1)
    down, across = (_uniform(generator, 0, 1) for _ in range(2))
    if asked > 0.5:
        return images
    height, width = images.shape[-2:]
    sides = [max(1, round(part * side)) for side in (height, width)]
    top, left = round(down * (height - sides[0])), round(across * (width - sides[1]))
    small = F.interpolate(images, sides, mode="nearest")
    return F.pad(small, (left, width - sides[1] - left, top, height - sides[0] - top))


class _Through(torch.autograd.Function):
    """A change of the pixels that the gradient knows nothing of."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        images: Tensor,
        change: Callable[[Tensor], Tensor],
        instead: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(images)
        ctx.instead = instead
        return change(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.instead is not None:
            with torch.enable_grad():
                images = ctx.saved_tensors[0].detach().requires_grad_()
                (gradient,) = torch.autograd.grad(ctx.instead(images), images, gradient)
        return gradient, None, None


def straight_through(
    images: Tensor, change: Callable[[Tensor], Tensor], instead: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``change(images)``, through which gradients pass as if nothing had been changed (BPDA).

    With ``instead``, a differentiable likeness of ``change``, they pass as through that.
    Source: Athalye, Carlini & Wagner 2018, section 4.1.
    """
    return _Through.apply(images, change, instead)


def jpeg_round_trip(images: Tensor, quality: int) -> Tensor:
    """Every picture (1 or 3 channels) through a JPEG file of this quality, 1 to 100; no gradient passes."""
    if images.shape[1] not in (1, 3):
        raise InputError(f"a JPEG file holds 1 or 3 channels, not {images.shape[1]}")
    levels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = []
    for picture in levels:
        file = io.BytesIO()
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(
            file, "JPEG", quality=quality
        )
        found.append(np.array(Image.open(file)).reshape(picture.shape))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).to(images) / 255


def jpeg(images: Tensor, generator: Generator, *, low: int = 50, high: int = 95) -> Tensor:
    """Through a JPEG file of a quality between ``low`` and ``high``; the gradient passes straight through."""
    quality = round(_uniform(generator, low, high))
    return straight_through(images, lambda pictures: jpeg_round_trip(pictures, quality))


def printed(images: Tensor, generator: Generator, *, noise: float = 0.05, contrast: float = 0.3) -> Tensor:
    """As printed and photographed: colours between paper and ink, a colour cast, grain."""
    channels = images.shape[1]
    paper = 1 - contrast / 2 * torch.rand(1, channels, 1, 1, generator=generator).to(images)
    ink = contrast / 2 * torch.rand(1, channels, 1, 1, generator=generator).to(images)
    grain = noise * torch.randn(1, *images.shape[1:], generator=generator).to(images)
    return (ink + (paper - ink) * images + grain).clamp(0, 1)


TransformName = Literal["rotate", "rescale", "brightness", "blur", "jpeg", "printed", "resize_and_pad"]


TRANSFORMS: dict[str, Transform] = {
    "rotate": rotate,
    "rescale": rescale,
    "brightness": brightness,
    "blur": blur,
    "jpeg": jpeg,
    "printed": printed,
    "resize_and_pad": resize_and_pad,
}


def compose(changes: Sequence[TransformName | Transform]) -> Transform:
    """These changes, or those of these names, one after another; UnknownName for one that does not exist."""
    for change in changes:
        if not callable(change) and change not in TRANSFORMS:
            raise UnknownName("transform", change, get_args(TransformName))
    steps = [change if callable(change) else TRANSFORMS[change] for change in changes]

    def change_all(images: Tensor, generator: Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return change_all
