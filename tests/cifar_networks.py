"""The CIFAR-10 networks of ``shared/weights``, for tests and for the tables in the book."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, load_model, read_images

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class _NormalizedBlock(nn.Module):
    """Residual block of two convolutions with batch norms; the shortcut subsamples and adds zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.padding = stride, (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class _ResNet(nn.Module):
    """ResNet for CIFAR (He et al. 2016): three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
            in_channels = [widths[stage - 1]] + [widths[stage]] * (blocks - 1)
            parts = [
                _NormalizedBlock(count, widths[stage], stride)
                for count, stride in zip(in_channels, strides, strict=True)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*parts))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class _PlainBlock(nn.Module):
    """Residual block of two convolutions without norms; the shortcut of stride 2 is a convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(in_channels, out_channels, 3, stride, 1),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1),
        )
        self.shortcut = nn.Sequential(
            *([nn.Conv2d(in_channels, out_channels, 1, stride)] if stride > 1 else [])
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class _Robust(nn.Module):
    """The adversarially trained networks: ``widths`` of the first convolution and of every stage."""

    def __init__(self, widths: tuple[int, ...], flat: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, 1)
        self.stages = len(widths) - 1
        for stage in range(1, len(widths)):
            first = _PlainBlock(widths[stage - 1], widths[stage], 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, _PlainBlock(widths[stage], widths[stage], 1)))
        self.linear1, self.linear2 = nn.Linear(flat, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


_PLAIN = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_ADVERSARIAL = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}


def load_cifar(assets: Path, name: str) -> Model:
    """Load resnet20, resnet32 or resnet56, or resnet2b or resnet4b, adversarially trained at eps 2/255."""
    match name:
        case "resnet2b":
            module: nn.Module = _Robust((8, 16), 1024)
        case "resnet4b":
            module = _Robust((16, 32, 32), 512)
        case _:
            module = _ResNet((int(name.removeprefix("resnet")) - 2) // 6)
    robust = name.endswith("b")
    file = f"cifar10_{name}_adv.abcrown" if robust else f"cifar10_{name}.akamaster"
    options = {"classes": CLASSES, "input_size": (3, 32, 32), **(_ADVERSARIAL if robust else _PLAIN)}
    return load_model(module.eval(), weights=assets / "weights" / f"{file}.safetensors", **options)


def cifar_images(assets: Path, count: int = 200) -> tuple[Tensor, Tensor]:
    """The first test images (count, 3, 32, 32) and their classes (count,)."""
    files = sorted((assets / "images" / "cifar10").glob("*.png"))[:count]
    return read_images(files), torch.tensor([int(file.stem.split("_")[1]) for file in files])
