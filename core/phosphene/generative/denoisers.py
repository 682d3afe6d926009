"""``Denoiser``: a diffusion model's noise prediction, and pipelines in diffusers' folder format."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingExtra, ModelError

Prediction = Literal["epsilon", "v_prediction", "sample"]


class Denoiser(nn.Module):
    """A diffusion model: it knows the noise eps in x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    Subclass it for a network of yours. ``forward(x, t)`` says, for x (N, C, h, w) at one time
    t = 0 ... T - 1, what ``prediction`` names: the noise, v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, or
    x_0; further channels are not looked at. ``alphas`` (T,): abar, from nearly 1 down to nearly 0.
    ``encode`` and ``decode`` lead from pictures (N, ``channels``, H, W) in [0, 1] to x_0 and back, where
    ``multiple`` divides H and W.
    """

    prediction: Prediction = "epsilon"
    channels: int = 3
    multiple: int = 1
    #: What it was loaded from.
    uri: str | None = None

    def __init__(self, alphas: Tensor) -> None:
        super().__init__()
        #: In double precision and in no state dict: a network in halves must not have it in halves.
        self.alphas = alphas.detach().double().cpu()

    def levels(self, t: int) -> tuple[float, float]:
        """How much of x_t is picture and how much noise: sqrt(abar_t), sqrt(1 - abar_t)."""
        abar = self.alphas[t].item()
        return math.sqrt(abar), math.sqrt(1 - abar)

    def eps(self, x: Tensor, t: int) -> Tensor:
        """The noise in x at time t, of x's shape and precision."""
        said = self(x.to(next(self.parameters(), x)), t)[:, : x.shape[1]].to(x)
        signal, noise = self.levels(t)
        match self.prediction:
            case "epsilon":
                return said
            case "v_prediction":
                return noise * x + signal * said
        return (x - signal * said) / noise

    def encode(self, images: Tensor) -> Tensor:
        """x_0 of pictures: 2 I - 1."""
        return 2 * images - 1

    def decode(self, x: Tensor) -> Tensor:
        """Pictures of x_0, as they come: they may leave [0, 1]."""
        return (x + 1) / 2


class Pipeline(Denoiser):
    """A UNet of diffusers with its noise schedule, and for one that works on latents its autoencoder.

    ``prompt`` (1, L, D): what a text-conditioned UNet is told.
    """

    prompt: Tensor | None

    def __init__(
        self, unet: Any, scheduler: Any, autoencoder: Any = None, prompt: Tensor | None = None
    ) -> None:
        super().__init__(scheduler.alphas_cumprod)
        self.prediction = scheduler.config.get("prediction_type", "epsilon")
        self.unet, self.autoencoder = unet, autoencoder
        self.register_buffer("prompt", prompt)
        self.channels = (unet if autoencoder is None else autoencoder).config.in_channels
        parts = [unet] if autoencoder is None else [unet, autoencoder]
        self.multiple = math.prod(2 ** (len(part.config.block_out_channels) - 1) for part in parts)

    def forward(self, x: Tensor, t: int) -> Tensor:
        told = {} if self.prompt is None else {"encoder_hidden_states": self.prompt.expand(len(x), -1, -1)}
        return self.unet(x, t, **told).sample

    def encode(self, images: Tensor) -> Tensor:
        x = super().encode(images)
        if self.autoencoder is None:
            return x
        found = self.autoencoder.encode(x.to(self.autoencoder.dtype))
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return (latents.to(x) - self._shift) * self.autoencoder.config.scaling_factor

    def decode(self, x: Tensor) -> Tensor:
        if self.autoencoder is None:
            return super().decode(x)
        latents = x / self.autoencoder.config.scaling_factor + self._shift
        return super().decode(self.autoencoder.decode(latents.to(self.autoencoder.dtype)).sample.to(x))

    @property
    def _shift(self) -> float:
        return self.autoencoder.config.get("shift_factor") or 0.0


def load_pipeline(folder: str | os.PathLike[str]) -> Pipeline:
    """The diffusion model in a folder that diffusers saved: an unconditional one, or Stable Diffusion's kind.

    Of safetensors alone, and never from elsewhere than the folder; one that takes a text is told the
    empty one. MissingExtra without diffusers, InputError for a folder that is none, ModelError for a
    pipeline that is told more than pictures, times and a text.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is no folder of a diffusers pipeline: it has no model_index.json")
    try:
        import diffusers

        index = json.loads((folder / "model_index.json").read_text())
        made = {name: _component(folder, name, index, diffusers) for name in ("unet", "scheduler")}
        latent = next((name for name in ("vae", "vqvae") if name in index), None)
        autoencoder = _component(folder, latent, index, diffusers) if latent else None
        prompt = _empty_prompt(folder, index) if "text_encoder" in index else None
    except ImportError as error:
        raise MissingExtra("a diffusion pipeline", "diffusion") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} cannot be read as a pipeline of safetensors: {error}") from error
    config, kind = made["unet"].config, index.get("_class_name")
    if not hasattr(made["scheduler"], "alphas_cumprod"):
        raise ModelError(f"{kind} has no noise schedule abar: it is no diffusion of noise into a picture")
    wanted = [k for k in ("class_embed_type", "num_class_embeds", "addition_embed_type") if config.get(k)]
    if wanted or (config.get("cross_attention_dim") and prompt is None):
        told = ", ".join(wanted) or "cross_attention_dim without a text encoder"
        raise ModelError(f"{kind} is told more than pictures, times and a text ({told}); use one that is not")
    found = Pipeline(**made, autoencoder=autoencoder, prompt=prompt).eval()
    found.uri = str(folder.resolve())
    return found


def _component(folder: Path, name: str, index: dict[str, Any], library: Any) -> Any:
    """One part of a pipeline, of the class that its index names."""
    kind = getattr(library, index[name][1])
    safely = {"use_safetensors": True} if issubclass(kind, nn.Module) else {}
    return kind.from_pretrained(folder / name, local_files_only=True, **safely)


def _empty_prompt(folder: Path, index: dict[str, Any]) -> Tensor:
    """What the text encoder makes of the empty prompt: (1, L, D)."""
    import transformers

    tokenizer, encoder = (
        _component(folder, name, index, transformers) for name in ("tokenizer", "text_encoder")
    )
    tokens = tokenizer(
        "", padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return encoder.eval()(tokens.input_ids)[0]
