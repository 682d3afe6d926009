"""Looking at a large picture part by part: the same loss and gradient in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phosphene import ModelError, receptive_fields
from phosphene.optimize import gram_matrix

from ._style_loss import Aim, Perception


class Tile(NamedTuple):
    """A part of the picture, with as much around it as its features depend on."""

    place: tuple[slice, slice]
    #: For each layer: where in the part's own map, and where in the whole picture's, its features lie.
    own: list[tuple[slice, slice]]
    whole: list[tuple[slice, slice]]


def tiles(look: Perception, images: Tensor, side: int) -> list[Tile] | None:
    """Parts of at most ``side`` pixels a side that cover pictures (N, C, H, W); None where one does.

    A part begins at a multiple of the coarsest layer's stride, so that its features are those of the whole
    picture. Raises ModelError where a layer sees the whole picture, whatever its size.
    """
    model, (height, width) = look.model, images.shape[2:]
    strides = [max(1, round(model.input_size[1] / model.map_shape(layer)[1])) for layer in look.layers]
    step = math.lcm(*strides)
    side = max(step, side // step * step)
    if max(height, width) <= side:
        return None
    probe, reach = min(height, width) // (2 * step) * 2 * step, 0
    for layer, stride in dict(zip(look.layers, strides, strict=True)).items():
        middle = probe // 2 // stride
        box = receptive_fields(model, layer, (probe, probe), [(middle, middle)])[0].tolist()
        if box == [0, 0, probe, probe]:
            raise ModelError(f"layer {layer!r} sees {probe} pixels and more, too far for tiles of {side}")
        reach = max(reach, middle * stride - min(box), max(box) - (middle + 1) * stride)
    margin = math.ceil(reach / step) * step

    def spans(length: int) -> list[tuple[int, int, int, int]]:
        cuts = [*range(0, max(1, length - step + 1), side), length]
        return [(a, b, max(0, a - margin), min(length, b + margin)) for a, b in itertools.pairwise(cuts)]

    def slices(span: tuple[int, int, int, int], length: int, stride: int) -> tuple[slice, slice]:
        begin, end, seen, _ = span
        last = None if end == length else end // stride
        own = slice((begin - seen) // stride, None if last is None else last - seen // stride)
        return own, slice(begin // stride, last)

    found = []
    for down, across in itertools.product(spans(height), spans(width)):
        rows = [slices(down, height, stride) for stride in strides]
        columns = [slices(across, width, stride) for stride in strides]
        pairs = list(zip(rows, columns, strict=True))
        own, whole = ([(r[k], c[k]) for r, c in pairs] for k in (0, 1))
        found.append(Tile((slice(*down[2:]), slice(*across[2:])), own, whole))
    return found


def by_tiles(
    look: Perception,
    aim: Aim,
    parts: Sequence[Tile],
    content_weight: float,
    style_weight: float | Tensor,
    images: Tensor,
) -> Tensor:
    """The loss (N,) of ``paint`` and its gradient, from one part of the pictures after another.

    A Gram matrix is a sum over places, so a first pass finds all of them, and with dL/dG known the gradient
    is a sum over parts, too: dL = sum_j <dL/dG_j, d(F_j F_j^T)> / M_j.
    """
    pictures = images.detach()

    def seen(part: Tile, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """The style layers' features in a part, and how far its content is off: (N,)."""
        maps = [f[..., y, x] for f, (y, x) in zip(look.maps(pixels), part.own, strict=True)]
        y, x = part.whole[-1]
        return maps[:-1], (maps[-1] - aim.content[..., y, x]).square().sum((1, 2, 3)) / scale

    scale = aim.content.square().sum((1, 2, 3)).clamp(min=1e-30)
    off, sums = torch.zeros_like(scale), [scale.new_zeros(())] * len(look.weights)
    places = [0] * len(look.weights)
    with torch.no_grad():
        for part in parts:
            features, away = seen(part, pictures[..., *part.place])
            off = off + away
            sums = [s + gram_matrix(f) * f[0, 0].numel() for s, f in zip(sums, features, strict=True)]
            places = [n + f[0, 0].numel() for n, f in zip(places, features, strict=True)]
    with torch.enable_grad():
        grams = [(s / n).requires_grad_() for s, n in zip(sums, places, strict=True)]
        style = style_weight * look.style_loss(grams, aim)
        slopes = torch.autograd.grad(style.sum(), grams)
        gradient = torch.zeros_like(pictures)
        for part in parts:
            pixels = pictures[..., *part.place].clone().requires_grad_()
            features, away = seen(part, pixels)
            share = content_weight * away.sum()
            for slope, f, n in zip(slopes, features, places, strict=True):
                share = share + (slope * gram_matrix(f)).sum() * (f[0, 0].numel() / n)
            gradient[..., *part.place] += torch.autograd.grad(share, pixels)[0]
    value = (content_weight * off + style).detach()
    return value + (gradient * (images - pictures)).sum((1, 2, 3))
