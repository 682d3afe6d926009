"""VGG-19 up to relu3_1, its distilled version and a decoder, from ``shared/weights``, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from phosphene import Model, load_model

#: Number of convolutions in each block of VGG-19.
_BLOCKS = (2, 2, 4, 4, 1)


def load_vgg19(assets: Path) -> Model:
    """Pretrained VGG-19 (rescaled, reflection padding) up to relu3_1: 64, 64 | 128, 128 | 256 channels."""
    weights = load_file(assets / "weights" / "vgg19_relu3_1.normalised.torchvision.safetensors")
    names = ["features.0", "features.2", "features.5", "features.7", "features.10"]
    convolutions = [(weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in names]
    return _chain(convolutions, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def load_small_vgg19(assets: Path, level: int = 5) -> Model:
    """VGG-19 distilled to a sixteenth of the parameters, up to relu{level}_1."""
    weights = load_file(assets / "weights" / f"vgg19_16x_encoder{level}.collabdistill.safetensors")
    names = [f"conv{block + 1}{index + 1}" for block in range(5) for index in range(_BLOCKS[block])]
    convolutions = [(weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in names if f"{n}.weight" in weights]
    # The linear map from pixels to Caffe's range is merged into the first convolution.
    matrix, shift = weights["conv0.weight"][:, :, 0, 0], weights["conv0.bias"]
    first, bias = convolutions[0]
    convolutions[0] = (torch.einsum("ochw,ci->oihw", first, matrix), bias + first.sum((2, 3)) @ shift)
    return _chain(convolutions)


def _chain(convolutions: list[tuple[Tensor, Tensor]], **options: Any) -> Model:
    """A model of these convolutions, ReLUs and max pooling."""
    layers: list[nn.Module] = []
    remaining = list(convolutions)
    for count in _BLOCKS:
        for weight, bias in remaining[:count]:
            layer = nn.Conv2d(weight.shape[1], len(weight), 3, padding=1, padding_mode="reflect")
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, nn.ReLU()]
        remaining = remaining[count:]
        if not remaining:
            break
        layers.append(nn.MaxPool2d(2))
    return load_model(nn.Sequential(*layers).eval(), input_size=(3, 64, 64), **options)


def load_decoder(assets: Path) -> nn.Sequential:
    """The decoder of ``load_vgg19``'s features at relu3_1 to images in [0, 1]."""
    weights = load_file(assets / "weights" / "vgg19_relu3_1.decoder.safetensors")
    layers: list[nn.Module] = []
    for name in (1, 5, 8, 12, 15):
        weight = weights[f"{name}.weight"]
        layer = nn.Conv2d(weight.shape[1], len(weight), 3, padding=1, padding_mode="reflect")
        layer.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"]})
        layers += [layer, *([nn.ReLU()] if name < 15 else [])]
        layers += [nn.Upsample(scale_factor=2)] if name in (1, 8) else []
    return nn.Sequential(*layers).eval()
