"""Incremental recomputation against whole pictures: exact, whatever the network does with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from phosphene_plugins.attribution._windowed_forward import Sweep


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
    """What has no rule, in the middle: a view that is written to, squeeze and excitation, normalisation."""

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
        [slice(at, min(at + side, whole)) for at in range(0, max(0, whole - side) + stride, stride)]
        for whole in (height, width)
    )
    return [(down, across) for down in rows for across in columns]


def both(network: nn.Module, size: tuple[int, int], side: int, stride: int) -> tuple[Tensor, Tensor, Sweep]:
    network = network.double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    picture, hidden = torch.rand(2, 3, *size, dtype=torch.float64, generator=generator)
    places = windows(*size, side, stride)
    sweep, some = Sweep(picture, hidden, places), range(0, len(places), max(1, len(places) // 12))
    whole = picture.repeat(len(some), 1, 1, 1)
    for row, place in zip(whole, some, strict=True):
        row[:, places[place][0], places[place][1]] = hidden[:, places[place][0], places[place][1]]
    with torch.inference_mode():
        halves = some[:5], some[5:]
        ours = torch.cat([network(sweep.pictures(half)) for half in halves])
        return ours, network(whole), sweep


@pytest.mark.parametrize(("size", "side", "stride"), [((48, 48), 8, 8), ((37, 53), 5, 4), ((41, 40), 1, 7)])
@pytest.mark.parametrize("kind", [Branches, Gates])
def test_windows_anywhere_give_what_whole_pictures_give(
    kind: type[nn.Module], size: tuple[int, int], side: int, stride: int
) -> None:
    torch.manual_seed(0)
    ours, theirs, _ = both(kind(), size, side, stride)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "mobilenet_v2"])
def test_known_networks_give_what_they_give_of_whole_pictures(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs, sweep = both(torchvision.models.get_model(name, weights=None), (67, 53), 7, 5)
    assert type(ours) is Tensor
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert not sweep.without_rule - {"add", "add_"}  # one branch may cover all a map before the other does


def test_what_has_no_rule_is_named_and_a_window_of_everything_is_whole() -> None:
    torch.manual_seed(0)
    *_, sweep = both(Gates(), (20, 20), 3, 3)
    assert sweep.without_rule == {"slice"}
    picture = torch.rand(3, 9, 9)
    everything = Sweep(picture, torch.zeros_like(picture), [(slice(0, 9), slice(0, 9))])
    with torch.inference_mode():
        assert not nn.Conv2d(3, 2, 3, bias=False)(everything.pictures([0])).any()


def test_local_layers_compute_no_more_than_the_window_reaches() -> None:
    seen: list[tuple[int, ...]] = []

    class Spy(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            output = super().forward(images)
            seen.append(tuple(output.crops.shape))  # type: ignore[attr-defined]
            return output

    network = nn.Sequential(Spy(3, 2, 3, padding=1), nn.ReLU(), Spy(2, 2, 3, padding=1))
    picture = torch.rand(3, 40, 40)
    sweep = Sweep(picture, torch.zeros_like(picture), windows(40, 40, 4, 4))
    with torch.inference_mode():
        network(sweep.pictures([0, 55]))
    assert seen == [(2, 2, 6, 6), (2, 2, 8, 8)]
