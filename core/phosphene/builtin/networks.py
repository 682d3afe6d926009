"""The small networks of the bundled world, both ending in an 8x8 map, its average, a linear head."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .scenes import CLASSES

WEIGHTS = Path(__file__).parent / "weights"

# Normalisation stays outside the modules: they are given (image - MEAN) / STD, per channel.
MEAN: tuple[float, float, float] = (0.44, 0.43, 0.39)
STD: tuple[float, float, float] = (0.22, 0.18, 0.25)


class ShapesVGG(nn.Module):
    """Plain 3x3 convolutions and ReLUs, two a stage, max-pooled between: 64, 32, 16, 8 pixels.

    Takes normalised images (N, 3, 64, 64), gives logits (N, 10); other sizes work too.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        """Build the network with ``widths`` channels in its stages."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, len(CLASSES))
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images (N, 3, H, W): logits (N, 10)."""
        logits: Tensor = self.classifier(self.flatten(self.pool(self.features(images))))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        """Build the block; a stride or a change of width puts a 1x1 convolution on the shortcut."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images)))))
        output: Tensor = self.relu(branch + self.downsample(images))
        return output


class ShapesResNet(nn.Module):
    """A small residual network with batch norm, its layers named as torchvision names them.

    Takes normalised images (N, 3, 64, 64), gives logits (N, 10); other sizes work too.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96)) -> None:
        """Build the network with ``widths`` channels in ``layer1`` … ``layer3``."""
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(first, first))
        self.layer2 = nn.Sequential(BasicBlock(first, second, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(second, third, stride=2), BasicBlock(third, third))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, len(CLASSES))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images (N, 3, H, W): logits (N, 10)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"shapes-vgg": ShapesVGG, "shapes-resnet": ShapesResNet}


def normalise(images: Tensor) -> Tensor:
    """Turn pixels (N, 3, H, W) in [0, 1] into what the networks take."""
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    return (images - mean) / torch.tensor(STD, device=images.device)[:, None, None]


def load_network(name: str) -> nn.Module:
    """Build a trained network by its name in ``NETWORKS``, in eval mode, on the CPU."""
    if name not in NETWORKS:
        raise ValueError(f"no bundled network {name!r}; there are {', '.join(NETWORKS)}")
    network = NETWORKS[name]()
    network.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return network.eval()
