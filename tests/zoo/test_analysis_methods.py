"""Attribution, activation and embedding methods on real architectures: valid results or the right refusal.

The methods are read from the registry, so that new ones of these families are tested too. The networks are
narrow: their structure matters here, not their size.
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
from phosphene_plugins.activations._channel_redundancy_result import ChannelRedundancy
from phosphene_plugins.activations._channel_statistics_result import ChannelStatistics
from phosphene_plugins.activations._receptive_field_result import ReceptiveField, ReceptiveFields
from phosphene_plugins.embeddings._set_distance_result import SetDistance
from phosphene_plugins.embeddings.patch_pca import PatchComponents
from phosphene_plugins.embeddings.patch_similarity import PatchSimilarity

SIDE, CLASSES = 64, 6


@dataclass(frozen=True)
class Architecture:
    """An architecture and its expected properties."""

    make: Callable[[], nn.Module]
    #: Whether it has ReLUs; otherwise guided backpropagation must be refused.
    relus: bool = True
    #: Whether CAM's equation holds.
    pooled: bool = True


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES)


def vision_transformer() -> nn.Module:
    """Torchvision's, with torch's own attention, which has a fast path in inference only."""
    return torchvision.models.VisionTransformer(SIDE, 16, 2, 2, 32, 64, num_classes=CLASSES)


ARCHITECTURES = {
    "resnet": Architecture(of_torchvision("resnet18")),  # residual sums
    "densenet": Architecture(densenet),  # concatenation, a functional ReLU at the end
    "googlenet": Architecture(of_torchvision("googlenet", init_weights=False, aux_logits=False)),
    "mobilenet_v2": Architecture(of_torchvision("mobilenet_v2", width_mult=0.35)),  # ReLU6
    "efficientnet": Architecture(of_torchvision("efficientnet_b0"), relus=False),
    "convnext": Architecture(
        of_timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
        relus=False,
        pooled=False,
    ),
    "vit": Architecture(vision_transformer, relus=False, pooled=False),
    "vit with registers": Architecture(
        of_timm(
            "vit_tiny_patch16_224", img_size=SIDE, depth=2, embed_dim=24, num_heads=2, reg_tokens=4
        ),
        relus=False,
        pooled=False,
    ),
    "swin": Architecture(
        of_timm(
            "swin_tiny_patch4_window7_224",
            img_size=SIDE, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2),
        ),
        relus=False,
    ),
}  # fmt: skip

#: Modules in which activations vanish with timm's initial weights.
VANISHING = {"timm.models.convnext"}
#: Methods with a pass for every channel run on the first stage, which has few.
PASS_PER_CHANNEL = {"score_cam", "ablation_cam"}
GUIDED = {"guided_backprop", "deconvnet", "guided_grad_cam", "guided_patches"}
#: Left out: on the same features as pca, and seconds to import.
LEFT_OUT = {"umap"}
NAMES = sorted(
    name.rpartition(".")[2]
    for name in methods
    if name.split(".")[0] in ("attribution", "activations", "embeddings")
    and name.rpartition(".")[2] not in LEFT_OUT
)


def randomize(make: Callable[[], nn.Module]) -> nn.Module:
    """The network with random weights whose logits depend on the image."""
    torch.manual_seed(0)
    network = make()
    for part in network.modules():
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and network.__module__ in VANISHING):
            nn.init.normal_(part.weight, std=0.2)
        elif isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean over all batches
    with torch.no_grad():
        network.train()(random_images(16))
    return network


@pytest.fixture(params=ARCHITECTURES, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[Architecture, Model]:
    architecture = ARCHITECTURES[request.param]
    return architecture, load_model(randomize(architecture.make).train(), input_size=(3, SIDE, SIDE))


@pytest.fixture(autouse=True)
def module_is_unchanged(network: tuple[Architecture, Model]) -> Iterator[None]:
    """After every call, also a refused one: hooks, gradients, mode, flags and weights are as before."""
    module = network[1].module
    before = module_state(module)
    yield
    assert module_state(module) == before


def module_state(module: nn.Module) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = [
        (part.training, *(len(vars(part)[architecture]) for architecture in kinds))
        for part in module.modules()
    ]
    parameters = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return [parts, parameters, [(t._version, t.data_ptr()) for t in module.state_dict().values()]]


def random_images(count: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def call(name: str, model: Model) -> Result:
    inputs: dict[str, Any] = {
        "images": random_images(18)[16:], "target": None,  # the predicted class, which has positive evidence
        "dataset": TensorDataset(random_images(8), classes=["odd", "even"] * 4),
        "other": TensorDataset(random_images(16)[8:]),
    }  # fmt: skip
    roles = inputs.keys() & {part.name for part in methods[name].spec.inputs}
    params = methods[name].spec.quick | ({"layer": model.stages[0]} if name in PASS_PER_CHANNEL else {})
    with max_batch(8):
        result = methods[name](model, **{role: inputs[role] for role in roles}, **params)
    # Before the ReLU, which may leave nothing of a map of four positions.
    return result.as_convention("captum") if isinstance(result, Attribution) else result


def refusal(name: str, architecture: Architecture) -> str | None:
    """The error message with which a method must refuse this architecture; None where it must not."""
    if name in GUIDED and not architecture.relus:
        return "found no ReLU in this model .* use saliency"
    if name == "cam" and not architecture.pooled:
        return "which CAM needs; use grad_cam"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_method_returns_a_valid_result_or_is_refused(name: str, network: tuple[Architecture, Model]) -> None:
    architecture, model = network
    if message := refusal(name, architecture):
        with pytest.raises(ModelError, match=message):
            call(name, model)
        return
    result = call(name, model)
    for field, tensor in tensors(result):
        assert tensor.isfinite().all(), f"{field} is not finite"
    check_result(name, result, model)


def tensors(result: Result) -> Iterator[tuple[str, Tensor]]:
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        value = list(value.values()) if isinstance(value, dict) else value
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, Tensor):
                yield field.name, item


def check_result(name: str, result: Result, model: Model) -> None:
    """Shapes, and that results are not constant: another image has another map."""
    if isinstance(result, (Attribution, Segmentation, ActivationMaps)):
        maps = result.maps
        sizes = {model.map_shape(layer)[1:] for layer in (*model.stages, model.last_map)}
        assert len(maps) == 2
        assert tuple(maps.shape[-2:]) in {(SIDE, SIDE), *sizes}
        assert (maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).all()
        differ = (maps[0] - maps[1]).abs().max() > 1e-2 * maps.abs().max()
        # Without max pooling a deconvnet does not depend on the image.
        assert differ or (name == "deconvnet" and not max_pools(model.module))
        if isinstance(result, Segmentation):
            assert result.masks.shape == (2, SIDE, SIDE)
        return
    channels, rows, columns = model.map_shape(model.last_map)
    if isinstance(result, ChannelStatistics):
        assert result.active_fraction.shape == result.mean.shape == result.selectivity.shape == (channels,)
        assert result.mean.unique().numel() > 1
    elif isinstance(result, ChannelRedundancy):
        assert result.similarity.shape == (channels, channels)
        assert result.similarity.abs().max() <= 1 + 1e-5
    elif isinstance(result, Patches):
        assert result.map_size == (rows, columns)
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
    elif isinstance(result, PatchComponents):
        assert result.components.shape == (2, 3, rows, columns)
        assert (result.variance.diff() <= 0).all() and result.components.std() > 0
    elif isinstance(result, PatchSimilarity):
        assert result.maps.shape == (2, rows, columns)
        assert float(result.maps[0].max()) == pytest.approx(1, abs=1e-5)
        assert result.maps.amin() < 1 - 1e-4 and result.maps.amin() >= -1
    elif isinstance(result, ReceptiveFields):
        assert (result.boxes[:, 2:] > result.boxes[:, :2]).all() and result.boxes.amax() <= SIDE
    elif isinstance(result, ReceptiveField):
        assert result.field.shape == (SIDE, SIDE) and result.field.amin() >= 0
        top, left, bottom, right = result.box
        inside = result.field[top:bottom, left:right].sum()
        assert float(inside) == pytest.approx(float(result.field.sum()), rel=1e-5)
    else:
        assert isinstance(result, Embedding), "a result type that this test does not check"
        assert result.features.shape[0] == len(result.ids) == 8
        assert not torch.allclose(result.features[0], result.features[1])
        assert result.points is None or result.points.shape[0] == 8


def max_pools(module: nn.Module) -> bool:
    return any(isinstance(part, nn.MaxPool2d) for part in module.modules())


def test_occlusion_equals_brute_force(network: tuple[Architecture, Model]) -> None:
    model = load_model(randomize(network[0].make).double().eval(), input_size=(3, SIDE, SIDE))
    images = random_images(1).double()
    side, stride = 20, 13  # not a multiple of the grid, and clipped at the border
    starts = range(0, SIDE - side + stride, stride)
    drops, count = torch.zeros(1, 2, SIDE, SIDE, dtype=torch.float64), torch.zeros(SIDE, SIDE)
    with torch.no_grad():
        clean = model(images)[:, [3, 5]]
        for top in starts:
            for left in starts:
                rows, columns = slice(top, top + side), slice(left, left + side)
                occluded = images.clone()
                occluded[..., rows, columns] = 0.5
                drops[..., rows, columns] += (clean - model(occluded)[:, [3, 5]])[..., None, None]
                count[rows, columns] += 1
    expected = drops / count
    result = methods["occlusion"](model, images, 3, window=side, stride=stride, classes=[5])
    actual = torch.stack([result.maps, result.more[:, 0]], 1)
    assert (expected.amax() - expected.amin()) > 1e-3 * clean.abs().max()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * float(clean.abs().max()))
