"""Invariants: conditions that every result of a method meets, checked by the conformance kit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from .declared_condition import DeclaredCondition


class Invariant(DeclaredCondition):
    """A condition that results meet. Subclass it with a ``kind`` and a ``check``, and it is registered.

    ``when`` limits it to some values of a parameter: ``when=param.targeted.is_true()``,
    ``when=~param.norm.one_of("l1", "l2")``.
    """

    kinds: ClassVar[dict[str, type[Invariant]]] = {}

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        """Raise AssertionError where it is not met."""
        raise NotImplementedError(f"{type(self).__name__} must define check()")


class WithinBall(Invariant):
    """Every adversarial image stays within ``radius`` of its original, in ``norm``."""

    kind: Literal["within_ball"] = "within_ball"
    radius: str
    norm: str

    def parameters(self) -> set[str]:
        return super().parameters() | {self.radius, self.norm}

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        radius, norm = params[self.radius], params[self.norm]
        delta = (result.adversarial.cpu().double() - result.images.cpu().double()).flatten(1)
        order = {"linf": math.inf, "l2": 2.0, "l1": 1.0}[norm]
        worst = float(delta.norm(order, dim=1).max())
        # A rounding of x + delta at pixel scale; norms sum it over the pixels.
        slack = 1e-6 * delta.shape[1] ** (1 / order)
        assert worst <= radius + slack, f"{worst} is outside the ball of radius {radius} ({norm})"


class UnitRange(Invariant):
    """Every value in ``field`` is in [0, 1]."""

    kind: Literal["unit_range", "pixel_range"] = "unit_range"
    field: str = "maps"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        values = getattr(result, self.field)
        low, high = float(values.min()), float(values.max())
        assert 0 <= low <= high <= 1, f"{self.field} lies in [{low}, {high}]"


class PixelRange(UnitRange):
    """Every pixel in ``field`` is in [0, 1]."""

    kind: Literal["pixel_range"] = "pixel_range"
    field: str = "images"


class Nonnegative(Invariant):
    """No value in ``field`` is below zero."""

    kind: Literal["nonnegative"] = "nonnegative"
    field: str = "maps"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        low = float(getattr(result, self.field).min())
        assert low >= 0, f"{self.field} goes down to {low}"


class SumsToOne(Invariant):
    """Each map of ``field`` (..., h, w) and its values ``rest`` (..., S) are nonnegative and sum to 1.

    Of a row of an attention matrix: ``field`` are the patches, ``rest`` class and register tokens.
    """

    kind: Literal["sums_to_one"] = "sums_to_one"
    field: str = "maps"
    rest: str

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        maps, rest = getattr(result, self.field), getattr(result, self.rest)
        # A softmax in half precision is exact to its last digit, times the number of tokens at most.
        slack = 1e-5 if maps.element_size() > 2 else 0.05
        low = min(float(values.min()) for values in (maps, rest) if values.numel())
        assert low >= 0, f"{self.field} or {self.rest} goes down to {low}"
        sums = maps.double().sum((-2, -1)) + rest.double().sum(-1)
        worst = float((sums - 1).abs().max())
        assert worst <= slack, f"{self.field} and {self.rest} sum to 1 only up to {worst}"


class SameShape(Invariant):
    """``field`` has the shape of the input images."""

    kind: Literal["same_shape"] = "same_shape"
    field: str = "images"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        shape, expected = tuple(getattr(result, self.field).shape), tuple(inputs["images"].shape)
        assert shape == expected, f"{self.field} has shape {shape}, the images {expected}"


class MapPerPixel(Invariant):
    """``field`` has one value for every pixel of every input image: (N, H, W)."""

    kind: Literal["map_per_pixel"] = "map_per_pixel"
    field: str = "maps"

    def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any], result: Any) -> None:
        shape, expected = tuple(getattr(result, self.field).shape), tuple(inputs["images"][:, 0].shape)
        assert shape == expected, f"{self.field} has shape {shape}, the images' pixels {expected}"
