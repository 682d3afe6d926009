"""Embeddings of images and texts by a CLIP of transformers in a local folder; needs the extra diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModelWithProjection

from ..errors import InputError


class ClipImages(nn.Module):
    """Image embeddings (N, E) of a CLIP, or the tokens (N, L, D) of its last but one layer."""

    def __init__(self, encoder: Any, folder: Path, is_global: bool) -> None:
        super().__init__()
        self.encoder, self.is_global = encoder, is_global
        size = encoder.config.image_size
        self.processor = (
            CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            if (folder / "preprocessor_config.json").is_file()
            else CLIPImageProcessor(size=size, crop_size=size)
        )

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.processor(list(images), do_rescale=False, return_tensors="pt").pixel_values
        return self._embed(pixels.to(images))

    def _embed(self, pixels: Tensor) -> Tensor:
        output = self.encoder(pixels, output_hidden_states=not self.is_global)
        embedding: Tensor = output.image_embeds if self.is_global else output.hidden_states[-2]
        return embedding

    def blank(self) -> Tensor:
        """What the encoder returns for an image of zeros after normalization."""
        size = self.encoder.config.image_size
        with torch.no_grad():
            return self._embed(torch.zeros(1, self.encoder.config.num_channels, size, size))


class ClipTexts:
    """Text embeddings (E,) of the CLIP in a folder, whose text encoder is loaded when first called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, text: str) -> Tensor:
        options: dict[str, Any] = {"local_files_only": True}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, **options)
            encoder = CLIPTextModelWithProjection.from_pretrained(
                self.folder, use_safetensors=True, dtype=torch.float32, **options
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder} cannot be read as a CLIP with a tokenizer, which a text needs: {error}"
            ) from error
        tokens = tokenizer([text], truncation=True, return_tensors="pt")
        with torch.no_grad():
            embedding: Tensor = encoder.eval()(tokens.input_ids).text_embeds[0]
        return embedding
