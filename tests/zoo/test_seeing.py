"""Every method that looks into a network, on real families: what each gives, or in which words it refuses.

Which methods there are is read from the registry, so that a new one of these families is tested too. The
networks are narrow ones of a kind each: it is how they are written that decides, not how large they are.
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
class Kind:
    """A network and what is known of it beforehand."""

    make: Callable[[], nn.Module]
    #: Whether ReLUs lie on the way, without which guided rewriting must refuse.
    relus: bool = True
    #: The first call that LRP has no rule for.
    no_rule: str | None = None
    #: Whether CAM's equation holds.
    pooled: bool = True


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES)


def vision_transformer() -> nn.Module:
    """As torchvision writes them, on torch's own attention, whose shortcut opens in inference alone."""
    return torchvision.models.VisionTransformer(SIDE, 16, 2, 2, 32, 64, num_classes=CLASSES)


KINDS = {
    "resnet": Kind(of_torchvision("resnet18")),  # residual sums
    "densenet": Kind(densenet),  # concatenation, a functional ReLU at the end
    "googlenet": Kind(of_torchvision("googlenet", init_weights=False, aux_logits=False)),  # functional ReLUs
    "mobilenet_v2": Kind(of_torchvision("mobilenet_v2", width_mult=0.35)),  # ReLU6
    "efficientnet": Kind(of_torchvision("efficientnet_b0"), relus=False, no_rule="silu"),
    "convnext": Kind(
        of_timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
        relus=False,
        no_rule="layer_norm",
        pooled=False,
    ),
    "vit": Kind(vision_transformer, relus=False, no_rule="layer_norm", pooled=False),
    "vit with registers": Kind(
        of_timm(
            "vit_tiny_patch16_224", img_size=SIDE, depth=2, embed_dim=24, num_heads=2, reg_tokens=4
        ),
        relus=False,
        no_rule="layer_norm",
        pooled=False,
    ),
    "swin": Kind(
        of_timm(
            "swin_tiny_patch4_window7_224",
            img_size=SIDE, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2),
        ),
        relus=False,
        no_rule="layer_norm",
    ),
}  # fmt: skip

#: Where nothing restores the signal's size between convolutions of timm's first weights.
FAINT = {"timm.models.convnext"}
#: With a pass for every channel, they are given a layer of few.
EARLY = {"score_cam", "ablation_cam"}
GUIDED = {"guided_backprop", "deconvnet", "guided_grad_cam", "guided_patches"}
#: Not the network's affair: they begin with the same features as pca, and take seconds to import.
OF_FEATURES_ALONE = {"umap"}
NAMES = sorted(
    name.rpartition(".")[2]
    for name in methods
    if name.split(".")[0] in ("attribution", "activations", "embeddings")
    and name.rpartition(".")[2] not in OF_FEATURES_ALONE
)


def awake(make: Callable[[], nn.Module]) -> nn.Module:
    """The network with weights that tell pictures apart: no head of zeros, no signal that dies away."""
    torch.manual_seed(0)
    network = make()
    for part in network.modules():
        if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and network.__module__ in FAINT):
            nn.init.normal_(part.weight, std=0.2)
        elif isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean of what it meets
    with torch.no_grad():
        network.train()(pictures(16))
    return network


@pytest.fixture(params=KINDS, scope="module")
def network(request: pytest.FixtureRequest) -> tuple[Kind, Model]:
    kind = KINDS[request.param]
    return kind, load_model(awake(kind.make).train(), input_size=(3, SIDE, SIDE))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(network: tuple[Kind, Model]) -> Iterator[None]:
    """After every call, also a refused one: no hook, no gradient, the mode, flags and weights of before."""
    module = network[1].module
    before = left(module)
    yield
    assert left(module) == before


def left(module: nn.Module) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = [(part.training, *(len(vars(part)[kind]) for kind in kinds)) for part in module.modules()]
    parameters = [(p.requires_grad, p.grad is None) for p in module.parameters()]
    return [parts, parameters, [(t._version, t.data_ptr()) for t in module.state_dict().values()]]


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def call(name: str, model: Model) -> Result:
    given: dict[str, Any] = {
        "images": pictures(18)[16:], "target": None,  # the predicted class: something speaks for it
        "dataset": TensorDataset(pictures(8), classes=["odd", "even"] * 4),
        "other": TensorDataset(pictures(16)[8:]),
    }  # fmt: skip
    roles = given.keys() & {part.name for part in methods[name].spec.inputs}
    params = methods[name].spec.quick | ({"layer": model.stages[0]} if name in EARLY else {})
    with max_batch(8):
        result = methods[name](model, **{role: given[role] for role in roles}, **params)
    # Before the ReLU, which may leave nothing of a map of four positions.
    return result.as_convention("captum") if isinstance(result, Attribution) else result


def refusal(name: str, kind: Kind) -> str | None:
    """The words in which a method must refuse a network of this kind, if it must."""
    if name in GUIDED and not kind.relus:
        return "found no ReLU in this model .* use saliency"
    if name == "lrp" and kind.no_rule:
        return f"LRP has no rule for '{kind.no_rule}'.*: use integrated_gradients"
    if name == "cam" and not kind.pooled:
        return "which CAM needs; use grad_cam"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_the_method_gives_what_it_promises_or_refuses_by_name(name: str, network: tuple[Kind, Model]) -> None:
    kind, model = network
    if words := refusal(name, kind):
        with pytest.raises(ModelError, match=words):
            call(name, model)
        return
    result = call(name, model)
    for field, tensor in tensors(result):
        assert tensor.isfinite().all(), f"{field} is not finite"
    examine(name, result, model)


def tensors(result: Result) -> Iterator[tuple[str, Tensor]]:
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        value = list(value.values()) if isinstance(value, dict) else value
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, Tensor):
                yield field.name, item


def examine(name: str, result: Result, model: Model) -> None:
    """Shapes, and that what was shown is no constant: another picture has another map."""
    if isinstance(result, (Attribution, Segmentation, ActivationMaps)):
        maps = result.maps
        sizes = {model.map_shape(layer)[1:] for layer in (*model.stages, model.last_map)}
        assert len(maps) == 2
        assert tuple(maps.shape[-2:]) in {(SIDE, SIDE), *sizes}
        assert (maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).all()
        differ = (maps[0] - maps[1]).abs().max() > 1e-2 * maps.abs().max()
        # Without max-pooling nothing in a deconvnet depends on the picture.
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
        assert isinstance(result, Embedding), "a kind of result that this test knows nothing of"
        assert result.features.shape[0] == len(result.ids) == 8
        assert not torch.allclose(result.features[0], result.features[1])
        assert result.points is None or result.points.shape[0] == 8


def max_pools(module: nn.Module) -> bool:
    return any(isinstance(part, nn.MaxPool2d) for part in module.modules())


def test_occlusion_of_any_network_is_brute_force(network: tuple[Kind, Model]) -> None:
    model = load_model(awake(network[0].make).double().eval(), input_size=(3, SIDE, SIDE))
    images = pictures(1).double()
    side, stride = 20, 13  # of no grid's size, and cut at the border
    starts = range(0, SIDE - side + stride, stride)
    fall, hidden_by = torch.zeros(1, 2, SIDE, SIDE, dtype=torch.float64), torch.zeros(SIDE, SIDE)
    with torch.no_grad():
        clean = model(images)[:, [3, 5]]
        for top in starts:
            for left in starts:
                rows, columns = slice(top, top + side), slice(left, left + side)
                hidden = images.clone()
                hidden[..., rows, columns] = 0.5
                fall[..., rows, columns] += (clean - model(hidden)[:, [3, 5]])[..., None, None]
                hidden_by[rows, columns] += 1
    expected = fall / hidden_by
    result = methods["occlusion"](model, images, 3, window=side, stride=stride, classes=[5])
    found = torch.stack([result.maps, result.more[:, 0]], 1)
    assert (expected.amax() - expected.amin()) > 1e-3 * clean.abs().max()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * float(clean.abs().max()))
