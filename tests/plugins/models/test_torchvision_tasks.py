"""``torchvision:`` - segmenters, detectors and quantized classifiers, as torchvision's builders make them."""

import hashlib
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.hub_cache import disconnect
from torch import nn
from torchvision import models
from torchvision.models._api import WeightsEnum
from torchvision.ops.misc import FrozenBatchNorm2d

from phosphene import ModelError, load_model, methods, run
from phosphene.models.loading import loaders

SEGMENTERS = models.list_models(module=models.segmentation)
DETECTORS = models.list_models(module=models.detection)
QUANTIZED = models.list_models(module=models.quantization)

#: One network of each kind for the normal run; the nightly one goes through all of them.
SMALL = [
    *("lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    *("quantized_mobilenet_v2", "quantized_shufflenet_v2_x0_5"),
]


def small_or_nightly(names: list[str]) -> list[Any]:
    return [name if name in SMALL else pytest.param(name, marks=pytest.mark.nightly) for name in names]


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and no network."""
    disconnect(monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put_into_cache(
    folder: Path, entry: WeightsEnum, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put a network's state into torch's cache as the file of ``entry``, with its true digest in its name."""
    draft = folder / "draft"
    torch.save(network.state_dict(), draft)
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()[:8]
    path = draft.rename(folder / f"weights-{digest}.pth")
    monkeypatch.setattr(entry.value, "url", f"https://example.org/{path.name}")


def photograph(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def with_statistics(network: nn.Module) -> nn.Module:
    """Give batch norms statistics that are not those of an untrained network."""
    generator = torch.Generator().manual_seed(0)
    for part in network.modules():
        if isinstance(part, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            part.running_mean.copy_(torch.rand(part.running_mean.shape, generator=generator) - 0.5)
            part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return network


@pytest.mark.parametrize("name", small_or_nightly(SEGMENTERS))
def test_segmenters_compute_what_torchvisions_builders_do(
    name: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = models.get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    network = with_statistics(models.get_model(name, weights_backbone=None, **options)).eval()
    put_into_cache(checkpoints, entry, network, monkeypatch)
    model = load_model(f"torchvision:{name}", pretrained=True)
    assert model.task == "segmentation" and model.classes == tuple(entry.meta["categories"])
    image = photograph(260, 390)
    with model.guard(), torch.no_grad():
        expected = models.get_model(name, weights=entry).eval()(entry.transforms()(image)[None])["out"]
        logits = model.outputs(model.transform(image)[None])
    assert logits.shape == (1, 21, 520, 780)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", small_or_nightly(DETECTORS))
def test_detectors_compute_what_torchvisions_builders_do(
    name: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = models.get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    network = models.get_model(name, weights=None, weights_backbone=None)
    put_into_cache(checkpoints, entry, with_statistics(network), monkeypatch)
    # In float64, since the boxes of random networks are nearly ties.
    model = load_model(f"torchvision:{name}", weights="DEFAULT", dtype=torch.float64)
    theirs = models.get_model(name, weights=entry).double().eval()
    assert model.task == "detection" and model.classes == tuple(entry.meta["categories"])
    image = photograph(120, 180)
    pixels = model.transform(image)
    assert torch.equal(pixels, entry.transforms()(image))
    with model.guard(), torch.no_grad():
        (boxes,), (expected,) = model.module(model.normalize(pixels[None])), theirs(pixels[None].double())
        # At the detector's own size: SSD's last layers need 300 pixels.
        batch = theirs.transform([pixels.double()])[0].tensors
        ours, features = model.module.backbone(batch), theirs.backbone(batch)  # there may be no boxes
    for key, values in features.items():
        torch.testing.assert_close(ours[key], values, rtol=1e-9, atol=1e-9)
    assert boxes.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(boxes[key], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [
    "fasterrcnn_resnet50_fpn", pytest.param("maskrcnn_resnet50_fpn", marks=pytest.mark.nightly),
    pytest.param("keypointrcnn_resnet50_fpn", marks=pytest.mark.nightly),
    pytest.param("retinanet_resnet50_fpn", marks=pytest.mark.nightly),
])  # fmt: skip
def test_batch_norms_of_the_first_coco_weights_add_nothing_to_the_variance(
    name: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = models.get_model_weights(name).COCO_V1
    network = models.get_model(name, weights=None, weights_backbone=None)
    put_into_cache(checkpoints, entry, network, monkeypatch)
    norms = [part for part in models.get_model(name, weights=entry).modules() if hasattr(part, "eps")]
    assert norms and {part.eps for part in norms} == {0.0}
    for weights in ("COCO_V1", "DEFAULT"):
        module = load_model(f"torchvision:{name}", weights=weights).module
        ours = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        assert len(ours) == len(norms) and {part.eps for part in ours} == {0.0}


@pytest.mark.parametrize("name", small_or_nightly(QUANTIZED))
@pytest.mark.filterwarnings("ignore")  # torch's quantization warns in many places
def test_quantized_classifiers_compute_without_gradients(name: str) -> None:
    engine = torch.backends.quantized.engine
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}")
    assert torch.backends.quantized.engine == engine
    assert model.task == "classification" and model.class_name(0) == "tench"
    images = torch.rand(2, *model.input_size)
    with torch.no_grad():
        expected = model.module(model.normalize(images))
    assert torch.equal(model(images), expected) and expected.shape == (2, 1000)


@pytest.mark.filterwarnings("ignore")
def test_methods_on_quantized_classifiers_run_or_name_the_missing_gradient() -> None:
    model = load_model("torchvision:quantized_mobilenet_v2", input_size=(3, 32, 32))
    images = torch.rand(1, 3, 32, 32)
    assert methods["occlusion"](model, images, 0).maps.shape == (1, 32, 32)
    for name in ("saliency", "pgd", "integrated_gradients"):
        with pytest.raises(ModelError, match="gradient"):
            run(name, model=model, images=images, progress=False)


@pytest.mark.parametrize(("options", "classes"), [({"num_classes": 4}, None), ({}, 21)])
def test_other_numbers_of_classes_have_no_names(options: Any, classes: int | None) -> None:
    model = load_model("torchvision:lraspp_mobilenet_v3_large", **options)
    assert (model.classes and len(model.classes)) == classes
    assert model.outputs(torch.rand(1, 3, 64, 64)).shape[1] == options.get("num_classes", 21)


def test_names_are_those_of_networks_that_take_images() -> None:
    names = set(loaders()["torchvision"].names())
    assert {*SEGMENTERS, *DETECTORS, *QUANTIZED} <= names
    refused = {*models.list_models(module=models.video), *models.list_models(module=models.optical_flow)}
    assert refused and not refused & names
    for name in refused:
        with pytest.raises(ModelError, match=f"torchvision's {name} takes (clips|two images at a time)"):
            load_model(f"torchvision:{name}")


def test_no_backbone_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    disconnect(monkeypatch)
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("example.org", 80))
    for name in ("lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"):
        load_model(f"torchvision:{name}")
