"""Keeping a picture's colours when its style changes: by its luminance alone, or by matched histograms.

Source: Gatys, Bethge, Hertzmann, Shechtman 2016, "Preserving Color in Neural Artistic Style Transfer".
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Luminance of R, G and B, as in YIQ.
_LUMA = (0.299, 0.587, 0.114)


def luminance(images: Tensor) -> Tensor:
    """Y (N, 1, H, W) of images (N, 3, H, W)."""
    return torch.einsum("nchw,c->nhw", images, images.new_tensor(_LUMA))[:, None]


def recoloured(images: Tensor, colours: Tensor) -> Tensor:
    """The images' luminance with another picture's colours: (N, 3, H, W), in [0, 1].

    In YIQ colours are differences to Y, so that replacing Y adds the same to all three channels.
    """
    return (colours + luminance(images) - luminance(colours)).clamp(0, 1)


def matched(images: Tensor, like: Tensor) -> Tensor:
    """The images with the mean and the covariance of the colours of ``like`` (1, C, H, W), in [0, 1].

    x -> S_l^(1/2) S_x^(-1/2) (x - m_x) + m_l, which of one channel is (x - m_x) s_l / s_x + m_l.
    """
    mean, _, inverse = _spread(images)
    wanted, root, _ = _spread(like)
    return (torch.einsum("mij,njk,nkhw->nihw", root, inverse, images - mean) + wanted).clamp(0, 1)


def _spread(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean colour (N, C, 1, 1), the root of the colours' covariance and its inverse (N, C, C)."""
    mean = images.mean((2, 3), keepdim=True)
    away = (images - mean).flatten(2).double()
    values, vectors = torch.linalg.eigh(away @ away.mT / away.shape[2])
    sizes = values.clamp(min=1e-8).sqrt()
    root, inverse = (
        torch.einsum("nij,nj,nkj->nik", vectors, s, vectors).to(images) for s in (sizes, 1 / sizes)
    )
    return mean, root, inverse
