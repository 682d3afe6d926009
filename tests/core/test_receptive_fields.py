"""Receptive fields: against the closed form, against brute force, and without side effects."""

from __future__ import annotations

import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18

from phosphene import InputError, ModelError, UnknownName, load_model, receptive_fields

# --- plain stacks: the closed form -----------------------------------------------------------

#: Reach (first to last tap, plus one), step between taps, stride and padding of one layer.
Geometry = tuple[int, int, int, int]


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Sequential, list[Geometry]]:
    """A stack of convolutions, poolings and ReLUs, and the geometry of each."""
    layers: list[nn.Module] = []
    geometry: list[Geometry] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "depthwise", "max", "average"]))
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 2)) if kind != "average" else 1
        padding, ceil_mode = draw(st.integers(0, kernel // 2)), draw(st.booleans())
        if kind in ("conv", "depthwise"):
            groups = 2 if kind == "depthwise" else 1
            layers.append(nn.Conv2d(2, 2, kernel, stride, padding, dilation, groups))
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode))
        else:
            layers.append(nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode))
        layers.append(nn.ReLU(inplace=draw(st.booleans())))
        geometry += [(dilation * (kernel - 1) + 1, dilation, stride, padding), (1, 1, 1, 0)]
    return nn.Sequential(*layers), geometry


def closed_form(geometry: list[Geometry], unit: int) -> tuple[int, int]:
    """First and last pixel in the field of a unit, in an image without borders (Araujo et al. 2019)."""
    first = last = unit
    for reach, _, stride, padding in reversed(geometry):
        first, last = first * stride - padding, last * stride - padding + reach - 1
    return first, last


def visible(geometry: list[Geometry], sides: list[int], unit: int) -> set[int]:
    """The pixels that a unit depends on along one axis; ``sides`` are those of each layer's input."""
    units = {unit}
    for (reach, step, stride, padding), side in zip(reversed(geometry), reversed(sides), strict=True):
        taps = {u * stride - padding + t for u in units for t in range(0, reach, step)}
        units = {t for t in taps if 0 <= t < side}
    return units


@settings(max_examples=80, deadline=None)
@given(stacks(), st.integers(8, 24), st.data())
def test_plain_stacks_equal_the_recursion(stack, side, data):
    module, geometry = stack
    sides, maps = [], torch.rand(1, 2, side, side)
    try:
        for layer in module:
            sides.append(maps.shape[2])
            maps = layer(maps)
    except RuntimeError:
        assume(False)  # a feature map is smaller than a kernel
    position = tuple(data.draw(st.integers(0, maps.shape[2] - 1), label=axis) for axis in "yx")
    model = load_model(module, input_size=(2, side, side))
    pixels = [visible(geometry, sides, unit) for unit in position]
    if not all(pixels):  # the unit's field is padding only
        with pytest.raises(ModelError, match="does not depend on the image"):
            receptive_fields(model, str(len(module) - 1), (side, side), [position])
        return
    (box,) = receptive_fields(model, str(len(module) - 1), (side, side), [position]).tolist()
    assert box == [min(pixels[0]), min(pixels[1]), max(pixels[0]) + 1, max(pixels[1]) + 1]
    for axis, unit in enumerate(position):
        first, last = closed_form(geometry, unit)
        if first >= 0 and last < side:
            assert (box[axis], box[axis + 2]) == (first, last + 1)


@pytest.mark.parametrize("side", [64, 96, 161, 224])
@pytest.mark.parametrize(
    ("layer", "reach", "stride"),
    [("conv1", 7, 2), ("maxpool", 11, 4), ("layer1.0", 27, 4), ("layer1", 43, 4), ("layer2", 99, 8)],
)
def test_resnet_layers_equal_published_values(side, layer, reach, stride):
    model = _resnet()
    rows = model.features(torch.rand(1, 3, side, side), layer).shape[2]
    positions = [(0, 0), (rows // 2, rows // 2), (rows - 1, 0)]
    boxes = receptive_fields(model, layer, (side, side), positions).tolist()
    for (y, x), box in zip(positions, boxes, strict=True):
        for unit, (low, high) in ((y, box[::2]), (x, box[1::2])):
            first = unit * stride - (reach - 1) // 2
            assert low == max(0, first)
            # Towards the far border strides leave up to a stride of pixels uncovered.
            assert min(side - stride, first + reach) <= high <= min(side, first + reach)


_RESNETS = {}


def _resnet():
    if not _RESNETS:
        torch.manual_seed(0)
        _RESNETS[0] = load_model(resnet18(weights=None), input_size=(3, 64, 64))
    return _RESNETS[0]


def test_fields_are_clipped_in_images_that_are_not_square():
    boxes = receptive_fields(_resnet(), "layer1", (64, 128), [(8, 16), (15, 31)])
    assert boxes.tolist() == [[11, 43, 54, 86], [39, 103, 64, 128]]


# --- branches, gates and products: brute force -----------------------------------------------


class Branches(nn.Module):
    """An inception-like block, a residual one, a channel split, gates that could shut, ops in position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.narrow = nn.Conv2d(4, 2, 1)
        self.wide = nn.Conv2d(4, 2, (1, 5), padding=(0, 2))
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.mix = nn.Conv2d(8, 4, 1)
        self.residual = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = torch.cat([F.relu6(self.narrow(x)), self.wide(x).sigmoid(), self.pool(x)], 1)
        x = self.mix(x).clamp_(min=0)
        y = self.relu(self.residual(x))
        y += x
        a, b = y.chunk(2, 1)
        return torch.maximum(a, b) * torch.tanh(a)


def test_branches_equal_perturbation_of_single_pixels():
    torch.manual_seed(0)
    module = Branches().double().eval()
    model = load_model(nn.Sequential(module, nn.Identity()), input_size=(1, 12, 12))
    positions = [(y, x) for y in range(6) for x in range(6)]
    boxes = receptive_fields(model, "0", (12, 12), positions).tolist()
    assert boxes == brute_force(model, "0", positions)


def brute_force(model, layer, positions):
    """The bounding box of the pixels that move a unit, over many random images and weights."""
    moved = torch.zeros(len(positions), 12, 12, dtype=torch.bool)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).abs() / 2)
            image = torch.rand(1, 1, 12, 12, generator=generator).double() * 0.2
            shifted_images = image.repeat(144, 1, 1, 1)
            shifted_images.view(144, 144)[range(144), range(144)] += 0.5
            change = model.features(shifted_images, layer) != model.features(image, layer)
            for i, (y, x) in enumerate(positions):
                moved[i] |= change[:, :, y, x].any(1).view(12, 12)
    rows = [(m.any(1).nonzero().flatten(), m.any(0).nonzero().flatten()) for m in moved]
    return [[int(y[0]), int(x[0]), int(y[-1]) + 1, int(x[-1]) + 1] for y, x in rows]


class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        return x * F.hardsigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))


def test_squeeze_and_excitation_depends_on_the_entire_image():
    model = load_model(nn.Sequential(SqueezeExcitation()), input_size=(3, 16, 16))
    assert receptive_fields(model, "0", (16, 16), [(3, 5)]).tolist() == [[0, 0, 16, 16]]
    assert receptive_fields(model, "0.conv", (16, 16), [(3, 5)]).tolist() == [[2, 4, 5, 7]]


def test_attention_depends_on_the_entire_image_and_patch_embedding_on_its_patch():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5)
    model = load_model(vit, input_size=(3, 64, 64))
    assert receptive_fields(model, "patch_embed", (64, 64), [(1, 2)]).tolist() == [[16, 32, 32, 48]]
    assert receptive_fields(model, "blocks.0", (64, 64), [(1, 2)]).tolist() == [[0, 0, 64, 64]]


@pytest.mark.parametrize("fused", [False, True])
def test_shifted_windows_depend_on_their_windows_only(fused):
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2,), embed_dim=24, num_heads=(2,), num_classes=5
    )
    for block in swin.layers[0].blocks:
        block.attn.fused_attn = fused
    model = load_model(swin, input_size=(3, 56, 56))
    corner = [(0, 0), (13, 13), (5, 5)]
    assert receptive_fields(model, "layers.0.blocks.0", (56, 56), corner).tolist() == [
        [0, 0, 28, 28], [28, 28, 56, 56], [0, 0, 28, 28],
    ]  # fmt: skip
    # Shifted by three of seven tokens: (0, 0) is alone with its own corner, (5, 5) meets all four windows.
    assert receptive_fields(model, "layers.0.blocks.1", (56, 56), corner).tolist() == [
        [0, 0, 28, 28], [28, 28, 56, 56], [0, 0, 56, 56],
    ]  # fmt: skip


def test_very_deep_networks_neither_overflow_nor_vanish():
    gated = [nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU6(), nn.SiLU()) for _ in range(100)]
    model = load_model(nn.Sequential(*gated), input_size=(1, 210, 6))
    assert receptive_fields(model, "99", (210, 6), [(104, 3)]).tolist() == [[4, 0, 205, 6]]


# --- side effects and errors ----------------------------------------------------------------


def test_module_is_unchanged_and_other_taps_read_nothing():
    torch.manual_seed(0)
    module = Branches().train()
    model = load_model(nn.Sequential(module), input_size=(1, 12, 12))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = [dict(m.__dict__) for m in module.modules()]
    with model.tap("0.stem") as tap, torch.inference_mode():
        receptive_fields(model, "0", (12, 12), [(2, 2)])
        with pytest.raises(ModelError, match="has not run"):
            tap["0.stem"]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    for m, was in zip(module.modules(), attributes, strict=True):
        assert m.training == was["training"] and not m._forward_hooks and not m._forward_pre_hooks
        assert set(m.__dict__) == set(was)
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in module.parameters())


def test_positions_may_repeat_and_keep_their_order():
    boxes = receptive_fields(_resnet(), "conv1", (64, 64), [(5, 6), (0, 0), (5, 6)])
    assert boxes.dtype == torch.int64
    assert boxes.tolist() == [[7, 9, 14, 16], [0, 0, 4, 4], [7, 9, 14, 16]]
    assert receptive_fields(_resnet(), "conv1", (64, 64), []).shape == (0, 4)


def test_other_threads_may_use_the_model():
    model, images, wrong = _resnet(), torch.rand(1, 3, 64, 64), []
    with model.guard(), torch.no_grad():
        expected = model(images)
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                with torch.no_grad():
                    wrong.append(not torch.equal(model(images), expected))

        thread = threading.Thread(target=watch)
        thread.start()
        receptive_fields(model, "layer3", (64, 64), [(1, 1), (2, 2)])
        done.set()
        thread.join()
    assert wrong and not any(wrong)


def test_invalid_requests_are_refused():
    model = _resnet()
    with pytest.raises(InputError, match="map of 32x32, so there is no position"):
        receptive_fields(model, "conv1", (64, 64), [(32, 0)])
    with pytest.raises(UnknownName, match="layer1"):
        receptive_fields(model, "layr1", (64, 64), [(0, 0)])
    with pytest.raises(ModelError, match="not a map"):
        receptive_fields(model, "fc", (64, 64), [(0, 0)])
    vit = load_model(timm.create_model("vit_tiny_patch16_224", depth=1), input_size=(3, 224, 224))
    with pytest.raises(ModelError, match="64(x|, )64"):
        receptive_fields(vit, "blocks.0", (64, 64), [(0, 0)])
