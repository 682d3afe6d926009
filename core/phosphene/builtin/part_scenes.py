"""Drawn scenes of objects made of parts: labeled 128x128 images with the visible pixels of each part.

A part can be removed, or drawn in the shape of another part, and the same scene drawn again: every random
number is a function of the scene and of the part that it belongs to, so nothing else changes. Colors,
textures, light, pose and background are independent of the class: only the parts' shapes separate the
classes. A map is a tensor (128, 128), an image or color (3, 128, 128) or (3, 1, 1); in an object's own
coordinates x points right, y down, and the object reaches from about -1 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, UnknownName
from ..torch_state import cpu_by_default
from .drawing import Keys, fractal, integers, keys_of, normal, oklch, paint, smoothstep, uniform

SIZE = 128
_LINE = torch.arange(SIZE, dtype=torch.float32, device="cpu") + 0.5  # pixel centers
_X, _Y = _LINE.expand(SIZE, SIZE), _LINE[:, None].expand(SIZE, SIZE)

#: The colors of a layer: the part's own two, of which the first is textured, and nearly black and white.
_MAIN, _SECOND, _DARK, _PALE = range(4)

#: _Layers of a part, back to front: the signed distance to an outline, negative inside, and its color.
_Layers: TypeAlias = list[tuple[Tensor, int]]


@dataclass(frozen=True)
class PartScenes:
    """N scenes with their ground truth.

    ``images`` (N, 3, 128, 128) float32 in [0, 1], integer multiples of 1/255; ``labels`` (N,) int64, indices
    into ``PART_CLASSES``; ``part_maps`` (N, 128, 128) int64, for each pixel the index of the part that is
    visible there among ``PARTS`` of the scene's class, -1 for the background.
    """

    images: Tensor
    labels: Tensor
    part_maps: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def masks(self) -> Tensor:
        """The objects' visible pixels, (N, 128, 128) bool."""
        return self.part_maps >= 0

    def parts(self, index: int) -> tuple[str, ...]:
        """The names of the parts of scene ``index``, also of removed ones."""
        return PARTS[PART_CLASSES[int(self.labels[index])]]

    def part_masks(self, index: int) -> Tensor:
        """The visible pixels of each part of scene ``index``, (P, 128, 128) bool."""
        return self.part_maps[index] == torch.arange(len(self.parts(index)))[:, None, None]


@cpu_by_default()
def draw_part_scenes(
    count: int,
    *,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    start: int = 0,
    remove: Collection[str] = (),
    exchange: Mapping[str, str] | None = None,
) -> PartScenes:
    """Draw scenes ``start`` … ``start + count - 1`` of the stream (seed, split).

    remove: names of parts that are left out of every object that has them.
    exchange: for names of parts, the part whose shape is drawn at their position: {"ears": "bear.ears"}.

    Scene i depends on (seed, split, i), ``remove`` and ``exchange`` only, not on the batch. Raises
    UnknownName for a part that no class has, InputError for another split.
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test', not {split!r}")
    exchange = exchange or {}
    for name in (*remove, *exchange):
        if name not in PART_NAMES:
            raise UnknownName("part", name, PART_NAMES)
    shapes = {
        f"{label}.{name}": part.shape for label, parts in _OBJECTS.items() for name, part in parts.items()
    }
    for name in exchange.values():
        if name not in shapes:
            raise UnknownName("part of a class", name, list(shapes))
    keys = keys_of(f"part-scene/{seed}/{split}/{index}" for index in range(start, start + count))
    labels = integers(keys, "class", below=len(PART_CLASSES))
    images = torch.empty(count, 3, SIZE, SIZE)
    part_maps = torch.empty(count, SIZE, SIZE, dtype=torch.int64)
    for index, label in enumerate(labels.tolist()):
        parts = {
            name: _Part(shapes[exchange[name]], *part.slots) if name in exchange else part
            for name, part in _OBJECTS[PART_CLASSES[label]].items()
        }
        images[index], part_maps[index] = _draw(_Draws(keys[index : index + 1]), parts, remove)
    return PartScenes(images, labels, part_maps)


@dataclass(frozen=True)
class _Draws:
    """The random numbers of one scene, by name."""

    key: Keys

    def number(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        return float(uniform(self.key, name, low=low, high=high))

    def choice(self, name: str, below: int) -> int:
        return int(integers(self.key, name, below=below))

    def noise(self, name: str, cells: int, octaves: int, channels: int = 1) -> Tensor:
        """1/f noise (channels, 128, 128)."""
        return fractal(self.key, name, SIZE, cells=cells, octaves=octaves, channels=channels)[0]


def _draw(draws: _Draws, parts: Mapping[str, _Part], remove: Collection[str]) -> tuple[Tensor, Tensor]:
    """Draw one scene: the image (3, 128, 128) and the index of each pixel's part (128, 128)."""
    hue, light = draws.number("ground hue", 0, 360), draws.number("ground light", 0.42, 0.82)
    image = _BACKGROUNDS[draws.choice("background", len(_BACKGROUNDS))](draws, hue, light)
    sun = draws.number("sun", math.radians(200), math.radians(340))
    sun_x, sun_y = math.cos(sun), math.sin(sun)
    x, y, scale = _object_coordinates(draws)
    layers: list[tuple[int, Tensor, Tensor, str]] = []
    bevels: dict[str, float] = {}
    for index, (name, part) in enumerate(parts.items()):
        if name in remove:
            continue
        bevels[name] = draws.number(f"{name} bevel", 4, 13)
        colors = _colors(draws, name, hue, light)
        grown = draws.number(f"{name} size", 0.9, 1.12)
        for slot in part.slots:
            size = slot.size * grown
            for distance, tone in part.shape(*slot.coordinates(x, y, grown)):
                layers.append((index, distance * (size * scale), colors[tone], name))
    part_map = torch.full((SIZE, SIZE), -1)
    if layers:
        outline = torch.stack([distance for _, distance, _, _ in layers]).amin(0)
        drop = draws.number("shadow", 4, 9)
        shadow = _shifted(outline, round(-sun_x * drop), round(-sun_y * drop))
        image = image * (1 - 0.5 * smoothstep(-shadow, -5.0, 3.0))
    gloss = draws.number("gloss", 0.1, 0.6)
    for index, distance, color, name in layers:
        window = _window_of(distance < 4)
        near, canvas = distance[window], image[:, *window]
        surface = _lit(
            color[:, *window] if color.shape[1] > 1 else color, near, bevels[name], gloss, sun_x, sun_y
        )
        # Darker around the edge of what is drawn over it, as if that stood out.
        canvas = canvas * (1 - 0.3 * (1 - near / 3).clamp(0, 1))
        image[:, *window] = paint(canvas, surface, (0.5 - near).clamp(0, 1))
        part_map[distance <= 0] = index
    return _expose(draws, image), part_map


def _object_coordinates(draws: _Draws) -> tuple[Tensor, Tensor, float]:
    """Each pixel's x and y in the object's coordinates, and the number of pixels of a unit."""
    scale = draws.number("scale", 32, 45)
    tilt = draws.number("tilt", -0.35, 0.35)
    margin = 1.22 * scale
    off_x = _X - draws.number("x", margin, SIZE - margin)
    off_y = _Y - draws.number("y", margin, SIZE - margin)
    cos, sin = math.cos(tilt) / scale, math.sin(tilt) / scale
    stretch = math.exp(draws.number("stretch", -0.1, 0.1))
    side = -1 if draws.choice("mirror", 2) else 1
    return side * stretch * (cos * off_x + sin * off_y), (cos * off_y - sin * off_x) / stretch, scale


def _window_of(pixels: Tensor) -> tuple[slice, slice]:
    """The rows and columns around the True pixels of a map."""
    spans = []
    for along in (1, 0):
        used = pixels.any(along).nonzero()
        spans.append(slice(int(used.min()), int(used.max()) + 1) if len(used) else slice(0, 0))
    return spans[0], spans[1]


def _shifted(plane: Tensor, right: int, down: int) -> Tensor:
    """A map moved by a number of pixels, its border repeated."""
    steps = torch.arange(SIZE)
    rows, columns = (steps - down).clamp(0, SIZE - 1), (steps - right).clamp(0, SIZE - 1)
    return plane[rows][:, columns]


# ---- surfaces ------------------------------------------------------------------------------------


def _color(light: float, chroma: float, hue: float) -> Tensor:
    """A color (3, 1, 1) of OKLCh values, the hue in degrees."""
    lightness, angle = torch.tensor([light, hue], dtype=torch.float64).view(2, 1, 1, 1)
    return oklch(lightness, chroma, angle)


def _colors(draws: _Draws, part: str, hue: float, light: float) -> list[Tensor]:
    """The colors of a part's layers, in contrast to the ground's: textured, plain, dark, pale."""
    own_hue = hue + draws.number(f"{part} hue", 60, 300)
    own_light = light + (-1 if light > 0.62 else 1) * draws.number(f"{part} light", 0.05, 0.28)
    chroma = draws.number(f"{part} chroma", 0.08, 0.21)
    contrast = (-1 if own_light > 0.62 else 1) * draws.number(f"{part} contrast", 0.14, 0.3)
    first = _color(own_light, chroma, own_hue)
    other_hue = own_hue + draws.number(f"{part} second hue", -90, 90)
    second = _color(own_light + contrast, 0.8 * chroma, other_hue)
    textured = paint(first, second, _texture(draws, part))
    return [textured, second, _color(0.2, 0.03, hue), _color(0.95, 0.02, own_hue)]


def _texture(draws: _Draws, part: str) -> Tensor:
    """How much of the second color each pixel has: plain, a ramp, stripes, checks, spots or noise."""
    kind = draws.choice(f"{part} texture", 8)
    along, across = _turned(draws.number(f"{part} texture angle", 0, math.pi))
    period = draws.number(f"{part} period", 6, 13)
    if kind < 2:
        return 0.12 * along / SIZE
    if kind == 2:
        return (along / 90 + 0.5).clamp(0, 1)
    if kind == 7:
        return smoothstep(draws.noise(f"{part} texture noise", 6, 4), -1, 1)[0]
    first, second = _wave(along / period), _wave(across / period)
    if kind == 3 or kind == 4:
        return smoothstep(first, 0.4, 0.6)
    if kind == 5:
        return smoothstep((first - 0.5) * (second - 0.5), -0.02, 0.02)
    return 1 - smoothstep((first - 0.5) ** 2 + (second - 0.5) ** 2, 0.06, 0.12)


def _turned(angle: float) -> tuple[Tensor, Tensor]:
    """Coordinates along and across a direction, 0 at the image's center."""
    x, y = _X - SIZE / 2, _Y - SIZE / 2
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _wave(phase: Tensor) -> Tensor:
    """A triangle wave in [0, 1] of period 1."""
    return (2 * (phase - phase.floor()) - 1).abs()


def _lit(color: Tensor, distance: Tensor, bevel: float, gloss: float, sun_x: float, sun_y: float) -> Tensor:
    """Shade a surface with a rounded edge, lit from the sun's direction, with a soft highlight."""
    rim = (1 + distance / bevel).clamp(0, 1)
    height = (1 - rim**2).sqrt() * (0.55 * bevel)
    height = F.pad(height[None], (1, 1, 1, 1), mode="replicate")[0]
    slope_y = (height[2:, 1:-1] - height[:-2, 1:-1]) / 2
    slope_x = (height[1:-1, 2:] - height[1:-1, :-2]) / 2
    facing = 0.78 - 0.62 * (slope_x * sun_x + slope_y * sun_y)
    facing = facing / (1 + slope_x**2 + slope_y**2).sqrt()
    bright = color * (0.42 + 0.74 * facing)
    return bright + (1 - bright) * (gloss * smoothstep(facing, 0.82, 1.0))


def _expose(draws: _Draws, image: Tensor) -> Tensor:
    """Vignette and sensor noise, then rounding to 8 bits."""
    image = image * (1.03 - 0.14 * ((_X - SIZE / 2) ** 2 + (_Y - SIZE / 2) ** 2) / (SIZE**2 / 2))
    noise = normal(draws.key, "noise", 3, SIZE, SIZE)[0] * draws.number("gain", 0, 0.018)
    return ((image + noise).clamp(0, 1) * 255).round() / 255


# ---- backgrounds, each with a hue and a lightness ------------------------------------------------


def _two_colors(draws: _Draws, hue: float, light: float) -> tuple[Tensor, Tensor]:
    contrast = draws.number("ground contrast", 0.08, 0.26)
    other = hue + draws.number("ground second hue", -100, 100)
    first = _color(light - contrast / 2, draws.number("ground chroma", 0.02, 0.14), hue)
    return first, _color(light + contrast / 2, draws.number("ground second chroma", 0.02, 0.14), other)


def _gradient(draws: _Draws, hue: float, light: float) -> Tensor:
    along, _ = _turned(draws.number("ground angle", 0, 2 * math.pi))
    return paint(*_two_colors(draws, hue, light), (along / 150 + 0.5).clamp(0, 1))


def _clouds(draws: _Draws, hue: float, light: float) -> Tensor:
    below, above = _two_colors(draws, hue, light)
    sky = paint(above, below, _Y / SIZE)
    puff = draws.noise("clouds", 2, 6)
    return paint(sky, _color(min(light + 0.3, 0.97), 0.02, hue), 0.8 * smoothstep(puff, -0.2, 1.8))


def _stripes(draws: _Draws, hue: float, light: float) -> Tensor:
    along, _ = _turned(draws.number("ground angle", 0, math.pi))
    soft = draws.number("ground softness", 0.06, 0.5)
    stripes = _wave(along / draws.number("ground period", 6, 30))
    return paint(*_two_colors(draws, hue, light), smoothstep(stripes, 0.5 - soft, 0.5 + soft))


def _checks(draws: _Draws, hue: float, light: float) -> Tensor:
    along, across = _turned(draws.number("ground angle", 0, math.pi))
    period = draws.number("ground period", 10, 36)
    checks = (_wave(along / period) - 0.5) * (_wave(across / period) - 0.5)
    return paint(*_two_colors(draws, hue, light), smoothstep(checks, -0.02, 0.02))


def _dots(draws: _Draws, hue: float, light: float) -> Tensor:
    along, across = _turned(draws.number("ground angle", 0, math.pi))
    period = draws.number("ground period", 9, 24)
    radius = (_wave(along / period) - 0.5) ** 2 + (_wave(across / period) - 0.5) ** 2
    return paint(*_two_colors(draws, hue, light), 1 - smoothstep(radius, 0.07, 0.13))


def _marble(draws: _Draws, hue: float, light: float) -> Tensor:
    noise = draws.noise("stone", 2, 6, channels=2)
    image = paint(*_two_colors(draws, hue, light), smoothstep(noise[0], -1.5, 1.5))
    vein = 1 - smoothstep((noise[1] + 0.4 * noise[0]).abs(), 0.0, 0.3)
    return image * (1 - 0.3 * vein)


def _spots(draws: _Draws, hue: float, light: float) -> Tensor:
    """Irregular spots of three colors, with a fine grain."""
    noise = draws.noise("spots", 4, 3, channels=3)
    image = paint(*_two_colors(draws, hue, light), smoothstep(noise[0], -0.15, 0.15))
    third = _color(light, draws.number("ground third chroma", 0.05, 0.15), hue + 180)
    image = paint(image, third, smoothstep(noise[1], 0.5, 0.8))
    return image * (1 + 0.05 * normal(draws.key, "grain", SIZE, SIZE)[0])


def _hills(draws: _Draws, hue: float, light: float) -> Tensor:
    """Three ranges of hills under a sky, the near ones darker and striped."""
    first, second = _two_colors(draws, hue, light)
    image = paint(second, _color(min(light + 0.25, 0.96), 0.04, hue + 40), _Y / SIZE)
    for number, line in enumerate((50, 76, 102)):
        ridge = (
            draws.noise(f"ridge {number}", 3, 4)[0, 0] * 9 + line + draws.number(f"line {number}", -14, 14)
        )
        shade = 1 - 0.14 * number + 0.05 * draws.noise(f"field {number}", 8, 3)[0]
        image = paint(
            image, (second + (first - second) * ((number + 1) / 3)) * shade, smoothstep(_Y - ridge, -0.6, 0.6)
        )
    return image


_BACKGROUNDS: tuple[Callable[[_Draws, float, float], Tensor], ...] = (
    _gradient, _clouds, _stripes, _checks, _dots, _marble, _spots, _hills,
)  # fmt: skip


# ---- outlines: signed distances in the unit of x and y -------------------------------------------


def _ellipse(x: Tensor, y: Tensor, at_x: float, at_y: float, wide: float, tall: float) -> Tensor:
    """About the distance to an ellipse with these half axes; exact for a circle."""
    u, v = (x - at_x) / wide, (y - at_y) / tall
    radius = (u**2 + v**2).sqrt()
    steepness = ((u / wide) ** 2 + (v / tall) ** 2).sqrt().clamp(min=1e-6)
    return radius * (radius - 1) / steepness


def _disc(x: Tensor, y: Tensor, at_x: float, at_y: float, radius: float) -> Tensor:
    return ((x - at_x) ** 2 + (y - at_y) ** 2).sqrt() - radius


def _box(
    x: Tensor, y: Tensor, at_x: float, at_y: float, wide: float, tall: float, corner: float = 0.04
) -> Tensor:
    """A box with these half sides and rounded corners."""
    u, v = (x - at_x).abs() - (wide - corner), (y - at_y).abs() - (tall - corner)
    outside = (u.clamp(min=0) ** 2 + v.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(u, v).clamp(max=0) - corner


def _rod(
    x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float], radius: float, tip: float = -1
) -> Tensor:
    """A round-ended line from start to end, ``tip`` wide at its end."""
    step_x, step_y = end[0] - start[0], end[1] - start[1]
    off_x, off_y = x - start[0], y - start[1]
    along = ((off_x * step_x + off_y * step_y) / (step_x**2 + step_y**2)).clamp(0, 1)
    width = radius if tip < 0 else radius + (tip - radius) * along
    return ((off_x - along * step_x) ** 2 + (off_y - along * step_y) ** 2).sqrt() - width


def _polygon(x: Tensor, y: Tensor, *corners: tuple[float, float], corner: float = 0.04) -> Tensor:
    """A polygon, grown by ``corner`` with round corners."""
    nearest, inside = torch.full_like(x, math.inf), torch.zeros_like(x, dtype=torch.bool)
    for (px, py), (qx, qy) in zip(corners, corners[1:] + corners[:1], strict=True):
        step_x, step_y = qx - px, qy - py
        along = (((x - px) * step_x + (y - py) * step_y) / (step_x**2 + step_y**2)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - px - along * step_x) ** 2 + (y - py - along * step_y) ** 2)
        if py != qy:
            inside ^= ((y < py) != (y < qy)) & (x < px + (y - py) * step_x / step_y)
    return torch.where(inside, -nearest.sqrt(), nearest.sqrt()) - corner


# ---- objects -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """Where a part's shape is drawn: its origin, size and angle clockwise; with ``mirror`` flipped in x."""

    x: float = 0.0
    y: float = 0.0
    size: float = 1.0
    angle: float = 0.0
    mirror: bool = False

    def coordinates(self, x: Tensor, y: Tensor, grown: float) -> tuple[Tensor, Tensor]:
        """Positions in the shape's coordinates, for a shape drawn ``grown`` times as large."""
        cos, sin = math.cos(self.angle) / (self.size * grown), math.sin(self.angle) / (self.size * grown)
        off_x, off_y = x - self.x, y - self.y
        along, across = cos * off_x + sin * off_y, cos * off_y - sin * off_x
        return (-along if self.mirror else along), across


class _Part:
    """A shape and the slots that it is drawn at."""

    def __init__(self, shape: Callable[[Tensor, Tensor], _Layers], *slots: _Slot) -> None:
        self.shape, self.slots = shape, slots or (_Slot(),)


def _both(x: float, y: float, size: float = 1.0, angle: float = 0.0) -> tuple[_Slot, _Slot]:
    """A slot on the right and its mirror image on the left."""
    return _Slot(x, y, size, angle), _Slot(-x, y, size, -angle, mirror=True)


def _head(x: Tensor, y: Tensor) -> _Layers:
    return [(_ellipse(x, y, 0, 0, 0.84, 0.74), _MAIN)]


def _round_ear(x: Tensor, y: Tensor) -> _Layers:
    return [(_disc(x, y, 0, 0, 0.34), _MAIN), (_disc(x, y, 0, 0, 0.17), _SECOND)]


def _pointed_ear(x: Tensor, y: Tensor) -> _Layers:
    outer = _polygon(x, y, (-0.3, 0.34), (0.12, -0.46), (0.3, 0.3))
    return [(outer, _MAIN), (_polygon(x, y, (-0.12, 0.18), (0.1, -0.24), (0.18, 0.16)), _SECOND)]


def _round_eye(x: Tensor, y: Tensor) -> _Layers:
    return [(_disc(x, y, 0, 0, 0.13), _DARK), (_disc(x, y, 0.04, -0.05, 0.04), _PALE)]


def _slit_eye(x: Tensor, y: Tensor) -> _Layers:
    white, pupil = _ellipse(x, y, 0, 0, 0.2, 0.15), _ellipse(x, y, 0, 0, 0.055, 0.13)
    return [(white, _PALE), (_ellipse(x, y, 0, 0, 0.16, 0.13), _SECOND), (pupil, _DARK)]


def _ringed_eye(x: Tensor, y: Tensor) -> _Layers:
    return [(_disc(x, y, 0, 0, 0.15), _PALE), (_disc(x, y, 0.03, 0, 0.085), _DARK)]


def _muzzle(x: Tensor, y: Tensor) -> _Layers:
    mouth = torch.minimum(_rod(x, y, (0, 0), (-0.14, 0.14), 0.025), _rod(x, y, (0, 0), (0.14, 0.14), 0.025))
    patch, nose = _ellipse(x, y, 0, 0, 0.4, 0.3), _ellipse(x, y, 0, -0.1, 0.15, 0.1)
    return [(patch, _PALE), (mouth, _DARK), (nose, _DARK)]


def _whiskers(x: Tensor, y: Tensor) -> _Layers:
    rods = [_rod(x, y, (0, 0.06 * k), (0.7, 0.2 * k - 0.02), 0.028) for k in (-1, 0, 1)]
    return [(torch.stack(rods).amin(0), _DARK)]


def _small_nose(x: Tensor, y: Tensor) -> _Layers:
    mouth = torch.minimum(
        _rod(x, y, (0, 0.08), (-0.14, 0.2), 0.025), _rod(x, y, (0, 0.08), (0.14, 0.2), 0.025)
    )
    return [(mouth, _DARK), (_polygon(x, y, (-0.08, -0.04), (0.08, -0.04), (0, 0.05)), _SECOND)]


def _bird_body(x: Tensor, y: Tensor) -> _Layers:
    return [(torch.minimum(_ellipse(x, y, -0.05, 0.1, 0.62, 0.44), _disc(x, y, 0.5, -0.38, 0.31)), _MAIN)]


def _bird_wing(x: Tensor, y: Tensor) -> _Layers:
    feathers = [_rod(x, y, (0.16, -0.06), (-0.5, 0.26 - 0.17 * k), 0.2, 0.07) for k in range(3)]
    return [(torch.stack(feathers).amin(0), _MAIN)]


def _bird_tail(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (0.2, -0.12), (0.2, 0.12), (-0.42, 0.16), (-0.3, -0.02), (-0.44, -0.2)), _MAIN)]


def _beak(x: Tensor, y: Tensor) -> _Layers:
    upper, lower = ((-0.12, 0.01), (0.34, 0.04), (-0.12, -0.14)), ((-0.12, 0.02), (0.24, 0.06), (-0.12, 0.14))
    return [(_polygon(x, y, *lower, corner=0.02), _DARK), (_polygon(x, y, *upper, corner=0.02), _SECOND)]


def _bird_leg(x: Tensor, y: Tensor) -> _Layers:
    rods = [_rod(x, y, (0, 0), (0, 0.42), 0.045)]
    rods += [_rod(x, y, (0, 0.42), (0.13 * k, 0.52), 0.04) for k in (-1, 0, 1)]
    return [(torch.stack(rods).amin(0), _SECOND)]


def _hull(x: Tensor, y: Tensor) -> _Layers:
    outer = _polygon(x, y, (-0.88, -0.14), (0.92, -0.18), (0.56, 0.24), (-0.6, 0.24), corner=0.05)
    return [(outer, _MAIN), (_rod(x, y, (-0.84, -0.12), (0.86, -0.15), 0.06), _SECOND)]


def _mast(x: Tensor, y: Tensor) -> _Layers:
    return [(_rod(x, y, (0, 0.5), (0, -0.98), 0.045), _SECOND)]


def _sail(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (0.02, -0.82), (0.62, 0.28), (0.02, 0.28)), _MAIN)]


def _flag(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (0, -0.12), (0.34, 0), (0, 0.12), corner=0.02), _SECOND)]


def _upper_wing(x: Tensor, y: Tensor) -> _Layers:
    blade = _polygon(x, y, (0.04, 0.1), (0.5, -0.5), (0.74, -0.42), (0.7, 0.02), (0.3, 0.2), corner=0.12)
    return [
        (blade, _MAIN),
        (_disc(x, y, 0.52, -0.22, 0.15), _SECOND),
        (_disc(x, y, 0.52, -0.22, 0.06), _DARK),
    ]


def _lower_wing(x: Tensor, y: Tensor) -> _Layers:
    return [(_ellipse(x, y, 0.34, 0.2, 0.34, 0.36), _MAIN), (_disc(x, y, 0.38, 0.26, 0.11), _SECOND)]


def _insect_body(x: Tensor, y: Tensor) -> _Layers:
    rings = [_rod(x, y, (-0.08, at), (0.08, at), 0.025) for at in (0.1, 0.26, 0.42)]
    body = torch.minimum(_rod(x, y, (0, -0.3), (0, 0.55), 0.13, 0.07), _disc(x, y, 0, -0.42, 0.16))
    return [(body, _DARK), (torch.stack(rings).amin(0), _SECOND)]


def _antenna(x: Tensor, y: Tensor) -> _Layers:
    rods = [_rod(x, y, (0, 0), (0.16, -0.3), 0.03), _rod(x, y, (0.16, -0.3), (0.34, -0.38), 0.03)]
    return [(torch.stack([*rods, _disc(x, y, 0.36, -0.38, 0.065)]).amin(0), _DARK)]


def _chassis(x: Tensor, y: Tensor) -> _Layers:
    body = torch.minimum(_box(x, y, 0, 0, 0.98, 0.22, 0.14), _box(x, y, -0.1, -0.06, 0.8, 0.24, 0.12))
    return [(body, _MAIN), (_box(x, y, 0, 0.14, 0.96, 0.045), _SECOND)]


def _cabin(x: Tensor, y: Tensor) -> _Layers:
    outer = _polygon(x, y, (-0.56, 0.2), (-0.38, -0.24), (0.26, -0.24), (0.54, 0.2), corner=0.08)
    rear = _polygon(x, y, (-0.4, 0.1), (-0.28, -0.18), (-0.06, -0.18), (-0.06, 0.1))
    front = _polygon(x, y, (0.08, 0.1), (0.08, -0.18), (0.2, -0.18), (0.38, 0.1))
    return [(outer, _MAIN), (torch.minimum(rear, front), _PALE)]


def _wheel(x: Tensor, y: Tensor) -> _Layers:
    spokes = [
        _rod(x, y, (-0.1 * c, -0.1 * s), (0.1 * c, 0.1 * s), 0.02)
        for c, s in ((1, 0), (0.5, 0.87), (0.5, -0.87))
    ]
    hub = [(_disc(x, y, 0, 0, 0.15), _PALE), (torch.stack(spokes).amin(0), _DARK)]
    return [(_disc(x, y, 0, 0, 0.27), _DARK), *hub]


def _lamp(x: Tensor, y: Tensor) -> _Layers:
    return [(_ellipse(x, y, 0, 0, 0.11, 0.13), _SECOND), (_ellipse(x, y, 0.01, 0, 0.06, 0.08), _PALE)]


def _fish_body(x: Tensor, y: Tensor) -> _Layers:
    gill = torch.maximum(_disc(x, y, 0.62, 0, 0.42).abs() - 0.022, x - 0.34)
    return [(_ellipse(x, y, 0.1, 0, 0.78, 0.46), _MAIN), (torch.maximum(gill, y.abs() - 0.26), _DARK)]


def _fish_tail(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (0.22, 0), (-0.3, -0.42), (-0.18, 0), (-0.3, 0.42), corner=0.06), _MAIN)]


def _fin(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (-0.34, 0.14), (-0.22, -0.22), (0.0, -0.2), (0.32, 0.14), corner=0.05), _MAIN)]


def _petal(x: Tensor, y: Tensor) -> _Layers:
    return [(_ellipse(x, y, 0, -0.42, 0.2, 0.3), _MAIN)]


def _flower_center(x: Tensor, y: Tensor) -> _Layers:
    return [(_disc(x, y, 0, 0, 0.22), _SECOND), (_disc(x, y, 0, 0, 0.11), _DARK)]


def _stem(x: Tensor, y: Tensor) -> _Layers:
    return [
        (
            torch.minimum(_rod(x, y, (0, -0.3), (0.06, 0.3), 0.06), _rod(x, y, (0.06, 0.3), (0, 1.0), 0.07)),
            _SECOND,
        )
    ]


def _leaf(x: Tensor, y: Tensor) -> _Layers:
    lens = torch.maximum(_disc(x, y, 0.3, 0.34, 0.5), _disc(x, y, 0.3, -0.34, 0.5))
    return [(lens, _MAIN), (_rod(x, y, (0.02, 0), (0.54, 0), 0.02), _SECOND)]


def _wall(x: Tensor, y: Tensor) -> _Layers:
    return [(_box(x, y, 0, 0, 0.7, 0.52), _MAIN)]


def _roof(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (-0.9, 0.26), (0, -0.42), (0.9, 0.26), corner=0.05), _MAIN)]


def _chimney(x: Tensor, y: Tensor) -> _Layers:
    return [(_box(x, y, 0, 0, 0.12, 0.3), _MAIN), (_box(x, y, 0, -0.28, 0.17, 0.07), _SECOND)]


def _door(x: Tensor, y: Tensor) -> _Layers:
    return [(_box(x, y, 0, 0, 0.17, 0.32), _SECOND), (_disc(x, y, 0.09, 0.02, 0.035), _DARK)]


def _window(x: Tensor, y: Tensor) -> _Layers:
    bars = torch.minimum(_box(x, y, 0, 0, 0.2, 0.022, 0.01), _box(x, y, 0, 0, 0.022, 0.2, 0.01))
    return [(_box(x, y, 0, 0, 0.2, 0.2), _DARK), (_box(x, y, 0, 0, 0.16, 0.16), _PALE), (bars, _DARK)]


def _stalk(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (-0.16, -0.5), (0.16, -0.5), (0.26, 0.44), (-0.26, 0.44), corner=0.08), _PALE)]


def _skirt(x: Tensor, y: Tensor) -> _Layers:
    return [(_polygon(x, y, (-0.2, -0.08), (0.2, -0.08), (0.34, 0.08), (-0.34, 0.08), corner=0.04), _SECOND)]


def _cap(x: Tensor, y: Tensor) -> _Layers:
    gills = _ellipse(x, y, 0, 0.12, 0.86, 0.14)
    return [(gills, _PALE), (torch.maximum(_ellipse(x, y, 0, 0.12, 0.9, 0.74), y - 0.12), _MAIN)]


def _dot(x: Tensor, y: Tensor) -> _Layers:
    return [(_ellipse(x, y, 0, 0, 0.15, 0.12), _PALE)]


#: The parts of each class, back to front.
_OBJECTS: dict[str, dict[str, _Part]] = {
    "bear": {
        "ears": _Part(_round_ear, *_both(0.6, -0.56)),
        "head": _Part(_head, _Slot(0, 0.1)),
        "muzzle": _Part(_muzzle, _Slot(0, 0.42)),
        "eyes": _Part(_round_eye, *_both(0.34, -0.06)),
    },
    "bird": {
        "legs": _Part(_bird_leg, _Slot(-0.14, 0.46), _Slot(0.14, 0.46)),
        "tail": _Part(_bird_tail, _Slot(-0.68, 0.02, angle=0.2)),
        "body": _Part(_bird_body),
        "wing": _Part(_bird_wing, _Slot(-0.02, 0.06)),
        "beak": _Part(_beak, _Slot(0.82, -0.36)),
        "eyes": _Part(_ringed_eye, _Slot(0.57, -0.44, 0.75)),
    },
    "boat": {
        "mast": _Part(_mast),
        "sails": _Part(_sail, _Slot(0.06, 0), _Slot(-0.06, 0.04, 0.86, mirror=True)),
        "flag": _Part(_flag, _Slot(0.04, -0.88)),
        "hull": _Part(_hull, _Slot(0, 0.66)),
    },
    "butterfly": {
        "antennae": _Part(_antenna, *_both(0.05, -0.5)),
        "lower wings": _Part(_lower_wing, *_both(0.06, 0.18)),
        "upper wings": _Part(_upper_wing, *_both(0.06, -0.1)),
        "body": _Part(_insect_body),
    },
    "car": {
        "cabin": _Part(_cabin, _Slot(-0.06, -0.28)),
        "body": _Part(_chassis, _Slot(0, 0.14)),
        "lamps": _Part(_lamp, _Slot(0.9, 0.06)),
        "wheels": _Part(_wheel, _Slot(-0.54, 0.36), _Slot(0.54, 0.36)),
    },
    "cat": {
        "ears": _Part(_pointed_ear, *_both(0.56, -0.54)),
        "head": _Part(_head, _Slot(0, 0.1)),
        "whiskers": _Part(_whiskers, *_both(0.22, 0.36)),
        "nose": _Part(_small_nose, _Slot(0, 0.32)),
        "eyes": _Part(_slit_eye, *_both(0.34, -0.04)),
    },
    "fish": {
        "tail": _Part(_fish_tail, _Slot(-0.74, 0)),
        "fins": _Part(_fin, _Slot(0.06, -0.42), _Slot(0.1, 0.42, 0.8, math.pi, mirror=True)),
        "body": _Part(_fish_body),
        "eyes": _Part(_ringed_eye, _Slot(0.56, -0.1, 0.85)),
    },
    "flower": {
        "stem": _Part(_stem),
        "leaves": _Part(_leaf, _Slot(0.06, 0.62, 0.9, -0.5), _Slot(0.02, 0.78, 0.9, 0.5, mirror=True)),
        "petals": _Part(_petal, *(_Slot(0, -0.36, 0.84, k * math.pi / 3.5) for k in range(7))),
        "center": _Part(_flower_center, _Slot(0, -0.36)),
    },
    "house": {
        "chimney": _Part(_chimney, _Slot(0.46, -0.56)),
        "wall": _Part(_wall, _Slot(0, 0.42)),
        "roof": _Part(_roof, _Slot(0, -0.36)),
        "door": _Part(_door, _Slot(0, 0.6)),
        "windows": _Part(_window, _Slot(-0.42, 0.36), _Slot(0.42, 0.36)),
    },
    "mushroom": {
        "stalk": _Part(_stalk, _Slot(0, 0.44)),
        "skirt": _Part(_skirt, _Slot(0, 0.24)),
        "cap": _Part(_cap, _Slot(0, -0.16)),
        "dots": _Part(
            _dot, _Slot(-0.42, -0.3), _Slot(0.02, -0.52), _Slot(0.44, -0.26), _Slot(0.1, -0.2, 0.8)
        ),
    },
}  # fmt: skip
PART_CLASSES = tuple(_OBJECTS)
#: The names of each class's parts, back to front.
PARTS: dict[str, tuple[str, ...]] = {label: tuple(parts) for label, parts in _OBJECTS.items()}
PART_NAMES = tuple(sorted({name for names in PARTS.values() for name in names}))
