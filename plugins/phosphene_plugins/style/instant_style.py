"""InstantStyle: images in the style of an image, which only the style blocks of a diffusion model read."""

from __future__ import annotations

import re
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from phosphene import InputError, Reference, fork_random_state, hookimpl, method
from phosphene.generative import Denoiser as NoisePredictor
from phosphene.generative import ImageAdapter
from phosphene.roles import Denoiser, Images, Seed
from phosphene.spec import Agrees, InvariantTo, PixelRange

from ._ddim import Guidance, require_channels_of
from ._image_adapter_role import Adapter
from ._pixel_features import draw_images
from ._prompted_images_result import ImagePrompted
from .ip_adapter import (
    DRAWING_COST,
    ImageSize,
    Prompts,
    SamplingSteps,
    Scale,
    TinyDenoiser,
    attention_layers,
    block_scales,
    blocks_of,
    draw_prompted,
    embed_images,
    images_without_prompt,
    sample_by_hand,
    tiny_adapter,
)


def default_block(layers: list[str], kind: str) -> str:
    """The second attention of the first up block with attention (style), or of the last down block (layout).

    The only one where a block has one. Of Stable Diffusion XL these are ``up_blocks.0.attentions.1`` and
    ``down_blocks.2.attentions.1``. Raises InputError for a network without such blocks.
    """
    side = {"style": "up", "layout": "down"}[kind]
    numbers: dict[int, list[str]] = {}
    for block in blocks_of(layers):
        if match := re.match(rf"{side}_blocks\.(\d+)(\.attentions\.\d+)?$", block):
            numbers.setdefault(int(match[1]), []).append(block)
    if not numbers:
        raise InputError(f"this diffusion model has no attention in {side} blocks: name its {kind}_blocks")
    number = min(numbers) if kind == "style" else max(numbers)
    return numbers[number][:2][-1]


def subtract_content(
    embeddings: Tensor, content: str, weight: float, denoiser: NoisePredictor, adapter: ImageAdapter
) -> Tensor:
    """Image embeddings (N, E) minus ``weight`` times that of the text of their content.

    Raises InputError where no text has an embedding in the same space.
    """
    if embeddings.ndim != 2:
        raise InputError(
            "this image adapter reads many tokens of an image encoder (IP-Adapter Plus), from which the "
            "embedding of a text cannot be subtracted: use an adapter of the image embedding, or content=''"
        )
    if adapter.embed_text is not None:
        text = adapter.embed_text(content)
    else:
        # The pooled text of XL is the projection of the CLIP whose image encoder its own adapters read.
        pooled = getattr(denoiser.prompted(content), "pooled", None)
        if pooled is None or pooled.shape[1] != embeddings.shape[1]:
            raise InputError(
                f"no text encoder belongs to the image encoder, whose embeddings have {embeddings.shape[1]} "
                "numbers: pass load_image_adapter(file, image_encoder=folder) with the folder of the CLIP "
                "with its text encoder and tokenizer, or content=''"
            )
        text = pooled[0]
    return embeddings - weight * text.to(embeddings)


def style_blocks_read_what_is_left_of_the_embedding() -> None:
    """Two steps by hand: the embedding minus the text's in the style block, and in the layout block."""
    with fork_random_state():
        torch.manual_seed(0)
        denoiser: Any = TinyDenoiser(text=True).double().requires_grad_(False)
        adapter = tiny_adapter().double()
        text = torch.randn(6, dtype=torch.float64)
    adapter.embed_text = lambda words: len(words) * text
    images = draw_images(2, 3, 5, 4, seed=0)
    call: Any = instant_style
    embeddings = torch.cat([images.mean((2, 3)), images.amax((2, 3))], 1)
    cases: tuple[tuple[dict[str, Any], list[float], float], ...] = (
        ({}, [0.0, 1.0], 0.0),
        ({"content": "a dog", "layout_scale": 0.5}, [0.5, 1.0], 5.0),
        ({"content": "dog", "content_scale": 0.25, "guidance": 2.0, "style_scale": 0.75}, [0.0, 0.75], 0.75),
        (
            {"style_blocks": ["down_blocks.0"], "layout_scale": 0.5, "layout_blocks": ["up_blocks"]},
            [1.0, 0.5],
            0.0,
        ),
    )  # fmt: skip
    for options, scales, subtracted in cases:
        result = call(images, denoiser, adapter, prompts=["a", "bcd"], steps=2, seed=7, **options)
        for n, embedding in enumerate((embeddings - subtracted * text).split(1)):
            for p, prompt in enumerate(result.prompts):
                expected = sample_by_hand(
                    denoiser, adapter, prompt, p, embedding, scales, options.get("guidance", 1.0)
                )
                assert (result.drawn[n, p] - expected).abs().max() < 1e-9, f"{options} {n} {p}"
    # Without a text encoder of its own the pooled text of the diffusion model is subtracted, if it fits.
    adapter.embed_text = None
    denoiser.pooled = text[None]
    result = call(images, denoiser, adapter, prompts=["a", "bcd"], steps=2, seed=7, content="dog")
    expected = sample_by_hand(denoiser, adapter, "a", 0, (embeddings - text)[:1], [0.0, 1.0], 1.0)
    assert (result.drawn[0, 0] - expected).abs().max() < 1e-9
    for pooled in (text[None, :5], None):
        denoiser.pooled = pooled
        try:
            call(images, denoiser, adapter, prompts=["a"], steps=1, content="dog")
        except InputError as error:
            message = str(error)
        else:
            message = "not refused"
        assert "have 6 numbers" in message, message
    blocks = [f"down_blocks.{n}.attentions.{m}" for n in (1, 2) for m in (0, 1)]
    blocks += [f"up_blocks.{n}.attentions.{m}" for n in (0, 1) for m in (0, 1, 2)]
    layers = [f"{block}.transformer_blocks.{n}.attn2" for block in blocks for n in (0, 1)]
    assert default_block(layers, "style") == "up_blocks.0.attentions.1"
    assert default_block(layers, "layout") == "down_blocks.2.attentions.1"


@method(
    family="style",
    references=[
        Reference(
            key="wang2024",
            title="InstantStyle: Free Lunch towards Style-Preserving in Text-to-Image Generation",
            authors="Wang, Spinelli, Wang, Bai, Qin, Chen",
            year=2024,
            url="https://arxiv.org/abs/2404.02733",
        ),
    ],
    invariants=[PixelRange(field="drawn"), PixelRange(field="plain")],
    relations=[
        InvariantTo("batch_order"),
        Agrees(
            images_without_prompt,
            where={"style_scale": 0.0, "layout_scale": 0.0},
            fields=("drawn",),
            tolerance=1e-6,
        ),
        Agrees(
            "style.ip_adapter",
            where={"content": "", "layout_scale": 0.0},
            other={"scale": {"up_blocks.0": 1.0}, "steps": 2, "size": [24, 24]},
            fields=("drawn",),
            tolerance=1e-6,
        ),
    ],
    cost=DRAWING_COST,
    oracle=style_blocks_read_what_is_left_of_the_embedding,
    quick={"steps": 2, "size": [24, 24], "content": "star", "layout_scale": 0.5},
    demo={"images": "builtin:scenes/3", "prompts": ["", ""], "guidance": 1.5},
)
def instant_style(
    images: Images,
    denoiser: Denoiser,
    image_adapter: Adapter,
    *,
    prompts: Prompts = [""],  # noqa: B006  (a parameter's default, which is copied)
    style_scale: Annotated[Scale, Field(description="weight of the image in the style blocks")] = 1.0,
    layout_scale: Annotated[Scale, Field(description="weight of the image in the layout blocks")] = 0.0,
    style_blocks: Annotated[
        list[str] | None,
        Field(min_length=1, description="blocks of style; default: see above"),
    ] = None,
    layout_blocks: Annotated[
        list[str] | None,
        Field(min_length=1, description="blocks of layout; default: see above"),
    ] = None,
    content: Annotated[
        str, Field(description="text of the image's content, which is subtracted from its embedding")
    ] = "",
    content_scale: Annotated[
        float, Field(ge=0, le=10, description="weight of the content's text in the subtraction")
    ] = 1.0,
    size: ImageSize = None,
    steps: SamplingSteps = 30,
    guidance: Guidance = 1.0,
    seed: Seed = None,
) -> ImagePrompted:
    """InstantStyle: images drawn in the style of an image, by an IP-Adapter in the style blocks alone.

    Z = softmax(Q K^T / sqrt(d)) V + s softmax(Q K'^T / sqrt(d)) V',    c = projection(E(I) - w E(content))

    as in ``ip_adapter``, where s is ``style_scale`` in the style blocks, ``layout_scale`` in the layout
    blocks, and 0 in all others, so that the image's objects are not drawn. The embedding of a text of its
    content, times w = ``content_scale``, is subtracted from the image's, which have one space in a CLIP.

    By default the style block is the second attention of the first up block that has one, and the layout
    block that of the last down block: of Stable Diffusion XL ``up_blocks.0.attentions.1`` and
    ``down_blocks.2.attentions.1``, which the authors identified. In other models nobody measured them: try
    others. The text encoder is that of the image encoder's folder, or of XL where its embeddings are as wide.

    ``image_adapter``, ``denoiser``, sizes and noise are those of ``ip_adapter``. The bundled adapter embeds
    the names of the ten classes of scenes: the mean features of scenes of a class, minus those of all.

    Returns:
        ``images`` (N, C, H, W), ``drawn`` and ``plain`` (N, P, C, H', W') in [0, 1].

    Raises:
        InputError: as ``ip_adapter``; a content without an embedding in the image encoder's space; a model
            without up or down blocks, whose blocks are not named.
        UnknownName: a block without attention.
        ModelError: a model without attention.

    Example::
        from phosphene import run

        result = run("instant_style", images="builtin:scenes/1", content="star", steps=2)
        result.drawn.shape  # (1, 1, 3, 64, 64)

    Source: Wang et al. 2024, sections 3.2.1 (subtraction) and 3.2.2 (style blocks).
    """
    require_channels_of(denoiser, images=images)
    layers = attention_layers(denoiser, image_adapter)
    scales: dict[int, float] = {}
    for kind, scale, blocks in (
        ("layout", layout_scale, layout_blocks),
        ("style", style_scale, style_blocks),
    ):
        if scale:
            scales |= block_scales(layers, dict.fromkeys(blocks or [default_block(layers, kind)], scale))
    embeddings = embed_images(image_adapter, images)
    if content:
        with torch.no_grad():
            embeddings = subtract_content(embeddings, content, content_scale, denoiser, image_adapter)
    return draw_prompted(
        images, denoiser, image_adapter, embeddings, scales,
        prompts=prompts, image_size=size, steps=steps, guidance=guidance, seed=seed,
    )  # fmt: skip


@hookimpl
def phosphene_methods():
    return [instant_style]
