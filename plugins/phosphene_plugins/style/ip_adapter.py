"""IP-Adapter: an image as prompt of a diffusion model, by decoupled attention to tokens of the image."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    ModelError,
    Reference,
    UnknownName,
    fork_random_state,
    hookimpl,
    method,
    progress_bar,
)
from phosphene.generative import Denoiser as NoisePredictor
from phosphene.generative import ImageAdapter, Pipeline
from phosphene.hooks import guard
from phosphene.roles import Denoiser, Images, Seed
from phosphene.spec import Agrees, Cost, InvariantTo, PixelRange, length, param, size

from ._ddim import (
    WITHOUT_TEXT,
    Guidance,
    ddim,
    decode_cropped,
    encode_padded,
    guided,
    require_channels_of,
    timesteps,
)
from ._diffusion_hooks import Predict, replace_outputs, self_attention_layers
from ._image_adapter_role import Adapter
from ._pixel_features import draw_images
from ._prompted_images_result import ImagePrompted

Prompts: TypeAlias = Annotated[
    list[str], Field(min_length=1, max_length=64, description="texts, of each of which an image is drawn")
]
Scale: TypeAlias = Annotated[float, Field(ge=0, le=10)]
ImageSize: TypeAlias = Annotated[
    list[Annotated[int, Field(ge=1, le=4096)]] | None,
    Field(
        min_length=2,
        max_length=2,
        description="height and width of the drawn images; default: those that the model was trained on, "
        "or those of the image prompts",
    ),
]
SamplingSteps: TypeAlias = Annotated[
    int, Field(ge=1, le=10_000, description="number of DDIM steps of the sampling")
]


def attention_layers(denoiser: NoisePredictor, adapter: ImageAdapter) -> list[str]:
    """Names of the layers that read the image, one for each pair of the adapter's keys and values.

    The cross-attention layers, or the self-attention layers of a model without text. Raises InputError for a
    model whose text and image have one attention, or an adapter of another model.
    """
    if isinstance(denoiser, Pipeline) and denoiser.joint_attention is not None:
        raise InputError(
            "the attention of this model is over text and image together: IP-Adapters of Stable Diffusion "
            "1, 2 and XL are supported"
        )
    cross = [
        name
        for name, layer in denoiser.named_modules()
        if getattr(layer, "is_cross_attention", False) and hasattr(layer, "to_out")
    ]
    layers = cross or self_attention_layers(denoiser)
    if not layers:
        raise ModelError("this diffusion model has no attention layer, which an image adapter needs")
    for part, linears in (("keys", adapter.keys), ("values", adapter.values)):
        expected = [_width(denoiser.get_submodule(f"{name}.to_k")) for name in layers]
        widths = [_width(linear) for linear in linears]
        if widths != expected:
            raise InputError(
                f"the image adapter {adapter.uri or ''} has {part} for {len(widths)} layers of widths "
                f"{_distinct(widths)}, this diffusion model has {len(expected)} layers of widths "
                f"{_distinct(expected)}: it is an adapter of another model"
            )
    return layers


def _width(linear: Any) -> int:
    """Length of a linear layer's output."""
    return int(linear.weight.shape[0])


def _distinct(numbers: list[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))


def add_image_attention(
    denoiser: NoisePredictor, adapter: ImageAdapter, embedding: Tensor, scales: Mapping[int, float]
) -> Predict:
    """predict(x, t) whose attention layers read the image of an ``embedding`` (1, ...) as well.

    Z = softmax(Q K^T / sqrt(d)) V + scale softmax(Q K'^T / sqrt(d)) V'

    with the layer's own queries Q, and keys K' and values V' of the image's tokens. ``scales``: by the
    number of the layer; layers without one are unchanged.

    Source: Ye et al. 2023, equation 5.
    """
    names = attention_layers(denoiser, adapter)
    tokens = adapter.projection(embedding)
    queries: dict[str, Tensor] = {}

    def record(name: str, t: int, query: Tensor) -> Tensor:
        queries[name] = query
        return query

    def add(number: int, key: Tensor, value: Tensor, weight: Tensor, t: int, output: Tensor) -> Tensor:
        query = queries[names[number]]
        heads = getattr(denoiser.get_submodule(names[number]), "heads", 1)
        q, k, v = (part.to(query).unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        # The output projection is linear, so that what is added to its input can be projected on its own.
        return output + scales[number] * F.linear(attended, weight)

    replacements: dict[str, Any] = {}
    for number, scale in scales.items():
        if scale:
            layer: Any = denoiser.get_submodule(names[number])
            is_list = isinstance(layer.to_out, nn.ModuleList)
            out = layer.to_out[0] if is_list else layer.to_out
            key, value = adapter.keys[number](tokens), adapter.values[number](tokens)
            replacements[f"{names[number]}.to_q"] = partial(record, names[number])
            replacements[f"{names[number]}.to_out{'.0' if is_list else ''}"] = partial(
                add, number, key, value, out.weight
            )
    return replace_outputs(denoiser, replacements)


def block_scales(layers: list[str], scale: float | Mapping[str, float]) -> dict[int, float]:
    """The scale of each layer by its number; of blocks, for the layers whose names contain the block's.

    Raises UnknownName for a block without such a layer.
    """
    if not isinstance(scale, Mapping):
        return dict.fromkeys(range(len(layers)), scale)
    scales: dict[int, float] = {}
    for block, value in scale.items():
        numbers = [n for n, name in enumerate(layers) if f".{block}." in f".{name}."]
        if not numbers:
            raise UnknownName("block with attention", block, blocks_of(layers), "this diffusion model")
        scales |= dict.fromkeys(numbers, value)
    return scales


def blocks_of(layers: list[str]) -> list[str]:
    """The blocks of attention layers, such as ``up_blocks.0.attentions.1``; other layers themselves."""
    pattern = r"(?:down|up|mid)_blocks?(?:\.\d+)?\.attentions\.\d+"
    blocks = [match[0] if (match := re.search(pattern, name)) else name for name in layers]
    return list(dict.fromkeys(blocks))


def embed_images(adapter: ImageAdapter, images: Tensor) -> Tensor:
    """Embeddings (N, ...) of images, one at a time, so that they do not depend on the batch."""
    with torch.no_grad():
        return torch.cat([adapter.embeddings(image) for image in images.split(1)])


def draw_prompted(
    images: Tensor,
    denoiser: NoisePredictor,
    adapter: ImageAdapter,
    embeddings: Tensor,
    scales: Mapping[int, float],
    *,
    prompts: list[str],
    image_size: list[int] | None,
    steps: int,
    guidance: float,
    seed: int | None,
) -> ImagePrompted:
    """Images drawn from each prompt with each of the ``embeddings`` (N, ...), and without any."""
    texts = {text: denoiser.prompted(text) if text else denoiser for text in ("", *prompts)}
    times = timesteps(denoiser.time_steps, steps)[::-1]
    height, width = image_size or denoiser.image_size or images.shape[2:]
    random = torch.Generator().manual_seed(seed or 0)
    # equivalent mutants: only its sides matter
    blank = images.new_zeros(1, denoiser.channels, height, width)
    with guard(denoiser), torch.no_grad():
        shape = encode_padded(denoiser, blank).shape[1:]
        noise = torch.randn(len(prompts), *shape, generator=random, dtype=images.dtype)
        noise = noise.to(next(denoiser.parameters(), images).device)

        negative = adapter.blank_embedding(embeddings)

        def predict(text: str, embedding: Tensor | None) -> Predict:
            if embedding is None:
                return texts[text].predict
            return add_image_attention(texts[text], adapter, embedding, scales)

        def draw(embedding: Tensor | None) -> Tensor:
            """Images (P, C, H', W') of the prompts."""
            drawn = []
            for x, prompt in zip(noise.split(1), prompts, strict=True):
                empty = predict("", None if embedding is None else negative)
                x = ddim(denoiser, guided(predict(prompt, embedding), empty, guidance), x, times, "Sampling")
                drawn.append(decode_cropped(denoiser, x, blank).clamp(0, 1).to(images))
            return torch.cat(drawn)

        plain = draw(None)
        drawn = [draw(each) for each in progress_bar(embeddings.split(1), "Image prompts", len(images))]
    return ImagePrompted(
        images=images,
        drawn=torch.stack(drawn),
        plain=plain.expand(len(images), -1, -1, -1, -1).clone(),
        prompts=tuple(prompts),
    )


#: Network evaluations of ``draw_prompted``; guidance other than 1 evaluates it without the prompts as well.
DRAWING_COST = Cost(forward=param.steps * (size.images + 1) * length(param.prompts) * (1 + WITHOUT_TEXT))


class _TinyAttention(nn.Module):
    """An attention layer of two heads with three channels each, over text or over positions."""

    heads = 2

    def __init__(self, text: bool) -> None:
        super().__init__()
        if text:
            self.is_cross_attention = True
        width = 5 if text else 3
        self.to_q, self.to_k, self.to_v = nn.Linear(3, 6), nn.Linear(width, 6), nn.Linear(width, 6)
        self.to_out: nn.Module = nn.ModuleList([nn.Linear(6, 3), nn.Identity()]) if text else nn.Linear(6, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        q, k, v = self.to_q(tokens)[0], self.to_k(context)[0], self.to_v(context)[0]
        heads = [_attend(q[:, part], k[:, part], v[:, part]) for part in (slice(0, 3), slice(3, 6))]
        out = self.to_out[0] if isinstance(self.to_out, nn.ModuleList) else self.to_out
        return out(torch.cat(heads, 1)[None]).mT.unflatten(2, x.shape[2:])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.T / 3**0.5).softmax(1) @ v


class TinyDenoiser(NoisePredictor):
    """Noise of attention layers, two over the text's letters or, without text, over positions."""

    multiple = 2

    def __init__(self, text: bool) -> None:
        super().__init__(torch.tensor([0.95, 0.8, 0.5]))
        self.down_blocks = nn.ModuleList([_TinyAttention(text)])
        self.up_blocks = nn.ModuleList([_TinyAttention(text)])
        self.letters = nn.Parameter(torch.randn(27, 5)) if text else None
        self.mid_block = _TinyAttention(False) if text else None  # not over text, so that it reads no image
        self.text = ""

    def forward(self, x: Tensor, t: int) -> Tensor:
        context = x.flatten(2).mT
        if self.letters is not None:
            context = self.letters[[0, *(1 + ord(c) - ord("a") for c in self.text)]][None]
        layers = (*self.down_blocks, *self.up_blocks)
        noise: Tensor = 0.3 * x + sum(layer(x, context) for layer in layers)
        return noise

    def prompted(self, text: str) -> NoisePredictor:
        if self.letters is None:
            return super().prompted(text)
        view = copy.copy(self)
        view.text = text
        return view


def tiny_adapter() -> ImageAdapter:
    """Two tokens of the means and maxima (6,) of an image's channels."""
    embed = lambda images: torch.cat([images.mean((2, 3)), images.amax((2, 3))], 1)
    projection = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)))
    keys, values = ([nn.Linear(4, 6, bias=False) for _ in range(2)] for _ in range(2))
    return ImageAdapter(embed, projection, keys, values)


def noise_by_hand(
    denoiser: Any, adapter: ImageAdapter, text: str, x: Tensor, embedding: Tensor | None, scales: list[float]
) -> Tensor:
    """The noise of the tiny denoiser, with decoupled attention by hand."""
    tokens = x.flatten(2).mT[0]
    context = (
        denoiser.letters[[0, *(1 + ord(c) - ord("a") for c in text)]]
        if denoiser.letters is not None
        else tokens
    )
    noise = 0.3 * x
    for n, layer in enumerate((denoiser.down_blocks[0], denoiser.up_blocks[0])):
        q, k, v = layer.to_q(tokens), layer.to_k(context), layer.to_v(context)
        attended = torch.cat([_attend(q[:, h], k[:, h], v[:, h]) for h in (slice(0, 3), slice(3, 6))], 1)
        if embedding is not None:
            image = adapter.projection(embedding)[0]
            k, v = adapter.keys[n](image), adapter.values[n](image)
            other = torch.cat([_attend(q[:, h], k[:, h], v[:, h]) for h in (slice(0, 3), slice(3, 6))], 1)
            attended = attended + scales[n] * other
        out = layer.to_out if denoiser.letters is None else layer.to_out[0]
        noise = noise + out(attended).T.view(1, *x.shape[1:])
    return noise


def sample_by_hand(
    denoiser: Any,
    adapter: ImageAdapter,
    text: str,
    number: int,
    embedding: Tensor | None,
    scales: list[float],
    guidance: float,
    seed: int = 7,
) -> Tensor:
    """The image (3, 5, 4) of two steps from the noise of a seed and of a prompt's number."""
    noise = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = noise[number : number + 1]
    blank = None if embedding is None else torch.zeros_like(embedding)
    for t, next_t in ((2, 1), (1, 0)):
        eps = noise_by_hand(denoiser, adapter, text, x, embedding, scales)
        empty = noise_by_hand(denoiser, adapter, "", x, blank, scales)
        eps = empty + guidance * (eps - empty)
        (signal, level), (next_signal, next_level) = denoiser.levels(t), denoiser.levels(next_t)
        x = next_signal * (x - level * eps) / signal + next_level * eps
    return (x[0, :, :5] + 1).div(2).clamp(0, 1)


def decoupled_attention_by_hand() -> None:
    """Two steps with text attention and image attention added up by hand; by block, and with guidance."""
    with fork_random_state():
        torch.manual_seed(0)
        models: list[Any] = [TinyDenoiser(text).double().requires_grad_(False) for text in (True, False)]
        adapter = tiny_adapter().double()
    images = draw_images(2, 3, 5, 4, seed=0)
    call: Any = ip_adapter
    cases: tuple[tuple[int, list[str], dict[str, Any], list[float]], ...] = (
        (0, ["a", "bcd"], {"scale": 0.75, "seed": 0}, [0.75, 0.75]),
        (0, ["a", "bcd"], {"scale": {"up_blocks.0": 0.5}, "guidance": 3.0}, [0.0, 0.5]),
        (1, ["", ""], {"scale": {"up_blocks": 0.25, "down_blocks": 1.5}, "guidance": 0.5}, [1.5, 0.25]),
    )
    for number, prompts, options, scales in cases:
        denoiser, guidance = models[number], options.get("guidance", 1.0)
        seed = options.get("seed", 7)
        result = call(images, denoiser, adapter, prompts=prompts, steps=2, **options | {"seed": seed})
        assert result.prompts == tuple(prompts) and torch.equal(result.images, images)
        embeddings = torch.cat([images.mean((2, 3)), images.amax((2, 3))], 1)
        for n, embedding in enumerate(embeddings.split(1)):
            for p, prompt in enumerate(prompts):
                for drawn, image in ((result.drawn, embedding), (result.plain, None)):
                    expected = sample_by_hand(denoiser, adapter, prompt, p, image, scales, guidance, seed)
                    assert (drawn[n, p] - expected).abs().max() < 1e-9, f"{options} {n} {p}"
        assert (result.drawn - result.plain).abs().max() > 0.01
    large = call(images, models[0], adapter, prompts=["a"], steps=1, size=[7, 6])
    assert large.drawn.shape == (2, 1, 3, 7, 6)
    names = [f"up_blocks.1.attentions.0.transformer_blocks.{n}.attn2" for n in (0, 1)]
    assert blocks_of([*names, "middle"]) == ["up_blocks.1.attentions.0", "middle"]
    refused: tuple[tuple[type[Exception], Tensor, dict[str, float], str], ...] = (
        (UnknownName, images, {"up_blocks.2": 1.0}, "has down_blocks.0, up_blocks.0 "),
        (InputError, images[:, :1], {"up_blocks.0": 1.0}, "takes 3 channels"),
    )
    for kind, wrong, scale, message in refused:
        try:
            call(wrong, models[0], adapter, prompts=["a"], steps=1, scale=scale)
        except kind as error:
            text = str(error)
        else:
            text = "not refused"
        assert message in text, text


def images_without_prompt(calls: Any) -> Tensor:
    plain: Tensor = calls.result.plain
    return plain


@method(
    family="style",
    references=[
        Reference(
            key="ye2023",
            title="IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",
            authors="Ye, Zhang, Liu, Han, Yang",
            year=2023,
            url="https://arxiv.org/abs/2308.06721",
        ),
    ],
    invariants=[PixelRange(field="drawn"), PixelRange(field="plain")],
    relations=[
        InvariantTo("batch_order"),
        Agrees(images_without_prompt, where={"scale": 0.0}, fields=("drawn",), tolerance=1e-6),
    ],
    cost=DRAWING_COST,
    oracle=decoupled_attention_by_hand,
    quick={"steps": 2, "size": [24, 24]},
    demo={"images": "builtin:scenes/3", "prompts": ["", ""], "guidance": 1.5},
)
def ip_adapter(
    images: Images,
    denoiser: Denoiser,
    image_adapter: Adapter,
    *,
    prompts: Prompts = [""],  # noqa: B006  (a parameter's default, which is copied)
    scale: Annotated[
        Scale | dict[str, Scale],
        Field(description="weight of the image in attention, or of each block by its name, 0 for others"),
    ] = 1.0,
    size: ImageSize = None,
    steps: SamplingSteps = 30,
    guidance: Guidance = 1.0,
    seed: Seed = None,
) -> ImagePrompted:
    """IP-Adapter: images drawn from an image prompt, by decoupled attention to text and image.

    Z = softmax(Q K^T / sqrt(d)) V + ``scale`` softmax(Q K'^T / sqrt(d)) V',    K' = W_k c,  V' = W_v c

    in each cross-attention layer, with the layer's own queries Q, and keys and values of the tokens c =
    projection(E(I)) of an image I, embedded by a CLIP. The adapter is the projection and W_k, W_v of each
    layer, trained while the diffusion model is fixed. With ``guidance`` g the noise is eps_0 + g (eps -
    eps_0), where eps_0 has the empty text and zeros as the image's embedding.

    ``image_adapter`` is the safetensors file of an IP-Adapter or IP-Adapter Plus as published (its CLIP in
    the folder ``image_encoder`` beside it, or in ../models), or ``load_image_adapter(file,
    image_encoder=folder)`` of ``phosphene.generative``. ``denoiser`` is then the folder of the Stable
    Diffusion 1.x, 2.x or XL pipeline that it was trained for. ``scale`` by block names blocks or the
    beginnings of their names, {"up_blocks.0": 1}; the error for one that does not exist lists them.

    The default adapter belongs to the bundled diffusion model, which has no text: its image attention is
    beside self-attention, and what it reads are features of a small classifier, of the whole image and of
    its cells. Colors and the kind of ground are taken from the image, and coarse layout; no class is.

    Images have the size that the model was trained for, if it is recorded, else that of ``images``. The
    noise of a prompt is the same for every image, and that of ``plain``, which is drawn without an image.

    Returns:
        ``images`` (N, C, H, W), ``drawn`` and ``plain`` (N, P, C, H', W') in [0, 1].

    Raises:
        InputError: images with other channels than the model's, a prompt for a model without text, an
            adapter of another model, or a model with one attention over text and image (SD 3, Flux).
        UnknownName: a block without attention.
        ModelError: a model without attention.

    Example::
        from phosphene import run

        result = run("ip_adapter", images="builtin:scenes/1", steps=2)
        result.drawn.shape  # (1, 1, 3, 64, 64)

    Source: Ye et al. 2023, section 3.2, equations 3 to 5 and 8.
    """
    require_channels_of(denoiser, images=images)
    scales = block_scales(attention_layers(denoiser, image_adapter), scale)
    return draw_prompted(
        images, denoiser, image_adapter, embed_images(image_adapter, images), scales,
        prompts=prompts, image_size=size, steps=steps, guidance=guidance, seed=seed,
    )  # fmt: skip


@hookimpl
def phosphene_methods():
    return [ip_adapter]
