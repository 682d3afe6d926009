"""The decoder that ``adaptive_style_fit`` trains: an encoder's feature maps -> images."""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model


class Decoder(nn.Module):
    """A mirrored encoder: feature maps (N, C, h, w) -> images (N, channels, H, W), one resolution at a time.

    For each of ``widths``, coarsest first: a convolution to the next width, nearest upsampling by two and a
    convolution at that width, all with reflection padding and, except for the last, ReLUs. There is no
    normalization layer, which would undo AdaIN.
    """

    # Saved weights depend on the names widen, smooth and paint.
    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__()
        conv = lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3)
        self.widen = nn.ModuleList(conv(coarse, fine) for coarse, fine in pairwise(widths))
        self.smooth = nn.ModuleList(conv(fine, fine) for fine in widths[1:-1])
        self.paint = conv(widths[-1], channels)

    def forward(self, features: Tensor) -> Tensor:
        x = features
        for level, layer in enumerate(self.widen):
            x = F.interpolate(layer(_pad(x)).relu(), scale_factor=2)
            if level < len(self.smooth):
                x = self.smooth[level](_pad(x)).relu()
        return self.paint(_pad(x))


def _pad(features: Tensor) -> Tensor:
    """One pixel of reflection padding; replication where a single row or column leaves nothing to reflect."""
    return F.pad(features, (1,) * 4, mode="reflect" if min(features.shape[2:]) > 1 else "replicate")


def log2_stride(model: Model, layer: str) -> int:
    """log2 of the layer's stride: 2 for feature maps of 16 x 16 from images of 64 x 64."""
    sides = zip(model.input_size[1:], model.map_shape(layer)[1:], strict=True)
    return max(0, round(max(math.log2(image / feature_map) for image, feature_map in sides)))


def decoder_widths(model: Model, layer: str) -> list[int]:
    """Channels of a layer's decoder, coarse to fine: those of the stage there, else half as many."""
    stage_widths = {log2_stride(model, s): model.map_shape(s)[0] for s in stages_up_to(model, layer)}
    widths = [model.map_shape(layer)[0]]
    for level in reversed(range(log2_stride(model, layer))):
        widths.append(stage_widths.get(level, max(16, widths[-1] // 2)))
    return widths


def stages_up_to(model: Model, layer: str) -> list[str]:
    """The model's stages that run before a layer, and the layer, finest first."""
    order = list(model.structure.layers)
    return [s for s in model.stages if order.index(s) < order.index(layer)] + [layer]
