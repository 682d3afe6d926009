"""Exported networks compute the same as the originals, at other batch sizes, heights and widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from phosphene import InputError, MissingExtra, ModelError, UnknownName, export, load_model, load_result, run
from phosphene.cli.app import app
from phosphene.results import TrainedNetwork
from phosphene_plugins.style._adaptive_network import AdaptiveNetwork
from phosphene_plugins.style._style_network import StyleNetwork

ONNX_TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def classifier(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )
    settings: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": (3, 32, 32)}
    return load_model(network.to(dtype), **settings)


def style_network(styles: int = 2) -> TrainedNetwork:
    torch.manual_seed(0)
    network = StyleNetwork(styles=styles, width=4, blocks=1).eval().requires_grad_(False)
    return TrainedNetwork(
        network=network, method="style.fast_style_fit", config=network.config, losses=torch.zeros(0),
        labels=tuple("abcdef"[:styles]), previews=torch.zeros(0, 3, 8, 8),
    )  # fmt: skip


def run_program(path: Path, **inputs: Tensor) -> Tensor:
    """The output of an exported network: by torch, or by onnxruntime."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(**inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == {*inputs}
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(output)


def require(suffix: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_classifiers_take_any_batch_height_and_width(suffix: str, tmp_path: Path) -> None:
    require(suffix)
    model = classifier()
    exported = export(model, tmp_path / f"a{suffix}")
    assert exported.dynamic == ("batch", "height", "width") and exported.inputs == {"images": (2, 3, 32, 32)}
    for shape in ((1, 3, 32, 32), (5, 3, 47, 90)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(run_program(exported.path, images=images), expected, **ONNX_TOLERANCE)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_style_networks_take_any_size_and_blend(suffix: str, tmp_path: Path) -> None:
    require(suffix)
    trained = style_network()
    exported = export(trained, tmp_path / f"a{suffix}")
    assert exported.dynamic == ("batch", "height", "width")
    images, weights = torch.rand(3, 3, 53, 80), torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
    with torch.no_grad():
        expected = trained.network(images.clone(), weights)
    output = run_program(exported.path, images=images, blend_weights=weights)
    torch.testing.assert_close(output, expected, **ONNX_TOLERANCE)
    assert np.isfinite(output.numpy()).all()


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_networks_of_arbitrary_styles_take_any_image_and_style(suffix: str, tmp_path: Path) -> None:
    require(suffix)
    stylizer: Any = load_result("builtin:shapes-adaptive")
    exported = export(stylizer, tmp_path / f"a{suffix}")
    assert exported.dynamic == ("batch", "height", "width")
    for size in ((75, 90), (64, 64), (33, 47)):
        images, style = torch.rand(1, 3, *size), torch.rand(1, 3, size[0] + 5, 61)
        expected = stylizer.stylize(images, stylizer.style_statistics(style), torch.ones(1, 1))
        output = run_program(exported.path, images=images, style=style)
        torch.testing.assert_close(output, expected.detach(), **ONNX_TOLERANCE)


def test_encoder_that_cannot_be_cut_off_is_refused(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x if x.sum() > 0 else -x).mean((2, 3))

    stylizer = AdaptiveNetwork.from_decoder(load_model(Branching()), nn.ConvTranspose2d(4, 3, 2, 2), "conv")
    with pytest.raises(ModelError, match=r"torch.fx cannot cut off its encoder module:Branching at 'conv'"):
        export(stylizer, tmp_path / "a.pt2")


@pytest.mark.nightly
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("uri", ["builtin:shapes-resnet", "builtin:shapes-vgg", "torchvision:vit_b_32"])
def test_named_classifiers(uri: str, suffix: str, tmp_path: Path) -> None:
    require(suffix)
    torch.manual_seed(0)
    model = load_model(uri)
    exported = export(model, tmp_path / f"a{suffix}")
    assert exported.dynamic == (("batch",) if "vit" in uri else ("batch", "height", "width"))
    images = torch.rand(3, *model.input_size)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(run_program(exported.path, images=images), expected, **ONNX_TOLERANCE)


def test_command_exports_a_saved_training(tmp_path: Path) -> None:
    options = {"steps": 1, "batch": 2, "seed": 0}
    trained = run("adversarial_training", dataset="builtin:scenes/4", out=tmp_path / "trained", **options)
    ran = CliRunner().invoke(app, ["export", str(tmp_path / "trained"), str(tmp_path / "a.pt2")])
    assert ran.exit_code == 0, ran.output
    assert "may vary: batch, height, width" in ran.output
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained.model()(images)  # type: ignore[attr-defined]
    torch.testing.assert_close(run_program(tmp_path / "a.pt2", images=images), expected, **ONNX_TOLERANCE)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Halving(nn.Module):
    """Reads images of even height in another way: a program traced on one of them is wrong on others."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.shape[2] % 2 == 0 else images.amax((2, 3))


def test_networks_that_depend_on_the_size_are_exported_for_their_own(tmp_path: Path) -> None:
    model = load_model(Halving(), input_size=(3, 8, 8))
    exported = export(model, tmp_path / "a.pt2")
    assert exported.dynamic == ("batch",)
    images = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(run_program(exported.path, images=images), model(images))


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match=r"no suffix of an exported network '.pth'; there is .pt2, .onnx"):
        export(classifier(), tmp_path / "a.pth")
    with pytest.raises(InputError, match="can be exported, not <Tensor of shape"):
        export(torch.zeros(2, 3), tmp_path / "a.pt2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a result of type Attribution"):
        export(run("saliency"), tmp_path / "a.pt2")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="torch.export cannot trace"):
        export(load_model(Branching(), input_size=(3, 8, 8)), tmp_path / "a.pt2")
    with pytest.raises(InputError, match="cannot be written"):
        export(classifier(), "/nowhere/a.pt2")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"phosphene\[export\]"):
        export(classifier(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
