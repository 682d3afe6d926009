"""Random numbers, noise and colors for drawn images, each a function of the image's key.

A random number is an integer hash of (key, name of the draw, position), never the next number of a shared
sequence, so an image does not depend on the batch that it is drawn in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Keys: TypeAlias = NDArray[np.uint64]


#: The first eight bytes of a digest, as a number.
_NUMBER = np.dtype("<u8")


def keys_of(names: Iterable[str]) -> Keys:
    """Hash each name to the key of one image, (N,)."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, _NUMBER).astype(np.uint64)


def _bits(keys: Keys, draw: str, shape: tuple[int, ...]) -> Keys:
    """Independent 64-bit integers (N, *shape): the splitmix64 hash of key, draw and position."""
    counter = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    own = np.frombuffer(hashlib.sha256(draw.encode()).digest(), _NUMBER, 1).astype(np.uint64)
    state = (keys ^ own)[:, None] + counter * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state ^= state >> shift
        state *= factor
    return state.reshape(len(keys), *shape)


def uniform(keys: Keys, draw: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform float32 numbers (N, *shape) in [low, high)."""
    unit = torch.from_numpy((_bits(keys, draw, shape) & 0xFFFFFF).astype(np.float32)) / 2**24
    return unit * (high - low) + low


def integers(keys: Keys, draw: str, *shape: int, below: int) -> Tensor:
    """Uniform int64 numbers (N, *shape) in 0 … below-1."""
    return torch.from_numpy((_bits(keys, draw, shape) & 0x7FFFFFFF).astype(np.int64)) % below


def normal(keys: Keys, draw: str, *shape: int) -> Tensor:
    """Approximately normal numbers (N, *shape), mean 0 and variance 1: sums of four uniform numbers."""
    bits = _bits(keys, draw, shape)
    total = np.sum([(bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], axis=0)
    return (torch.from_numpy(total.astype(np.float32)) / 65535 - 2.0) * math.sqrt(3.0)


def fractal(keys: Keys, draw: str, size: int, *, cells: int, octaves: int, channels: int = 1) -> Tensor:
    """Noise with a 1/f amplitude spectrum, (N, channels, size, size), variance about 1.

    ``cells`` is the number of lattice cells across the coarsest octave.
    """
    total = torch.zeros(len(keys), channels, size, size)
    for octave in range(octaves):
        side = cells * 2**octave + 1
        lattice = uniform(keys, f"{draw}/{octave}", channels, side, side, low=-1.0)
        layer = F.interpolate(lattice, size=(size, size), mode="bicubic", align_corners=True)
        total += layer * (2.2 * 0.5**octave)
    return total


def rotate(angle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates along and across the direction ``angle`` (radians)."""
    # In float64: libraries differ in the last bit of cos, which is lost when rounded to float32.
    cos, sin = angle.double().cos().float(), angle.double().sin().float()
    return x * cos + y * sin, y * cos - x * sin


def oklch(lightness: Tensor, chroma: Tensor | float, hue: Tensor) -> Tensor:
    """sRGB colors (..., 3, h, w) from OKLCh maps (..., 1, h, w), clipped to the gamut; hue in degrees."""
    # In float64, as in ``rotate``.
    light, strength, angle = lightness.double(), torch.as_tensor(chroma).double(), torch.deg2rad(hue.double())
    a, b = strength * angle.cos(), strength * angle.sin()
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    linear = torch.cat([red, green, blue], dim=-3).clamp(0, 1)
    curved = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved).float()


def paint(canvas: Tensor, color: Tensor, coverage: Tensor) -> Tensor:
    """Blend a color over the canvas with opacity ``coverage`` in [0, 1]."""
    return canvas + (color - canvas) * coverage


def smoothstep(value: Tensor, low: float, high: float) -> Tensor:
    """0 below ``low``, 1 above ``high``, a cubic in between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)
