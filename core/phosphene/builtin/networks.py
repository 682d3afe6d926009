"""The bundled classifiers: networks with an 8x8 map, average pooling and a linear layer; a transformer."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..torch_state import cpu_by_default
from .scenes import CLASSES
from .vision_transformer import VIT, ShapesViT

_Network = TypeVar("_Network", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"

# Normalization is not part of the modules: their input is (image - MEAN) / STD, per channel.
MEAN = (0.44, 0.43, 0.39)
STD = (0.22, 0.18, 0.25)


class ShapesVGG(nn.Module):
    """Plain 3x3 convolutions and ReLUs, two per stage, max pooling between stages: 64, 32, 16, 8 pixels.

    Takes normalized images (N, 3, 64, 64), returns logits (N, 10); other sizes are allowed.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (24, 48, 96, 128):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, len(CLASSES))
        _initialize(self.features)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(images))))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions with batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images)))))
        return self.relu(branch + self.downsample(images))


class ShapesResNet(nn.Module):
    """A small residual network with batch norm, its layers named as in torchvision.

    Takes normalized images (N, 3, 64, 64), returns logits (N, 10); other sizes are allowed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(32, 32))
        self.layer2 = nn.Sequential(BasicBlock(32, 64, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(64, 96, stride=2), BasicBlock(96, 96))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(96, len(CLASSES))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ShapesCertified(nn.Module):
    """A small network of strided convolutions whose predictions are proven by interval bounds.

    Takes normalized images (N, 3, 64, 64), returns logits (N, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.AvgPool2d(2)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 4, stride=2, padding=1), nn.ReLU()),
        )
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64 * 4 * 4, len(CLASSES))
        _initialize(self.features)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(self.shrink(images))))


class ShapesLipschitz(nn.Module):
    """A small network of layers of norm 1 whose predictions are proven by its Lipschitz constant.

    Takes normalized images (N, 3, 64, 64), returns logits (N, 10). Average pooling, not strides: the norm of
    a strided convolution is bounded by that of all its positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.AvgPool2d(4)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        )
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(64 * 4 * 4, 48)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(48, len(CLASSES))
        _initialize(self.features)

    def forward(self, images: Tensor) -> Tensor:
        x = self.flatten(self.features(self.shrink(images)))
        return self.classifier(self.relu(self.hidden(x)))


def _initialize(features: nn.Sequential) -> None:
    """Draw the weights of convolutions for layers of ReLUs (He et al.), without biases."""
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


#: The convolutional networks.
NETWORKS: dict[str, type[nn.Module]] = {
    "shapes-vgg": ShapesVGG,
    "shapes-resnet": ShapesResNet,
    "shapes-biased": ShapesVGG,
    "shapes-robust": ShapesVGG,
}
#: Trained on interval bounds, which prove its predictions in small balls.
CERTIFIED = "shapes-certified"
#: Trained for a small Lipschitz constant, which proves its predictions in l2 balls.
LIPSCHITZ = "shapes-lipschitz"
#: All bundled classifiers of scenes.
CLASSIFIERS: dict[str, type[nn.Module]] = NETWORKS | {
    VIT: ShapesViT,
    CERTIFIED: ShapesCertified,
    LIPSCHITZ: ShapesLipschitz,
}
#: Trained on scenes whose background determines the class; its predictions follow the background.
BIASED = "shapes-biased"
#: Trained on adversarial examples.
ROBUST = "shapes-robust"
#: The network of ``parts_resnet``, for scenes of objects made of parts.
PARTS_RESNET = "parts-resnet"


def normalize(images: Tensor) -> Tensor:
    """Normalize pixels (N, 3, H, W) in [0, 1] to the networks' input."""
    mean, std = torch.tensor([MEAN, STD], device=images.device)[:, :, None, None]
    return (images - mean) / std


@cpu_by_default()
def load_network(name: str) -> nn.Module:
    """Load a trained network by its name in ``CLASSIFIERS``, in eval mode, on the CPU."""
    network = CLASSIFIERS[name]()
    network.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return network.eval()


@cpu_by_default()
def load_generator(kind: type[_Network], name: str) -> _Network:
    """Load a trained generative network, stored in half precision, in eval mode, on the CPU."""
    stored = load_file(WEIGHTS / f"{name}.safetensors")
    with torch.device("meta"):  # initializing the weights would take time and random numbers
        network = kind()
    network.load_state_dict({key: value.float() for key, value in stored.items()}, assign=True)
    return network.eval()
