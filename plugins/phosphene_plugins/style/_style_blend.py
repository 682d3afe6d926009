"""Blends of several styles: weights that sum to one, and the title of an image in a blend."""

from __future__ import annotations

import math

from torch import Tensor

from phosphene import InputError


def normalize_blend(blend: list[float] | None, styles: Tensor) -> Tensor:
    """gamma (S,): the blend divided by its sum, equal weights for None.

    Raises InputError unless there is one weight for each style and at least one is above zero.
    """
    # equivalent mutants: equal weights are divided by their sum
    blend = [1.0] * len(styles) if blend is None else blend
    # Divided by a power of two, which is exact: the sum of very large weights would be infinite.
    exponent = math.frexp(max(blend, default=0.0))[1]
    weights = styles.new_tensor([math.ldexp(weight, -exponent) for weight in blend])
    if len(weights) != len(styles) or not weights.sum() > 0:
        raise InputError(f"{len(styles)} styles need one weight each, at least one above zero, not {blend}")
    return weights / weights.sum()


def style_title(blend_weights: Tensor) -> str:
    """The title of an image in a blend of styles with these weights (S,)."""
    if len(blend_weights) == 1:
        return "in the style"
    return " + ".join(f"{w:.0%} of style {n}" for n, w in enumerate(blend_weights) if w)
