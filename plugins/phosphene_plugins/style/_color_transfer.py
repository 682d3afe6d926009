"""Keeping a picture's colours when its style changes: by its luminance alone, or by matched histograms.

Source: Gatys, Bethge, Hertzmann, Shechtman 2016, "Preserving Color in Neural Artistic Style Transfer".
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from phosphene import InputError

#: Whose colours a painted picture has: the style's, or the content's, kept in one of two ways.
Colour: TypeAlias = Literal["style", "luminance", "histogram"]


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


def prepared(content: Tensor, styles: Tensor, colour: Colour) -> tuple[Tensor, list[Tensor]]:
    """What of the content is painted, and the styles for it: the same for all, or a set for each.

    Of "luminance" alone what is painted is grey, and ``recoloured`` afterwards.
    """
    if colour == "style":
        return content, [styles]
    if colour == "histogram":
        return content, [matched(styles, like) for like in content.split(1)]
    if content.shape[1] != 3:
        raise InputError(f"luminance is of red, green and blue, not of {content.shape[1]} channels")
    grey, shown = luminance(styles), luminance(content).expand_as(content)
    return shown, [matched(grey, like[:, :1]).expand_as(styles) for like in shown.split(1)]


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
