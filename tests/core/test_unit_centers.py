"""Centers of units: against closed forms, receptive fields and gradients; the heat of dots lies there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phosphene import (
    InputError,
    Model,
    ModelError,
    TensorDataset,
    UnknownName,
    load_model,
    load_result,
    methods,
    receptive_fields,
    run,
    unit_centers,
)
from phosphene.images import Centers, enlarge_maps, overlay
from phosphene.results import Attribution

# --- stacks of windows: the closed form ----------------------------------------------------------

#: Kernel, stride, padding before and after, dilation.
Window = tuple[int, int, int, int, int]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.integers(1, 2)
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(20, 60),
)
def test_stacks_equal_the_recursion(windows: list[Window], side: int) -> None:
    """Unit i is centered at i * stride - padding + (reach - 1) / 2 of the layer below."""
    layers = []
    for kernel, stride, before, after, dilation in windows:
        pad = nn.ZeroPad2d((before, after, before, after))
        layers += [pad, nn.Conv2d(3, 3, kernel, stride, dilation=dilation), nn.ReLU()]
    try:
        maps, counts = torch.zeros(1, 3, side, side), []
        for layer in layers:
            maps = layer(maps)
            counts.append(maps.shape[2])
    except RuntimeError:
        assume(False)
    # One unit for the entire image has no position, and padding around it cannot continue the coordinates.
    count = counts[-1]
    assume(min(counts) > 1 and count <= 2 * side)
    expected = torch.arange(count, dtype=torch.float64)
    for kernel, stride, before, _, dilation in reversed(windows):
        expected = expected * stride - before + dilation * (kernel - 1) / 2
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    model = load_model(nn.Sequential(*layers, *head), input_size=(3, side, side))
    centers = unit_centers(model, str(len(layers) - 1), (side, side))
    assert centers is not None
    for axis in centers:
        assert axis == pytest.approx(expected.tolist())


class Residual(nn.Module):
    def __init__(self, below: int, width: int, stride: int, skip: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(below, width, 3, stride, 1)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(F.relu(self.first(x))) + self.skip(x))


class Branches(nn.Module):
    """An inception block: branches of different widths, concatenated, gated by a global average."""

    def __init__(self, below: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(below, width, 1)
        self.wide = nn.Conv2d(below, width, 5, padding=2)
        self.dilated = nn.Conv2d(below, width, 3, padding=3, dilation=3)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.gate = nn.Conv2d(3 * width + below, 3 * width + below, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.narrow(x), self.wide(x), self.dilated(x), self.pool(x)], 1)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class SamePadding(nn.Conv2d):
    """TensorFlow's "same" padding: the odd pixel is added on the lower right."""

    def forward(self, x: Tensor) -> Tensor:
        total = [
            max(0, (-(-n // s) - 1) * s + k - n)
            for n, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        pads = [part for t in reversed(total) for part in (t // 2, t - t // 2)]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


def convolution(below: int, width: int, kernel: int, stride: int, padding: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(below, width, kernel, stride, padding), nn.ReLU())


NETWORKS: dict[str, list[nn.Module]] = {
    "symmetric padding": [convolution(3, 4, 3, 2, 1)] + [convolution(4, 4, 3, 2, 1) for _ in range(3)],
    "large kernels": [convolution(3, 4, 7, 4, 3), convolution(4, 4, 5, 2, 2), convolution(4, 4, 3, 2, 1)],
    "asymmetric padding": [
        SamePadding(3, 4, 3, 2),
        nn.ReLU(),
        SamePadding(4, 4, 5, 2),
        SamePadding(4, 4, 3, 2),
    ],
    "no padding": [convolution(3, 4, 5, 2, 0), convolution(4, 4, 3, 2, 0), convolution(4, 4, 3, 2, 0)],
    "mixed padding": [convolution(3, 4, 7, 2, 0), convolution(4, 4, 3, 2, 1), convolution(4, 4, 2, 2, 0)],
    "aligned pooling": [
        *[nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)],
    ],
    "ceil mode": [
        *[convolution(3, 4, 3, 2, 0), nn.MaxPool2d(3, 2, ceil_mode=True)],
        *[convolution(4, 4, 3, 1, 1), nn.AvgPool2d(3, 2, ceil_mode=True)],
    ],
    "dilation": [
        *[nn.Conv2d(3, 4, 3, 2, 2, dilation=2), nn.MaxPool2d(3, 2, 1, dilation=2)],
        *[nn.Conv2d(4, 4, 3, 2, 4, dilation=4), nn.ReLU()],
    ],
    "residual": [
        convolution(3, 4, 7, 2, 3),
        nn.MaxPool2d(3, 2, 1),
        Residual(4, 4, 1, nn.Identity()),
        Residual(4, 6, 2, nn.Conv2d(4, 6, 1, 2)),
    ],
    "branches": [convolution(3, 4, 3, 2, 1), Branches(4, 2), convolution(10, 4, 3, 2, 1)],
    "blur pooling": [nn.Conv2d(3, 4, 3, 2, 1), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, 2)],
}


#: Maxima have the gradient of one pixel.
WITHOUT_MAXIMA = [
    *(
        "symmetric padding",
        "large kernels",
        "asymmetric padding",
        "no padding",
        "mixed padding",
        "blur pooling",
    )
]


def positive_model(kind: str, side: int) -> Model:
    """A network whose weights are positive, symmetric and largest in the middle of each kernel."""
    network = copy.deepcopy(nn.Sequential(*NETWORKS[kind]))
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            with torch.no_grad():
                for length, dim in zip(part.kernel_size, (2, 3), strict=True):
                    index = torch.arange(length) - (length - 1) / 2
                    profile = torch.exp(-(index**2))
                    shape = (-1, 1) if dim == 2 else (1, -1)
                    part.weight.copy_(profile.view(shape) * (part.weight if dim == 3 else 1))
                part.weight /= part.weight[0].sum()
                part.bias.zero_()
    width = network(torch.zeros(1, 3, side, side)).shape[1]
    head = nn.Linear(width, 2)
    nn.init.constant_(head.weight, 1.0)
    layers = nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return load_model(layers, input_size=(3, side, side))


def centers_of(model: Model, layer: str, size: tuple[int, int]) -> Centers:
    centers = unit_centers(model, layer, size)
    assert centers is not None
    return centers


@pytest.mark.parametrize("kind", NETWORKS)
def test_dots_are_found_at_their_positions(kind: str) -> None:
    """A dot in the middle of a receptive field: the maximum of the heat is at most 2 pixels off."""
    side = 95
    model = positive_model(kind, side)
    rows = model.map_shape("0")[1]
    units = sorted({(rows // 2, rows // 2), (rows // 3, rows // 2 + 1), (rows // 2 + 1, rows // 3)})
    # Gates depend on the entire image: the positions are those without them.
    layer = "0" if kind != "branches" else "0.0"
    if layer == "0":
        boxes = receptive_fields(model, "0", (side, side), units).double()
        dots = [((b[0] + b[2] - 1) / 2, (b[1] + b[3] - 1) / 2) for b in boxes]
    else:
        dots = [(4.0 * y, 4.0 * x) for y, x in units]
    for y, x in dots:
        images = torch.zeros(1, 3, side, side)
        top, left = round(float(y)) - 1, round(float(x)) - 1
        images[:, :, top : top + 3, left : left + 3] = 1
        heat = run("grad_cam", model=model, images=images, target=0, layer="0", progress=False).heat()[0]
        peak = divmod(int(heat.argmax()), side)
        assert max(abs(peak[0] - float(y)), abs(peak[1] - float(x))) <= 2, (kind, (y, x), peak)


@pytest.mark.parametrize("kind", WITHOUT_MAXIMA)
def test_centers_are_the_mean_pixel_of_the_gradient(kind: str) -> None:
    """With symmetric positive weights, for units whose receptive field lies inside the image."""
    side = 128
    model = positive_model(kind, side)
    y, x = centers_of(model, "0", (side, side))
    image = (0.5 + torch.zeros(1, 3, side, side)).requires_grad_()
    maps = model.features(image, "0").mean(1)[0]
    middle = len(y) // 2
    (gradient,) = torch.autograd.grad(maps[middle, middle], image)
    weight = gradient[0].sum(0)
    pixels = torch.arange(side, dtype=weight.dtype)
    for axis, centers in enumerate((y, x)):
        mean = float((weight.sum(1 - axis) * pixels).sum() / weight.sum())
        assert mean == pytest.approx(float(centers[middle]), abs=0.05)


def test_centers_of_residual_networks_are_those_of_the_issue() -> None:
    from torchvision.models import mobilenet_v2, resnet18, vgg11

    for build, layer, offset in (
        (resnet18, "layer4", 0.0), (mobilenet_v2, "features", 0.0), (vgg11, "features", 15.5),
    ):  # fmt: skip
        model = load_model(build(weights=None), input_size=(3, 224, 224))
        y, x = centers_of(model, layer, (224, 224))
        assert y == x == tuple(32 * i + offset for i in range(7))
    # "same" padding, as TensorFlow pads: the other way.
    tf = load_model(timm.create_model("tf_efficientnet_b0", num_classes=2), input_size=(3, 224, 224))
    assert centers_of(tf, tf.last_map, (224, 224))[0] == tuple(32 * i + 31 for i in range(7))


def test_windows_of_ceil_mode_are_centered_at_what_they_cover() -> None:
    layers = nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten(), nn.Linear(192, 2))
    model = load_model(layers, input_size=(3, 16, 16))
    y, _ = centers_of(model, "0", (16, 16))
    assert y == (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 14.5)
    boxes = receptive_fields(model, "0", (16, 16), [(i, 0) for i in range(8)]).double()
    assert list(y) == ((boxes[:, 0] + boxes[:, 2] - 1) / 2).tolist()


def test_the_heat_of_a_dot_is_not_half_a_cell_off() -> None:
    """Five stride-2 convolutions with padding 1: cells that share the image are off by 15 pixels."""
    layers: list[nn.Module] = []
    for channels in (3, 4, 4, 4, 4):
        layer = nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False)
        nn.init.constant_(layer.weight, 0.05)
        layer.weight.data[:, :, 1, 1] = 1.0
        layers += [layer, nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(network[-1].weight, 1.0)
    model = load_model(network, input_size=(3, 224, 224))
    for y, x in ((64, 64), (96, 128), (160, 32)):
        images = torch.zeros(1, 3, 224, 224)
        images[:, :, y - 2 : y + 3, x - 2 : x + 3] = 1
        heat = run("grad_cam", model=model, images=images, target=0, progress=False).heat()[0]
        assert divmod(int(heat.argmax()), 224) == (y, x)


def test_images_need_not_be_square() -> None:
    model = positive_model("symmetric padding", 64)
    y, x = centers_of(model, "0", (48, 80))
    assert y == (0, 16, 32) and x == (0, 16, 32, 48, 64)


# --- tokens ----------------------------------------------------------------------------------------

TOKENS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 96, "depth": 2}, "blocks.1", 96, 16),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2)},
        "layers.1",
        56,
        8,
    ),
    "mixer": ("mixer_s16_224", {"img_size": 96}, "blocks.1", 96, 16),
    "patches of stride 8": ("pit_ti_224", {}, "transformers.0", 224, 8),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_are_centered_at_their_patches(kind: str) -> None:
    name, options, layer, side, patch = TOKENS[kind]
    torch.manual_seed(0)
    model = load_model(timm.create_model(name, num_classes=3, **options), input_size=(3, side, side))
    y, x = centers_of(model, layer, (side, side))
    offset = 7.5 if kind == "patches of stride 8" else (patch - 1) / 2
    assert y == x == tuple(i * patch + offset for i in range(len(y)))


@pytest.mark.parametrize("kind", ["vit", "swin", "mixer"])
def test_dots_in_token_networks_are_found_at_their_positions(kind: str) -> None:
    name, options, layer, side, patch = TOKENS[kind]
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3, **options).eval()
    with torch.no_grad():  # the blocks add nothing, so that a token depends on its own patch
        for part_name, parameter in network.named_parameters():
            if part_name.endswith(("attn.proj.weight", "fc2.weight", "fc2.bias", "pos_embed")):
                parameter.zero_()
    model = load_model(network, input_size=(3, side, side))
    for row, column in ((1, 2), (3, 1), (4, 4)):
        y, x = (i * patch + patch // 2 for i in (row, column))
        images = torch.zeros(1, 3, side, side)
        images[:, :, y - 2 : y + 2, x - 2 : x + 2] = 1
        heat = run("eigen_cam", model=model, images=images, layer=layer, progress=False).heat()[0]
        peak = divmod(int(heat.argmax()), side)
        assert max(abs(peak[0] - y), abs(peak[1] - x)) <= 2


def test_attention_of_torch_does_not_move_tokens() -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    network = VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3)
    model = load_model(network, input_size=(3, 64, 64))
    for layer in ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0.self_attention"):
        assert centers_of(model, layer, (64, 64)) == ((7.5, 23.5, 39.5, 55.5),) * 2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer2"),
        ("mobilenet_v2", "features.6"),
        ("regnet_x_400mf", "trunk_output.block2"),
        ("shufflenet_v2_x0_5", "stage2"),
        ("squeezenet1_0", "features.5"),
        ("densenet121", "features.transition1"),
        ("googlenet", "inception3a"),
        ("convnext_tiny", "features.0"),
    ],
)
def test_centers_are_those_of_receptive_fields(name: str, layer: str) -> None:
    """For a unit whose field lies inside the image; of branches that differ, fields are the union."""
    import torchvision.models

    build = getattr(torchvision.models, name)
    network = build(weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    model = load_model(network, input_size=(3, 160, 192))
    y, x = centers_of(model, layer, (160, 192))
    unit = (len(y) // 2, len(x) // 2)
    ((top, left, bottom, right),) = receptive_fields(model, layer, (160, 192), [unit]).tolist()
    assert 0 < top < bottom < 160 and 0 < left < right < 192
    assert (y[unit[0]], x[unit[1]]) == ((top + bottom - 1) / 2, (left + right - 1) / 2)


# --- results -----------------------------------------------------------------------------------------


def test_aligned_maps_are_enlarged_as_before_bit_for_bit() -> None:
    model = positive_model("aligned pooling", 64)
    result = run("grad_cam", model=model, images=torch.rand(2, 3, 64, 64), target=0, progress=False)
    assert result.centers is not None
    before = F.interpolate(result.maps[:, None], (64, 64), mode="bilinear")[:, 0]
    assert torch.equal(enlarge_maps(result.maps, (64, 64), result.centers), before)


def test_values_between_the_centers_are_linear_and_constant_beyond() -> None:
    maps = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    large = enlarge_maps(maps, (8, 4), ((1.0, 5.0), (0.0, 2.0)))[0]
    assert large[:, 0].tolist() == [1, 1, 2, 3, 4, 5, 5, 5] and large[0].tolist() == [1, 2, 3, 3]
    same = enlarge_maps(torch.eye(2)[None], (2, 2), ((0.5, 1.5), (0.0, 1.0)))
    assert same[0].tolist() == [[1.0, 0.0], [0.5, 0.5]]
    column = torch.tensor([[[2.0], [4.0], [7.0]]], dtype=torch.float64)
    # Two rows at one position have their mean there; the order of the rows does not matter.
    assert enlarge_maps(column, (3, 1), ((2.0, 0.0, 2.0), (0.0,)))[0, :, 0].tolist() == [4.0, 4.25, 4.5]
    assert enlarge_maps(column, (2, 1), ((1.0, 1.0, 1.0), (0.0,)))[0, :, 0].tolist() == [13 / 3, 13 / 3]
    with pytest.raises(InputError, match=r"of \(3, 1\) do not fit maps of \(2, 2\)"):
        enlarge_maps(maps, (8, 4), ((0.0, 1.0, 2.0), (0.0,)))


def test_saved_results_have_their_centers_and_earlier_ones_load(tmp_path: Path) -> None:
    model = positive_model("symmetric padding", 64)
    result = run("grad_cam", model=model, images=torch.rand(1, 3, 64, 64), target=0, progress=False)
    result.save(tmp_path / "new")
    loaded = load_result(tmp_path / "new")
    assert isinstance(loaded, Attribution) and loaded.centers is not None
    assert torch.equal(loaded.heat(), result.heat())
    assert loaded.centers == ((0, 16, 32, 48),) * 2
    document = tmp_path / "new" / "result.json"
    fields = json.loads(document.read_text())
    del fields["fields"]["centers"]  # as an earlier version wrote it
    document.write_text(json.dumps(fields))
    earlier = load_result(tmp_path / "new")
    assert isinstance(earlier, Attribution) and earlier.centers is None


def test_conventions_of_libraries_share_the_image_equally() -> None:
    model = positive_model("symmetric padding", 64)
    result = run("grad_cam", model=model, images=torch.rand(1, 3, 64, 64), target=0, progress=False)
    assert result.as_convention("minmax").centers is result.centers
    for convention in ("pytorch-grad-cam", "torchcam", "captum", "pair-saliency"):
        converted = result.as_convention(convention)
        assert converted.centers is None
        aligned = F.interpolate(converted.maps[:, None], (64, 64), mode="bilinear")[:, 0]
        heat = converted.heat()
        torch.testing.assert_close(heat, (aligned - aligned.amin()) / (aligned.amax() - aligned.amin()))


def test_scores_overlays_and_products_lie_at_the_centers() -> None:
    model, side = positive_model("symmetric padding", 64), 64
    images = torch.zeros(1, 3, side, side)
    images[:, :, 31:34, 15:18] = 1
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, 29:36, 13:20] = True
    score = methods["pointing_game"](model, TensorDataset(images, ["0"], mask), method="grad_cam", seed=0)
    assert score.image_values[0, 0, 0].tolist() == [1.0]
    result = methods["activation_maps"](model, images, layer="0", channels=[0], overlay=True)
    assert result.centers == ((0, 16, 32, 48),) * 2
    heat = enlarge_maps(result.scaled[0], (side, side), result.centers)[0]
    assert divmod(int(heat.argmax()), side) == (32, 16)
    torch.testing.assert_close(result.panels()[0][1].image, overlay(images[0], heat))
    coarse = methods["grad_cam"](model, images, 0)
    fine = methods["guided_backprop"](model, images, 0).maps
    product = methods["guided_grad_cam"](model, images, 0).maps
    torch.testing.assert_close(product, enlarge_maps(coarse.maps, (side, side), coarse.centers) * fine)


def test_cells_of_patches_lie_at_the_centers() -> None:
    gate = nn.Sequential(
        *copy.deepcopy(NETWORKS["symmetric padding"]), Branches(4, 2)
    )  # its fields are the entire image
    layers = nn.Sequential(gate, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2))
    model = load_model(layers, input_size=(3, 64, 64))
    patches = methods["top_patches"](model, TensorDataset(torch.rand(2, 3, 64, 64)), layer="0", k=2)
    assert patches.boxes.tolist() == [[0, 0, 64, 64]] * len(patches.boxes)
    assert [patches._cell(0, i, 64) for i in range(4)] == [(0, 8), (8, 24), (24, 40), (40, 56)]


# --- networks whose positions are not revealed, and errors ---------------------------------------------


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:])


class Reversed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3)


@pytest.mark.parametrize("part", [Fourier(), Reversed(), nn.Upsample(scale_factor=1.5)])
def test_maps_without_positions_share_the_image_equally(part: nn.Module) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 4, 4), part, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = load_model(layers, input_size=(3, 32, 32))
    centers = unit_centers(model, "1", (32, 32))
    assert (centers is None) == (not isinstance(part, nn.Upsample))
    result = run(
        "grad_cam", model=model, images=torch.rand(1, 3, 32, 32), target=0, layer="1", progress=False
    )
    before = F.interpolate(result.maps[:, None], (32, 32), mode="bilinear")[:, 0]
    assert torch.equal(enlarge_maps(result.maps, (32, 32), result.centers), before)


class Writes(nn.Module):
    """Writes into a buffer and into its input, and computes with numbers that are no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.register_buffer("running", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.running.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        mask = x.new_zeros(x.shape[2:])
        mask[:2] = 1.0
        x += mask
        x[:, :2].mul_(2)
        return F.hardtanh(x, inplace=True)


def test_nothing_is_written_into_the_network() -> None:
    module = nn.Sequential(Writes(), nn.Flatten(), nn.Linear(256, 2)).train()
    model = load_model(module, input_size=(3, 16, 16))
    _ = model.structure
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with model.tap("0.conv") as tap, torch.inference_mode():
        y, _ = centers_of(model, "0", (16, 16))
        with pytest.raises(ModelError, match="has not run"):
            tap["0.conv"]
    assert y == tuple(2 * i for i in range(8))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_does_not_matter(dtype: torch.dtype) -> None:
    module = nn.Sequential(*copy.deepcopy(NETWORKS["symmetric padding"]), nn.Flatten(), nn.LazyLinear(2))
    module(torch.zeros(1, 3, 300, 300))
    model = load_model(module.to(dtype), input_size=(3, 300, 300))
    assert centers_of(model, "3", (300, 300))[0] == tuple(16 * i for i in range(19))


def test_invalid_requests_are_refused() -> None:
    model = positive_model("symmetric padding", 64)
    with pytest.raises(UnknownName, match="no layer"):
        unit_centers(model, "layer9", (64, 64))
    with pytest.raises(ModelError, match="not a map"):
        unit_centers(model, "3", (64, 64))
