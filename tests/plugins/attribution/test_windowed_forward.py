"""Windowed forward passes equal full forward passes for every kind of network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from phosphene_plugins.attribution._windowed_forward import WindowedImages


class Branches(nn.Module):
    """Residual sums, concatenation, every kind of pooling, dilation, groups, in-place calls and reuse."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.right = nn.Conv2d(8, 4, 1)
        self.skip = nn.Conv2d(12, 6, 1, stride=3)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.first(images)))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        y = torch.cat([self.left(x).relu_() + x, self.right(x)], 1)
        y += 0.5
        y = F.avg_pool2d(y, 2, 1, padding=1) * torch.sigmoid(y.new_ones(12, 1, 1))
        return self.head(F.hardswish(self.skip(y)).mean((2, 3)))


class Gates(nn.Module):
    """Operations that are not local: a view that is written to, squeeze and excitation, group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        x[:, :2].mul_(2)
        x = x * x.mean((2, 3), keepdim=True).sigmoid()
        return self.last(self.norm(x)).amax((2, 3))


def windows(height: int, width: int, side: int, stride: int) -> list[tuple[slice, slice]]:
    rows, columns = (
        [slice(start, min(start + side, size)) for start in range(0, max(0, size - side) + stride, stride)]
        for size in (height, width)
    )
    return [(vertical, horizontal) for vertical in rows for horizontal in columns]


def both(
    network: nn.Module, size: tuple[int, int], side: int, stride: int
) -> tuple[Tensor, Tensor, WindowedImages]:
    """The outputs by windows and by full forward passes."""
    network = network.double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    image, replacement = torch.rand(2, 3, *size, dtype=torch.float64, generator=generator)
    positions = windows(*size, side, stride)
    windowed = WindowedImages(image, replacement, positions)
    indices = range(0, len(positions), max(1, len(positions) // 12))
    full = image.repeat(len(indices), 1, 1, 1)
    for row, index in zip(full, indices, strict=True):
        rows, columns = positions[index]
        row[:, rows, columns] = replacement[:, rows, columns]
    with torch.inference_mode():
        ours = torch.cat([network(windowed.batch(half)) for half in (indices[:5], indices[5:])])
        return ours, network(full), windowed


@pytest.mark.parametrize(("size", "side", "stride"), [((48, 48), 8, 8), ((37, 53), 5, 4), ((41, 40), 1, 7)])
@pytest.mark.parametrize("kind", [Branches, Gates])
def test_windows_of_any_size_equal_full_forward_passes(
    kind: type[nn.Module], size: tuple[int, int], side: int, stride: int
) -> None:
    torch.manual_seed(0)
    ours, theirs, _ = both(kind(), size, side, stride)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "mobilenet_v2"])
def test_torchvision_networks_equal_full_forward_passes(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs, windowed = both(torchvision.models.get_model(name, weights=None), (67, 53), 7, 5)
    assert type(ours) is Tensor
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    # One branch may cover all of a feature map before the other does.
    assert not windowed.nonlocal_operations - {"add", "add_"}


def test_nonlocal_operations_are_named_and_a_window_may_cover_the_image() -> None:
    torch.manual_seed(0)
    *_, windowed = both(Gates(), (20, 20), 3, 3)
    assert windowed.nonlocal_operations == {"slice"}
    image = torch.rand(3, 9, 9)
    everything = WindowedImages(image, torch.zeros_like(image), [(slice(0, 9), slice(0, 9))])
    with torch.inference_mode():
        assert not nn.Conv2d(3, 2, 3, bias=False)(everything.batch([0])).any()


def test_local_layers_compute_only_what_the_window_affects() -> None:
    shapes: list[tuple[int, ...]] = []

    class Spy(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            output = super().forward(images)
            shapes.append(tuple(output.crops.shape))  # type: ignore[attr-defined]
            return output

    network = nn.Sequential(Spy(3, 2, 3, padding=1), nn.ReLU(), Spy(2, 2, 3, padding=1))
    image = torch.rand(3, 40, 40)
    windowed = WindowedImages(image, torch.zeros_like(image), windows(40, 40, 4, 4))
    with torch.inference_mode():
        network(windowed.batch([0, 55]))
    assert shapes == [(2, 2, 6, 6), (2, 2, 8, 8)]
