"""``Pipeline``: a diffusion model of diffusers, loaded from a local folder by ``load_pipeline``."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, MissingExtra, ModelError, PhospheneError
from ..hooks import Tap
from .denoisers import Denoiser

#: The embedding (1, L, D) of a text, or that and its pooled embedding (1, P).
TextEmbedding = Tensor | tuple[Tensor, Tensor]

SUPPORTED = (
    "supported are unconditional pipelines, StableDiffusionPipeline (1.x, 2.x), StableDiffusionXLPipeline, "
    "StableDiffusion3Pipeline and FluxPipeline"
)


class Pipeline(Denoiser):
    """A UNet of diffusers with its noise schedule, and the autoencoder of a latent diffusion model.

    ``prompt`` (1, L, D) is the text embedding that a text-conditioned UNet receives, ``encode_prompt``
    computes it from a text, and ``tokenizer`` is that of the text encoder. ``text_encoders`` are the pairs
    of tokenizer and text encoder; learned words are input embeddings of these.
    """

    prompt: Tensor | None
    #: The pooled text embedding (1, P) of a model that receives one.
    pooled: Tensor | None
    #: Where attention is over image and text together, which of them comes first.
    joint_attention: Literal["image first", "text first"] | None = None

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        autoencoder: Any = None,
        prompt: Tensor | None = None,
        encode_prompt: Callable[[str], TextEmbedding] | None = None,
        tokenizer: Any = None,
        text_encoders: list[tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__(scheduler.alphas_cumprod)
        self.prediction = scheduler.config.get("prediction_type", "epsilon")
        self.unet = unet
        self._set_text(prompt, None, encode_prompt, tokenizer, text_encoders)
        self._set_sizes(unet, autoencoder)

    def _set_text(
        self,
        prompt: Tensor | None,
        pooled: Tensor | None,
        encode_prompt: Callable[[str], TextEmbedding] | None,
        tokenizer: Any,
        text_encoders: list[tuple[Any, Any]] | None,
    ) -> None:
        self.register_buffer("prompt", prompt)
        self.register_buffer("pooled", pooled)
        self.encode_prompt, self.tokenizer = encode_prompt, tokenizer
        self.text_encoders = [pair for pair in text_encoders or [] if pair[1] is not None]

    def _set_sizes(self, network: Any, autoencoder: Any) -> None:
        self.autoencoder = autoencoder
        self.channels = (network if autoencoder is None else autoencoder).config.in_channels
        self.multiple = self._network_multiple(network) * self._pixels
        if size := network.config.get("sample_size"):
            height, width = (size, size) if isinstance(size, int) else size
            self.image_size = height * self._pixels, width * self._pixels

    def _network_multiple(self, network: Any) -> int:
        """What the height and width of x_t are multiples of."""
        return int(2 ** (len(network.config.block_out_channels) - 1))

    @property
    def _pixels(self) -> int:
        """Pixels per latent position and axis."""
        if self.autoencoder is None:
            return 1
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))

    def forward(self, x: Tensor, t: int) -> Tensor:
        if self.prompt is None:
            return self.unet(x, t).sample
        return self.unet(x, t, encoder_hidden_states=self.prompt.expand(len(x), -1, -1)).sample

    def prompted(self, text: str) -> Pipeline:
        if self.prompt is None or self.encode_prompt is None:
            super().prompted(text)
        assert self.encode_prompt is not None
        with torch.no_grad():
            return self._conditioned(self.encode_prompt(text))

    def _conditioned(self, embedding: TextEmbedding) -> Pipeline:
        """This pipeline with another text embedding."""
        assert self.prompt is not None
        prompt, pooled = embedding if isinstance(embedding, tuple) else (embedding, None)
        view = copy.copy(self)  # its networks are this pipeline's
        pooled = None if pooled is None else pooled.to(self.prompt)
        view._buffers = {**self._buffers, "prompt": prompt.to(self.prompt), "pooled": pooled}
        return view

    def with_tokens(self, text: str, tokens: Tensor) -> Pipeline:
        if not self.text_encoders:
            super().with_tokens(text, tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.token_width:
            raise InputError(
                f"tokens have the shape (n, {self.token_width}) for this model, not {tuple(tokens.shape)}"
            )
        if "*" not in text:
            raise InputError(f"the text {text!r} has no *, which stands for the learned tokens")
        count = len(tokens)
        text = text.replace("*", f" {' '.join('*' * count)} ")
        assert self.encode_prompt is not None
        with ExitStack() as stack:
            parts = tokens.split(self._widths, 1)
            for (tokenizer, encoder), vectors in zip(self.text_encoders, parts, strict=True):
                stars = [match.start() for match in re.finditer(r"\*", text)]
                # Positions in the text embedding, each with the number of its learned word.
                located = [
                    (position, number % count)
                    for position, (start, end) in enumerate(_offsets(tokenizer, text))
                    for number, star in enumerate(stars)
                    if start <= star < end
                ]

                def insert(output: Tensor, vectors: Tensor = vectors, located: Any = located) -> Tensor:
                    fitting = [pair for pair in located if pair[0] < output.shape[1]]
                    positions, rows = torch.tensor(fitting, dtype=torch.long).view(-1, 2).unbind(1)
                    return output.index_copy(1, positions, vectors.to(output)[rows][None])

                weight = encoder.get_input_embeddings().weight  # T5 has it in two modules
                tables = {
                    name: module
                    for name, module in encoder.named_modules()
                    if isinstance(module, nn.Embedding) and module.weight is weight
                }
                stack.enter_context(Tap(tables, replace=dict.fromkeys(tables, (1, insert))))
            return self._conditioned(self.encode_prompt(text))

    @property
    def _widths(self) -> list[int]:
        """Width of the input embeddings of each text encoder."""
        return [encoder.get_input_embeddings().embedding_dim for _, encoder in self.text_encoders]

    @property
    def token_width(self) -> int:
        return sum(self._widths)

    def token_embedding(self, word: str) -> Tensor:
        if not self.text_encoders:
            return super().token_embedding(word)
        rows = []
        for tokenizer, encoder in self.text_encoders:
            ids = tokenizer(word, add_special_tokens=False).input_ids
            rows.append(encoder.get_input_embeddings().weight[ids].mean(0))
        return torch.cat(rows).detach()

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, without punctuation, each with the positions of its tokens.

        Raises InputError for a model without text, or a text with more tokens than the model reads;
        ModelError for a tokenizer that does not say which characters a token stands for.
        """
        if self.tokenizer is None:
            return super().word_tokens(text)
        words = [(match[0], match.span()) for match in re.finditer(r"\w+(?:['’-]\w+)*", text)]
        positions: list[list[int]] = [[] for _ in words]
        for tokenizer, first, longest in self._token_sequences():
            spans = _offsets(tokenizer, text)
            if len(spans) > longest:
                raise InputError(f"the text has {len(spans)} tokens, of which the model reads {longest}")
            # Special tokens stand for no characters.
            for n, (_, (start, end)) in enumerate(words):
                positions[n] += [first + p for p, (a, b) in enumerate(spans) if max(a, start) < min(b, end)]
        return [(word, p) for (word, _), p in zip(words, positions, strict=True)]

    def _token_sequences(self) -> Iterator[tuple[Any, int, int]]:
        """The tokenizers of the text embedding: each with its first position and its length."""
        yield self.tokenizer, 0, self.tokenizer.model_max_length

    def encode(self, images: Tensor) -> Tensor:
        """x_0 of images in [0, 1]: pixels, or the autoencoder's scaled latents (the posterior's mode)."""
        x = super().encode(images)
        if self.autoencoder is None:
            return x
        output = self.autoencoder.encode(x.to(self.autoencoder.dtype))
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        shift, scale = self._latent_scale
        return (latents.to(x) - shift) * scale

    def decode(self, x: Tensor) -> Tensor:
        """Images of x_0, decoded from latents where there is an autoencoder, not clipped to [0, 1]."""
        if self.autoencoder is None:
            return super().decode(x)
        shift, scale = self._latent_scale
        latents = x / scale + shift
        return super().decode(self.autoencoder.decode(latents.to(self.autoencoder.dtype)).sample.to(x))

    @property
    def _latent_scale(self) -> tuple[Any, Any]:
        """Mean of the latents, which is subtracted from them, and the factor that follows."""
        config = self.autoencoder.config
        if (mean := config.get("latents_mean")) is not None and config.get("latents_std") is not None:
            mean, std = (torch.tensor(v)[None, :, None, None] for v in (mean, config["latents_std"]))
            return mean.to(self.autoencoder.device), config.scaling_factor / std.to(self.autoencoder.device)
        return config.get("shift_factor") or 0.0, config.scaling_factor


class XLPipeline(Pipeline):
    """Stable Diffusion XL: two text encoders, whose pooled text and the image's size are conditions too.

    The empty prompt has an embedding of zeros where the pipeline's configuration says so, as its guidance.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(
            pipe.unet,
            pipe.scheduler,
            pipe.vae,
            tokenizer=pipe.tokenizer or pipe.tokenizer_2,
            text_encoders=[(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)],
        )

        def encode_prompt(text: str) -> tuple[Tensor, Tensor]:
            prompt, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
            zeros = not text and pipe.config.force_zeros_for_empty_prompt
            return (prompt * 0, pooled * 0) if zeros else (prompt, pooled)

        self.encode_prompt = encode_prompt
        with torch.no_grad():
            self.prompt, self.pooled = encode_prompt("")

    def forward(self, x: Tensor, t: int) -> Tensor:
        assert self.prompt is not None and self.pooled is not None
        size = [side * self._pixels for side in x.shape[2:]]
        conditions = {
            "text_embeds": self.pooled.expand(len(x), -1),
            # Original size, crop's corner and target size: an image that was neither resized nor cropped.
            "time_ids": x.new_tensor([[*size, 0, 0, *size]]).expand(len(x), -1),
        }
        prompt = self.prompt.expand(len(x), -1, -1)
        output: Tensor = self.unet(x, t, encoder_hidden_states=prompt, added_cond_kwargs=conditions).sample
        return output


class FlowPipeline(Pipeline):
    """A transformer of image and text tokens that was trained by flow matching (MMDiT).

    Time steps t = 0 ... T have sigma = t / T, shifted as its scheduler shifts them; where the shift depends
    on the image's size, it is the scheduler's largest.
    """

    def __init__(
        self,
        pipe: Any,
        text_encoders: list[tuple[Any, Any]],
        tokenizer: Any,
        encode_prompt: Callable[[str], tuple[Tensor, Tensor]],
    ) -> None:
        scheduler, config = pipe.scheduler, pipe.scheduler.config
        sigmas = torch.linspace(0, 1, config.num_train_timesteps + 1, dtype=torch.float64)
        if config.use_dynamic_shifting:
            sigmas[1:] = scheduler.time_shift(config.max_shift, 1.0, sigmas[1:])
        else:
            sigmas = scheduler.shift * sigmas / (1 + (scheduler.shift - 1) * sigmas)
        Denoiser.__init__(self, sigmas=sigmas)
        self.scale = config.num_train_timesteps
        self.transformer = pipe.transformer
        with torch.no_grad():
            prompt, pooled = encode_prompt("")
        self._set_text(prompt, pooled, encode_prompt, tokenizer, text_encoders)
        self._set_sizes(pipe.transformer, pipe.vae)


class StableDiffusion3(FlowPipeline):
    """Stable Diffusion 3: text tokens of two CLIP encoders and a T5, after those of the image."""

    joint_attention = "image first"

    def __init__(self, pipe: Any) -> None:
        pairs = [
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
            (pipe.tokenizer_3, pipe.text_encoder_3),
        ]

        def encode_prompt(text: str) -> tuple[Tensor, Tensor]:
            prompt, _, pooled, _ = pipe.encode_prompt(
                text, None, None, device="cpu", do_classifier_free_guidance=False
            )
            return prompt, pooled

        super().__init__(pipe, pairs, pipe.tokenizer, encode_prompt)
        self._clip_length = pipe.tokenizer_max_length
        self._t5 = pipe.tokenizer_3 if pipe.text_encoder_3 is not None else None

    def _network_multiple(self, network: Any) -> int:
        return int(network.config.patch_size)

    def _token_sequences(self) -> Iterator[tuple[Any, int, int]]:
        assert self.prompt is not None
        clip = self._clip_length
        yield self.tokenizer, 0, clip
        if self._t5 is not None:
            yield self._t5, clip, self.prompt.shape[1] - clip

    def forward(self, x: Tensor, t: int) -> Tensor:
        assert self.prompt is not None and self.pooled is not None
        output: Tensor = self.transformer(
            hidden_states=x,
            timestep=x.new_full((len(x),), self.levels(t)[1] * self.scale),
            encoder_hidden_states=self.prompt.expand(len(x), -1, -1),
            pooled_projections=self.pooled.expand(len(x), -1),
        ).sample
        return output


class Flux(FlowPipeline):
    """Flux: text tokens of a T5 before those of the image, the pooled text of a CLIP as a condition.

    ``distilled_guidance`` is the guidance scale that a guidance-distilled model receives as a number.
    """

    joint_attention, positional_keys = "text first", True
    distilled_guidance: float = 3.5

    def __init__(self, pipe: Any) -> None:
        pairs = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]

        def encode_prompt(text: str) -> tuple[Tensor, Tensor]:
            prompt, pooled, _ = pipe.encode_prompt(text, device="cpu")
            return prompt, pooled

        super().__init__(pipe, pairs, pipe.tokenizer_2, encode_prompt)
        # The transformer's configuration has no size; that of the pipeline is in its code.
        self.image_size = (pipe.default_sample_size * self._pixels,) * 2

    def _network_multiple(self, network: Any) -> int:
        return 2  # latents are packed in blocks of 2 x 2

    def _token_sequences(self) -> Iterator[tuple[Any, int, int]]:
        assert self.prompt is not None
        yield self.tokenizer, 0, self.prompt.shape[1]

    def forward(self, x: Tensor, t: int) -> Tensor:
        assert self.prompt is not None and self.pooled is not None
        height, width = (side // 2 for side in x.shape[2:])
        ids = x.new_zeros(height, width, 3)
        ids[..., 1] = torch.arange(height, device=x.device)[:, None]
        ids[..., 2] = torch.arange(width, device=x.device)
        guided = self.transformer.config.guidance_embeds
        output = self.transformer(
            hidden_states=F.pixel_unshuffle(x, 2).flatten(2).mT,
            timestep=x.new_full((len(x),), self.levels(t)[1]),
            guidance=x.new_full((len(x),), self.distilled_guidance) if guided else None,
            encoder_hidden_states=self.prompt.expand(len(x), -1, -1),
            pooled_projections=self.pooled.expand(len(x), -1),
            txt_ids=x.new_zeros(self.prompt.shape[1], 3),
            img_ids=ids.flatten(0, 1),
        ).sample
        return F.pixel_shuffle(output.mT.unflatten(2, (height, width)), 2)


#: Pipelines whose text embedding is that of diffusers' own ``encode_prompt``.
KINDS: dict[str, type[Any]] = {
    "StableDiffusionXLPipeline": XLPipeline,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}


def load_pipeline(folder: str | os.PathLike[str]) -> Pipeline:
    """Load a diffusion model from a diffusers folder: unconditional, Stable Diffusion 1 to 3, XL, or Flux.

    Only safetensors are read, and nothing is downloaded. A text-conditioned model gets the embedding of the
    empty prompt; ``prompted(text)`` is the same model with another one.

    Raises:
        MissingExtra: diffusers is not installed.
        InputError: a folder that is not a pipeline of safetensors.
        ModelError: a pipeline without a noise schedule, one conditioned on more than text, or one of another
            architecture.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is not the folder of a diffusers pipeline: it has no model_index.json")
    try:
        import diffusers

        index = json.loads((folder / "model_index.json").read_text())
        kind = index.get("_class_name")
        if kind not in KINDS and "unet" not in index:
            raise ModelError(f"{kind} is not supported: {SUPPORTED}")
        pipeline = (
            _load_text_pipeline(folder, index, diffusers)
            if kind in KINDS
            else _load_unet_pipeline(folder, index, diffusers)
        )
    except ImportError as error:
        raise MissingExtra("a diffusion pipeline", "diffusion") from error
    except PhospheneError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} cannot be read as a pipeline of safetensors: {error}") from error
    pipeline.eval().uri = str(folder.resolve())
    return pipeline


def _load_text_pipeline(folder: Path, index: dict[str, Any], diffusers: Any) -> Pipeline:
    """A pipeline of ``KINDS``, from components that are loaded one by one."""
    kind: str = index["_class_name"]
    components, libraries = {}, {"diffusers": diffusers}
    for name, entry in index.items():
        if isinstance(entry, list) and name not in ("image_encoder", "feature_extractor"):
            if entry[0] == "transformers":
                import transformers

                libraries["transformers"] = transformers
            components[name] = entry[0] and _load_component(folder, name, index, libraries[entry[0]])
    scheduler = components["scheduler"]
    flow = type(scheduler).__name__.startswith("FlowMatch")
    if flow != issubclass(KINDS[kind], FlowPipeline):
        needed = "FlowMatchEulerDiscreteScheduler" if not flow else "a scheduler with alphas_cumprod"
        raise ModelError(f"{kind} with {type(scheduler).__name__} is not supported: it takes {needed}")
    if index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{kind} conditioned on an aesthetic score (a refiner) is not supported: {SUPPORTED}"
        )
    options = {name: index[name] for name in ("force_zeros_for_empty_prompt",) if name in index}
    pipe = getattr(diffusers, kind)(**components, **options)
    for part in components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipeline: Pipeline = KINDS[kind](pipe)
    if not flow:
        _require_text_alone(pipeline.unet.config, kind, scheduler, {"addition_embed_type": "text_time"})
    _require_latent_input(pipeline, kind)
    return pipeline


def _load_unet_pipeline(folder: Path, index: dict[str, Any], diffusers: Any) -> Pipeline:
    """An unconditional pipeline, or one of a UNet and at most one text encoder."""
    unet, scheduler = (_load_component(folder, name, index, diffusers) for name in ("unet", "scheduler"))
    latent = next((name for name in ("vae", "vqvae") if name in index), None)
    autoencoder = _load_component(folder, latent, index, diffusers) if latent else None
    tokenizer = encoder = encode_prompt = prompt = None
    if "text_encoder" in index:
        tokenizer, encoder, encode_prompt = _prompt_encoder(folder, index)
        with torch.no_grad():
            prompt = encode_prompt("")
    kind = index.get("_class_name")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ModelError(
            f"{kind} has no noise schedule abar: it is not a diffusion model with Gaussian noise"
        )
    without_encoder = unet.config.get("cross_attention_dim") and prompt is None
    _require_text_alone(unet.config, kind, scheduler, {}, without_encoder)
    pipeline = Pipeline(
        unet,
        scheduler,
        autoencoder,
        prompt,
        encode_prompt,
        tokenizer,
        [(tokenizer, encoder)],
    )
    _require_latent_input(pipeline, kind)
    return pipeline


def _require_text_alone(
    config: Any, kind: Any, scheduler: Any, accepted: dict[str, str], without_encoder: bool = False
) -> None:
    """Raises ModelError for conditions other than time, text and the ``accepted`` ones."""
    conditions = ("class_embed_type", "num_class_embeds", "addition_embed_type")
    unsupported = [name for name in conditions if config.get(name) and config[name] != accepted.get(name)]
    if without_encoder:
        unsupported = unsupported or ["cross_attention_dim without a text encoder"]
    if unsupported:
        names = ", ".join(unsupported)
        raise ModelError(
            f"{kind} is conditioned on more than time and text ({names}), which is not supported"
        )
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"{kind} predicts {prediction!r}: a UNet's epsilon, v_prediction and sample are supported"
        )


def _require_latent_input(pipeline: Pipeline, kind: Any) -> None:
    """Raises ModelError for a network that reads more channels than x_t has, as for inpainting."""
    autoencoder = pipeline.autoencoder
    if autoencoder is None:
        return
    network = pipeline.transformer if isinstance(pipeline, FlowPipeline) else pipeline.unet
    channels = autoencoder.config.latent_channels * (4 if isinstance(pipeline, Flux) else 1)
    if network.config.in_channels != channels:
        raise ModelError(
            f"{kind} reads {network.config.in_channels} channels, of which {channels} are latents: a model "
            "that receives a mask or another image is not supported"
        )


def _load_component(folder: Path, name: str, index: dict[str, Any], library: Any) -> Any:
    """A component of a pipeline, of the class that the index names."""
    kind = getattr(library, index[name][1])
    options = {"use_safetensors": True} if issubclass(kind, nn.Module) else {}
    return kind.from_pretrained(folder / name, local_files_only=True, **options)


def _prompt_encoder(folder: Path, index: dict[str, Any]) -> tuple[Any, Any, Callable[[str], Tensor]]:
    """The tokenizer, the text encoder, and a function from a text to its embedding (1, L, D)."""
    import transformers

    tokenizer, encoder = (
        _load_component(folder, name, index, transformers) for name in ("tokenizer", "text_encoder")
    )
    encoder.eval().requires_grad_(False)
    padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}

    def encode_prompt(text: str) -> Tensor:
        embedding: Tensor = encoder(tokenizer(text, return_tensors="pt", **padding).input_ids)[0]
        return embedding

    return tokenizer, encoder, encode_prompt


def _offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """The characters (start, end) of each token of a text.

    Raises ModelError for a tokenizer that does not say them.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ModelError(f"{kind} does not say which word a token belongs to: pass a fast tokenizer")
    offsets: list[tuple[int, int]] = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return offsets
