"""``Denoiser``: noise prediction of a diffusion model; ``Pipeline``: one loaded from a diffusers folder."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, MissingExtra, ModelError

#: What the network of a diffusion model predicts, in the names of diffusers.
Prediction = Literal["epsilon", "v_prediction", "sample"]


class Denoiser(nn.Module):
    """A diffusion model, which predicts the noise eps in x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    Subclass it for a network of your own. ``forward(x, t)`` returns, for x (N, C, h, w) at one time step t
    = 0 ... T - 1, what ``prediction`` names: the noise, v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, or
    x_0. Further output channels, such as a predicted variance, are ignored. ``alphas_cumprod`` (T,) is
    abar, which falls from nearly 1 to nearly 0. ``encode`` and ``decode`` map images (N, ``channels``, H,
    W) in [0, 1] to x_0 and back; H and W are multiples of ``multiple``.
    """

    prediction: Prediction = "epsilon"
    channels: int = 3
    multiple: int = 1
    #: Height and width of the images that it was trained on; None where it is not recorded.
    image_size: tuple[int, int] | None = None
    #: Path or name that it was loaded from.
    uri: str | None = None

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        # Not a buffer: ``.half()`` would round it, and 1 - abar_t loses all digits in half precision.
        self.alphas_cumprod = alphas_cumprod.detach().cpu().double()

    def levels(self, t: int) -> tuple[float, float]:
        """Signal and noise levels of x_t: sqrt(abar_t), sqrt(1 - abar_t)."""
        abar = self.alphas_cumprod[t].item()
        return math.sqrt(abar), math.sqrt(1 - abar)

    def eps(self, x: Tensor, t: int) -> Tensor:
        """The predicted noise in x at time step t, of x's shape and dtype."""
        output = self(x.to(next(self.parameters(), x)), t)[:, : x.shape[1]].to(x)
        signal, noise = self.levels(t)
        match self.prediction:
            case "epsilon":
                return output
            case "v_prediction":
                return noise * x + signal * output
        return (x - signal * output) / noise

    def prompted(self, text: str) -> Denoiser:
        """The same model, conditioned on a text. Raises InputError for a model without text."""
        raise InputError("this diffusion model is not conditioned on text, so it takes no prompt")

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, each with the positions of its tokens in the text embedding.

        Raises InputError for a model without text, or a text with more tokens than the model reads.
        """
        raise InputError("this diffusion model is not conditioned on text, so it reads no words")

    def encode(self, images: Tensor) -> Tensor:
        """x_0 of images in [0, 1]: 2 I - 1."""
        return 2 * images - 1

    def decode(self, x: Tensor) -> Tensor:
        """Images of x_0: (x_0 + 1) / 2, not clipped to [0, 1]."""
        return (x + 1) / 2


class Pipeline(Denoiser):
    """A UNet of diffusers with its noise schedule, and the autoencoder of a latent diffusion model.

    ``prompt`` (1, L, D) is the text embedding that a text-conditioned UNet receives, ``encode_prompt``
    computes it from a text, and ``tokenizer`` is that of the text encoder.
    """

    prompt: Tensor | None

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        autoencoder: Any = None,
        prompt: Tensor | None = None,
        encode_prompt: Callable[[str], Tensor] | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(scheduler.alphas_cumprod)
        self.prediction = scheduler.config.get("prediction_type", "epsilon")
        self.unet, self.autoencoder = unet, autoencoder
        self.register_buffer("prompt", prompt)
        self.encode_prompt, self.tokenizer = encode_prompt, tokenizer
        self.channels = (unet if autoencoder is None else autoencoder).config.in_channels
        networks = [unet] if autoencoder is None else [unet, autoencoder]
        factors = [2 ** (len(n.config.block_out_channels) - 1) for n in networks]
        self.multiple = math.prod(factors)
        if size := unet.config.get("sample_size"):
            height, width = (size, size) if isinstance(size, int) else size
            pixels = math.prod(factors[1:])  # per latent position and axis
            self.image_size = height * pixels, width * pixels

    def forward(self, x: Tensor, t: int) -> Tensor:
        if self.prompt is None:
            return self.unet(x, t).sample
        return self.unet(x, t, encoder_hidden_states=self.prompt.expand(len(x), -1, -1)).sample

    def prompted(self, text: str) -> Pipeline:
        if self.prompt is None or self.encode_prompt is None:
            super().prompted(text)
        assert self.prompt is not None and self.encode_prompt is not None
        view = copy.copy(self)  # its networks are this pipeline's
        view._buffers = {**self._buffers, "prompt": self.encode_prompt(text).to(self.prompt)}
        return view

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, without punctuation, each with the positions of its tokens.

        Raises InputError for a model without text, or a text with more tokens than the model reads;
        ModelError for a tokenizer that does not say which characters a token stands for.
        """
        if self.tokenizer is None:
            return super().word_tokens(text)
        if not self.tokenizer.is_fast:
            kind = type(self.tokenizer).__name__
            raise ModelError(f"{kind} does not say which word a token belongs to: pass a fast tokenizer")
        spans = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        longest = self.tokenizer.model_max_length
        if len(spans) > longest:
            raise InputError(f"the text has {len(spans)} tokens, of which the model reads {longest}")
        words = [(match[0], match.span()) for match in re.finditer(r"\w+(?:['’-]\w+)*", text)]
        # Special tokens stand for no characters.
        return [
            (word, [n for n, (a, b) in enumerate(spans) if max(a, start) < min(b, end)])
            for word, (start, end) in words
        ]

    def encode(self, images: Tensor) -> Tensor:
        """x_0 of images in [0, 1]: pixels, or the autoencoder's scaled latents (the posterior's mode)."""
        x = super().encode(images)
        if self.autoencoder is None:
            return x
        output = self.autoencoder.encode(x.to(self.autoencoder.dtype))
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        return (latents.to(x) - self._shift) * self.autoencoder.config.scaling_factor

    def decode(self, x: Tensor) -> Tensor:
        """Images of x_0, decoded from latents where there is an autoencoder, not clipped to [0, 1]."""
        if self.autoencoder is None:
            return super().decode(x)
        latents = x / self.autoencoder.config.scaling_factor + self._shift
        return super().decode(self.autoencoder.decode(latents.to(self.autoencoder.dtype)).sample.to(x))

    @property
    def _shift(self) -> float:
        """Mean of the latents, which is subtracted from them."""
        return self.autoencoder.config.get("shift_factor") or 0.0


def load_pipeline(folder: str | os.PathLike[str]) -> Pipeline:
    """Load a diffusion model from a diffusers folder: an unconditional one, or one like Stable Diffusion.

    Only safetensors are read, and nothing is downloaded. A text-conditioned model gets the embedding of the
    empty prompt; ``prompted(text)`` is the same model with another one.

    Raises:
        MissingExtra: diffusers is not installed.
        InputError: a folder that is not a pipeline of safetensors.
        ModelError: a pipeline without a noise schedule, or one conditioned on more than text.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is not the folder of a diffusers pipeline: it has no model_index.json")
    try:
        import diffusers

        index = json.loads((folder / "model_index.json").read_text())
        components = {name: _load_component(folder, name, index, diffusers) for name in ("unet", "scheduler")}
        latent = next((name for name in ("vae", "vqvae") if name in index), None)
        autoencoder = _load_component(folder, latent, index, diffusers) if latent else None
        tokenizer, encode_prompt = _prompt_encoder(folder, index) if "text_encoder" in index else (None, None)
        prompt = encode_prompt("") if encode_prompt is not None else None
    except ImportError as error:
        raise MissingExtra("a diffusion pipeline", "diffusion") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} cannot be read as a pipeline of safetensors: {error}") from error
    config, kind = components["unet"].config, index.get("_class_name")
    if not hasattr(components["scheduler"], "alphas_cumprod"):
        raise ModelError(
            f"{kind} has no noise schedule abar: it is not a diffusion model with Gaussian noise"
        )
    conditions = ("class_embed_type", "num_class_embeds", "addition_embed_type")
    unsupported = [name for name in conditions if config.get(name)]
    if config.get("cross_attention_dim") and prompt is None:
        unsupported = unsupported or ["cross_attention_dim without a text encoder"]
    if unsupported:
        names = ", ".join(unsupported)
        raise ModelError(
            f"{kind} is conditioned on more than time and text ({names}), which is not supported"
        )
    pipeline = Pipeline(
        **components,
        autoencoder=autoencoder,
        prompt=prompt,
        encode_prompt=encode_prompt,
        tokenizer=tokenizer,
    ).eval()
    pipeline.uri = str(folder.resolve())
    return pipeline


def _load_component(folder: Path, name: str, index: dict[str, Any], library: Any) -> Any:
    """A component of a pipeline, of the class that the index names."""
    kind = getattr(library, index[name][1])
    options = {"use_safetensors": True} if issubclass(kind, nn.Module) else {}
    return kind.from_pretrained(folder / name, local_files_only=True, **options)


def _prompt_encoder(folder: Path, index: dict[str, Any]) -> tuple[Any, Callable[[str], Tensor]]:
    """The tokenizer, and a function from a text to the text encoder's embedding of it, (1, L, D)."""
    import transformers

    tokenizer, encoder = (
        _load_component(folder, name, index, transformers) for name in ("tokenizer", "text_encoder")
    )
    encoder.eval().requires_grad_(False)
    padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}

    @torch.no_grad()
    def encode_prompt(text: str) -> Tensor:
        embedding: Tensor = encoder(tokenizer(text, return_tensors="pt", **padding).input_ids)[0]
        return embedding

    return tokenizer, encode_prompt
