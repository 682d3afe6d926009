"""Random numbers, noise and colours for drawn pictures, each a function of a picture's key alone.

The generators are counter-based: a draw is an integer hash of (key, name of the draw, position),
never the next number of a shared sequence. So a batch gives what its pictures give one by one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


_STEP = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def keys_of(names: Iterable[str]) -> Tensor:
    """Hash each name to the int64 key of one picture, shape (N,)."""
    return torch.tensor([_digest(name) for name in names], dtype=torch.int64)


def _bits(keys: Tensor, draw: str, shape: tuple[int, ...]) -> Tensor:
    """Independent 64-bit integers (N, *shape): splitmix64 of key, draw and position."""
    counter = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64)
    state = (keys ^ _digest(draw)).unsqueeze(1) + counter * _STEP
    for shift, factor in _ROUNDS:
        state.bitwise_xor_((state >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    state.bitwise_xor_((state >> 31).bitwise_and_((1 << 33) - 1))
    return state.view(len(keys), *shape)


def uniform(keys: Tensor, draw: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform float32 numbers (N, *shape) in [low, high)."""
    unit = (_bits(keys, draw, shape) & 0xFFFFFF).to(torch.float32) / 2**24
    return unit * (high - low) + low


def integers(keys: Tensor, draw: str, *shape: int, below: int) -> Tensor:
    """Uniform int64 numbers (N, *shape) in 0 … below-1."""
    return (_bits(keys, draw, shape) & 0x7FFFFFFF) % below


def normal(keys: Tensor, draw: str, *shape: int) -> Tensor:
    """Nearly normal numbers (N, *shape), zero mean, unit variance: the sum of four uniforms."""
    lanes = 0x0000FFFF0000FFFF
    bits = _bits(keys, draw, shape)
    pairs = (bits & lanes) + (bits.bitwise_right_shift_(16).bitwise_and_(lanes))
    total = (pairs & 0xFFFFFFFF).add_(pairs.bitwise_right_shift_(32)).to(torch.float32)
    return total.div_(65535).sub_(2.0).mul_(math.sqrt(3.0))


def fractal(
    keys: Tensor, draw: str, size: int, *, channels: int = 1, cells: int = 2, octaves: int = 5
) -> Tensor:
    """Noise with a 1/f amplitude spectrum, (N, channels, size, size), about unit variance.

    ``cells`` is the number of lattice cells across the coarsest octave.
    """
    total = torch.zeros(len(keys), channels, size, size)
    for octave in range(octaves):
        side = cells * 2**octave + 1
        lattice = uniform(keys, f"{draw}/{octave}", channels, side, side, low=-1.0)
        layer = F.interpolate(lattice, size=(size, size), mode="bicubic", align_corners=True)
        total += layer * (2.2 * 0.5**octave)
    return total


def pixel_grid(size: int) -> tuple[Tensor, Tensor]:
    """Pixel-centre coordinates y (size, 1) and x (1, size), in pixels."""
    line = torch.arange(size, dtype=torch.float32) + 0.5
    return line[:, None], line[None, :]


def oklch(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Tensor:
    """sRGB colours (..., 3) of OKLCh coordinates; the hue in degrees, clamped to the gamut."""
    # In float64, so that the last bit of cos and pow is gone once rounded to float32.
    angle = torch.deg2rad(hue.double())
    light = lightness.double()
    a, b = chroma.double() * angle.cos(), chroma.double() * angle.sin()
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    linear = torch.stack([red, green, blue], dim=-1).clamp(0, 1)
    curved = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved).float()


def paint(canvas: Tensor, colour: Tensor, coverage: Tensor) -> Tensor:
    """Lay a colour, broadcastable to (N, 3, H, W), over the canvas by coverage (N, H, W)."""
    return canvas + (colour - canvas) * coverage.unsqueeze(1)


def smoothstep(value: Tensor, low: float, high: float) -> Tensor:
    """0 below ``low``, 1 above ``high``, a smooth cubic between."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)
