"""Color preservation in style transfer, by luminance or by matching the style's colors to the content's.

Source: Gatys, Bethge, Hertzmann, Shechtman 2016, "Preserving Color in Neural Artistic Style Transfer".
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from phosphene import InputError, to_float64

#: Colors of a stylized image: the style's; or the content's, because only the luminance is stylized
#: ("luminance") or because the styles' color mean and covariance are matched to it first ("histogram").
ColorSource: TypeAlias = Literal["style", "luminance", "histogram"]

#: Weights of R, G and B in the luminance Y of YIQ.
_LUMA = (0.299, 0.587, 0.114)


def luminance(images: Tensor) -> Tensor:
    """Y (N, 1, H, W) of images (N, 3, H, W)."""
    return torch.einsum("nchw,c->nhw", images, images.new_tensor(_LUMA))[:, None]


def replace_luminance(images: Tensor, stylized: Tensor) -> Tensor:
    """The images with the luminance of the stylized ones and their own chrominance: (N, 3, H, W), in [0, 1].

    The chrominances I and Q of YIQ are differences to Y, so replacing Y adds the same to all three channels.
    """
    return (images + luminance(stylized) - luminance(images)).clamp(0, 1)


def match_color_statistics(images: Tensor, reference: Tensor) -> Tensor:
    """The images with the color mean and covariance of a reference (1, C, H, W), in [0, 1].

    x -> S_r^(1/2) S_x^(-1/2) (x - m_x) + m_r, for one channel (x - m_x) s_r / s_x + m_r.
    """
    mean, _, inverse_root = _color_statistics(images)
    reference_mean, root, _ = _color_statistics(reference)
    matched = torch.einsum("mij,njk,nkhw->nihw", root, inverse_root, images - mean) + reference_mean
    return matched.clamp(0, 1)


def prepare_colors(content: Tensor, styles: Tensor, color: ColorSource) -> tuple[Tensor, list[Tensor]]:
    """The content and style images to optimize on: one batch of styles for all contents, or one per content.

    For "luminance" both are gray; ``replace_luminance`` afterwards restores the content's colors.
    Raises InputError for "luminance" of images that do not have three channels.
    """
    if color == "style":
        return content, [styles]
    if color == "histogram":
        return content, [match_color_statistics(styles, reference) for reference in content.split(1)]
    if content.shape[1] != 3:
        raise InputError(f"luminance needs red, green and blue, not {content.shape[1]} channels")
    gray_styles, gray_content = luminance(styles), luminance(content).expand_as(content)
    return gray_content, [
        match_color_statistics(gray_styles, reference[:, :1]).expand_as(styles)
        for reference in gray_content.split(1)
    ]


def _color_statistics(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean color (N, C, 1, 1), root of the color covariance and inverse of that root (N, C, C)."""
    mean = images.mean((2, 3), keepdim=True)
    centered = to_float64((images - mean).flatten(2))
    values, vectors = torch.linalg.eigh(centered @ centered.mT / centered.shape[2])
    std = values.clamp(min=1e-8).sqrt()
    root, inverse_root = (
        torch.einsum("nij,nj,nkj->nik", vectors, s, vectors).to(images) for s in (std, 1 / std)
    )
    return mean, root, inverse_root
