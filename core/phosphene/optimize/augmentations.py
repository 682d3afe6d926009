"""Differentiable random augmentations: rotation, scale, perspective, brightness, blur, JPEG, print, resizing.

Each takes images (N, C, H, W) in [0, 1] and a generator and draws its parameters once for the batch, so that
a batch has the same result as its images alone.
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

#: Images (N, C, H, W), generator of the random parameters -> images of the same shape.
Transform = Callable[[Tensor, Generator], Tensor]


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def affine(images: Tensor, *, degrees: float = 0.0, scale: float = 1.0) -> Tensor:
    """Rotate images (N, C, H, W) anticlockwise and scale them about the center, with reflection padding."""
    height, width = images.shape[-2:]
    angle = math.radians(degrees)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # affine_grid's coordinates run from -1 to 1 along both sides, so a rotation needs the aspect ratio.
    matrix = images.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    size = [len(images), *images.shape[1:]]
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), size, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, generator: Generator, *, pixels: int) -> Tensor:
    """Roll all images by one random shift of at most ``pixels`` along each axis."""
    down, across = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
    return torch.roll(images, (down, across), (-2, -1))


def rotate(images: Tensor, generator: Generator, *, degrees: float = 20.0) -> Tensor:
    """Rotate by a random angle of at most ``degrees`` in either direction."""
    return affine(images, degrees=_uniform(generator, -degrees, degrees))


def rescale(images: Tensor, generator: Generator, *, factor: float = 1.25) -> Tensor:
    """Scale about the center by a random factor between 1 / ``factor`` and ``factor``."""
    return affine(images, scale=factor ** _uniform(generator, -1, 1))


def perspective(
    images: Tensor, generator: Generator, *, degrees: float = 25.0, distance: float = 3.0
) -> Tensor:
    """View the image as a plane in space, tilted about both axes by random angles of at most ``degrees``.

    A point x of the plane, rotated by R, appears at D (Rx)_{1,2} / (D + (Rx)_3), with D the ``distance`` of
    the camera in halves of the longer side. The plane continues by reflection.

    Source:
        Athalye et al. 2018, "Synthesizing Robust Adversarial Examples", where objects are rendered so.
    """
    tilt, turn = (math.radians(_uniform(generator, -degrees, degrees)) for _ in range(2))
    height, width = images.shape[-2:]
    # affine_grid's coordinates run from -1 to 1 along both sides, those of the plane along the longer one.
    longer = max(height, width)
    sides = torch.tensor([width / longer, height / longer, 1], dtype=torch.float64)
    rotation = torch.tensor(
        [
            [math.cos(turn), math.sin(tilt) * math.sin(turn), 0],
            [0, math.cos(tilt), 0],
            [-math.sin(turn) / distance, math.sin(tilt) * math.cos(turn) / distance, 1],
        ],
        dtype=torch.float64,
    )
    to_plane = torch.linalg.inv(rotation @ sides.diag()).to(images)
    identity = images.new_tensor([[[1, 0, 0], [0, 1, 0]]])
    grid = F.affine_grid(identity, [1, *images.shape[1:]], align_corners=False)
    points = F.pad(grid * sides[:2].to(images), (0, 1), value=1.0) @ to_plane.T
    grid = (points[..., :2] / points[..., 2:]).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def brightness(images: Tensor, generator: Generator, *, change: float = 0.2) -> Tensor:
    """Multiply all pixels by 1 ± ``change`` and add ± ``change`` / 2, both at random."""
    gain, offset = 1 + _uniform(generator, -change, change), _uniform(generator, -change / 2, change / 2)
    return (images * gain + offset).clamp(0, 1)


def blur(images: Tensor, generator: Generator, *, sigma: float = 1.0) -> Tensor:
    """Blur by a Gaussian of a random width of at most ``sigma`` pixels."""
    return gaussian_blur(images, _uniform(generator, 0, sigma))


def resize_and_pad(images: Tensor, generator: Generator, *, min_scale: float = 0.85) -> Tensor:
    """Input diversity: with probability 1/2, shrink to a random scale and pad with zeros at random.

    Source:
        Xie et al. 2019, "Improving Transferability of Adversarial Examples with Input Diversity".
    """
    scale, probability = _uniform(generator, min_scale, 1), _uniform(generator, 0, 1)
    vertical, horizontal = (_uniform(generator, 0, 1) for _ in range(2))
    if probability > 0.5:
        return images
    height, width = images.shape[-2:]
    new_height, new_width = (max(1, round(scale * side)) for side in (height, width))
    top, left = round(vertical * (height - new_height)), round(horizontal * (width - new_width))
    resized = F.interpolate(images, (new_height, new_width), mode="nearest")
    return F.pad(resized, (left, width - new_width - left, top, height - new_height - top))


class _StraightThrough(torch.autograd.Function):
    """Any function forward; the identity, or the gradient of a surrogate, backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        images: Tensor,
        function: Callable[[Tensor], Tensor],
        surrogate: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(images)
        ctx.surrogate = surrogate
        return function(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.surrogate is not None:
            with torch.enable_grad():
                images = ctx.saved_tensors[0].detach().requires_grad_()
                (gradient,) = torch.autograd.grad(ctx.surrogate(images), images, gradient)
        return gradient, None, None


def straight_through(
    images: Tensor,
    function: Callable[[Tensor], Tensor],
    surrogate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``function(images)`` with the gradient of the identity: straight-through estimator (BPDA).

    With a ``surrogate``, a differentiable approximation of ``function``, the gradient is the surrogate's.

    Source:
        Athalye, Carlini & Wagner 2018, section 4.1.
    """
    return _StraightThrough.apply(images, function, surrogate)


def jpeg_round_trip(images: Tensor, quality: int) -> Tensor:
    """Encode and decode images of 1 or 3 channels as JPEG, quality 1 to 100; not differentiable."""
    if images.shape[1] not in (1, 3):
        raise InputError(f"a JPEG file holds 1 or 3 channels, not {images.shape[1]}")
    levels = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded = []
    for image in levels:
        file = io.BytesIO()
        encoder_input = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        encoder_input.save(file, "JPEG", quality=quality)
        decoded.append(np.array(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images) / 255


def jpeg(images: Tensor, generator: Generator, *, low: int = 50, high: int = 95) -> Tensor:
    """JPEG compression of a random quality between ``low`` and ``high``, with a straight-through gradient."""
    quality = round(_uniform(generator, low, high))
    return straight_through(images, lambda x: jpeg_round_trip(x, quality))


def printed(images: Tensor, generator: Generator, *, noise: float = 0.05, contrast: float = 0.3) -> Tensor:
    """Simulated print: contrast reduced to between paper and ink, random color cast, noise."""
    channels = images.shape[1]
    paper = 1 - contrast / 2 * torch.rand(1, channels, 1, 1, generator=generator).to(images)
    ink = contrast / 2 * torch.rand(1, channels, 1, 1, generator=generator).to(images)
    grain = noise * torch.randn(1, *images.shape[1:], generator=generator).to(images)
    return (ink + (paper - ink) * images + grain).clamp(0, 1)


TransformName = Literal[
    "rotate", "rescale", "brightness", "blur", "jpeg", "printed", "perspective", "resize_and_pad"
]


TRANSFORMS: dict[str, Transform] = {
    "rotate": rotate,
    "rescale": rescale,
    "brightness": brightness,
    "blur": blur,
    "jpeg": jpeg,
    "printed": printed,
    "perspective": perspective,
    "resize_and_pad": resize_and_pad,
}


def compose(transforms: Sequence[TransformName | Transform]) -> Transform:
    """Transforms, or their names in ``TRANSFORMS``, applied in order. Raises UnknownName for another name."""
    for transform in transforms:
        if not callable(transform) and transform not in TRANSFORMS:
            raise UnknownName("transform", transform, get_args(TransformName))
    functions = [transform if callable(transform) else TRANSFORMS[transform] for transform in transforms]

    def apply(images: Tensor, generator: Generator) -> Tensor:
        for function in functions:
            images = function(images, generator)
        return images

    return apply
