"""``onnx:`` - an ONNX file through onnxruntime, as a network without gradients: ``onnx:classifier.onnx``.

onnxruntime is imported when a network is loaded: this module is imported for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phosphene import InputError, MissingExtra, UnknownName, hookimpl

if TYPE_CHECKING:
    from torch import nn


class OnnxLoader:
    """An ONNX file with one image input (N, C, H, W) of floating-point numbers.

    onnxruntime computes no gradients: methods that need none (occlusion, RISE, square, HopSkipJump) work, and
    all others are refused. A fixed batch size is served in parts of that size. Channels, height and width
    come from the file where they are fixed. Options: ``output_name``, where the graph has several outputs;
    ``layout="NHWC"`` for images with channels last; ``providers``, those of onnxruntime (default: the CPU's).
    Normalization and class names are the caller's: ``load_model("onnx:file.onnx", mean=..., std=...,
    classes=[...])``.
    """

    def load(
        self,
        name: str,
        *,
        weights: str | None,
        pretrained: bool,
        output_name: str | None = None,
        layout: str | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> tuple[nn.Module, dict[str, Any]]:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra(f"onnx:{name}", "onnx") from error
        from ._onnx_network import OnnxNetwork

        path = Path(name).resolve()
        if weights is not None:
            raise InputError(f"onnx:{name} contains its weights and takes no weights={weights!r}")
        if not path.is_file():
            raise InputError(f"there is no ONNX file {path}")
        if layout not in (None, "NCHW", "NHWC"):
            raise InputError(f"layout must be 'NCHW' or 'NHWC', not {layout!r}")
        try:
            session = onnxruntime.InferenceSession(str(path), providers=list(providers))
        except Exception as error:  # onnxruntime's own types, which depend on its build
            raise InputError(f"onnxruntime cannot read {path}: {error}") from error
        inputs = _image_input(session, path, layout)
        outputs = [output.name for output in session.get_outputs()]
        if output_name is None and len(outputs) > 1:
            raise InputError(
                f"{path.name} has {len(outputs)} outputs, {', '.join(outputs)}: choose the logits, "
                f"load_model('onnx:{name}', output_name={outputs[0]!r})"
            )
        if output_name is not None and output_name not in outputs:
            raise UnknownName("output", output_name, outputs, path.name)
        batch, *sides = inputs.shape
        sides = [sides[2], *sides[:2]] if layout == "NHWC" else sides
        network = OnnxNetwork(
            session,
            path,
            inputs.name,
            output_name or outputs[0],
            batch if isinstance(batch, int) else None,
            layout == "NHWC",
        )
        settings: dict[str, Any] = {"name": f"onnx:{path.name}", "uri": f"onnx:{path}"}
        if all(isinstance(side, int) for side in sides):
            settings["input_size"] = tuple(sides)
        elif isinstance(sides[0], int) and sides[0] != 3:
            settings |= {
                "mean": [0.0] * sides[0],
                "std": [1.0] * sides[0],
            }  # how Model learns of the channels
        return network, settings

    def saved_options(self, name: str) -> Sequence[str]:
        """Which output is read, and the layout."""
        return ("output_name", "layout")

    def names(self) -> Sequence[str]:
        """Empty: names are files, which are not listed."""
        return []


def _image_input(session: Any, path: Path, layout: str | None) -> Any:
    """The input of the images; InputError for a graph whose input is something else."""
    from ._onnx_network import INPUT_TYPES

    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs)
        raise InputError(
            f"{path.name} has {len(inputs)} inputs, {names}; only one, the images, can be passed"
        )
    (images,) = inputs
    if images.type not in INPUT_TYPES:
        allowed = ", ".join(INPUT_TYPES)
        raise InputError(f"the input {images.name!r} of {path.name} is a {images.type}, not one of {allowed}")
    if len(images.shape) != 4:
        raise InputError(
            f"the input {images.name!r} of {path.name} has the shape {images.shape}, not (N, C, H, W)"
        )
    _, first, _, last = images.shape
    if layout is None and isinstance(first, int) and first not in (1, 3) and last in (1, 3):
        raise InputError(
            f"the input {images.name!r} of {path.name} has the shape {images.shape}: pass layout='NHWC' "
            "where the channels are last, layout='NCHW' where they are first"
        )
    return images


@hookimpl
def phosphene_model_loaders():
    return {"onnx": OnnxLoader()}
