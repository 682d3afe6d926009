"""``onnx:`` - a graph computes what onnxruntime computes, and methods that need gradients are refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from phosphene import InputError, MissingExtra, ModelError, UnknownName, load_model, methods, replay, run
from phosphene.models import load_saved_model
from phosphene.models.loading import loaders

CLASSES = ["cat", "dog", "eel", "fox"]
NORMALIZATION = {"mean": [0.5] * 3, "std": [0.25] * 3}

#: Gradient methods of several families, with arguments of their own.
GRADIENT_METHODS = ["saliency", "integrated_gradients", "grad_cam", "lrp", "fgsm", "pgd", "deepfool"]

#: Methods that need forward passes alone.
BLACK_BOX_METHODS = ["occlusion", "rise", "square", "hop_skip_jump", "boundary"]


def write_graph(
    path: Path, batch: int | str = "N", channels: int = 3, sides: tuple[Any, Any] = (8, 8), *,
    layout: str = "NCHW", outputs: int = 1, kind: int = TensorProto.FLOAT,
) -> Tensor:  # fmt: skip
    """A convolution with global average pooling as an ONNX file; returns its weights (4, C, 3, 3)."""
    numbers = np.random.default_rng(0).normal(size=(4, channels, 3, 3))
    weights = numbers.astype(helper.tensor_dtype_to_np_dtype(kind))
    source = "images" if layout == "NCHW" else "transposed"
    nodes = [helper.make_node("Transpose", ["images"], [source], perm=[0, 3, 1, 2])]
    nodes = [] if layout == "NCHW" else nodes
    nodes += [
        helper.make_node("Conv", [source, "weights"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    shape = [batch, channels, *sides] if layout == "NCHW" else [batch, *sides, channels]
    values = [("logits", [batch, 4]), ("maps", [batch, 4, None, None])][:outputs]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info(name, kind, sizes) for name, sizes in values],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return torch.from_numpy(weights.astype(np.float32))


def images(count: int = 5, channels: int = 3, side: int = 8) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("graph", "options", "size"), [
    ({}, {}, (3, 8, 8)),
    ({"batch": 1}, {}, (3, 8, 8)),
    ({"batch": 2}, {}, (3, 8, 8)),
    ({"batch": 7}, {}, (3, 8, 8)),
    ({"sides": ("H", "W")}, {}, None),
    ({"layout": "NHWC"}, {"layout": "NHWC"}, (3, 8, 8)),
    ({"outputs": 2}, {"output_name": "logits"}, (3, 8, 8)),
], ids=["any batch", "batch 1", "batch 2", "batch 7", "any size", "NHWC", "two outputs"])  # fmt: skip
def test_logits_are_those_of_the_graph(graph: Any, options: Any, size: Any, tmp_path: Path) -> None:
    weights = write_graph(tmp_path / "tiny.onnx", **graph)
    model = load_model(f"onnx:{tmp_path / 'tiny.onnx'}", classes=CLASSES, **NORMALIZATION, **options)
    expected = F.conv2d((images() - 0.5) / 0.25, weights).mean((2, 3))
    torch.testing.assert_close(model(images()), expected)
    assert model.size_known is (size is not None)
    assert size is None or model.input_size == size
    assert model.class_index("eel") == 2


def test_half_precision_graph_returns_float32(tmp_path: Path) -> None:
    weights = write_graph(tmp_path / "half.onnx", kind=TensorProto.FLOAT16)
    logits = load_model(f"onnx:{tmp_path / 'half.onnx'}")(images())
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, F.conv2d(images(), weights).mean((2, 3)), rtol=0.01, atol=0.005)


@pytest.mark.parametrize("channels", [1, 4])
def test_number_of_channels_is_that_of_the_graph(channels: int, tmp_path: Path) -> None:
    for sides in ((8, 8), ("H", "W")):
        weights = write_graph(tmp_path / "tiny.onnx", channels=channels, sides=sides)
        model = load_model(f"onnx:{tmp_path / 'tiny.onnx'}")
        pixels = images(channels=channels)
        torch.testing.assert_close(model(pixels), F.conv2d(pixels, weights).mean((2, 3)))


@pytest.mark.parametrize("name", BLACK_BOX_METHODS)
def test_methods_without_gradients_run(name: str, tmp_path: Path) -> None:
    weights = write_graph(tmp_path / "tiny.onnx", batch=2)
    model = load_model(f"onnx:{tmp_path / 'tiny.onnx'}", classes=CLASSES)

    def network(pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, weights).mean((2, 3))

    reference = load_model(network, input_size=(3, 8, 8), classes=CLASSES)
    options: dict[str, Any] = {"seed": 0} if "seed" in methods[name].spec.params.model_fields else {}
    result, expected = (
        run(name, model=m, images=images(2), progress=False, **options) for m in (model, reference)
    )
    field = "maps" if hasattr(result, "maps") else "adversarial"
    torch.testing.assert_close(getattr(result, field), getattr(expected, field), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_methods_with_gradients_are_refused_before_they_start(name: str, tmp_path: Path) -> None:
    write_graph(tmp_path / "tiny.onnx")
    model = load_model(f"onnx:{tmp_path / 'tiny.onnx'}", classes=CLASSES)
    with pytest.raises(ModelError, match=r"onnx:tiny.onnx lets no gradient through, and this method needs"):
        run(name, model=model, images=images(1), progress=False)


def test_result_is_replayed_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(tmp_path / "tiny.onnx", outputs=2)
    monkeypatch.chdir(tmp_path)
    model = load_model("onnx:tiny.onnx", output_name="logits", classes=CLASSES)
    run("occlusion", model=model, images=images(1), target="dog", progress=False, out=tmp_path / "map")
    monkeypatch.chdir(tmp_path / "map")
    assert replay(tmp_path / "map").same
    with pytest.raises(InputError, match="does not accept the option 'providers' from a file"):
        load_saved_model({"uri": f"onnx:{tmp_path / 'tiny.onnx'}", "providers": []})


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    write_graph(tmp_path / "tiny.onnx")
    first = load_model(f"onnx:{tmp_path / 'tiny.onnx'}").digest
    assert load_model(f"onnx:{tmp_path / 'tiny.onnx'}").digest == first
    write_graph(tmp_path / "tiny.onnx", batch=2)
    assert load_model(f"onnx:{tmp_path / 'tiny.onnx'}").digest != first


@pytest.mark.parametrize(("graph", "options", "error", "message"), [
    ({"outputs": 2}, {}, InputError, "has 2 outputs, logits, maps: choose the logits"),
    ({"outputs": 2}, {"output_name": "logit"}, UnknownName, "did you mean 'logits'"),
    ({"layout": "NHWC"}, {}, InputError, "pass layout='NHWC' where the channels are last"),
    ({}, {"layout": "NWHC"}, InputError, "layout must be 'NCHW' or 'NHWC'"),
    ({"kind": TensorProto.INT32}, {}, InputError, r"onnxruntime cannot read|is a tensor\(int32\)"),
    ({}, {"weights": "DEFAULT"}, InputError, "contains its weights and takes no weights='DEFAULT'"),
    ({}, {"flavour": 3}, InputError, "cannot be built"),
])  # fmt: skip
def test_graphs_and_options_that_are_ambiguous_are_refused(
    graph: Any, options: Any, error: Any, message: str, tmp_path: Path
) -> None:
    write_graph(tmp_path / "tiny.onnx", **graph)
    with pytest.raises(error, match=message):
        load_model(f"onnx:{tmp_path / 'tiny.onnx'}", **options)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no ONNX file .*absent.onnx"):
        load_model(f"onnx:{tmp_path / 'absent.onnx'}")
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="onnxruntime cannot read .*damaged.onnx"):
        load_model(f"onnx:{tmp_path / 'damaged.onnx'}")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(loaders()["onnx"].names()) == []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"phosphene\[onnx\]"):
        load_model("onnx:classifier.onnx")
