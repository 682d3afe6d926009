"""Precisions: float64 on devices that may not have it, float32 where half precision does not suffice."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """The device for work in float64: ``device``, or the CPU where it has no float64 (Apple's MPS)."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return torch.device("cpu")
    return device


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on ``float64_device``; ``result.to(tensor)`` moves a result back."""
    return tensor.to(float64_device(tensor.device)).double()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, of half precision in float32: linear algebra, Fourier transforms and resizing have no half
    precision on the CPU, and sums of many squares overflow in float16. ``result.to(tensor)`` moves back.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
