"""StyleAligned: images of several prompts that share self-attention with a reference, and so its style."""

from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from phosphene import InputError, Reference, fork_random_state, hookimpl, method, progress_bar
from phosphene.hooks import guard
from phosphene.roles import Denoiser, Images, Seed
from phosphene.spec import (
    Cost,
    InvariantTo,
    PixelRange,
    length,
    param,
    size,
)

from ._adain import adain
from ._aligned_images_result import AlignedImages
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
from ._diffusion_hooks import (
    LayerOutputs,
    record_outputs,
    replace_outputs,
    select_layers,
    self_attention_layers,
)
from ._pixel_features import draw_images
from .diffusion_style import TinyDenoiser


def equals_attention_over_concatenated_tokens() -> None:
    """One and two steps: plain attention with [K_r; K] and [V_r; V], queries and keys normalized by hand."""
    with fork_random_state():
        torch.manual_seed(0)
        denoiser = TinyDenoiser(torch.tensor([0.9, 0.6, 0.2])).double().requires_grad_(False)
    references = draw_images(2, 3, 5, 4, seed=0)
    padded = references[:, :, [*range(5), 4, 4, 4]]
    noise = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    call: Any = style_aligned
    cases: tuple[tuple[Any, list[int], float, list[int]], ...] = (
        ({}, [1, 2], 1.0, [0, 2]),
        ({}, [1, 2], 1.0, [0, 1, 2]),
        ({"layers": ["up_blocks.0"]}, [0], 1.0, [0, 2]),
        ({"guidance": 3.0, "style_prompt": "ink"}, [1, 2], 3.0, [0, 1, 2]),
    )

    def move(x: Tensor, eps: Tensor, source: int, target: int) -> Tensor:
        (signal, level), (new_signal, new_level) = denoiser.levels(source), denoiser.levels(target)
        return new_signal * (x - level * eps) / signal + new_level * eps

    for options, shared, guidance, times in cases:
        prompts = ["a", "bcd"]
        result = call(references, denoiser, prompts=prompts, steps=len(times) - 1, seed=7, **options)
        for n, reference in enumerate(padded.split(1)):
            recorded: dict[int, dict[str, Tensor]] = {t: {} for t in times}
            z = 2 * reference - 1
            for s, t in pairwise(times):
                text = options.get("style_prompt", "")
                z = move(z, denoiser.prompted(text)(z, t, recorded[t].setdefault), s, t)
            for p, prompt in enumerate(prompts):
                x = noise[p : p + 1]
                for t, s in pairwise(times[::-1]):
                    drawn = []
                    for text in ("", prompt):
                        eps = denoiser.prompted(text).shift + sum(block(x) for block in denoiser.resnets)
                        tokens = x.flatten(2).mT
                        for number, block in enumerate(denoiser.up_blocks):
                            q, k, v = (getattr(block, f"to_{part}")(tokens)[0] for part in "qkv")
                            if number in shared:
                                q_r, k_r, v_r = (
                                    recorded[t][f"up_blocks.{number}.to_{part}"][0] for part in "qkv"
                                )
                                q, k = (
                                    (own - own.mean(0))
                                    * other.std(0, correction=0)
                                    / own.std(0, correction=0)
                                    + other.mean(0)
                                    for own, other in ((q, q_r), (k, k_r))
                                )
                                k, v = torch.cat([k_r, k]), torch.cat([v_r, v])
                            eps = eps + ((q @ k.T).softmax(1) @ v).T.view(1, 3, 8, 4)
                        drawn.append(eps)
                    eps = drawn[0] + guidance * (drawn[1] - drawn[0])
                    x = move(x, eps, t, s)
                    if s == 0:
                        expected = (x[0, :, :5] + 1).div(2).clamp(0, 1)
                        assert (result.aligned[n, p] - expected).abs().max() < 1e-4, f"{options} {n} {p}"
    assert result.prompts == ("a", "bcd") and not torch.equal(result.plain, result.aligned)


@method(
    family="style",
    references=[
        Reference(
            key="hertz2024",
            title="Style Aligned Image Generation via Shared Attention",
            authors="Hertz, Voynov, Fruchter, Cohen-Or",
            year=2024,
            url="https://arxiv.org/abs/2312.02133",
        ),
    ],
    invariants=[PixelRange(field="aligned"), PixelRange(field="plain")],
    relations=[InvariantTo("batch_order")],
    # Guidance other than 1 evaluates the noise without the text as well.
    cost=Cost(
        forward=param.steps * (size.images + (size.images + 1) * length(param.prompts) * (1 + WITHOUT_TEXT))
    ),
    oracle=equals_attention_over_concatenated_tokens,
    quick={"steps": 2, "prompts": [""]},
    demo={"images": "builtin:scenes/2", "steps": 25},
)
def style_aligned(
    images: Images,
    denoiser: Denoiser,
    *,
    prompts: Annotated[
        list[str], Field(min_length=1, max_length=64, description="texts, of each of which an image is drawn")
    ] = ["", "", ""],  # noqa: B006  (a parameter's default, which is copied)
    style_prompt: Annotated[
        str, Field(description="description of the reference, for a text-conditioned model")
    ] = "",
    layers: Annotated[
        list[str] | None,
        Field(description="shared self-attention layers; default: the finer two thirds of the up blocks"),
    ] = None,
    steps: Annotated[
        int, Field(ge=1, le=10_000, description="number of DDIM steps of the inversion, and of the sampling")
    ] = 50,
    guidance: Guidance = 1.0,
    seed: Seed = None,
) -> AlignedImages:
    """StyleAligned: images drawn from prompts with the self-attention of a reference, and so in its style.

    softmax(Q' [K_r, K']^T / sqrt(d)) [V_r, V],   Q' = AdaIN(Q, Q_r),  K' = AdaIN(K, K_r)

    at each time step, with Q_r, K_r and V_r the reference's, recorded in its DDIM inversion, and AdaIN over
    positions, for each channel. An image attends to its own positions and to those of the reference, whose
    queries and keys have the same mean and deviation, so that both are attended to. Nothing is trained.

    Images have the size of their reference. The noise of a prompt is the same for every reference, and that
    of ``plain``, which is drawn without it. A text-conditioned model takes ``prompts`` and the reference's
    ``style_prompt``, an unconditional one empty prompts: each is a sample.

    ``denoiser`` is the bundled one, the folder of a diffusers pipeline (unconditional, or Stable Diffusion 1,
    2, XL or 3), or a ``Denoiser``. Keys of Flux carry positions, which concatenated ones do not have. Samples
    of the bundled model take the reference's colors and small patterns; outlines follow the noise.

    Returns:
        ``images`` (N, C, H, W) the references, ``aligned`` and ``plain`` (N, P, C, H, W) in [0, 1].

    Raises:
        InputError: images with other channels than the model's; a prompt or guidance for a model without
            text; a model whose keys carry positions.
        ModelError: a model without self-attention.
        UnknownName: layers that the model does not have.

    Example::
        from phosphene import run

        result = run("style_aligned", images="builtin:scenes/1", steps=2)
        result.aligned.shape  # (1, 3, 3, 64, 64)

    Source: Hertz et al. 2024, section 3.2, equation 3, and section 3.3 (a reference image).
    """
    require_channels_of(denoiser, images=images)
    if denoiser.positional_keys:
        raise InputError(
            "the keys of this model carry their position, so that those of a reference cannot be added: "
            "Stable Diffusion 1, 2, XL and 3 and unconditional models are supported"
        )
    if guidance != 1 and not any(prompts):
        raise InputError("guidance is the weight of a text: pass prompts")
    attention = select_layers(self_attention_layers(denoiser), layers, "self-attention layer")
    projections = [f"{name}.to_{part}" for name in attention for part in "qkv"]
    texts = {text: denoiser.prompted(text) if text else denoiser for text in ("", style_prompt, *prompts)}
    times = timesteps(denoiser.time_steps, steps)
    reference: LayerOutputs = {}

    def share(name: str, t: int, output: Tensor) -> Tensor:
        other = reference[t][name]
        if not name.endswith("to_v"):
            output = adain(output.mT[..., None], other.mT[..., None])[..., 0].mT
        return output if name.endswith("to_q") else torch.cat([other, output], 1)

    sharing = {name: partial(share, name) for name in projections}

    def draw(x: Tensor, prompt: str, *, shared: bool) -> Tensor:
        with_text, empty = (
            replace_outputs(texts[text], sharing) if shared else texts[text].predict for text in (prompt, "")
        )

        x = ddim(denoiser, guided(with_text, empty, guidance), x, times[::-1], "Sampling")
        return decode_cropped(denoiser, x, images)[0].clamp(0, 1).to(images)

    with guard(denoiser), torch.no_grad():
        encoded = encode_padded(denoiser, images)
        random = torch.Generator().manual_seed(seed or 0)
        noise = torch.randn(len(prompts), *encoded.shape[1:], generator=random, dtype=encoded.dtype)
        noise = noise.to(encoded)
        plain = [draw(x, prompt, shared=False) for x, prompt in zip(noise.split(1), prompts, strict=True)]
        aligned = []
        for x_0 in progress_bar(encoded.split(1), "References", len(images)):
            record = record_outputs(texts[style_prompt], projections, reference)
            ddim(denoiser, record, x_0, times, "Inverting")
            aligned += [
                draw(x, prompt, shared=True) for x, prompt in zip(noise.split(1), prompts, strict=True)
            ]
    return AlignedImages(
        images=images,
        aligned=torch.stack(aligned).unflatten(0, (len(images), -1)),
        plain=torch.stack(plain).expand(len(images), -1, -1, -1, -1).clone(),
        prompts=tuple(prompts),
    )


@hookimpl
def phosphene_methods():
    return [style_aligned]
