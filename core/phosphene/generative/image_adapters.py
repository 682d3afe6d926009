"""``ImageAdapter``: an image prompt adapter (IP-Adapter), and ``load_image_adapter`` from local files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingExtra, ModelError


class ImageAdapter(nn.Module):
    """Keys and values of an image for the attention layers of a diffusion model.

    ``embed`` maps images (N, C, H, W) in [0, 1] to embeddings (N, ...), ``projection`` these to tokens
    (N, n, D). ``keys`` and ``values`` are linear layers D -> width, one for each attention layer that reads
    the image, in the order of the network's modules. ``embed_text`` maps a text to an embedding (E,) in the
    same space, None where there is none. ``blank`` is the embedding (1, ...) of no image; default: zeros.
    """

    def __init__(
        self,
        embed: Callable[[Tensor], Tensor],
        projection: nn.Module,
        keys: Iterable[nn.Module],
        values: Iterable[nn.Module],
        *,
        embed_text: Callable[[str], Tensor] | None = None,
        blank: Tensor | None = None,
        uri: str | None = None,
    ) -> None:
        super().__init__()
        self.embed, self.projection = embed, projection
        self.keys, self.values = nn.ModuleList(keys), nn.ModuleList(values)
        self.embed_text, self.blank, self.uri = embed_text, blank, uri

    def embeddings(self, images: Tensor) -> Tensor:
        """Embeddings (N, ...) of images (N, C, H, W) in [0, 1], on the adapter's device, in its precision."""
        return self.embed(images.to(next(self.projection.parameters(), images)))

    def blank_embedding(self, embeddings: Tensor) -> Tensor:
        """The embedding (1, ...) of no image, for guidance: ``blank``, or zeros."""
        return torch.zeros_like(embeddings[:1]) if self.blank is None else self.blank


def load_image_adapter(
    file: str | os.PathLike[str], image_encoder: str | os.PathLike[str] | None = None
) -> ImageAdapter:
    """Load an IP-Adapter of Stable Diffusion 1.x, 2.x or XL from a safetensors file.

    Its tensors are ``image_proj.*``, ``ip_adapter.N.to_k_ip.weight`` and ``ip_adapter.N.to_v_ip.weight``,
    as published. ``image_encoder`` is the folder of its CLIP image encoder; default: the folder
    ``image_encoder`` beside the file, or ``../models/image_encoder``, whose width fits. A folder with the
    text encoder of the CLIP as well embeds texts. Nothing is downloaded, and no pickles are read.

    Raises:
        MissingExtra: diffusers or transformers is not installed.
        InputError: a file that is no adapter in safetensors, or no image encoder that fits.
        ModelError: an adapter that reads face embeddings.
    """
    file = Path(file).expanduser()
    if file.suffix != ".safetensors":
        pickled = file.suffix in (".bin", ".ckpt", ".pt", ".pth")
        reason = ": pickled weights execute code and are never loaded" if pickled else ""
        raise InputError(
            f"{file} is not a .safetensors file{reason}; IP-Adapters are published as .safetensors as well"
        )
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    try:
        from diffusers.loaders.unet import UNet2DConditionLoadersMixin
        from diffusers.models.embeddings import ImageProjection
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import CLIPVisionModelWithProjection

        from .clip_embeddings import ClipImages, ClipTexts
    except ImportError as error:
        raise MissingExtra("an image adapter", "diffusion") from error
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = value.float()
    projection_state, layer_state = parts["image_proj"], parts["ip_adapter"]
    faces = "perceiver_resampler.proj_in.weight" in projection_state or "proj.0.weight" in projection_state
    if any("lora" in name for name in layer_state) or (faces and "proj.3.weight" not in projection_state):
        raise ModelError(f"{file} reads embeddings of a face recognition network (FaceID), not of a CLIP")
    try:
        projection: nn.Module = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(
            projection_state, low_cpu_mem_usage=False
        )
        numbers = sorted({int(name.partition(".")[0]) for name in layer_state})
        keys, values = (
            [_linear(layer_state[f"{n}.to_{kind}_ip.weight"]) for n in numbers] for kind in ("k", "v")
        )
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(
            f"{file} is not an IP-Adapter, whose tensors are image_proj.* and ip_adapter.N.to_k_ip.weight "
            f"and to_v_ip.weight; it has {', '.join(sorted(tensors)[:3])} ..."
        ) from error
    is_global = isinstance(projection, ImageProjection)  # else it reads the last but one layer's tokens
    first = next(
        projection_state[name]
        for name in ("proj.weight", "proj_in.weight", "proj.0.weight")
        if name in projection_state
    )
    folder = _image_encoder_folder(file, image_encoder, first.shape[1], is_global)
    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} cannot be read as a CLIP image encoder of safetensors: {error}"
        ) from error
    embed = ClipImages(encoder, folder, is_global)
    has_text = is_global and "text_config" in _config(folder)
    adapter = ImageAdapter(
        embed,
        projection,
        keys,
        values,
        embed_text=ClipTexts(folder) if has_text else None,
        blank=None if is_global else embed.blank(),
        uri=str(file.resolve()),
    )
    return adapter.eval().requires_grad_(False)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _config(folder: Path) -> Mapping[str, Any]:
    """The configuration of a network; empty where there is none."""
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return config


def _image_encoder_folder(
    file: Path, folder: str | os.PathLike[str] | None, width: int, is_global: bool
) -> Path:
    """The folder of an image encoder whose embeddings, or tokens, have ``width`` numbers.

    Raises InputError where none of those that are searched has.
    """
    folders = (
        [file.parent / "image_encoder", file.parent.parent / "models" / "image_encoder"]
        if folder is None
        else [Path(folder).expanduser()]
    )
    widths = {}
    for candidate in folders:
        config = _config(candidate)
        if config:
            vision = config.get("vision_config", config)
            widths[candidate] = (
                config.get("projection_dim", 512) if is_global else vision.get("hidden_size", 768)
            )
        if widths.get(candidate) == width:
            return candidate
    described = ", ".join(f"{candidate} has {own}" for candidate, own in widths.items())
    names = " or ".join(str(candidate) for candidate in folders)
    raise InputError(
        f"{file.name} needs a CLIP image encoder with {'embeddings' if is_global else 'tokens'} of {width} "
        f"numbers in {names}: {described or 'there is none'}; load_image_adapter(file, image_encoder=folder) "
        "takes another folder"
    )
