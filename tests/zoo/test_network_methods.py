"""Attribution, activation and embedding methods on network families: a valid result, or a specific refusal.

The methods are read from the registry, so that new methods of these families are tested too. The networks
are narrow, one of each architecture: the result depends on how they are implemented, not on their size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from phosphene import Model, ModelError, load_model, max_batch, methods
from phosphene.data import TensorDataset
from phosphene.results import (
    ActivationMaps,
    Attribution,
    Embedding,
    Neighbors,
    Patches,
    Result,
    Segmentation,
)
from phosphene_plugins.activations._channel_results import ChannelRedundancy, ChannelStatistics
from phosphene_plugins.embeddings._set_distance_result import SetDistance

SIDE, CLASSES = 64, 6


@dataclass(frozen=True)
class Architecture:
    """A network and the expected refusals."""

    make: Callable[[], nn.Module]
    #: Whether it has ReLUs, without which guided rewriting must be refused.
    has_relus: bool = True
    #: The first operation for which LRP has no rule.
    lrp_refuses: str | None = None
    #: Whether CAM's equation holds.
    has_cam_head: bool = True


def torchvision_network(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def timm_network(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES)


def vision_transformer() -> nn.Module:
    """torchvision's, with torch's attention, which has a fast path for inference alone."""
    return torchvision.models.VisionTransformer(SIDE, 16, 2, 2, 32, 64, num_classes=CLASSES)


ARCHITECTURES = {
    "resnet": Architecture(torchvision_network("resnet18")),  # residual sums
    "densenet": Architecture(densenet),  # concatenation, a functional ReLU at the end
    # functional ReLUs
    "googlenet": Architecture(torchvision_network("googlenet", init_weights=False, aux_logits=False)),
    "mobilenet_v2": Architecture(torchvision_network("mobilenet_v2", width_mult=0.35)),  # ReLU6
    "efficientnet": Architecture(torchvision_network("efficientnet_b0"), has_relus=False, lrp_refuses="silu"),
    "convnext": Architecture(
        timm_network("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
        has_relus=False,
        lrp_refuses="layer_norm",
        has_cam_head=False,
    ),
    "vit": Architecture(vision_transformer, has_relus=False, lrp_refuses="layer_norm", has_cam_head=False),
    "vit with registers": Architecture(
        timm_network(
            "vit_tiny_patch16_224", img_size=SIDE, depth=2, embed_dim=24, num_heads=2, reg_tokens=4
        ),
        has_relus=False,
        lrp_refuses="layer_norm",
        has_cam_head=False,
    ),
    "swin": Architecture(
        timm_network(
            "swin_tiny_patch4_window7_224",
            img_size=SIDE, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2),
        ),
        has_relus=False,
        lrp_refuses="layer_norm",
    ),
}  # fmt: skip

#: Modules whose signal vanishes with timm's initial weights, since no norm rescales it between convolutions.
WEAK_SIGNAL = {"timm.models.convnext"}
#: Methods with a forward pass per channel run on a layer with few channels.
ONE_PASS_PER_CHANNEL = {"score_cam", "ablation_cam"}
GUIDED = {"guided_backprop", "deconvnet", "guided_grad_cam", "guided_patches"}
#: Methods of the same features as pca, which take seconds to import.
EXCLUDED = {"umap"}
NAMES = sorted(
    name.rpartition(".")[2]
    for name in methods
    if name.split(".")[0] in ("attribution", "activations", "embeddings")
    and name.rpartition(".")[2] not in EXCLUDED
)


def initialized(make: Callable[[], nn.Module]) -> nn.Module:
    """The network with weights whose outputs differ between images: no head of zeros, no vanishing signal."""
    torch.manual_seed(0)
    network = make()
    for part in network.modules():
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and network.__module__ in WEAK_SIGNAL):
            nn.init.normal_(part.weight, std=0.2)
        elif isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # cumulative mean
    with torch.no_grad():
        network.train()(random_images(16))
    return network


@pytest.fixture(params=ARCHITECTURES, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[Architecture, Model]:
    architecture = ARCHITECTURES[request.param]
    return architecture, load_model(initialized(architecture.make).train(), input_size=(3, SIDE, SIDE))


@pytest.fixture(autouse=True)
def model_is_unchanged(network: tuple[Architecture, Model]) -> Iterator[None]:
    """A call, also a refused one, leaves no hooks or gradients and changes no modes, flags or weights."""
    module = network[1].module
    before = state_of(module)
    yield
    assert state_of(module) == before


def state_of(module: nn.Module) -> list[object]:
    hook_kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = [(part.training, *(len(vars(part)[kind]) for kind in hook_kinds)) for part in module.modules()]
    parameters = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return [parts, parameters, [(t._version, t.data_ptr()) for t in module.state_dict().values()]]


def random_images(count: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def call(name: str, model: Model) -> Result:
    inputs: dict[str, Any] = {
        "images": random_images(18)[16:], "target": None,  # the predicted class has positive evidence
        "dataset": TensorDataset(random_images(8), classes=["odd", "even"] * 4),
        "other": TensorDataset(random_images(16)[8:]),
    }  # fmt: skip
    roles = inputs.keys() & {part.name for part in methods[name].spec.inputs}
    params = methods[name].spec.quick | ({"layer": model.stages[0]} if name in ONE_PASS_PER_CHANNEL else {})
    with max_batch(8):
        result = methods[name](model, **{role: inputs[role] for role in roles}, **params)
    # Before the ReLU, which may remove all values of a map of four positions.
    return result.as_convention("captum") if isinstance(result, Attribution) else result


def refusal(name: str, architecture: Architecture) -> str | None:
    """The error message with which a method must refuse this architecture, or None."""
    if name in GUIDED and not architecture.has_relus:
        return "found no ReLU in this model .* use saliency"
    if name == "lrp" and architecture.lrp_refuses:
        return f"LRP has no rule for '{architecture.lrp_refuses}'.*: use integrated_gradients"
    if name == "cam" and not architecture.has_cam_head:
        return "which CAM needs; use grad_cam"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_result_is_valid_or_the_network_is_refused_with_advice(
    name: str, network: tuple[Architecture, Model]
) -> None:
    architecture, model = network
    if message := refusal(name, architecture):
        with pytest.raises(ModelError, match=message):
            call(name, model)
        return
    result = call(name, model)
    for field, tensor in tensors_of(result):
        assert tensor.isfinite().all(), f"{field} is not finite"
    check_result(name, result, model)


def tensors_of(result: Result) -> Iterator[tuple[str, Tensor]]:
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        value = list(value.values()) if isinstance(value, dict) else value
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, Tensor):
                yield field.name, item


def check_result(name: str, result: Result, model: Model) -> None:
    """Shapes, and that results are not constant and differ between images."""
    if isinstance(result, (Attribution, Segmentation, ActivationMaps)):
        maps = result.maps
        sizes = {model.map_shape(layer)[1:] for layer in (*model.stages, model.last_map)}
        assert len(maps) == 2
        assert tuple(maps.shape[-2:]) in {(SIDE, SIDE), *sizes}
        assert (maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).all()
        differ = (maps[0] - maps[1]).abs().max() > 1e-2 * maps.abs().max()
        # Without max-pooling the map of a deconvnet does not depend on the image.
        assert differ or (name == "deconvnet" and not max_pools(model.module))
        if isinstance(result, Segmentation):
            assert result.masks.shape == (2, SIDE, SIDE)
        return
    channels, rows, columns = model.map_shape(model.last_map)
    if isinstance(result, ChannelStatistics):
        assert result.active.shape == result.mean.shape == result.selectivity.shape == (channels,)
        assert result.mean.unique().numel() > 1
    elif isinstance(result, ChannelRedundancy):
        assert result.similarity.shape == (channels, channels)
        assert result.similarity.abs().max() <= 1 + 1e-5
    elif isinstance(result, Patches):
        assert result.grid == (rows, columns)
        assert len(result.scores) == len(result.boxes) > 0
        assert (result.boxes[:, 2:] > result.boxes[:, :2]).all()
        assert result.boxes.amin() >= 0
        assert result.boxes.amax() <= SIDE
        assert result.gradients is None or result.gradients.any()
    elif isinstance(result, Neighbors):
        assert result.indices.shape == result.distances.shape
        assert (result.distances.diff() >= 0).all()
        assert result.distances.amin() > 0
    elif isinstance(result, SetDistance):
        assert result.frechet > 0
    else:
        assert isinstance(result, Embedding), "this test has no checks for this type of result"
        assert result.features.shape[0] == len(result.ids) == 8
        assert not torch.allclose(result.features[0], result.features[1])
        assert result.points is None or result.points.shape[0] == 8


def max_pools(module: nn.Module) -> bool:
    return any(isinstance(part, nn.MaxPool2d) for part in module.modules())


def test_occlusion_equals_brute_force(network: tuple[Architecture, Model]) -> None:
    model = load_model(initialized(network[0].make).double().eval(), input_size=(3, SIDE, SIDE))
    images = random_images(1).double()
    side, stride = 20, 13  # no multiple of any grid's stride, cropped at the border
    starts = range(0, SIDE - side + stride, stride)
    drops, windows_per_pixel = torch.zeros(1, 2, SIDE, SIDE, dtype=torch.float64), torch.zeros(SIDE, SIDE)
    with torch.no_grad():
        clean = model(images)[:, [3, 5]]
        for top in starts:
            for start in starts:
                rows, columns = slice(top, top + side), slice(start, start + side)
                occluded = images.clone()
                occluded[..., rows, columns] = 0.5
                drops[..., rows, columns] += (clean - model(occluded)[:, [3, 5]])[..., None, None]
                windows_per_pixel[rows, columns] += 1
    expected = drops / windows_per_pixel
    result = methods["occlusion"](model, images, 3, window=side, stride=stride, classes=[5])
    maps = torch.stack([result.maps, result.more[:, 0]], 1)
    assert (expected.amax() - expected.amin()) > 1e-3 * clean.abs().max()
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-11 * float(clean.abs().max()))
