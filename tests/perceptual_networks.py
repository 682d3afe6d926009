"""The perceptual networks of ``shared/weights``, for tests and trials: VGG-19, cut and distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from phosphene import Model, load_model

#: Convolutions between the poolings of VGG-19.
_BLOCKS = (2, 2, 4, 4, 1)


def load_vgg19(assets: Path) -> Model:
    """The real VGG-19 (rescaled, reflection padding) up to relu3_1: 64, 64 | 128, 128 | 256 channels."""
    weights = load_file(assets / "weights" / "vgg19_relu3_1.normalised.torchvision.safetensors")
    names = ["features.0", "features.2", "features.5", "features.7", "features.10"]
    convolutions = [(weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in names]
    return _chain(convolutions, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def load_small_vgg19(assets: Path, level: int = 5) -> Model:
    """VGG-19 distilled to a sixteenth, up to relu{level}_1."""
    weights = load_file(assets / "weights" / f"vgg19_16x_encoder{level}.collabdistill.safetensors")
    names = [f"conv{block + 1}{place + 1}" for block in range(5) for place in range(_BLOCKS[block])]
    convolutions = [(weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in names if f"{n}.weight" in weights]
    # What brings the pixels into Caffe's range is linear, and goes into the first convolution.
    matrix, shift = weights["conv0.weight"][:, :, 0, 0], weights["conv0.bias"]
    first, bias = convolutions[0]
    convolutions[0] = (torch.einsum("ochw,ci->oihw", first, matrix), bias + first.sum((2, 3)) @ shift)
    return _chain(convolutions)


def _chain(convolutions: list[tuple[Tensor, Tensor]], **known: Any) -> Model:
    """A network of such convolutions alone, with the names that the papers give them."""
    layers: list[nn.Module] = []
    left = list(convolutions)
    for count in _BLOCKS:
        for weight, bias in left[:count]:
            layer = nn.Conv2d(weight.shape[1], len(weight), 3, padding=1, padding_mode="reflect")
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, nn.ReLU()]
        left = left[count:]
        if not left:
            break
        layers.append(nn.MaxPool2d(2))
    return load_model(nn.Sequential(*layers).eval(), input_size=(3, 64, 64), **known)


def load_decoder(assets: Path) -> nn.Sequential:
    """The network that makes pictures in [0, 1] of what ``load_vgg19`` gives at relu3_1."""
    weights = load_file(assets / "weights" / "vgg19_relu3_1.decoder.safetensors")
    layers: list[nn.Module] = []
    for name in (1, 5, 8, 12, 15):
        weight = weights[f"{name}.weight"]
        layer = nn.Conv2d(weight.shape[1], len(weight), 3, padding=1, padding_mode="reflect")
        layer.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"]})
        layers += [layer, *([nn.ReLU()] if name < 15 else [])]
        layers += [nn.Upsample(scale_factor=2)] if name in (1, 8) else []
    return nn.Sequential(*layers).eval()
