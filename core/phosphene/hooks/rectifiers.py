"""``read_rectifier``: whether a call of a torch function computes a ReLU, however it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rectifier:
    """A call that computes min(max(x, 0), upper).

    input: x.
    upper: the upper bound; None for a ReLU without.
    in_place: whether the call overwrites x.
    saves: what autograd saves for the call's own gradient, "input", "output" or nothing: the network may
        overwrite the other.
    clamp: whether it is a clamp, which may also limit pixels to [0, 1].
    """

    input: Tensor
    upper: float | None = None
    in_place: bool = False
    saves: str = "input"
    clamp: bool = False


def function_name(func: Any) -> str:
    """The name of a torch function, method or operator overload without underscores: ``relu``."""
    name: str = getattr(func, "__name__", "")
    return name.partition(".")[0].strip("_")


def read_rectifier(func: Any, args: Any, kwargs: Any) -> Rectifier | None:
    """The rectifier that a call computes, or None.

    ReLU and ReLU6 as modules, functions, tensor methods, in-place methods and operators of an exported
    network; ``clamp``, ``clip``, ``clamp_min``, ``hardtanh`` and ``threshold`` at 0; a leaky ReLU of slope
    0; the maximum of x and 0; and ``x * (x > 0)`` and ``torch.where(x > 0, x, 0)``.
    """
    name = function_name(func)
    if (read := _READERS.get(name)) is None:
        return None
    own: str = getattr(func, "__name__", "").partition(".")[0]
    rectifier = read(name, args, {key.removesuffix("_val"): value for key, value in kwargs.items()})
    if rectifier is not None and own.endswith("_") and not own.endswith("__"):
        rectifier = Rectifier(rectifier.input, rectifier.upper, True, "output", rectifier.clamp)
    elif rectifier is not None and own.startswith("__i"):  # __imul__
        rectifier = Rectifier(rectifier.input, rectifier.upper, True, "output")
    return rectifier


def _named(names: str, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip(names.split(), args, strict=False)) | kwargs


def _relu(name: str, args: Any, kwargs: Any) -> Rectifier | None:
    call = _named("input inplace", args, kwargs)
    in_place, upper = bool(call.get("inplace")), 6.0 if name == "relu6" else None
    return Rectifier(call["input"], upper, in_place, "output" if in_place or name == "relu" else "input")


def _clamp(name: str, args: Any, kwargs: Any) -> Rectifier | None:
    names, default = ("input min max inplace", -1) if name == "hardtanh" else ("input min max", None)
    call = _named(names, args, kwargs)
    low, high = call.get("min", default), call.get("max", 1 if name == "hardtanh" else None)
    bounds = (int, float)
    if not isinstance(low, bounds) or low != 0 or not (high is None or isinstance(high, bounds)):
        return None
    upper = None if high is None or high == float("inf") else float(high)
    in_place = bool(call.get("inplace"))
    saves = "output" if in_place else "input"
    return Rectifier(call["input"], upper, in_place, saves, clamp=name != "hardtanh")


def _threshold(name: str, args: Any, kwargs: Any) -> Rectifier | None:
    call = _named("input threshold value inplace", args, kwargs)
    if call.get("threshold") != 0 or call.get("value") != 0:
        return None
    in_place = bool(call.get("inplace"))
    return Rectifier(call["input"], None, in_place, "output" if in_place else "input")


def _leaky(name: str, args: Any, kwargs: Any) -> Rectifier | None:
    call = _named("input negative_slope inplace", args, kwargs)
    if call.get("negative_slope", 0.01) != 0:
        return None
    in_place = bool(call.get("inplace"))
    return Rectifier(call["input"], None, in_place, "output" if in_place else "input")


def _maximum(name: str, args: Any, kwargs: Any) -> Rectifier | None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 2:
        return None
    for x, other in (tensors, reversed(tensors)):
        if x.requires_grad and not other.requires_grad and not other.any() and _same_shape(x, other):
            return Rectifier(x)
    return None


def _masked(name: str, args: Any, kwargs: Any) -> Rectifier | None:
    """``x * (x > 0)``."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if len(tensors) != 2:
        return None
    for x, mask in (tensors, reversed(tensors)):
        if x.requires_grad and not mask.requires_grad and mask.shape == x.shape and _is_mask(mask, x):
            return Rectifier(x, saves="nothing")
    return None


def _where(name: str, args: Any, kwargs: Any) -> Rectifier | None:
    """``torch.where(x > 0, x, 0)`` and ``x.where(x > 0, 0)``."""
    if len(args) != 3 or kwargs:
        return None
    condition, x, other = args
    if isinstance(x, Tensor) and x.dtype == torch.bool:
        condition, x = x, condition
    if not (isinstance(condition, Tensor) and isinstance(x, Tensor) and x.requires_grad):
        return None
    zero = not other.requires_grad and not other.any() if isinstance(other, Tensor) else other == 0
    return Rectifier(x, saves="nothing") if zero and _is_mask(condition, x) else None


def _same_shape(x: Tensor, other: Tensor) -> bool:
    return torch.broadcast_shapes(x.shape, other.shape) == x.shape


def _is_mask(mask: Tensor, x: Tensor) -> bool:
    """Whether a mask is 1 where x > 0 and 0 elsewhere (either where x is 0)."""
    if mask.shape != x.shape:
        return False
    x = x.detach()
    # Where x is 0 both masks give 0; NaN is neither.
    return bool((((x > 0).to(mask.dtype) == mask) | (x == 0)).all())


_READERS: dict[str, Callable[[str, Any, Any], Rectifier | None]] = {
    **dict.fromkeys(("relu", "relu6"), _relu),
    **dict.fromkeys(("hardtanh", "clamp", "clip", "clamp_min"), _clamp),
    "threshold": _threshold,
    "leaky_relu": _leaky,
    **dict.fromkeys(("maximum", "max", "fmax"), _maximum),
    **dict.fromkeys(("mul", "multiply", "imul", "rmul"), _masked),
    "where": _where,
}
