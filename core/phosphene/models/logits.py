"""Logits from a network's output (``read_logits``), and functions of images as modules (``Function``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError, type_name


class Function(nn.Module):
    """A function of plain tensors (N, C, H, W) as a module without weights or layers."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        if type(images) is not Tensor:  # a subclass: NumPy, and sessions that take arrays, refuse it
            images = torch.empty(images.shape, dtype=images.dtype, device=images.device).copy_(images)
        return self.function(images)


def read_logits(output: Any, classes: int | None = None) -> Tensor:
    """The logits in a network's output: a tensor, or ``.logits``, ``["logits"]`` or ``["out"]`` of it.

    Of a tuple or another mapping the only tensor that can be logits: (N, K) or (N,), else (N, K, H, W).
    Where several can be, the one with ``classes`` columns. Raises ModelError for none, and for several.
    """
    logits = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out", output))
    if isinstance(logits, np.ndarray):
        logits = torch.from_numpy(logits)
    if isinstance(logits, Tensor):
        return logits
    named: dict[str, Any] = {}
    if isinstance(logits, Mapping):
        named = {repr(key): value for key, value in logits.items()}
    elif isinstance(logits, (tuple, list)):
        named = {str(index): value for index, value in enumerate(logits)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    vectors = {name: value for name, value in tensors.items() if value.ndim in (1, 2)}
    candidates = vectors or {name: value for name, value in tensors.items() if value.ndim == 4}
    if len(candidates) > 1 and classes is not None:
        fitting = {n: v for n, v in candidates.items() if v.ndim > 1 and v.shape[1] == classes}
        candidates = fitting if len(fitting) == 1 else candidates
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    kind = type_name(output)
    items = output if isinstance(output, (list, tuple)) else []
    if any(isinstance(item, Mapping) and "boxes" in item for item in items):
        raise ModelError(
            "this model returns boxes, as a detector: declare it by load_model(..., task='detection')"
        )
    if not candidates:
        raise ModelError(
            f"this model returns {kind} without recognizable logits; "
            "pass a function that returns them: load_model(..., output=lambda result: ...)"
        )
    shapes = " and ".join(f"[{name}] {tuple(value.shape)}" for name, value in candidates.items())
    first = next(iter(candidates))
    raise ModelError(
        f"this model returns {kind} in which several tensors can be the logits, {shapes}; choose one: "
        f"load_model(..., output=lambda result: result[{first}])"
    )
