"""Gram matrices of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_matrix(features: Tensor) -> Tensor:
    """Gram matrices G = F F^T / (H W) of feature maps (N, C, H, W): (N, C, C), scaled as in Gatys's code."""
    return torch.einsum("nchw,ndhw->ncd", features, features) / features[0, 0].numel()
