"""Drawn style and texture pictures, rich in colour and structure, for synthesis and style."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import fractal, integers, keys_of, normal, oklch, smoothstep, uniform

TEXTURES: tuple[str, ...] = ("bricks", "pebbles", "waves", "swirls", "mosaic", "weave", "dots")

_FINE = 2  # drawn this many times finer than asked for, then averaged down


def draw_texture(name: str, size: int = 128, seed: int = 0) -> Tensor:
    """Draw the texture ``name``: (3, size, size) float32 RGB in [0, 1].

    The grain stays the same number of pixels whatever the size; a larger picture shows more.
    """
    if name not in TEXTURES:
        raise ValueError(f"no texture {name!r}; there are {', '.join(TEXTURES)}")
    if size < 8:
        raise ValueError(f"a texture needs at least 8 pixels a side, got {size}")
    fine = _PAINTERS[TEXTURES.index(name)](keys_of([f"texture/{name}/{seed}"]), size)
    picture = F.avg_pool2d(fine[None], _FINE)[0].clamp(0, 1)
    return (picture * 255).round() / 255


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Coordinates y, x (fine, fine) in pixels of the finished picture."""
    line = (torch.arange(size * _FINE, dtype=torch.float32) + 0.5) / _FINE
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x


def _noise(key: Tensor, draw: str, size: int, period: float, octaves: int = 4) -> Tensor:
    """1/f noise (fine, fine), its coarsest waves about ``period`` pixels long."""
    cells = max(1, round(size / period))
    return fractal(key, draw, size * _FINE, cells=cells, octaves=octaves)[0, 0]


def _palette(*colours: tuple[float, float, float]) -> Tensor:
    """RGB colours (K, 3) from OKLCh triples."""
    lightness, chroma, hue = torch.tensor(colours).unbind(1)
    return oklch(lightness, chroma, hue)


def _pick(palette: Tensor, index: Tensor) -> Tensor:
    """The palette's colours (3, ...) for a map of indices, counted around."""
    return palette[index.remainder(len(palette))].movedim(-1, 0)


def _blend(palette: Tensor, place: Tensor) -> Tensor:
    """Colours (3, ...) at ``place`` in [0, 1] along the palette, mixed between neighbours."""
    place = place.clamp(0, 1) * (len(palette) - 1)
    low = place.floor().clamp(max=len(palette) - 2)
    return torch.lerp(_pick(palette, low.long()), _pick(palette, low.long() + 1), place - low)


def _cell_number(key: Tensor, draw: str, row: Tensor, column: Tensor, below: int) -> Tensor:
    """A random integer for each lattice cell."""
    table = integers(key, draw, 4096, below=below)[0]
    return table[(row.long() * 61 + column.long() * 7).remainder(4096)]


def _over(under: Tensor, colour: Tensor, coverage: Tensor) -> Tensor:
    return under + (colour - under) * coverage


def _bricks(key: Tensor, size: int) -> Tensor:
    y, x = _grid(size)
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
    mortar = _palette((0.8, 0.03, 80)).T[:, :, None] * (0.9 + 0.08 * rough)
    return _over(mortar, brick, smoothstep(gap, 0.7, 1.6))


def _pebbles(key: Tensor, size: int) -> Tensor:
    y, x = _grid(size)
    y = y + 0.8 * _noise(key, "bend y", size, 24, 3)
    x = x + 0.8 * _noise(key, "bend x", size, 24, 3)
    pitch = 15.0
    first, second = torch.full_like(y, 1e9), torch.full_like(y, 1e9)
    owner = torch.zeros_like(y, dtype=torch.long)
    for step_y in range(-2, 3):
        for step_x in range(-2, 3):
            row, column = (y / pitch).floor() + step_y, (x / pitch).floor() + step_x
            seat = _cell_number(key, "seat", row, column, 1 << 20)
            at_y = (row + 0.1 + 0.8 * (seat % 1024) / 1024) * pitch
            at_x = (column + 0.1 + 0.8 * (seat // 1024) / 1024) * pitch
            away = ((y - at_y) ** 2 + (x - at_x) ** 2).sqrt()
            second = torch.minimum(second, torch.maximum(first, away))
            owner = torch.where(away < first, seat, owner)
            first = torch.minimum(first, away)
    gap = second - first
    height = (1 - (1 - gap / 9).clamp(0, 1) ** 2).sqrt() * 4.5
    slope_y, slope_x = torch.gradient(height, spacing=1 / _FINE)
    light = (0.8 + 0.6 * (slope_x + slope_y)) / (1 + slope_x**2 + slope_y**2).sqrt()
    palette = _palette(
        (0.72, 0.03, 80), (0.5, 0.05, 250), (0.62, 0.07, 40), (0.82, 0.03, 100),
        (0.42, 0.04, 200), (0.66, 0.06, 150), (0.58, 0.09, 20), (0.75, 0.08, 70),
    )  # fmt: skip
    vein = _noise(key, "vein", size, 14, 5)
    stone = _pick(palette, owner % 8191) * (0.92 + 0.09 * vein)
    stone = stone * (0.45 + 0.62 * light) + 0.3 * smoothstep(light, 0.95, 1.1)
    sand = _palette((0.3, 0.03, 60)).T[:, :, None] * (1 + 0.2 * normal(key, "sand", *y.shape)[0])
    return _over(sand, stone, smoothstep(gap, 0.8, 2.0))


def _waves(key: Tensor, size: int) -> Tensor:
    """Rows of breaking waves, each with a foam edge and lines that follow it."""
    y, x = _grid(size)
    sky = _palette((0.9, 0.05, 85), (0.85, 0.06, 60))
    image = _blend(sky, y / size)
    sea = _palette((0.38, 0.11, 258), (0.5, 0.11, 245), (0.62, 0.09, 225), (0.44, 0.1, 235))
    foam = _palette((0.96, 0.02, 95)).T[:, :, None]
    ink = _palette((0.27, 0.08, 262)).T[:, :, None]
    rows = math.ceil((size + 24) / 15)
    phase, length = uniform(key, "phase", rows)[0], uniform(key, "length", rows)[0]
    for row in range(rows):
        bent = x + 2.2 * _noise(key, f"bend {row}", size, 30, 4)
        cycle = bent / (34 + 14 * float(length[row])) + float(phase[row])
        rise = cycle - cycle.floor()
        # A long swell up to a steep front: the crest leans the way the sea runs.
        crest = torch.where(rise < 0.72, (rise / 0.72) ** 2, ((1 - rise) / 0.28) ** 1.4)
        curl = _noise(key, f"curl {row}", size, 9, 3)
        depth = y - (15 * row + 6 - 13 * crest)
        lines = (depth / 4.2 + 0.12 * curl).remainder(1)
        body = _pick(sea, torch.tensor(row))[:, None, None] * (1.1 - 0.012 * depth.clamp(0, 30))
        body = _over(body, foam * 0.92, smoothstep((lines - 0.5).abs(), 0.36, 0.48) * 0.55)
        froth = depth + 1.1 * curl - 2.6 * crest
        body = _over(foam, body, smoothstep(froth, 1.2, 2.0))
        rim = _over(ink, body, smoothstep(depth, 0.5, 1.2))
        image = _over(image, rim, smoothstep(depth, -0.3, 0.3))
    return image


def _strokes(
    image: Tensor, place: Tensor, angle: Tensor, colour: Tensor, *, length: float, width: float
) -> Tensor:
    """Paint round-ended strokes (K,) one over another; place (2, K) y and x in pixels, colour (K, 3)."""
    y, x = place
    reach = math.ceil((length / 2 + width) * _FINE) + 1
    canvas = F.pad(image[None], (2 * reach,) * 4, mode="reflect")[0]
    line = torch.arange(2 * reach, dtype=torch.float32)
    cos, sin = angle.double().cos().float(), angle.double().sin().float()
    top = (y * _FINE).long() + reach
    left = (x * _FINE).long() + reach
    off_y = (line - reach + 0.5) / _FINE - (y * _FINE).remainder(1)[:, None] / _FINE
    off_x = (line - reach + 0.5) / _FINE - (x * _FINE).remainder(1)[:, None] / _FINE
    along = off_x[:, None, :] * cos[:, None, None] + off_y[:, :, None] * sin[:, None, None]
    across = off_y[:, :, None] * cos[:, None, None] - off_x[:, None, :] * sin[:, None, None]
    beyond = (along.abs() - length / 2).clamp(min=0)
    coverage = ((width / 2 - (beyond**2 + across**2).sqrt()) * _FINE + 0.5).clamp(0, 1)
    ridge = 1 + 0.16 * (across * (2 / width)).clamp(-1, 1)  # thick paint, lit from one side
    tops, lefts = top.tolist(), left.tolist()
    for k, (row, column) in enumerate(zip(tops, lefts, strict=True)):
        window = canvas[:, row : row + 2 * reach, column : column + 2 * reach]
        window += (colour[k, :, None, None] * ridge[k] - window) * coverage[k]
    return canvas[:, 2 * reach : -2 * reach, 2 * reach : -2 * reach]


def _at(field: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of a map (..., fine, fine) at places y, x in pixels."""
    last = field.shape[-1] - 1
    return field[..., (y * _FINE).long().clamp(0, last), (x * _FINE).long().clamp(0, last)]


def _swirls(key: Tensor, size: int) -> Tensor:
    """A night sky of short strokes that run along whirls, around glowing stars."""
    y, x = _grid(size)
    stream = 9 * _noise(key, "stream", size, 52, 1) + 0.5 * y
    glow = torch.zeros_like(y)
    stars = max(3, size * size // 1900)
    spot = uniform(key, "star", stars, 2, low=0.04, high=0.96)[0] * size
    power = uniform(key, "star power", stars, low=0.5, high=1.0)[0]
    for index, ((at_y, at_x), strength) in enumerate(zip(spot, power, strict=True)):
        radius = ((y - at_y) ** 2 + (x - at_x) ** 2).sqrt()
        whirl = index % 3 == 0  # every third spot is no star but a great whirl of the air
        near = 1 / (1 + (radius / ((30 if whirl else 15) * strength)) ** 6)
        stream = stream + near * (2 * radius - stream)  # circles around the star
        ring = 0.12 * (radius * 1.3).sin()
        if not whirl:
            glow = torch.maximum(glow, (1.1 - radius / (16 * strength) + ring).clamp(0, 1))
    slope_y, slope_x = torch.gradient(stream, spacing=1 / _FINE)
    bands = 0.28 + 0.17 * _noise(key, "bands", size, 36, 3) + 0.09 * (stream / 5).sin()
    night = _palette((0.25, 0.09, 268), (0.38, 0.13, 262), (0.52, 0.12, 250), (0.68, 0.08, 215),
                     (0.86, 0.06, 190))  # fmt: skip
    star = _palette((0.45, 0.12, 255), (0.72, 0.07, 190), (0.82, 0.14, 95), (0.9, 0.15, 88),
                    (0.97, 0.07, 100))  # fmt: skip
    image = _blend(night, bands)
    count = size * size // 5
    place = uniform(key, "stroke", 2, count, low=0, high=size)[0]
    flow = torch.atan2(-_at(slope_x, *place), _at(slope_y, *place))
    flow = flow + 0.12 * normal(key, "wobble", count)[0]
    jitter = 0.16 * normal(key, "jitter", count)[0]
    shine = _at(glow, *place)
    colour = torch.where(
        shine + 0.1 * normal(key, "edge", count)[0] > 0.2,
        _blend(star, shine + 0.7 * jitter),
        _blend(night, _at(bands, *place) + jitter),
    )
    return _strokes(image, place, flow, colour.T, length=6.0, width=1.8)


def _mosaic(key: Tensor, size: int) -> Tensor:
    """Small stones laid in bent rows, their colours in bands and rosettes."""
    y, x = _grid(size)
    pitch = 6.2
    bent_y = y + 5 * _noise(key, "bend y", size, 90, 2)
    bent_x = x + 5 * _noise(key, "bend x", size, 90, 2)
    row = (bent_y / pitch).floor()
    slide = _cell_number(key, "slide", row, torch.zeros_like(row), 100) / 100
    column = (bent_x / pitch + slide).floor()
    v, u = bent_y / pitch - row, bent_x / pitch + slide - column
    gap = torch.minimum(torch.minimum(u, 1 - u), torch.minimum(v, 1 - v)) * pitch
    gap = gap + 0.12 * _noise(key, "chip", size, 6, 3)
    # A stone has one colour: the design's, where the stone's middle lies.
    middle_y = y + (0.5 - v) * pitch
    middle_x = x + (0.5 - u) * pitch
    design = 1.5 * _at(_noise(key, "design", size, 46, 2), middle_y, middle_x)
    wide = 44.0
    ring_y, ring_x = middle_y.remainder(wide) - wide / 2, middle_x.remainder(wide) - wide / 2
    radius = (ring_y**2 + ring_x**2).sqrt()
    band = ((radius / 6.5) + 0.5 * design).floor().long()
    palette = _palette(
        (0.9, 0.04, 90), (0.62, 0.16, 40), (0.35, 0.09, 255), (0.7, 0.11, 195), (0.8, 0.14, 85),
        (0.45, 0.13, 20),
    )  # fmt: skip
    tint = _cell_number(key, "tint", row, column, 1000) / 1000 - 0.5
    stone = _pick(palette, band) * (1 + 0.34 * tint)
    stone = stone * (1 + 0.05 * _noise(key, "grain", size, 5, 3)) + 0.1 * (0.5 - v) * (gap < 1.8)
    grout = _palette((0.76, 0.02, 80)).T[:, :, None] * 0.92
    return _over(grout, stone, smoothstep(gap, 0.35, 0.8))


def _weave(key: Tensor, size: int) -> Tensor:
    """Cloth: threads over and under each other, dyed in a plaid."""
    y, x = _grid(size)
    pitch = 5.0
    y = y + 0.5 * _noise(key, "slack y", size, 40, 3)
    x = x + 0.5 * _noise(key, "slack x", size, 40, 3)
    row, column = (y / pitch).floor(), (x / pitch).floor()
    v, u = y / pitch - row - 0.5, x / pitch - column - 0.5
    palette = _palette(
        (0.42, 0.14, 25), (0.3, 0.07, 250), (0.85, 0.06, 90), (0.5, 0.09, 160), (0.72, 0.13, 75)
    )
    plaid = torch.tensor([0, 0, 0, 4, 1, 1, 2, 1, 1, 3, 3, 3, 2, 3, 3, 3, 1, 1, 4, 0, 0])
    offset = integers(key, "plaid", below=len(plaid))[0]
    weft = _pick(palette, plaid[(row.long() + offset).remainder(len(plaid))])
    warp = _pick(palette, plaid[(column.long() + offset).remainder(len(plaid))])
    over = (row.long() + column.long()).remainder(4) < 2  # a twill: over two, under two
    weft_on_top = over[None]
    side = torch.where(over, v, u)  # across the thread on top
    run = (row + column + torch.where(over, u, -v) + 0.5).remainder(2) / 2
    # Twisted fibres: fine diagonal lines across each thread.
    twist = ((torch.where(over, x, y) * 0.9 + side * 3).remainder(1) - 0.5).abs()
    shade = (1.12 - 2.6 * side**2) * (0.82 + 0.36 * twist) * (0.84 + 0.5 * run * (1 - run))
    shade = shade * (1 + 0.06 * _noise(key, "fibre", size, 6, 4) + 0.08 * (v + u))
    cloth = torch.where(weft_on_top, weft, warp) * shade
    return cloth * (0.55 + 0.45 * smoothstep(0.5 - side.abs(), 0.0, 0.16))


def _dots(key: Tensor, size: int) -> Tensor:
    """Pointillism: a soft landscape of colours, set in dots that differ from it in hue."""
    y, _ = _grid(size)
    field = y / size * 0.75 + 0.12 + 0.13 * _noise(key, "land", size, 60, 3)
    land = _palette(
        (0.82, 0.08, 220), (0.88, 0.08, 60), (0.82, 0.15, 80), (0.66, 0.16, 135), (0.55, 0.13, 160),
        (0.52, 0.13, 275), (0.6, 0.16, 340),
    )  # fmt: skip
    image = _blend(land, field)
    image = image * 0.85 + 0.1
    count = size * size // 4
    place = uniform(key, "dot", 2, count, low=0, high=size)[0]
    at = _at(field, *place) + 0.1 * normal(key, "stray", count)[0]
    odd = uniform(key, "odd", count)[0]
    at = torch.where(odd < 0.16, (at + 0.5).remainder(1), at)  # the complement, here and there
    colour = _blend(land, at) + 0.06 * normal(key, "tint", 3, count)[0]
    flat = torch.zeros(count)
    return _strokes(image, place, flat, colour.T.clamp(0, 1), length=0.0, width=3.4)


_PAINTERS: tuple[Callable[[Tensor, int], Tensor], ...] = (
    _bricks, _pebbles, _waves, _swirls, _mosaic, _weave, _dots,
)  # fmt: skip
