"""Draws the bundled texture images: ``python tests/builtin/draw_textures.py`` writes the files.

Each is drawn at twice the resolution and averaged down: a map is (fine, fine), an image (3, fine,
fine), a palette (K, 3, 1, 1); coordinates and lengths are in pixels of the final image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from phosphene.builtin.drawing import (
    Keys,
    fractal,
    integers,
    keys_of,
    normal,
    oklch,
    paint,
    rotate,
    smoothstep,
    uniform,
)
from phosphene.builtin.textures import TEXTURE_FOLDER, TEXTURES
from phosphene.images import write_png

_FINE = 2


def draw_texture(name: str, size: int = 128, seed: int = 0) -> Tensor:
    """Draw the texture ``name`` of ``TEXTURES``: (3, size, size) float32 RGB in [0, 1].

    Structures have the same size in pixels for any image size; a larger image contains more of them.
    """
    line = (torch.arange(size * _FINE, dtype=torch.float32) + 0.5) / _FINE
    y, x = torch.meshgrid(line, line, indexing="ij")
    fine = _PAINTERS[name](keys_of([f"texture/{name}/{seed}"]), size, x, y)
    image = F.avg_pool2d(fine[None], _FINE)[0].clamp(0, 1)
    return (image * 255).round() / 255


def _noise(key: Keys, draw: str, size: int, period: float, octaves: int = 4) -> Tensor:
    """A map of 1/f noise, its coarsest waves about ``period`` pixels long."""
    cells = max(1, round(size / period))
    return fractal(key, draw, size * _FINE, cells=cells, octaves=octaves)[0, 0]


def _palette(*colors: tuple[float, float, float]) -> Tensor:
    """RGB colors of OKLCh triples."""
    return oklch(*torch.tensor(colors)[..., None, None, None].unbind(1))


def _pick(palette: Tensor, index: Tensor) -> Tensor:
    """The palette's colors (3, ...) for a map of indices, counted around."""
    return palette.flatten(1)[index.remainder(len(palette))].movedim(-1, 0)


def _blend(palette: Tensor, position: Tensor) -> Tensor:
    """Colors (3, ...) at ``position`` in [0, 1] along the palette, mixed between neighbors."""
    position = position.clamp(0, 1) * (len(palette) - 1)
    low = position.floor().clamp(max=len(palette) - 2)
    return torch.lerp(_pick(palette, low.long()), _pick(palette, low.long() + 1), position - low)


def _cell_number(key: Keys, draw: str, row: Tensor, column: Tensor, below: int) -> Tensor:
    """A random integer for each lattice cell."""
    table = integers(key, draw, 4096, below=below)[0]
    return table[(row.long() * 61 + column.long() * 7).remainder(4096)]


def _at(field: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of a map at positions y, x."""
    last = len(field) - 1
    return field[(y * _FINE).long().clamp(0, last), (x * _FINE).long().clamp(0, last)]


def _bricks(key: Keys, size: int, x: Tensor, y: Tensor) -> Tensor:
    tall, wide = 13.0, 29.0
    y = y + 0.5 * _noise(key, "sag", size, 40) + 4
    row = (y / tall).floor()
    x = x + 0.5 * wide * row.remainder(2) + 9
    column = (x / wide).floor()
    v, u = y - row * tall, x - column * wide
    gap = torch.minimum(torch.minimum(u, wide - u), torch.minimum(v, tall - v))
    gap = gap + 0.35 * _noise(key, "chips", size, 8, 3)
    palette = _palette(
        (0.52, 0.13, 32), (0.45, 0.11, 28), (0.58, 0.12, 42), (0.62, 0.1, 55), (0.4, 0.07, 20),
        (0.55, 0.14, 36), (0.5, 0.05, 300),
    )  # fmt: skip
    brick = _pick(palette, _cell_number(key, "brick", row, column, 7))
    rough = _noise(key, "rough", size, 12, 5)
    edge = smoothstep(v, 0.8, 3.5) - smoothstep(tall - v, 0.8, 4.0)
    brick = brick * (1 + 0.1 * rough - 0.13 * edge + 0.05 * normal(key, "grit", *y.shape)[0])
    mortar = _palette((0.8, 0.03, 80))[0] * (0.9 + 0.08 * rough)
    return paint(mortar, brick, smoothstep(gap, 0.7, 1.6))


def _pebbles(key: Keys, size: int, x: Tensor, y: Tensor) -> Tensor:
    y = y + 0.8 * _noise(key, "bend y", size, 24, 3)
    x = x + 0.8 * _noise(key, "bend x", size, 24, 3)
    pitch = 15.0
    steps = torch.arange(-2, 3)
    row = (y / pitch).floor() + steps.repeat_interleave(5)[:, None, None]
    column = (x / pitch).floor() + steps.repeat(5)[:, None, None]
    seat = _cell_number(key, "seat", row, column, 1 << 20)
    at_y = (row + 0.1 + 0.8 * (seat % 1024) / 1024) * pitch
    at_x = (column + 0.1 + 0.8 * (seat // 1024) / 1024) * pitch
    (first, second), near = ((y - at_y) ** 2 + (x - at_x) ** 2).sqrt().topk(2, dim=0, largest=False)
    owner, gap = seat.gather(0, near[:1])[0], second - first
    height = (1 - (1 - gap / 9).clamp(0, 1) ** 2).sqrt() * 4.5
    slope_y, slope_x = torch.gradient(height, spacing=1 / _FINE)
    light = (0.8 + 0.6 * (slope_x + slope_y)) / (1 + slope_x**2 + slope_y**2).sqrt()
    palette = _palette(
        (0.72, 0.03, 80), (0.5, 0.05, 250), (0.62, 0.07, 40), (0.82, 0.03, 100),
        (0.42, 0.04, 200), (0.66, 0.06, 150), (0.58, 0.09, 20), (0.75, 0.08, 70),
    )  # fmt: skip
    stone = _pick(palette, owner % 8191) * (0.92 + 0.09 * _noise(key, "vein", size, 14, 5))
    stone = stone * (0.45 + 0.62 * light) + 0.3 * smoothstep(light, 0.95, 1.1)
    sand = _palette((0.3, 0.03, 60))[0] * (1 + 0.2 * normal(key, "sand", *y.shape)[0])
    return paint(sand, stone, smoothstep(gap, 0.8, 2.0))


def _waves(key: Keys, size: int, x: Tensor, y: Tensor) -> Tensor:
    """Rows of breaking waves, each with a foam edge and lines that follow it."""
    image = _blend(_palette((0.9, 0.05, 85), (0.85, 0.06, 60)), y / size)
    sea = _palette((0.38, 0.11, 258), (0.5, 0.11, 245), (0.62, 0.09, 225), (0.44, 0.1, 235))
    foam, ink = _palette((0.96, 0.02, 95), (0.27, 0.08, 262))
    rows = math.ceil((size + 24) / 15)
    phases, lengths = uniform(key, "phase", rows)[0], uniform(key, "length", rows)[0]
    for row, (phase, length) in enumerate(zip(phases.tolist(), lengths.tolist(), strict=True)):
        bent = x + 2.2 * _noise(key, f"bend {row}", size, 30, 4)
        cycle = bent / (34 + 14 * length) + phase
        rise = cycle - cycle.floor()
        # A long swell up to a steep front: the crest leans the way the sea runs.
        crest = torch.where(rise < 0.72, (rise / 0.72) ** 2, ((1 - rise) / 0.28) ** 1.4)
        curl = _noise(key, f"curl {row}", size, 9, 3)
        depth = y - (15 * row + 6 - 13 * crest)
        lines = (depth / 4.2 + 0.12 * curl).remainder(1)
        body = sea[row % len(sea)] * (1.1 - 0.012 * depth.clamp(0, 30))
        body = paint(body, foam * 0.92, smoothstep((lines - 0.5).abs(), 0.36, 0.48) * 0.55)
        body = paint(foam, body, smoothstep(depth + 1.1 * curl - 2.6 * crest, 1.2, 2.0))
        body = paint(ink, body, smoothstep(depth, 0.5, 1.2))
        image = paint(image, body, smoothstep(depth, -0.3, 0.3))
    return image


def _strokes(
    image: Tensor, position: Tensor, angle: Tensor, color: Tensor, length: float = 6.0, width: float = 1.8
) -> Tensor:
    """Paint round-ended strokes (K,) one over another; position (2, K) y and x, color (3, K)."""
    reach = math.ceil((length / 2 + width) * _FINE) + 1
    canvas = F.pad(image[None], (2 * reach,) * 4, mode="reflect")[0]
    line = (torch.arange(2 * reach, dtype=torch.float32) - reach + 0.5) / _FINE
    off_y, off_x = line - ((position * _FINE).remainder(1) / _FINE)[..., None]
    along, across = rotate(angle[:, None, None], off_x[:, None, :], off_y[:, :, None])
    beyond = (along.abs() - length / 2).clamp(min=0)
    coverage = ((width / 2 - (beyond**2 + across**2).sqrt()) * _FINE + 0.5).clamp(0, 1)
    ridge = 1 + 0.16 * (across * (2 / width)).clamp(-1, 1)  # thick paint, lit from one side
    for k, (top, left) in enumerate(((position * _FINE).long() + reach).T.tolist()):
        window = canvas[:, top : top + 2 * reach, left : left + 2 * reach]
        window += (color[:, k, None, None] * ridge[k] - window) * coverage[k]
    return canvas[:, 2 * reach : -2 * reach, 2 * reach : -2 * reach]


def _swirls(key: Keys, size: int, x: Tensor, y: Tensor) -> Tensor:
    """A night sky of short strokes that run along whirls, around glowing stars."""
    stream, glow = 9 * _noise(key, "stream", size, 52, 1) + 0.5 * y, torch.zeros_like(y)
    stars = max(3, size * size // 1900)
    spot = uniform(key, "star", stars, 2, low=0.04, high=0.96)[0] * size
    power = uniform(key, "star power", stars, low=0.5, high=1.0)[0]
    for index, ((at_y, at_x), strength) in enumerate(zip(spot, power, strict=True)):
        radius = ((y - at_y) ** 2 + (x - at_x) ** 2).sqrt()
        whirl = index % 3 == 0  # every third spot is no star but a great whirl of the air
        near = 1 / (1 + (radius / ((30 if whirl else 15) * strength)) ** 6)
        stream = stream + near * (2 * radius - stream)  # circles around the star
        if not whirl:
            shine = 1.1 - radius / (16 * strength) + 0.12 * (radius * 1.3).sin()
            glow = torch.maximum(glow, shine.clamp(0, 1))
    slope_y, slope_x = torch.gradient(stream, spacing=1 / _FINE)
    bands = 0.28 + 0.17 * _noise(key, "bands", size, 36, 3) + 0.09 * (stream / 5).sin()
    night = _palette(
        (0.25, 0.09, 268), (0.38, 0.13, 262), (0.52, 0.12, 250), (0.68, 0.08, 215), (0.86, 0.06, 190)
    )
    star = _palette(
        (0.45, 0.12, 255), (0.72, 0.07, 190), (0.82, 0.14, 95), (0.9, 0.15, 88), (0.97, 0.07, 100)
    )
    count = size * size // 5
    position = uniform(key, "stroke", 2, count, low=0, high=size)[0]
    wobble, jitter, edge = (normal(key, draw, count)[0] for draw in ("wobble", "jitter", "edge"))
    flow = torch.atan2(-_at(slope_x, *position), _at(slope_y, *position)) + 0.12 * wobble
    shine = _at(glow, *position)
    starlit = _blend(star, shine + 0.7 * (0.16 * jitter))
    dark = _blend(night, _at(bands, *position) + 0.16 * jitter)
    color = torch.where(shine + 0.1 * edge > 0.2, starlit, dark)
    return _strokes(_blend(night, bands), position, flow, color)


def _mosaic(key: Keys, size: int, x: Tensor, y: Tensor) -> Tensor:
    """Small stones laid in bent rows, their colors in bands and rosettes."""
    pitch, wide = 6.2, 44.0
    bent_y = y + 5 * _noise(key, "bend y", size, 90, 2)
    bent_x = x + 5 * _noise(key, "bend x", size, 90, 2)
    row = (bent_y / pitch).floor()
    slide = _cell_number(key, "slide", row, torch.zeros_like(row), 100) / 100
    column = (bent_x / pitch + slide).floor()
    v, u = bent_y / pitch - row, bent_x / pitch + slide - column
    gap = torch.minimum(torch.minimum(u, 1 - u), torch.minimum(v, 1 - v)) * pitch
    gap = gap + 0.12 * _noise(key, "chip", size, 6, 3)
    # A stone has one color: the design's, where the stone's center lies.
    middle_y, middle_x = y + (0.5 - v) * pitch, x + (0.5 - u) * pitch
    design = 1.5 * _at(_noise(key, "design", size, 46, 2), middle_y, middle_x)
    ring_y, ring_x = middle_y.remainder(wide) - wide / 2, middle_x.remainder(wide) - wide / 2
    band = ((ring_y**2 + ring_x**2).sqrt() / 6.5 + 0.5 * design).floor().long()
    palette = _palette(
        (0.9, 0.04, 90), (0.62, 0.16, 40), (0.35, 0.09, 255), (0.7, 0.11, 195), (0.8, 0.14, 85),
        (0.45, 0.13, 20),
    )  # fmt: skip
    tint = _cell_number(key, "tint", row, column, 1000) / 1000 - 0.5
    stone = _pick(palette, band) * (1 + 0.34 * tint)
    stone = stone * (1 + 0.05 * _noise(key, "grain", size, 5, 3)) + 0.1 * (0.5 - v) * (gap < 1.8)
    grout = _palette((0.76, 0.02, 80))[0] * 0.92
    return paint(grout, stone, smoothstep(gap, 0.35, 0.8))


_PAINTERS: dict[str, Callable[[Keys, int, Tensor, Tensor], Tensor]] = {
    "bricks": _bricks,
    "pebbles": _pebbles,
    "waves": _waves,
    "swirls": _swirls,
    "mosaic": _mosaic,
}


if __name__ == "__main__":
    for texture in TEXTURES:
        write_png(draw_texture(texture), TEXTURE_FOLDER / f"{texture}.png")
