"""Draws the bundled paintings: ``python tests/builtin/draw_paintings.py`` writes the files.

Styles of 256x256 pixels, drawn like the textures of ``draw_textures``, stored with a palette of 128 colors.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from draw_textures import _FINE, _at, _blend, _noise, _palette, _pick, _strokes
from model_cards import write_file
from PIL import Image
from torch import Tensor

from phosphene.builtin.drawing import Keys, integers, keys_of, normal, paint, smoothstep, uniform
from phosphene.builtin.textures import PAINTING_FOLDER, PAINTINGS

SIZE = 256
COLORS = 128


def draw_painting(name: str, seed: int = 0) -> Tensor:
    """Draw the painting ``name`` of ``PAINTINGS``: (3, 256, 256) float32 RGB in [0, 1]."""
    line = (torch.arange(SIZE * _FINE, dtype=torch.float32) + 0.5) / _FINE
    y, x = torch.meshgrid(line, line, indexing="ij")
    fine = _PAINTERS[name](keys_of([f"painting/{name}/{seed}"]), x, y)
    return F.avg_pool2d(fine[None], _FINE)[0].clamp(0, 1)


def save_painting(image: Tensor, file: Path) -> None:
    """Write an image (3, H, W) as a PNG with a palette."""
    pixels = Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())
    content = io.BytesIO()
    pixels.quantize(COLORS, dither=Image.Dither.FLOYDSTEINBERG).save(content, "PNG", optimize=True)
    write_file(file, content.getvalue())


def _dabs(
    key: Keys,
    image: Tensor,
    flow: Tensor,
    name: str,
    *,
    count: int,
    length: float,
    width: float,
    jitter: float,
) -> Tensor:
    """Repaint an image (3, fine, fine) with strokes along ``flow``, an angle for each pixel."""
    position = uniform(key, f"{name} dabs", 2, count, low=0, high=SIZE)[0]
    tint, wobble = normal(key, f"{name} tint", 2, count)[0]
    color = torch.stack([_at(channel, *position) for channel in image]) * (1 + jitter * tint)
    return _strokes(image, position, _at(flow, *position) + 0.15 * wobble, color, length, width)


def _night(key: Keys, x: Tensor, y: Tensor) -> Tensor:
    """A night sky in long strokes, with whirls, stars and a moon over dark hills."""
    stream, glow = 26 * _noise(key, "stream", SIZE, 120, 1) + 0.7 * y, torch.zeros_like(y)
    spots = [(48, 204, 30, 1), (104, 96, 42, 0), (40, 50, 17, 1), (70, 150, 14, 1), (120, 190, 26, 0)]
    spots += [(26, 118, 12, 1), (112, 28, 15, 1), (140, 134, 11, 1), (86, 236, 12, 1)]
    for at_y, at_x, reach, shines in spots:
        radius = ((y - at_y) ** 2 + (x - at_x) ** 2).sqrt()
        near = 1 / (1 + (radius / (1.7 * reach)) ** 5)
        stream = stream + near * (2 * radius - stream)  # circles around the spot
        if shines:
            shine = 1.1 - radius / (1.35 * reach) + 0.1 * (radius * 0.8).sin()
            glow = torch.maximum(glow, shine.clamp(0, 1))
    slope_y, slope_x = torch.gradient(stream, spacing=1 / _FINE)
    flow = torch.atan2(-slope_x, slope_y)
    bands = 0.34 + 0.15 * _noise(key, "bands", SIZE, 70, 3) + 0.16 * (stream / 9).sin()
    night = _palette(
        (0.24, 0.1, 270), (0.36, 0.14, 262), (0.5, 0.13, 250), (0.66, 0.09, 220), (0.86, 0.07, 195)
    )
    star = _palette(
        (0.5, 0.12, 255), (0.75, 0.08, 180), (0.84, 0.15, 95), (0.92, 0.16, 90), (0.98, 0.06, 100)
    )
    image = torch.where(glow > 0.2, _blend(star, glow), _blend(night, bands))
    for number, (line, color) in enumerate(((196, (0.4, 0.09, 245)), (222, (0.27, 0.07, 200)))):
        ridge = line + 13 * _noise(key, f"hill {number}", SIZE, 110, 2)[0]
        slope = torch.atan2(torch.gradient(ridge, spacing=1 / _FINE)[0], torch.ones_like(ridge))
        cover = smoothstep(y - ridge, -0.5, 0.5)
        shade = 1 + 0.3 * ((y - ridge) / 4).sin()
        image = paint(image, _palette(color)[0] * shade, cover)
        flow = torch.where(cover > 0.5, slope.expand_as(flow), flow)
    return _dabs(key, image, flow, "night", count=11000, length=11, width=3.0, jitter=0.16)


def _sea(key: Keys, x: Tensor, y: Tensor) -> Tensor:
    """Rows of breaking waves with foam edges under a pale sky, in flat colors and dark lines."""
    image = _blend(_palette((0.9, 0.05, 85), (0.84, 0.07, 55)), y / SIZE)
    sea = _palette((0.36, 0.11, 262), (0.48, 0.12, 250), (0.62, 0.09, 228), (0.42, 0.11, 240))
    foam, ink = _palette((0.96, 0.02, 95), (0.25, 0.08, 264))
    rows = 9
    phases, lengths = uniform(key, "phase", 2, rows)[0].tolist()
    for row in range(rows):
        bent = x + 5 * _noise(key, f"bend {row}", SIZE, 64, 4)
        cycle = bent / (80 + 40 * lengths[row]) + phases[row]
        rise = cycle - cycle.floor()
        crest = torch.where(rise < 0.72, (rise / 0.72) ** 2, ((1 - rise) / 0.28) ** 1.4)
        curl = _noise(key, f"curl {row}", SIZE, 17, 4)
        depth = y - (30 * row + 28 - 32 * crest)
        lines = (depth / 9 + 0.14 * curl).remainder(1)
        body = sea[row % len(sea)] * (1.1 - 0.005 * depth.clamp(0, 60))
        body = paint(body, foam * 0.92, smoothstep((lines - 0.5).abs(), 0.37, 0.47) * 0.6)
        body = paint(foam, body, smoothstep(depth + 2.6 * curl - 6 * crest, 2.2, 3.4))
        body = paint(ink, body, smoothstep(depth, 0.9, 1.9))
        image = paint(image, body, smoothstep(depth, -0.4, 0.4))
    return image * (1 + 0.02 * normal(key, "paper", *y.shape)[0])


def _meadow(key: Keys, x: Tensor, y: Tensor) -> Tensor:
    """A meadow of poppies under a summer sky, in short strokes."""
    puff = _noise(key, "clouds", SIZE, 110, 4)
    image = _blend(_palette((0.62, 0.11, 250), (0.78, 0.08, 235), (0.9, 0.05, 90)), y / 120)
    image = paint(image, _palette((0.96, 0.03, 80))[0], smoothstep(puff, 0.1, 1.4))
    flow = 0.5 * _noise(key, "wind", SIZE, 90, 2)
    far = 92 + 9 * _noise(key, "far", SIZE, 80, 2)[0]
    image = paint(image, _palette((0.52, 0.08, 200))[0].expand_as(image), smoothstep(y - far, -0.5, 0.5))
    near = 112 + 7 * _noise(key, "near", SIZE, 120, 2)[0]
    patches = 0.5 + 0.4 * _noise(key, "patches", SIZE, 60, 4)
    grass = _palette((0.42, 0.1, 150), (0.58, 0.14, 135), (0.72, 0.15, 118), (0.82, 0.13, 100))
    ground = smoothstep(y - near, -0.5, 0.5)
    image = paint(image, _blend(grass, patches), ground)
    flow = torch.where(ground > 0.5, math.pi / 2 + 0.6 * _noise(key, "blades", SIZE, 50, 2), flow)
    image = _dabs(key, image, flow, "meadow", count=14000, length=8, width=2.4, jitter=0.12)
    count = 900
    depth, across, kind = uniform(key, "poppies", 3, count)[0]
    order = depth.argsort()  # the near ones last
    at = torch.stack([118 + 134 * depth[order] ** 0.8, across[order] * SIZE])
    petals = _palette((0.58, 0.22, 28), (0.64, 0.21, 35), (0.52, 0.2, 22), (0.87, 0.16, 95), (0.93, 0.03, 90))
    color = _pick(petals, (kind[order] * 5).long())
    for near_rows in (range(0, count // 2), range(count // 2, count)):
        size = 3.0 if near_rows.start == 0 else 5.4
        rows = torch.tensor(near_rows)
        angle = normal(key, f"petal {near_rows.start}", len(rows))[0]
        image = _strokes(image, at[:, rows], angle, color[:, rows], size * 0.5, size)
    return image


def _glass(key: Keys, x: Tensor, y: Tensor) -> Tensor:
    """Leaded glass: glowing panes of strong colors around a rose."""
    radius = ((x - 128) ** 2 + (y - 128) ** 2).sqrt()
    angle = torch.atan2(y - 128, x - 128)
    count = 150
    seat = uniform(key, "panes", count, 2, low=-8, high=SIZE + 8)[0]
    seat = seat[((seat - 128) ** 2).sum(1).sqrt() > 92]
    away = torch.stack([((y - at_y) ** 2 + (x - at_x) ** 2).sqrt() for at_y, at_x in seat.tolist()])
    (first, second), near = away.topk(2, dim=0, largest=False)
    gap, pane = second - first, near[0]
    ring = (radius / 26).floor().clamp(max=3)
    petals = torch.tensor([1.0, 8.0, 12.0, 16.0])[ring.long()]
    turn = (angle / (2 * math.pi) + 0.5) * petals + 0.5 * ring
    sector = turn - turn.floor()
    sides = torch.minimum(sector, 1 - sector) * (2 * math.pi / petals) * radius
    rims = torch.minimum(radius - 26 * ring, torch.where(ring < 3, 26 * (ring + 1), 92.0) - radius)
    rose = radius < 92
    rose_gap = torch.where(ring == 0, rims.maximum(26 - radius), torch.minimum(sides, rims))
    gap = torch.where(rose, rose_gap, torch.minimum(gap, (radius - 92) * 2))
    pane = torch.where(rose, 200 + (ring * 31 + turn.floor().remainder(petals) % 2 * 7).long(), pane)
    colors = _palette(
        (0.5, 0.2, 27), (0.45, 0.17, 262), (0.6, 0.16, 150), (0.82, 0.16, 88), (0.5, 0.17, 305),
        (0.66, 0.12, 215), (0.68, 0.18, 50),
    )  # fmt: skip
    table = integers(key, "glass", 512, below=7)[0]
    glass = _pick(colors, table[pane])
    streaks = _noise(key, "streaks", SIZE, 26, 4)
    glow = 0.75 + 0.4 * smoothstep(gap, 0, 11) + 0.1 * streaks
    lead = _palette((0.16, 0.02, 260))[0] * (
        1 + 1.2 * smoothstep(gap, 0.2, 1.6) * (1 - smoothstep(gap, 1.6, 2.6))
    )
    return paint(lead, glass * glow, smoothstep(gap, 2.0, 2.9))


def _circles(key: Keys, x: Tensor, y: Tensor) -> Tensor:
    """Concentric rings in squares, all in different colors, with brush marks."""
    pitch = SIZE / 4
    bent_x, bent_y = (
        x + 2.2 * _noise(key, "bend x", SIZE, 40, 3),
        y + 2.2 * _noise(key, "bend y", SIZE, 40, 3),
    )
    row, column = (bent_y / pitch).floor().clamp(0, 3), (bent_x / pitch).floor().clamp(0, 3)
    v, u = bent_y - (row + 0.5) * pitch, bent_x - (column + 0.5) * pitch
    radius = (u**2 + v**2).sqrt() + 1.2 * _noise(key, "edge", SIZE, 22, 3)
    ring = (radius / 7.4).floor().clamp(max=4)
    palette = _palette(
        (0.55, 0.2, 28), (0.8, 0.15, 88), (0.45, 0.15, 262), (0.62, 0.13, 200), (0.6, 0.15, 145),
        (0.7, 0.16, 50), (0.42, 0.13, 310), (0.92, 0.04, 90), (0.3, 0.06, 265), (0.72, 0.13, 350),
    )  # fmt: skip
    table = integers(key, "rings", 128, below=10)[0]
    number = ((row * 4 + column) * 5 + ring).long()
    image = _pick(palette, table[number])
    around = torch.where(ring < 4, torch.atan2(u, -v), 0.4 * _noise(key, "square", SIZE, 60, 2))
    image = image * (1 + 0.1 * _noise(key, "wash", SIZE, 30, 5))
    return _dabs(key, image, around, "circles", count=9000, length=7, width=2.6, jitter=0.09)


def _marbling(key: Keys, x: Tensor, y: Tensor) -> Tensor:
    """Marbled paper: bands of color, combed and whirled."""
    for number, period in enumerate((110, 60, 30)):
        strength = 30 / (1 + 1.3 * number)
        x = x + strength * _noise(key, f"drift x {number}", SIZE, period, 2)
        y = y + strength * _noise(key, f"drift y {number}", SIZE, period, 2)
    comb = (x / 22).remainder(1)
    y = y + 26 * ((2 * comb - 1).abs() - 0.5) ** 2 * torch.where((x / 22).floor().remainder(2) > 0, 4.0, -4.0)
    phase = y / 11
    band = phase.floor()
    palette = _palette(
        (0.35, 0.11, 262), (0.93, 0.03, 90), (0.52, 0.19, 27), (0.86, 0.06, 85), (0.62, 0.11, 210),
        (0.8, 0.14, 80), (0.28, 0.05, 260),
    )  # fmt: skip
    table = integers(key, "bands", 256, below=7)[0]
    image = _pick(palette, table[band.long().remainder(256)])
    edge = phase - band
    vein = 1 - smoothstep(torch.minimum(edge, 1 - edge), 0.02, 0.1)
    image = paint(image, _palette((0.95, 0.03, 90))[0], 0.75 * vein)
    return image * (1 + 0.04 * _noise(key, "paper", SIZE, 14, 4))


_PAINTERS: dict[str, Callable[[Keys, Tensor, Tensor], Tensor]] = {
    "night": _night,
    "sea": _sea,
    "meadow": _meadow,
    "glass": _glass,
    "circles": _circles,
    "marbling": _marbling,
}


if __name__ == "__main__":
    PAINTING_FOLDER.mkdir(exist_ok=True)
    for painting in PAINTINGS:
        save_painting(draw_painting(painting), PAINTING_FOLDER / f"{painting}.png")
