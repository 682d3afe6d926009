"""Tiny IP-Adapters of random weights for the pipelines of ``tiny_pipelines``, in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

#: Length of the CLIP's image embedding, and width of its layers.
EMBEDDING, HIDDEN = 6, 8


def write_image_adapter(folder: Path, unet: Any, *, plus: bool = False) -> Path:
    """``adapter.safetensors`` for a UNet, with a CLIP image encoder in the folder beside it."""
    import transformers

    torch.manual_seed(1)
    width = unet.config.cross_attention_dim
    layers = [layer for layer in unet.modules() if getattr(layer, "is_cross_attention", False)]
    tensors = {
        f"ip_adapter.{2 * n + 1}.to_{kind}_ip.weight": torch.randn(layer.to_k.out_features, width)
        for n, layer in enumerate(layers)
        for kind in "kv"
    }
    projection = _resampler(width) if plus else _linear(width)
    tensors |= {f"image_proj.{name}": value for name, value in projection.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter.safetensors")
    config = transformers.CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=EMBEDDING,
    )  # fmt: skip
    encoder = transformers.CLIPVisionModelWithProjection(config)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    encoder.save_pretrained(folder / "image_encoder")
    return folder / "adapter.safetensors"


def _linear(width: int) -> dict[str, Tensor]:
    """Four tokens of the image embedding."""
    return {
        "proj.weight": torch.randn(4 * width, EMBEDDING), "proj.bias": torch.randn(4 * width),
        "norm.weight": 1 + 0.1 * torch.randn(width), "norm.bias": 0.1 * torch.randn(width),
    }  # fmt: skip


def _resampler(width: int, inner: int = 12, heads: int = 1) -> dict[str, Tensor]:
    """Three tokens of those of the image encoder, by four layers of attention (IP-Adapter Plus)."""
    tensors = {
        "latents": torch.randn(1, 3, inner), "proj_in.weight": torch.randn(inner, HIDDEN),
        "proj_in.bias": torch.randn(inner), "proj_out.weight": torch.randn(width, inner),
        "proj_out.bias": torch.randn(width), "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width),
    }  # fmt: skip
    for n in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            tensors[f"layers.{n}.{norm}.weight"] = 1 + 0.1 * torch.randn(inner)
            tensors[f"layers.{n}.{norm}.bias"] = 0.1 * torch.randn(inner)
        for name, shape in (
            ("0.to_q", (64 * heads, inner)), ("0.to_kv", (128 * heads, inner)),
            ("0.to_out", (inner, 64 * heads)), ("1.1", (4 * inner, inner)), ("1.3", (inner, 4 * inner)),
        ):  # fmt: skip
            tensors[f"layers.{n}.{name}.weight"] = torch.randn(*shape) / shape[1] ** 0.5
    return tensors
