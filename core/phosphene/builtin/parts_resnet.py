"""``parts-resnet``: a residual network for 128x128 images, trained on scenes of objects made of parts."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..torch_state import cpu_by_default
from .networks import PARTS_RESNET, WEIGHTS, BasicBlock
from .part_scenes import PART_CLASSES


class PartsResNet(nn.Module):
    """A residual network with batch norm whose first layer has 7x7 filters, named as in torchvision.

    Takes normalized images (N, 3, 128, 128), returns logits (N, 10); other sizes are allowed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(32, 32))
        self.layer2 = nn.Sequential(BasicBlock(32, 64, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, len(PART_CLASSES))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@cpu_by_default()
def load_parts_resnet() -> PartsResNet:
    """Load the trained network, stored in half precision, in eval mode, on the CPU."""
    network = PartsResNet()
    network.load_state_dict(load_file(WEIGHTS / f"{PARTS_RESNET}.safetensors"))
    return network.eval()
