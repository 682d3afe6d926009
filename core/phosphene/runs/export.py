"""``export``: a classifier or a style network as a program of ``torch.export``, or as ONNX."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingExtra, ModelError, UnknownName, value_repr
from ..files.system import error_text
from ..models import Model, load_model
from ..results import Result, TrainedNetwork
from ..torch_state import cpu_by_default, restored
from .saved_results import load_result

#: Suffixes of exported networks.
SUFFIXES = (".pt2", ".onnx")

#: Names of an image's axes, as they are reported and named in ONNX.
_AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Exported:
    """An exported network: its file, the names and example shapes of its inputs, and the axes that may vary.

    ``dynamic`` are those of "batch", "height" and "width" that may differ from the example.
    """

    path: Path
    inputs: dict[str, tuple[int, ...]]
    dynamic: tuple[str, ...]

    def __str__(self) -> str:
        inputs = ", ".join(f"{name} {shape}" for name, shape in self.inputs.items())
        return f"{self.path}: {inputs}; may vary: {', '.join(self.dynamic) or 'nothing'}"


class _Classifier(nn.Module):
    """A model with its normalization and its choice of the logits: pixels in [0, 1] to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.module
        self._transforms = [transform for _, transform in model.defenses]
        self._output = model.output
        for name, values in (("mean", model.mean), ("std", model.std)):
            self.register_buffer(name, values.to(model.device, model.dtype)[:, None, None])

    def forward(self, images: Tensor) -> Any:
        for transform in self._transforms:
            images = transform(images)
        return self._output(self.network((images - self.mean) / self.std))


@restored
@cpu_by_default()
def export(
    source: Model | TrainedNetwork | str | os.PathLike[str],
    path: str | os.PathLike[str],
) -> Exported:
    """Write a network as a program of ``torch.export`` (``.pt2``) or as ONNX (``.onnx``), by the suffix.

    A classifier takes ``images`` (N, C, H, W) in [0, 1] and returns logits (N, K); normalization and defenses
    are part of the program. A style network takes ``images`` and, where it has several styles, their weights
    ``blend_weights`` (N, S), and returns images. Batch, height and width may vary, but for networks that fix
    them, such as most transformers. The written program is run on other inputs and compared.

    Args:
        source: a ``Model``, its URI, or the result of a training method or its folder.
        path: the file to write.

    Returns:
        The inputs and the axes that may vary.

    Raises:
        UnknownName: another suffix.
        ModelError: a network that ``torch.export`` cannot trace.
        MissingExtra: ONNX without the extra ``export``.

    Example::
        from phosphene import export

        print(export("builtin:shapes-resnet", "classifier.pt2"))
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise UnknownName("suffix of an exported network", file.suffix or str(file), SUFFIXES)
    if not file.parent.is_dir():
        raise InputError(f"the network cannot be written to {file}: there is no folder {file.parent}")
    if file.suffix.lower() == ".onnx":
        _require_onnx()
    network, inputs, name = _network_and_inputs(source)
    with torch.no_grad():
        program = _trace(network, inputs, name, list(_AXES))
        if not _agrees(program, network, inputs):
            program = _trace(network, inputs, name, [0])
            if not _agrees(program, network, inputs):
                raise ModelError(f"the exported program of {name} computes other values than the network")
        try:
            if file.suffix.lower() == ".pt2":
                torch.export.save(program, file)
            else:
                _write_onnx(program, inputs, file, name)
                _check_onnx(file, network, _other_inputs(program, inputs), name)
        except OSError as error:
            raise InputError(f"the network cannot be written to {file}: {error_text(error)}") from error
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    return Exported(file, shapes, tuple(_AXES[axis] for axis in _dynamic_axes(program)))


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtra("exporting to ONNX", "export") from None


def _network_and_inputs(source: Any) -> tuple[nn.Module, dict[str, Tensor], str]:
    """The module to trace, example inputs by name, and a name for messages."""
    if isinstance(source, (str, os.PathLike)):
        is_result = Path(source, "result.json").is_file()
        source = load_result(source) if is_result else load_model(os.fspath(source))
    if isinstance(source, TrainedNetwork):
        name = source.method
        if hasattr(source, "model"):
            source = source.model()
        else:
            network, inputs = source.export_network()
            return network.eval(), inputs, name
    if isinstance(source, Model):
        channels, height, width = source.input_size
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, channels, height, width, generator=generator).to(source.device, source.dtype)
        return _Classifier(source).eval(), {"images": images}, source.name
    what = f"a result of type {type(source).__name__}" if isinstance(source, Result) else value_repr(source)
    raise InputError(f"a model, its URI, or the result of a training can be exported, not {what}")


def _trace(
    network: nn.Module, inputs: dict[str, Tensor], name: str, image_axes: list[int]
) -> torch.export.ExportedProgram:
    """The network as a program in which these axes of the images vary where the network allows it."""
    axes = {
        key: dict.fromkeys(image_axes if value.ndim == 4 else [0], torch.export.Dim.AUTO)
        for key, value in inputs.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own modules
            program = torch.export.export(network, (), inputs, dynamic_shapes=axes, strict=False)
            return program.run_decompositions({})
    except Exception as error:  # torch.export raises whatever the network's code runs into
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"torch.export cannot trace {name}: {reason:.300}") from error


def _dynamic_axes(program: torch.export.ExportedProgram) -> list[int]:
    """The axes of the images that vary."""
    node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "images")
    return [axis for axis in _AXES if not isinstance(node.meta["val"].shape[axis], int)]


def _agrees(program: torch.export.ExportedProgram, network: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the program computes what the network does, at another batch size, height and width."""
    rest = _other_inputs(program, inputs)
    try:
        expected, computed = network(**rest), program.module()(**rest)
    except (AssertionError, RuntimeError):  # a condition of the program on the size
        return False
    return torch.allclose(expected, computed, rtol=1e-3, atol=1e-4)


def _other_inputs(program: torch.export.ExportedProgram, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of another batch size, height and width, as far as they may vary."""
    axes = _dynamic_axes(program)
    images = inputs["images"]
    _, channels, height, width = images.shape
    # No multiples of a stride: a program may hold for these alone.
    size = (height + 37 if 2 in axes else height, width + 58 if 3 in axes else width)
    generator = torch.Generator().manual_seed(1)
    count = 3 if 0 in axes else len(images)
    rest = {key: value[:1].expand(count, *value.shape[1:]) for key, value in inputs.items()}
    return {**rest, "images": torch.rand(count, channels, *size, generator=generator).to(images)}


def _check_onnx(file: Path, network: nn.Module, inputs: dict[str, Tensor], name: str) -> None:
    """Compare the written file with the network, where onnxruntime is installed. Raises ModelError."""
    try:
        import onnxruntime
    except ImportError:
        return
    arrays = {key: value.cpu().numpy() for key, value in inputs.items()}
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (computed,) = session.run(None, arrays)
    except Exception as error:  # onnxruntime has an exception of its own for each of its status codes
        file.unlink()
        reason = " ".join(str(error).split())
        raise ModelError(f"onnxruntime cannot run {name} as ONNX: {reason:.300}") from error
    expected = network(**inputs)
    if not torch.allclose(torch.from_numpy(computed).to(expected), expected, rtol=1e-2, atol=1e-3):
        file.unlink()
        raise ModelError(f"{name} as ONNX computes other values than the network")


def _write_onnx(
    program: torch.export.ExportedProgram, inputs: dict[str, Tensor], file: Path, name: str
) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = torch.onnx.export(
                program,
                kwargs=inputs,
                input_names=list(inputs),
                output_names=["output"],
                verbose=False,
            )
    except Exception as error:  # an operator without a conversion, or a fault of the converter
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{name} cannot be converted to ONNX: {reason:.300}") from error
    assert converted is not None
    converted.save(file, external_data=False)
