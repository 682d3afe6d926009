"""Gram matrices of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import at_least_float32


def gram_matrix(features: Tensor) -> Tensor:
    """Gram matrices G = F F^T / (H W) of feature maps (N, C, H, W): (N, C, C), scaled as in Gatys's code."""
    features = at_least_float32(features)  # sums over all positions overflow in float16
    return torch.einsum("nchw,ndhw->ncd", features, features) / features[0, 0].numel()
