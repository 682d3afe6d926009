"""Drawn scenes: labeled 64x64 images with object masks, one shaded shape on a natural background.

Everything but the outline (colors, fill, area, position, tilt, light, background) is independent of the
class, so only the shape separates the classes. Throughout, a number per scene is a tensor (n, 1, 1, 1), a
map (n, 1, 64, 64), a color (n, 3, 1, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..torch_state import cpu_by_default
from .drawing import Keys, fractal, integers, keys_of, normal, oklch, paint, rotate, smoothstep, uniform

Points: TypeAlias = NDArray[Any]

SIZE = 64
_X = torch.arange(SIZE, dtype=torch.float32, device="cpu") + 0.5  # pixel centers
_Y = _X[:, None]
_REACH = 1.5  # half the width of a distance table, in units of the shape's side
_CHUNK = 256  # scenes drawn at once


@dataclass(frozen=True)
class Scenes:
    """N scenes with their ground truth.

    ``images`` (N, 3, 64, 64) float32 in [0, 1], integer multiples of 1/255; ``labels`` (N,) int64, indices
    into ``CLASSES``; ``masks`` (N, 64, 64) bool, the pixels whose center lies in the object;
    ``backgrounds`` (N,) int64, indices into ``BACKGROUNDS``; ``hints`` (N,) int64, the class that the
    background indicates, or None for scenes whose background is independent of the class.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    backgrounds: Tensor
    hints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@cpu_by_default()
def draw_scenes(
    count: int,
    *,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    start: int = 0,
    biased: bool = False,
    conflict: bool = False,
) -> Scenes:
    """Draw scenes ``start`` … ``start + count - 1`` of the stream (seed, split).

    Scene i depends on (seed, split, i) only, not on the batch. In ``biased`` scenes the background is a
    function of the class: one of the first five kinds in one of two ranges of its hue; with ``conflict`` it
    is the background of another class.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    keys = keys_of(f"scene/{seed}/{split}/{index}" for index in range(start, start + count))
    labels = integers(keys, "class", below=len(CLASSES))
    kinds, hints, tones = integers(keys, "background", below=len(BACKGROUNDS)), None, None
    if biased:
        away = 1 + integers(keys, "hint", below=len(CLASSES) - 1) if conflict else 0
        hints = (labels + away) % len(CLASSES)
        kinds, tones = hints % 5, hints // 5
    images = torch.empty(count, 3, SIZE, SIZE)
    masks = torch.empty(count, SIZE, SIZE, dtype=torch.bool)
    for first in range(0, count, _CHUNK):
        part = slice(first, first + _CHUNK)
        toned = None if tones is None else tones[part]
        images[part], masks[part] = _draw(keys[part], labels[part], kinds[part], toned)
    return Scenes(images, labels, masks, kinds, hints)


def _draw(keys: Keys, labels: Tensor, kinds: Tensor, tones: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw one chunk: images (n, 3, 64, 64) and masks (n, 64, 64); a tone selects half of the hue range."""
    image, hue = torch.empty(len(keys), 3, SIZE, SIZE), torch.empty(len(keys), 1, 1, 1)
    light = _number(keys, "ground light", 0.42, 0.8)
    for kind, (painter, low, high) in enumerate(_BACKGROUNDS.values()):
        if len(rows := (kinds == kind).nonzero()[:, 0]):
            row_keys = keys[rows.numpy()]
            hue[rows] = _number(row_keys, "ground hue", low, high)
            if tones is not None:
                hue[rows] = (hue[rows] + low + tones[rows, None, None, None] * (high - low)) / 2
            image[rows] = painter(row_keys, hue[rows], light[rows])
    sun = _number(keys, "sun", math.radians(200), math.radians(340)).double()
    sun_x, sun_y = sun.cos().float(), sun.sin().float()
    distance = _distance(keys, labels)
    drop = _number(keys, "shadow", 1.5, 4.0)
    shadow = _distance(keys, labels, -sun_x * drop, -sun_y * drop)
    image = image * (1 - 0.5 * smoothstep(-shadow, -4.0, 2.5))
    surface = _light(keys, _fill(keys, hue, light), distance, sun_x, sun_y)
    image = paint(image, surface, (0.5 - distance).clamp(0, 1))
    return _expose(keys, image), distance[:, 0] <= 0


def _number(keys: Keys, draw: str, low: float, high: float, *count: int) -> Tensor:
    """One uniform number per scene, or ``count`` of them, (n, count, 1, 1, 1)."""
    return uniform(keys, draw, *count, 1, 1, 1, low=low, high=high)


# ---- the object ---------------------------------------------------------------------------------

_TURN = np.arange(120) * (2 * math.pi / 120)  # a full turn


def _polar(radius: float | Points, angle: Points) -> Points:
    """Points at an angle clockwise from the top."""
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


# In float32: the bundled networks were trained on exactly these bits.
_ARROW = np.array(
    [(0, -1), (0.95, 0.1), (0.42, 0.1), (0.42, 1), (-0.42, 1), (-0.42, 0.1), (-0.95, 0.1)], np.float32
)
_ARMS = np.array([(0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36), (0.36, 1)], np.float32)
_HEART = 13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN)

# Closed polygons (K, 2) of x and y (down) around each shape, clockwise, and anticlockwise around its hole.
_OUTLINES: dict[str, list[Points]] = {
    "circle": [_polar(1.0, _TURN)],
    "ring": [_polar(1.0, _TURN), _polar(0.42, -_TURN)],
    "arrow": [_ARROW],
    "drop": [np.stack([np.sin(_TURN) * np.sin(_TURN / 2) ** 1.5, -np.cos(_TURN)], axis=1)],
    "triangle": [_polar(1.0, _TURN[::40])],
    "square": [_polar(1.0, _TURN[15::30])],
    "star": [_polar(np.tile([1.0, 0.5], 5), _TURN[::12])],
    "cross": [np.concatenate([_ARMS, -_ARMS])],
    "heart": [np.stack([16 * np.sin(_TURN) ** 3, -_HEART], axis=1)],
    "flower": [_polar(0.58 + 0.42 * abs(np.cos(2.5 * _TURN)) ** 0.6, _TURN)],
}
CLASSES = tuple(_OUTLINES)


@lru_cache(maxsize=1)
def _tables() -> Tensor:
    """Signed distances (10, 1, 160, 160) to the outlines, centered and scaled to unit area."""
    x = torch.linspace(-_REACH, _REACH, 160, dtype=torch.float64).numpy()
    y = x[:, None]
    tables = []
    for loops in _OUTLINES.values():
        starts = np.concatenate(loops).astype(float)
        ends = np.concatenate([np.roll(loop, -1, axis=0) for loop in loops]).astype(float)
        twice = starts[:, :1] * ends[:, 1:] - ends[:, :1] * starts[:, 1:]
        center = ((starts + ends) * twice).sum(0) / (3 * twice.sum())
        side = math.sqrt(twice.sum() / 2)
        nearest, inside = np.full((160, 160), np.inf), np.zeros((160, 160), dtype=bool)
        for (px, py), (qx, qy) in zip((starts - center) / side, (ends - center) / side, strict=True):
            ex, ey = qx - px, qy - py
            along = (((x - px) * ex + (y - py) * ey) / (ex * ex + ey * ey)).clip(0, 1)
            nearest = np.minimum(nearest, (x - px - along * ex) ** 2 + (y - py - along * ey) ** 2)
            if py != qy:
                inside ^= ((y < py) != (y < qy)) & (x < px + (y - py) * ex / ey)
        tables.append(np.where(inside, -np.sqrt(nearest), np.sqrt(nearest)))
    return torch.from_numpy(np.stack(tables)[:, None]).float()


def _distance(keys: Keys, labels: Tensor, shift_x: Tensor | float = 0, shift_y: Tensor | float = 0) -> Tensor:
    """Signed distance in pixels to the outlines, shifted; negative inside."""
    tilt = _number(keys, "tilt", -0.6, 0.6).double()
    stretch = _number(keys, "stretch", -0.12, 0.12).double().exp()
    side = (_number(keys, "area", 0.12, 0.2) * SIZE**2).sqrt()
    dx = _X - (_number(keys, "x", 21, 43) + shift_x)
    dy = _Y - (_number(keys, "y", 21, 43) + shift_y)
    u = (tilt.cos() * stretch).float() * dx + (tilt.sin() * stretch).float() * dy
    v = (tilt.cos() / stretch).float() * dy - (tilt.sin() / stretch).float() * dx
    grid = torch.stack([u, v], dim=-1)[:, 0] / (side * _REACH)
    return side * F.grid_sample(_tables()[labels], grid, padding_mode="border", align_corners=True)


def _fill(keys: Keys, hue: Tensor, light: Tensor) -> Tensor:
    """Color and pattern of the objects (n, 3, 64, 64), in contrast to the background's hue and lightness."""
    own_hue = hue + _number(keys, "own hue", 70, 290)
    own_light = light + torch.where(light > 0.6, -1.0, 1.0) * _number(keys, "own light", 0.06, 0.3)
    chroma = _number(keys, "own chroma", 0.07, 0.2)
    step = _number(keys, "second light", 0.14, 0.3) * torch.where(own_light > 0.6, -1, 1)
    first = oklch(own_light, chroma, own_hue)
    second = oklch(own_light + step, chroma * 0.8, own_hue + _number(keys, "second hue", -60, 60))
    along, across = rotate(_number(keys, "fill angle", 0, math.pi), _X - 32, _Y - 32)
    period = _number(keys, "fill period", 5, 9)
    fade, wave_a, wave_b = along / 60 + 0.5, _wave(along / period), _wave(across / period)
    patterns = [
        fade,
        0.12 + 0.1 * fade,
        smoothstep(wave_a, 0.4, 0.6),
        smoothstep((wave_a - 0.5) * (wave_b - 0.5), -0.02, 0.02),
        1 - smoothstep((wave_a - 0.5) ** 2 + (wave_b - 0.5) ** 2, 0.05, 0.12),
        smoothstep(fractal(keys, "fill noise", SIZE, cells=4, octaves=4), -1, 1),
    ]
    pattern = torch.stack(patterns)[integers(keys, "fill", below=6), torch.arange(len(keys))]
    return paint(first, second, pattern.clamp(0, 1))


def _wave(phase: Tensor) -> Tensor:
    """A triangle wave in [0, 1] of period 1: exact arithmetic, unlike a sine."""
    return (2 * (phase - phase.floor()) - 1).abs()


def _light(keys: Keys, color: Tensor, distance: Tensor, sun_x: Tensor, sun_y: Tensor) -> Tensor:
    """Shade the surface with a bevelled edge, lit from the sun's direction, with a soft highlight."""
    rim = 1 + distance / _number(keys, "bevel", 3.5, 8.0)
    height = F.pad((1 - rim.clamp(0, 1) ** 2).sqrt() * 3, (1, 1, 1, 1), mode="replicate")
    slope_y, slope_x = (g[..., 1:-1, 1:-1] for g in torch.gradient(height, dim=(2, 3)))
    facing = 0.75 - 0.6 * (slope_x * sun_x + slope_y * sun_y)
    facing = facing / (1 + slope_x**2 + slope_y**2).sqrt()
    gloss = _number(keys, "gloss", 0, 0.5) * smoothstep(facing, 0.78, 1.05)
    lit = color * (0.45 + 0.73 * facing)
    return lit + (1 - lit) * gloss


def _expose(keys: Keys, image: Tensor) -> Tensor:
    """Camera effects: slight blur, vignette and sensor noise, then rounding to 8 bits."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    soft = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16
    image = paint(image, soft, _number(keys, "blur", 0, 0.6))
    image = image * (1.03 - 0.16 * ((_X - 32) ** 2 + (_Y - 32) ** 2) / 2048)
    noise = normal(keys, "noise", 3, SIZE, SIZE) * _number(keys, "gain", 0, 0.022)
    # 8 bits, so that PNG stores a scene exactly and last-bit differences between machines vanish.
    return ((image + noise).clamp(0, 1) * 255).round() / 255


# ---- the backgrounds, each with a hue and a lightness -------------------------------------------


def _sky(keys: Keys, hue: Tensor, light: Tensor) -> Tensor:
    horizon = hue + _number(keys, "horizon", -20, 130)
    sky = paint(oklch(light - 0.06, 0.11, hue), oklch(light + 0.12, 0.07, horizon), _Y / SIZE)
    puff = fractal(keys, "clouds", SIZE, cells=2, octaves=6)
    cover = smoothstep(puff + _number(keys, "cover", -0.6, 0.6), -0.2, 1.8)
    below = torch.cat([puff[:, :, 3:], puff[:, :, -3:]], dim=2)
    white = oklch((light + 0.32).clamp(max=0.98), 0.015, horizon)
    shade = 1 - 0.12 * (puff - below).clamp(-1, 1.5)
    return paint(sky, white / shade.clamp(min=0.9), cover * 0.85)


def _leaves(keys: Keys, hue: Tensor, light: Tensor) -> Tensor:
    """Dead leaves model: opaque, overlapping leaves with power-law sizes."""
    half = 4.0 / (1 - 0.88 * _number(keys, "leaf size", 0, 1, 70)).sqrt()
    half, _ = half.sort(dim=1, descending=True)
    angle = _number(keys, "leaf angle", 0, 2 * math.pi, 70)
    at_x, at_y = _number(keys, "leaf x", -4, 68, 70), _number(keys, "leaf y", -4, 68, 70)
    own_light = light[:, None] + _number(keys, "leaf light", -0.22, 0.1, 70)
    own_hue = hue[:, None] + _number(keys, "leaf hue", -28, 28, 70)
    colors = oklch(own_light, _number(keys, "leaf chroma", 0.04, 0.12, 70), own_hue)
    image = oklch(light - 0.2, 0.05, hue)
    for i in range(70):
        along, across = rotate(angle[:, i], _X - at_x[:, i], _Y - at_y[:, i])
        # A lens: two arcs whose chord, twice the half, is the leaf's length.
        edge = ((across.abs() + 0.6 * half[:, i]) ** 2 + along**2).sqrt() - 1.166 * half[:, i]
        midrib = 0.3 * (0.8 - across.abs()).clamp(0, 0.5)
        shade = (across * (0.1 / half[:, i])).clamp(-0.1, 0.1) - midrib + 1
        shadow = 1 - 0.3 * (1 - 0.4 * edge).clamp(0, 1)
        leaf = (0.5 - edge).clamp(0, 1)
        image = torch.addcmul(image * ((1 - leaf) * shadow), colors[:, i], shade * leaf)
    return image


def _grass(keys: Keys, hue: Tensor, light: Tensor) -> Tensor:
    """Rows of curved, tapering blades, the near ones in front and lighter."""
    depth = torch.arange(110).view(-1, 1, 1, 1) / 110
    root_x = _number(keys, "blade x", -6, 70, 110)
    root_y = 10 + depth * 92 + _number(keys, "blade y", -6, 6, 110)
    length, width = _number(keys, "blade length", 22, 40, 110), _number(keys, "blade width", 1.0, 2.6, 110)
    lean = _number(keys, "blade lean", -11, 11, 110) + _number(keys, "wind", -8, 8, 1)
    own_light = light[:, None] - 0.2 + 0.2 * depth + _number(keys, "blade light", -0.12, 0.1, 110)
    own_hue = hue[:, None] + _number(keys, "blade hue", -16, 16, 110)
    colors = oklch(own_light, _number(keys, "blade chroma", 0.06, 0.14, 110), own_hue)
    image = oklch(light - 0.3, 0.06, hue)
    for i in range(110):
        t = (root_y[:, i] - _Y) / length[:, i]  # 0 at the root, 1 at the tip
        off = _X - (root_x[:, i] + lean[:, i] * t.clamp(min=0) ** 2)
        blade = torch.minimum(0.5 + width[:, i] * (1 - t) - off.abs(), 4 * t).clamp(0, 1)
        shade = (off * 0.12).clamp(-0.2, 0.15) + (0.89 + 0.18 * t.clamp(0, 1))
        image = torch.addcmul(image * (1 - blade), colors[:, i], shade * blade)
    return image


def _bricks(keys: Keys, hue: Tensor, light: Tensor) -> Tensor:
    tilt, tall = _number(keys, "wall tilt", -0.12, 0.12), _number(keys, "course", 7, 11)
    wide = 2.1 * tall
    down = _Y - tilt * (_X - 32) + _number(keys, "wall y", 16, 28)
    row = (down / tall).floor()
    across = _X + tilt * (_Y - 32) + _number(keys, "wall x", 0, 20) + 0.5 * (row % 2) * 2.1 * tall + 16
    column = (across / wide).floor()
    v, u = down - row * tall, across - column * 2.1 * tall
    gap = torch.minimum(torch.minimum(u, wide - u), torch.minimum(v, tall - v))
    colors = oklch(
        light - 0.1 + uniform(keys, "brick light", 1, 1, 256, low=-0.09, high=0.09),
        uniform(keys, "brick chroma", 1, 1, 256, low=0.04, high=0.1),
        hue + uniform(keys, "brick hue", 1, 1, 256, low=-15, high=15),
    )
    number = (row.long() * 13 + column.long()).remainder(256)
    brick = colors.expand(-1, -1, SIZE, -1).gather(3, number.expand(-1, 3, -1, -1))
    rough = 1 + 0.05 * fractal(keys, "rough", SIZE, cells=8, octaves=4)
    edge = 0.1 * (smoothstep(tall - v, 0.8, 2.4) - smoothstep(v, 0.8, 2.4))
    mortar = oklch(light + 0.06, 0.02, hue + 20) * rough
    return paint(mortar, brick * (rough - edge), smoothstep(gap, 0.4, 1.3))


def _sand(keys: Keys, hue: Tensor, light: Tensor) -> Tensor:
    """Wind ripples, bent by slow noise, lit from one side, with grain."""
    along, _ = rotate(_number(keys, "ripple angle", 0.9, 2.2), _X, _Y)
    bend = fractal(keys, "bend", SIZE, cells=2, octaves=3)
    phase = along / _number(keys, "ripple", 6.5, 12) + 0.32 * bend
    rise = phase - phase.floor()  # a slow windward and a steep lee slope
    ridge = torch.minimum(rise / 0.7, (1 - rise) / 0.3)
    slow = fractal(keys, "dune", SIZE, cells=2, octaves=4)
    grain = normal(keys, "grain", 1, SIZE, SIZE)
    return oklch(light, 0.06, hue) * (0.86 + 0.2 * smoothstep(ridge, 0, 1) + 0.04 * slow + 0.035 * grain)


def _marble(keys: Keys, hue: Tensor, light: Tensor) -> Tensor:
    """1/f noise in correlated colors, with darker veins along its level lines."""
    noise = fractal(keys, "stone", SIZE, channels=3, cells=2, octaves=6)
    dark = oklch(light - 0.14, 0.07, hue)
    pale = oklch(light + 0.12, 0.04, hue + _number(keys, "stone hue", -70, 70))
    vein = 1 - smoothstep((noise[:, 1:2] + 0.4 * noise[:, :1]).abs(), 0.0, 0.35)
    return paint(dark, pale, smoothstep(noise[:, :1], -1.6, 1.6)) * (1 - 0.28 * vein) + 0.015 * noise


# How each kind is drawn, and the range of its hue in degrees.
_BACKGROUNDS: dict[str, tuple[Callable[[Keys, Tensor, Tensor], Tensor], float, float]] = {
    "sky": (_sky, 200, 300),
    "leaves": (_leaves, 20, 160),
    "grass": (_grass, 95, 150),
    "bricks": (_bricks, 15, 75),
    "sand": (_sand, 50, 95),
    "marble": (_marble, 0, 360),
}
BACKGROUNDS = tuple(_BACKGROUNDS)
