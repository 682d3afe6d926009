"""The CIFAR-10 networks of ``shared/weights``, for tests and for the tables in the book."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, load_model, read_images

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class _Normed(nn.Module):
    """Two convolutions with batch norms beside a shortcut without weights, which fills up with zeros."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(made)
        self.stride, self.added = stride, (made - given) // 2

    def forward(self, x: Tensor) -> Tensor:
        beside = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + beside)


class _ResNet(nn.Module):
    """He et al. 2016 for CIFAR: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
            given = [widths[stage - 1]] + [widths[stage]] * (blocks - 1)
            parts = [_Normed(g, widths[stage], s) for g, s in zip(given, strides, strict=True)]
            setattr(self, f"layer{stage}", nn.Sequential(*parts))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class _Plain(nn.Module):
    """Two convolutions without norms beside a shortcut, which is a convolution where the size changes."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(given, made, 3, stride, 1), nn.Conv2d(made, made, 3, 1, 1)
        self.shortcut = nn.Sequential(*([nn.Conv2d(given, made, 1, stride)] if stride > 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class _Robust(nn.Module):
    """The adversarially trained networks: ``widths`` of the first convolution and of every stage."""

    def __init__(self, widths: tuple[int, ...], flat: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 2, 1)
        self.stages = len(widths) - 1
        for stage in range(1, len(widths)):
            first = _Plain(widths[stage - 1], widths[stage], 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, _Plain(widths[stage], widths[stage], 1)))
        self.linear1, self.linear2 = nn.Linear(flat, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


_PLAIN = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_ADVERSARIAL = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}


def load_cifar(assets: Path, name: str) -> Model:
    """ "resnet20", "resnet32", "resnet56", or trained against changes of 2/255, "resnet2b" or "resnet4b"."""
    match name:
        case "resnet2b":
            module: nn.Module = _Robust((8, 16), 1024)
        case "resnet4b":
            module = _Robust((16, 32, 32), 512)
        case _:
            module = _ResNet((int(name.removeprefix("resnet")) - 2) // 6)
    robust = name.endswith("b")
    file = f"cifar10_{name}_adv.abcrown" if robust else f"cifar10_{name}.akamaster"
    known = {"classes": CLASSES, "input_size": (3, 32, 32), **(_ADVERSARIAL if robust else _PLAIN)}
    return load_model(module.eval(), weights=assets / "weights" / f"{file}.safetensors", **known)


def cifar_images(assets: Path, count: int = 200) -> tuple[Tensor, Tensor]:
    """The first test pictures (count, 3, 32, 32) and their classes (count,)."""
    files = sorted((assets / "images" / "cifar10").glob("*.png"))[:count]
    return read_images(files), torch.tensor([int(file.stem.split("_")[1]) for file in files])
