"""An ONNX graph as a torch module without gradients."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phosphene.models import Function


class OnnxNetwork(Function):
    """From images (N, C, H, W) to one output of an ONNX graph, computed by onnxruntime without gradients.

    A graph with a fixed batch size b runs on b images at a time; the last images are repeated to fill it.
    """

    def __init__(
        self, session: Any, path: Path, input_name: str, output_name: str, batch: int | None, nhwc: bool
    ) -> None:
        super().__init__(self.run)
        self.session, self.batch, self.nhwc = session, batch, nhwc
        self.input_name, self.output_name = input_name, output_name
        kind = next(i.type for i in session.get_inputs() if i.name == input_name)
        self.input_type = INPUT_TYPES[kind]
        # A buffer, so that the digest differs between different graphs.
        sha = hashlib.sha256(path.read_bytes()).digest()
        self.register_buffer("file_digest", torch.frombuffer(bytearray(sha), dtype=torch.uint8))

    def run(self, images: Tensor) -> Tensor:
        """The output for images of any number, as float32 on the device of the images."""
        # Reshaped, a batch of a tensor subclass that is computed lazily becomes a plain tensor.
        plain = images.detach().flatten(1).view(images.shape).cpu().to(self.input_type)
        plain = plain.permute(0, 2, 3, 1) if self.nhwc else plain
        parts = plain.split(self.batch) if self.batch else (plain,)
        outputs = [self._run_part(part.contiguous()) for part in parts]
        return torch.cat(outputs).to(images.device)

    def _run_part(self, images: Tensor) -> Tensor:
        missing = (self.batch or len(images)) - len(images)
        filled = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
        (output,) = self.session.run([self.output_name], {self.input_name: filled.numpy()})
        values = torch.from_numpy(output)
        return (values.float() if values.is_floating_point() else values)[: len(images)]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxNetwork:
        return self  # a session cannot be copied, and has no state that could change


#: The types of inputs that images can be converted to, by onnxruntime's name.
INPUT_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
}
