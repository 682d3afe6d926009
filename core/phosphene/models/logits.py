"""Logits from a network's output (``read_logits``), and functions of images as modules (``Function``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError


class Function(nn.Module):
    """A function of plain tensors (N, C, H, W) as a module without weights or layers."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        if type(images) is not Tensor:  # a subclass: NumPy, and sessions that take arrays, refuse it
            images = torch.empty(images.shape, dtype=images.dtype, device=images.device).copy_(images)
        return self.function(images)


def read_logits(output: Any) -> Tensor:
    """The logits (N, K) in a network's output: a tensor, a tuple, a mapping or an object with ``.logits``."""
    logits = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out", tuple(output.values())))
    if isinstance(logits, (tuple, list)):
        logits = next((o for o in logits if isinstance(o, Tensor) and o.ndim == 2), None)
    if isinstance(logits, np.ndarray):
        logits = torch.from_numpy(logits)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"this model returns a {type(output).__name__} without recognisable logits; "
            "pass a function that returns them: load_model(..., output=lambda result: ...)"
        )
    return logits
