"""The role ``autoencoder``: a sparse autoencoder of a layer's activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import torch.nn.functional as F

from phosphene import InputError
from phosphene.errors import type_name
from phosphene.roles import InputContext, InputRole, SampleRequest, check_type
from phosphene.spec import Role

from ._sparse_autoencoder import FIT, AutoencoderNetwork, SparseAutoencoder, read_published

#: A sparse autoencoder, trained by ``sparse_autoencoder_fit`` or read from a published file.
Autoencoder: TypeAlias = Annotated[SparseAutoencoder, Role("autoencoder")]


class AutoencoderRole(InputRole):
    """The result of ``sparse_autoencoder_fit``, its folder, or a safetensors file; default: the bundled."""

    name, value_type, default = "autoencoder", SparseAutoencoder, "builtin:shapes-codes"
    metavar = "FOLDER|FILE"
    description = "result of ``sparse_autoencoder_fit``, or a published .safetensors file"
    help = "folder of sparse_autoencoder_fit, or a .safetensors file (default: builtin:shapes-codes)"

    def read(self, value: Any, context: InputContext) -> Any:
        if not isinstance(value, (str, Path)):
            kind = type_name(value)
            raise InputError(f"an autoencoder is a fit's result, its folder or a file, not {kind}")
        path = Path(value)
        return read_published(path) if path.suffix == ".safetensors" else context.result(value)

    def check(self, value: Any, context: InputContext) -> SparseAutoencoder:
        autoencoder: SparseAutoencoder = check_type(
            value, SparseAutoencoder, "the result of sparse_autoencoder_fit"
        )
        return autoencoder

    def sample(self, request: SampleRequest) -> SparseAutoencoder:
        """Random codes of the model's last map."""
        layer = request.model.last_map
        channels = request.model.map_shape(layer)[0]
        draw = torch.Generator().manual_seed(1)
        network = AutoencoderNetwork(channels, 7, "topk", 2)
        with torch.no_grad():
            network.decoder.copy_(F.normalize(torch.randn(7, channels, generator=draw), dim=1))
            network.encoder.copy_(network.decoder)
            network.encoder_bias.copy_(0.2 * torch.randn(7, generator=draw))
            network.bias.copy_(0.1 * torch.randn(channels, generator=draw))
        config = {"channels": channels, "codes": 7, "activation": "topk", "k": 2, "normalization": "none"}
        return SparseAutoencoder(
            network=network.eval().requires_grad_(False), method=FIT, config=config, layer=layer,
            losses=torch.empty(0), labels=(), previews=torch.empty(0, 3, 1, 1),
        )  # fmt: skip

    def bad_values(self, good: Any, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a path", "somewhere"
        yield "a tensor", torch.zeros(3)


AUTOENCODER = AutoencoderRole()
