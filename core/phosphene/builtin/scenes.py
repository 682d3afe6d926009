"""Endless labelled 64x64 pictures with their truth: one lit shape on a natural background.

Everything but the outline (colours, fill, area, place, tilt, light, background) is drawn without
looking at the class, so only shape tells the classes apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import (
    fractal,
    integers,
    keys_of,
    normal,
    oklch,
    paint,
    pixel_grid,
    smoothstep,
    uniform,
)

SIZE = 64
CLASSES: tuple[str, ...] = (
    "circle", "ring", "arrow", "drop", "triangle",
    "square", "star", "cross", "heart", "flower",
)  # fmt: skip
BACKGROUNDS: tuple[str, ...] = ("sky", "leaves", "grass", "bricks", "sand", "marble")

_TABLE, _REACH = 160, 1.5  # samples per side of a distance table, and its half-width in units
_CHUNK = 256  # scenes drawn at once


@dataclass(frozen=True)
class Scenes:
    """N pictures and all that is true of them.

    ``images`` (N, 3, 64, 64) float32 in [0, 1], whole multiples of 1/255; ``labels`` (N,) int64
    into ``CLASSES``; ``masks`` (N, 64, 64) bool, the pixels whose centre lies in the object;
    ``backgrounds`` (N,) int64 into ``BACKGROUNDS``.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    backgrounds: Tensor

    def __len__(self) -> int:
        """Count the scenes."""
        return len(self.labels)


def draw_scenes(
    count: int,
    *,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    start: int = 0,
    classes: Sequence[int] | None = None,
    background: Sequence[int] | None = None,
) -> Scenes:
    """Draw scenes ``start`` … ``start + count - 1`` of the stream (seed, split).

    Scene i depends on (seed, split, i) only, whatever else is drawn with it. ``classes`` and
    ``background`` force the class or the background kind of each scene (``count`` indices); all
    else about the scene stays as it was.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if count < 0 or start < 0:
        raise ValueError(f"count and start must not be negative, got {count} and {start}")
    keys = keys_of(f"scene/{seed}/{split}/{index}" for index in range(start, start + count))
    labels = _choice(keys, "class", CLASSES, classes)
    kinds = _choice(keys, "background", BACKGROUNDS, background)
    images = torch.empty(count, 3, SIZE, SIZE)
    masks = torch.empty(count, SIZE, SIZE, dtype=torch.bool)
    for first in range(0, count, _CHUNK):
        part = slice(first, first + _CHUNK)
        images[part], masks[part] = _draw(keys[part], labels[part], kinds[part])
    return Scenes(images, labels, masks, kinds)


def _choice(keys: Tensor, draw: str, names: tuple[str, ...], forced: Sequence[int] | None) -> Tensor:
    if forced is None:
        return integers(keys, draw, below=len(names))
    chosen = torch.as_tensor(forced, dtype=torch.int64)
    if chosen.shape != keys.shape:
        raise ValueError(f"{len(keys)} scenes need {len(keys)} {draw} indices, got {len(chosen)}")
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(names):
        raise ValueError(f"{draw} indices must lie in 0 … {len(names) - 1}")
    return chosen.clone()


def _draw(keys: Tensor, labels: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Paint one chunk: images (n, 3, 64, 64) and masks (n, 64, 64)."""
    hue, light = _ground_tone(keys, kinds)
    image = torch.empty(len(keys), 3, SIZE, SIZE)
    for kind, painter in enumerate(_GROUNDS):
        chosen = (kinds == kind).nonzero().squeeze(1)
        if len(chosen):
            image[chosen] = painter(keys[chosen], hue[chosen], light[chosen])

    pose = _pose(keys)
    sun = uniform(keys, "sun", low=math.radians(200), high=math.radians(340)).double()
    sun_x, sun_y = sun.cos().float(), sun.sin().float()
    distance = _distance(labels, pose, torch.zeros_like(sun_x), torch.zeros_like(sun_y))
    drop = uniform(keys, "shadow", low=1.5, high=4.0)
    shadow = _distance(labels, pose, -sun_x * drop, -sun_y * drop)
    image = image * (1 - 0.5 * smoothstep(-shadow, -4.0, 2.5)).unsqueeze(1)

    surface = _light(keys, _fill(keys, hue, light), distance, sun_x, sun_y)
    image = paint(image, surface, (0.5 - distance).clamp(0, 1))
    return _expose(keys, image), distance <= 0


# ---- the object ---------------------------------------------------------------------------------


def _outline(name: str) -> list[Tensor]:
    """Closed polygons (K, 2) of a class's outline; inside is where an odd number encloses."""
    turn = torch.arange(120, dtype=torch.float64) * (2 * math.pi / 120)

    def polar(radius: Tensor | float, angle: Tensor) -> Tensor:
        return torch.stack([radius * angle.sin(), -radius * angle.cos()], dim=1)

    def regular(corners: int, offset: float = 0.0) -> Tensor:
        return torch.arange(corners, dtype=torch.float64) * (2 * math.pi / corners) + offset

    match name:
        case "circle":
            return [polar(1.0, turn)]
        case "ring":
            return [polar(1.0, turn), polar(0.42, turn)]
        case "arrow":
            right = torch.tensor([[0.0, -1.0], [0.95, 0.1], [0.42, 0.1], [0.42, 1.0]])
            return [torch.cat([right, right[1:].flip(0) * torch.tensor([-1.0, 1.0])]).double()]
        case "drop":
            width = turn.sin() * (turn / 2).sin() ** 1.5
            return [torch.stack([width, -turn.cos()], dim=1)]
        case "triangle":
            return [polar(1.0, regular(3))]
        case "square":
            return [polar(1.0, regular(4, math.pi / 4))]
        case "star":
            radius = torch.tensor([1.0, 0.5], dtype=torch.float64).repeat(5)
            return [polar(radius, regular(10))]
        case "cross":
            w = 0.36
            corner = torch.tensor([[w, 1], [w, w], [1, w], [1, -w], [w, -w], [w, -1]])
            return [torch.cat([corner, -corner]).double()]
        case "heart":
            y = 13 * turn.cos() - 5 * (2 * turn).cos() - 2 * (3 * turn).cos() - (4 * turn).cos()
            return [torch.stack([16 * turn.sin() ** 3, -y], dim=1)]
        case _:
            return [polar(0.58 + 0.42 * (2.5 * turn).cos().abs() ** 0.6, turn)]


@lru_cache(maxsize=1)
def _tables() -> Tensor:
    """Signed distances (10, 160, 160) to the outlines, centred and scaled to unit area."""
    line = torch.linspace(-_REACH, _REACH, _TABLE, dtype=torch.float64)
    y, x = line[:, None], line[None, :]
    tables = []
    for name in CLASSES:
        loops = _outline(name)
        pairs = [(loop, loop.roll(-1, 0)) for loop in loops]
        twice = [p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1] for p, q in pairs]
        areas = [float(t.sum()) / 2 for t in twice]
        centre = ((pairs[0][0] + pairs[0][1]) * twice[0][:, None]).sum(0) / (6 * areas[0])
        side = math.sqrt(abs(areas[0]) - sum(abs(a) for a in areas[1:]))
        nearest = torch.full((_TABLE, _TABLE), math.inf, dtype=torch.float64)
        inside = torch.zeros(_TABLE, _TABLE, dtype=torch.bool)
        for start, end in ((p, q) for loop in pairs for p, q in zip(*loop, strict=True)):
            (px, py), (qx, qy) = ((v - centre) / side for v in (start, end))
            ex, ey = qx - px, qy - py
            along = (((x - px) * ex + (y - py) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            gap = (x - px - along * ex) ** 2 + (y - py - along * ey) ** 2
            nearest = torch.minimum(nearest, gap)
            if py != qy:
                inside ^= ((y < py) != (y < qy)) & (x < px + (y - py) * ex / ey)
        tables.append(torch.where(inside, -nearest.sqrt(), nearest.sqrt()).float())
    return torch.stack(tables)


@dataclass(frozen=True)
class _Pose:
    """Where the object lies: centre and side in pixels, and the frame (n, 2, 2) it is drawn in."""

    x: Tensor
    y: Tensor
    side: Tensor
    frame: Tensor


def _pose(keys: Tensor) -> _Pose:
    tilt = uniform(keys, "tilt", low=-0.6, high=0.6).double()
    stretch = uniform(keys, "stretch", low=-0.12, high=0.12).double().exp()
    cos, sin = tilt.cos(), tilt.sin()
    frame = torch.stack([cos * stretch, sin * stretch, -sin / stretch, cos / stretch], dim=1)
    return _Pose(
        x=uniform(keys, "x", low=21, high=43),
        y=uniform(keys, "y", low=21, high=43),
        side=(uniform(keys, "area", low=0.12, high=0.2) * SIZE**2).sqrt(),
        frame=frame.float().view(-1, 2, 2),
    )


def _distance(labels: Tensor, pose: _Pose, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Signed distance (n, 64, 64) in pixels to the outline, moved by a shift; inside negative."""
    y, x = pixel_grid(SIZE)
    dx, dy = x - _map(pose.x + shift_x), y - _map(pose.y + shift_y)
    scale = _map(pose.side) * _REACH
    u = (_map(pose.frame[:, 0, 0]) * dx + _map(pose.frame[:, 0, 1]) * dy) / scale
    v = (_map(pose.frame[:, 1, 0]) * dx + _map(pose.frame[:, 1, 1]) * dy) / scale
    grid = torch.stack([u, v], dim=-1)
    table = _tables()[labels].unsqueeze(1)
    found = F.grid_sample(table, grid, padding_mode="border", align_corners=True)
    return found.squeeze(1) * _map(pose.side)


def _fill(keys: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    """Colour the object's surface (n, 3, 64, 64), standing out from a ground of that tone."""
    own_hue = hue + uniform(keys, "own hue", low=70, high=290)
    away = torch.where(light > 0.6, -1.0, 1.0)
    own_light = light + away * uniform(keys, "own light", low=0.06, high=0.3)
    chroma = uniform(keys, "own chroma", low=0.07, high=0.2)
    first = oklch(own_light, chroma, own_hue)
    step = uniform(keys, "second light", low=0.14, high=0.3) * torch.where(own_light > 0.6, -1, 1)
    second = oklch(own_light + step, chroma * 0.8, own_hue + uniform(keys, "second hue", low=-60, high=60))

    y, x = pixel_grid(SIZE)
    angle = uniform(keys, "fill angle", high=math.pi).double()
    cos, sin = _map(angle.cos().float()), _map(angle.sin().float())
    along, across = (x - 32) * cos + (y - 32) * sin, (y - 32) * cos - (x - 32) * sin
    period = _map(uniform(keys, "fill period", low=5.0, high=9.0))
    kind = _map(integers(keys, "fill", below=6))
    blend = along / 60 + 0.5
    wave_a, wave_b = _wave(along / period), _wave(across / period)
    dots = (wave_a - 0.5) ** 2 + (wave_b - 0.5) ** 2
    for index, pattern in (
        (1, 0.12 + 0.1 * blend),
        (2, smoothstep(wave_a, 0.4, 0.6)),
        (3, smoothstep((wave_a - 0.5) * (wave_b - 0.5), -0.02, 0.02)),
        (4, 1 - smoothstep(dots, 0.05, 0.12)),
        (5, smoothstep(fractal(keys, "fill noise", SIZE, cells=4, octaves=4)[:, 0], -1, 1)),
    ):
        blend = torch.where(kind == index, pattern, blend)
    return paint(first[:, :, None, None], second[:, :, None, None], blend.clamp(0, 1))


def _light(keys: Tensor, colour: Tensor, distance: Tensor, sun_x: Tensor, sun_y: Tensor) -> Tensor:
    """Round the surface's edge off and light it from the sun's side, with a soft highlight."""
    rim = 1 + distance / _map(uniform(keys, "bevel", low=3.5, high=8.0))
    height = (1 - rim.clamp(0, 1) ** 2).sqrt() * 3
    padded = F.pad(height, (1, 1, 1, 1), mode="replicate")
    slope_x = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    slope_y = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    facing = 0.75 - 0.6 * (slope_x * _map(sun_x) + slope_y * _map(sun_y))
    facing = facing / (1 + slope_x**2 + slope_y**2).sqrt()
    gloss = _map(uniform(keys, "gloss", high=0.5)) * smoothstep(facing, 0.78, 1.05)
    lit = colour * (0.45 + 0.73 * facing).unsqueeze(1)
    return lit + (1 - lit) * gloss.unsqueeze(1)


def _expose(keys: Tensor, image: Tensor) -> Tensor:
    """Take the photograph: a little blur, vignette and sensor noise, then 8-bit rounding."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    soft = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16
    image = image + (soft - image) * uniform(keys, "blur", 1, 1, 1, high=0.6)
    y, x = pixel_grid(SIZE)
    image = image * (1.03 - 0.16 * ((x - 32) ** 2 + (y - 32) ** 2) / 2048)
    noise = normal(keys, "noise", 3, SIZE, SIZE) * uniform(keys, "gain", 1, 1, 1, high=0.022)
    # 8 bits, so that PNG keeps a scene exactly and a last-bit difference between machines is gone.
    return ((image + noise).clamp(0, 1) * 255).round() / 255


# ---- the ground ---------------------------------------------------------------------------------


def _map(scalars: Tensor) -> Tensor:
    """One number per scene (n,) as a map (n, 1, 1)."""
    return scalars[:, None, None]


def _wave(phase: Tensor) -> Tensor:
    """A triangle wave in [0, 1] of period 1: exact arithmetic, unlike a sine."""
    return (2 * (phase - phase.floor()) - 1).abs()


def _ground_tone(keys: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the hue (degrees) and lightness (n,) of each scene's ground, within its kind's range."""
    low = torch.tensor([200.0, 20.0, 95.0, 15.0, 50.0, 0.0])[kinds]
    high = torch.tensor([300.0, 160.0, 150.0, 75.0, 95.0, 360.0])[kinds]
    unit = uniform(keys, "ground hue")
    return low + (high - low) * unit, uniform(keys, "ground light", low=0.42, high=0.8)


def _tone(hue: Tensor, light: Tensor, chroma: float) -> Tensor:
    """A ground colour as (n, 3, 1, 1)."""
    return oklch(light, torch.full_like(light, chroma), hue)[:, :, None, None]


def _lay(
    image: Tensor, colour: Tensor, shade: Tensor, coverage: Tensor, shadow: Tensor | None = None
) -> None:
    """Paint colour (n, 3) times shade (n, 64, 64) in place: strokes are many, so passes few."""
    rest = 1 - coverage
    image.mul_((rest if shadow is None else rest.mul_(shadow)).unsqueeze(1))
    image.addcmul_(colour[:, :, None, None], shade.mul_(coverage).unsqueeze(1))


def _sky(keys: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    y, _ = pixel_grid(SIZE)
    horizon = hue + uniform(keys, "horizon", low=-20, high=130)
    fade = (y / SIZE).expand(len(keys), SIZE, SIZE)
    sky = paint(_tone(hue, light - 0.06, 0.11), _tone(horizon, light + 0.12, 0.07), fade)
    puff = fractal(keys, "clouds", SIZE, cells=2, octaves=6)[:, 0]
    cover = smoothstep(puff + _map(uniform(keys, "cover", low=-0.6, high=0.6)), -0.2, 1.8)
    below = torch.cat([puff[:, 3:], puff[:, -3:]], dim=1)
    white = _tone(horizon, (light + 0.32).clamp(max=0.98), 0.015)
    shade = (1 - 0.12 * (puff - below).clamp(-1, 1.5)).unsqueeze(1)
    return paint(sky, white / shade.clamp(min=0.9), cover * 0.85)


def _leaves(keys: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    """Dead leaves: opaque leaves fallen over each other, their sizes a power law."""
    count = 70
    y, x = pixel_grid(SIZE)
    size = 4.0 / (1 - 0.88 * uniform(keys, "leaf size", count)).sqrt()
    size, _ = size.sort(dim=1, descending=True)
    angle = uniform(keys, "leaf angle", count, high=2 * math.pi).double()
    cos, sin = angle.cos().float(), angle.sin().float()
    at_x = uniform(keys, "leaf x", count, low=-4, high=68)
    at_y = uniform(keys, "leaf y", count, low=-4, high=68)
    colours = oklch(
        light[:, None] + uniform(keys, "leaf light", count, low=-0.22, high=0.1),
        uniform(keys, "leaf chroma", count, low=0.04, high=0.12),
        hue[:, None] + uniform(keys, "leaf hue", count, low=-28, high=28),
    )
    image = _tone(hue, light - 0.2, 0.05).repeat(1, 1, SIZE, SIZE)
    for i in range(count):
        dx, dy = x - _map(at_x[:, i]), y - _map(at_y[:, i])
        u = dx * _map(cos[:, i]) + dy * _map(sin[:, i])
        v = dy * _map(cos[:, i]) - dx * _map(sin[:, i])
        half = _map(size[:, i])  # a lens: two arcs whose chord, 2 · half, is the leaf's length
        side = v.abs()
        edge = ((side + 0.6 * half).square_() + u.square_()).sqrt_() - 1.166 * half
        midrib = side.neg_().add_(0.8).clamp_(0, 0.5).mul_(-0.3)
        shade = v.mul_(0.1 / half).clamp_(-0.1, 0.1).add_(midrib).add_(1)
        shadow = (edge * -0.4).add_(1).clamp_(0, 1).mul_(-0.3).add_(1)
        _lay(image, colours[:, i], shade, edge.neg_().add_(0.5).clamp_(0, 1), shadow)
    return image


def _grass(keys: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    """Rows of curved, tapering blades, the near ones in front and lighter."""
    count = 110
    y, x = pixel_grid(SIZE)
    depth = torch.arange(count) / count
    root_x = uniform(keys, "blade x", count, low=-6, high=70)
    root_y = 10 + depth * 92 + uniform(keys, "blade y", count, low=-6, high=6)
    length = uniform(keys, "blade length", count, low=22, high=40)
    lean = uniform(keys, "blade lean", count, low=-11, high=11) + uniform(keys, "wind", 1, low=-8, high=8)
    width = uniform(keys, "blade width", count, low=1.0, high=2.6)
    colours = oklch(
        light[:, None] - 0.2 + 0.2 * depth + uniform(keys, "blade light", count, low=-0.12, high=0.1),
        uniform(keys, "blade chroma", count, low=0.06, high=0.14),
        hue[:, None] + uniform(keys, "blade hue", count, low=-16, high=16),
    )
    image = _tone(hue, light - 0.3, 0.06).repeat(1, 1, SIZE, SIZE)
    for i in range(count):
        t = (_map(root_y[:, i]) - y) / _map(length[:, i])  # 0 at the root, 1 at the tip
        bent = _map(root_x[:, i]) + _map(lean[:, i]) * t.clamp(min=0).square_()
        off = x - bent
        blade = torch.minimum(0.5 + _map(width[:, i]) * (1 - t) - off.abs(), 4 * t)
        shade = off.mul_(0.12).clamp_(-0.2, 0.15).add_(0.89 + 0.18 * t.clamp(0, 1))
        _lay(image, colours[:, i], shade, blade.clamp_(0, 1))
    return image


def _bricks(keys: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    y, x = pixel_grid(SIZE)
    tilt = _map(uniform(keys, "wall tilt", low=-0.12, high=0.12))
    across = x + tilt * (y - 32) + _map(uniform(keys, "wall x", high=20))
    down = y - tilt * (x - 32) + _map(uniform(keys, "wall y", low=16, high=28))
    tall = _map(uniform(keys, "course", low=7, high=11))
    row = (down / tall).floor()
    across = across + 0.5 * (row % 2) * 2.1 * tall + 16
    column = (across / (2.1 * tall)).floor()
    v, u = down - row * tall, across - column * 2.1 * tall
    gap = torch.minimum(torch.minimum(u, 2.1 * tall - u), torch.minimum(v, tall - v))
    number = (row.long() * 13 + column.long()).remainder(256).flatten(1)
    colours = oklch(
        light[:, None] - 0.1 + uniform(keys, "brick light", 256, low=-0.09, high=0.09),
        uniform(keys, "brick chroma", 256, low=0.04, high=0.1),
        hue[:, None] + uniform(keys, "brick hue", 256, low=-15, high=15),
    )
    brick = colours.transpose(1, 2).gather(2, number[:, None].expand(-1, 3, -1))
    rough = 1 + 0.05 * fractal(keys, "rough", SIZE, cells=8, octaves=4)
    edge = 0.1 * (smoothstep(tall - v, 0.8, 2.4) - smoothstep(v, 0.8, 2.4))
    brick = brick.view(-1, 3, SIZE, SIZE) * (rough - edge.unsqueeze(1))
    mortar = _tone(hue + 20, light + 0.06, 0.02) * rough
    return paint(mortar, brick, smoothstep(gap, 0.4, 1.3))


def _sand(keys: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    """Wind ripples, bent by slow noise, lit from one side, with grain."""
    y, x = pixel_grid(SIZE)
    angle = uniform(keys, "ripple angle", low=0.9, high=2.2).double()
    along = x * _map(angle.cos().float()) + y * _map(angle.sin().float())
    bend = fractal(keys, "bend", SIZE, cells=2, octaves=3)[:, 0]
    phase = along / _map(uniform(keys, "ripple", low=6.5, high=12)) + 0.32 * bend
    rise = phase - phase.floor()  # a slow windward and a steep lee slope
    ridge = torch.minimum(rise / 0.7, (1 - rise) / 0.3)
    slow = fractal(keys, "dune", SIZE, cells=2, octaves=4)[:, 0]
    grain = normal(keys, "grain", SIZE, SIZE)
    shade = 0.86 + 0.2 * smoothstep(ridge, 0, 1) + 0.04 * slow + 0.035 * grain
    return _tone(hue, light, 0.06) * shade.unsqueeze(1)


def _marble(keys: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    """1/f noise in correlated colours, with darker veins along its level lines."""
    noise = fractal(keys, "stone", SIZE, channels=3, cells=2, octaves=6)
    blend = smoothstep(noise[:, 0], -1.6, 1.6)
    other = hue + uniform(keys, "stone hue", low=-70, high=70)
    image = paint(_tone(hue, light - 0.14, 0.07), _tone(other, light + 0.12, 0.04), blend)
    vein = 1 - smoothstep((noise[:, 1] + 0.4 * noise[:, 0]).abs(), 0.0, 0.35)
    return image * (1 - 0.28 * vein.unsqueeze(1)) + 0.015 * noise


_GROUNDS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _sky, _leaves, _grass, _bricks, _sand, _marble,
)  # fmt: skip
