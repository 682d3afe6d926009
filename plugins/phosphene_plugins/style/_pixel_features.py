"""A network whose features are pixels, and the style-transfer loss on it in closed form; for oracles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, load_model
from phosphene.optimize import total_variation

MEAN, STD = (0.25, 0.5, 0.125), (0.5, 0.75, 0.25)


def load_pixel_model(dtype: torch.dtype = torch.float64) -> Model:
    """Layer "0" is the normalized pixels (x - mean) / std, layer "1" their means over 3 x 3, stride 2."""
    pixels = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.dirac_(pixels.weight)
    network = nn.Sequential(pixels, nn.AvgPool2d(3, 2, 1)).to(dtype)
    return load_model(network, input_size=(3, 16, 16), mean=MEAN, std=STD)


def draw_images(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniformly random pixels in [0.2, 0.8]."""
    return 0.2 + 0.6 * torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def pixel_features(images: Tensor, layer: str) -> Tensor:
    """The features of ``load_pixel_model``."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    pixels = (images - mean) / std
    return pixels if layer == "0" else F.avg_pool2d(pixels, 3, 2, 1)


def gram(images: Tensor, layer: str) -> Tensor:
    """G = F F^T / M of the features at a layer."""
    features = pixel_features(images, layer).flatten(2)
    return features @ features.mT / features.shape[2]


def relative(values: Tensor, target: Tensor) -> Tensor:
    """|values - target|^2 / |target|^2 of each row."""
    return (values - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)


def transfer_loss(
    images: Tensor,
    content: Tensor,
    styles: Tensor,
    blend: tuple[float, ...] = (1.0,),
    *,
    content_layer: str = "0",
    weights: Mapping[str, float],
    alpha: float,
    beta: float,
    smoothness: float = 0.0,
) -> Tensor:
    """alpha L_content + beta L_style + smoothness TV / (H W), with ``weights`` of the style layers: (N,)."""
    loss = alpha * relative(pixel_features(images, content_layer), pixel_features(content, content_layer))
    for layer, weight in weights.items():
        target = sum(b * gram(style, layer) for b, style in zip(blend, styles.split(1), strict=True))
        assert isinstance(target, Tensor)
        loss = loss + beta * weight * relative(gram(images, layer), target)
    return loss + smoothness * total_variation(images) / images[0, 0].numel()
