"""Diffusion style transfer (StyleID): a style's attention keys and values injected into DDIM sampling."""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, fork_random_state, hookimpl, method, progress_bar
from phosphene.generative import Denoiser as NoisePredictor
from phosphene.hooks import guard
from phosphene.results import Stylization
from phosphene.roles import Denoiser, Images, Styles
from phosphene.spec import Cost, InvariantTo, PixelRange, SameShape, param, size

from ._adain import adain
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
    query_layer,
    record_outputs,
    replace_outputs,
    residual_blocks,
    select_layers,
    self_attention_layers,
)
from ._pixel_features import draw_images


class GaussianDenoiser(NoisePredictor):
    """The optimal denoiser of images whose x_0 are independent draws of N(mean, std^2)."""

    def __init__(self, alphas_cumprod: Tensor, mean: float, std: float) -> None:
        super().__init__(alphas_cumprod)
        self.mean, self.std = mean, std

    def forward(self, x: Tensor, t: int) -> Tensor:
        signal, level = self.levels(t)
        return level * (x - signal * self.mean) / (signal**2 * self.std**2 + level**2)

    def solve_ode(self, x: Tensor, t: int) -> Tensor:
        """The exact solution at time t of the probability-flow ODE that starts from x at time 0."""
        (first, noise), (signal, level) = self.levels(0), self.levels(t)
        variance_ratio = (signal**2 * self.std**2 + level**2) / (first**2 * self.std**2 + noise**2)
        return signal * self.mean + variance_ratio**0.5 * (x - first * self.mean)


def gaussian_images_have_a_closed_form() -> None:
    """The inversion's error against the ODE halves with twice the steps; the result approaches AdaIN."""
    times_are_even_and_the_noisier_ones()
    one_step_of_injection_by_hand()
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    denoiser = GaussianDenoiser(alphas_cumprod, 0.3, 0.5)
    random = torch.Generator().manual_seed(0)
    content = 0.3 + 0.2 * torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=random)
    style = 0.5 + 0.1 * torch.rand(1, 3, 12, 10, dtype=torch.float64, generator=random)
    inversion_errors, result_errors = [], []
    for steps in (50, 100, 200):
        x = denoiser.encode(content)
        inverted = ddim(denoiser, denoiser.predict, x, timesteps(1000, steps), "")
        inversion_errors.append((inverted - denoiser.solve_ode(x, 999)).abs().max().item())
        result = diffusion_style(content, style, denoiser, inject="nothing", steps=steps)
        result_errors.append((result.stylized - adain(content, style)).abs().max().item())
    assert all(0.45 < later / earlier < 0.55 for earlier, later in pairwise(inversion_errors)), (
        f"inversion errors {inversion_errors}"
    )
    assert result_errors[0] > result_errors[1] > result_errors[2] and result_errors[2] < 5e-3, (
        f"differences to AdaIN {result_errors}"
    )


def times_are_even_and_the_noisier_ones() -> None:
    """Equal intervals, or each time once; both directions evaluate the network at the same times."""
    assert timesteps(11, 4) == [0, 2, 5, 8, 10] and timesteps(3, 9) == [0, 1, 2] == timesteps(3, 2)
    assert timesteps(54, 50)[25] == 26, "26.5 is not rounded to the even number"
    denoiser = GaussianDenoiser(torch.tensor([0.9, 0.6, 0.2]), 0.0, 1.0)
    evaluated: list[int] = []

    def eps(x: Tensor, t: int) -> Tensor:
        evaluated.append(t)
        return torch.zeros_like(x)

    for times in ((0, 1, 2), (2, 1, 0)):
        ddim(denoiser, eps, torch.zeros(1, 3, 1, 1), times, "")
    assert evaluated == [1, 2, 2, 1]


class TinyAttention(nn.Module):
    """The projections of a self-attention layer of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(3, 3) for _ in range(3))


class TinyDenoiser(NoisePredictor):
    """Noise of three self-attention layers and two residual blocks, each on the pixels themselves."""

    multiple = 4

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__(alphas_cumprod)
        self.shift = 0.0
        self.up_blocks = nn.ModuleList(TinyAttention() for _ in range(3))
        self.resnets = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))

    def forward(self, x: Tensor, t: int, change: Any = lambda name, output: output) -> Tensor:
        """The noise; ``change(name, output)`` replaces the output of a layer."""
        noise = torch.full_like(x, self.shift)
        for n, block in enumerate(self.resnets):
            noise = noise + change(f"resnets.{n}", block(x))
        tokens = x.flatten(2).mT
        for n in range(len(self.up_blocks)):
            names = (f"up_blocks.{n}.to_{part}" for part in "qkv")
            q, k, v = (change(name, self.get_submodule(name)(tokens)) for name in names)
            noise = noise + ((q @ k.mT).softmax(2) @ v).mT.unflatten(2, x.shape[2:])
        return noise

    def prompted(self, text: str) -> "TinyDenoiser":
        """A text adds a tenth of its length to the noise."""
        view = copy.copy(self)
        view.shift = len(text) / 10
        return view


def stylize_by_hand(
    denoiser: TinyDenoiser,
    image: Tensor,
    styles: Tensor,
    layers: list[str],
    gamma: float,
    temperature: float,
    texts: Sequence[str] = ("", "", ""),
    guidance: float = 1.0,
) -> Tensor:
    """x_0 of an image after one step up and one down, with the outputs of ``layers`` replaced.

    ``texts``: of the style's inversion, of the content's, and of the sampling.
    """
    (signal, level), (last_signal, last_level) = denoiser.levels(0), denoiser.levels(2)
    style: dict[str, Tensor] = {}
    content: dict[str, Tensor] = {}
    noisy = []
    for x, outputs, text in ((2 * styles - 1, style, texts[0]), (2 * image - 1, content, texts[1])):
        noise = denoiser.prompted(text)(x, 2, outputs.setdefault)
        noisy.append(last_signal * (x - level * noise) / signal + last_level * noise)
    z = adain(noisy[1], noisy[0])

    def inject(name: str, own: Tensor) -> Tensor:
        if name.partition(".to_")[0] not in layers:
            return own
        mixed = gamma * content[name] + (1 - gamma) * own
        if name.endswith("q"):
            return temperature * mixed
        return torch.cat([*style[name]])[None] if name[-1] in "kv" else adain(mixed, style[name])

    empty, noise = (denoiser.prompted(text)(z, 2, inject) for text in ("", texts[2]))
    noise = empty + guidance * (noise - empty)
    x_0: Tensor = signal * (z - last_level * noise) / last_signal + level * noise
    return x_0


def one_step_of_injection_by_hand() -> None:
    """One step up and one down, with queries, keys, values and features replaced by hand."""
    tested: Any = diffusion_style  # its result has every field here
    with fork_random_state():
        torch.manual_seed(0)
        denoiser = TinyDenoiser(torch.tensor([0.9, 0.6, 0.2])).double().requires_grad_(False)
    images, styles = draw_images(2, 3, 5, 4, seed=0), draw_images(2, 3, 4, 6, seed=1)
    padded, padded_styles = images[:, :, [*range(5), 4, 4, 4]], styles[..., [*range(6), 5, 5]]
    attention = [f"up_blocks.{n}" for n in range(3)]
    cases: tuple[tuple[Any, float, float, list[str]], ...] = (
        ({}, 0.75, 1.5, attention[1:]),
        ({"gamma": 0.25, "temperature": 3.0, "layers": attention[:1]}, 0.25, 3.0, attention[:1]),
        ({"gamma": 0.25, "inject": "features"}, 0.25, 1.0, ["resnets.0", "resnets.1"]),
        ({"inject": "features", "layers": ["resnets.1"]}, 0.75, 1.0, ["resnets.1"]),
        ({"inject": "nothing"}, 0.0, 1.0, []),
    )
    for options, gamma, temperature, layers in cases:
        result = tested(images, styles, denoiser, steps=1, **options)
        for stylized, image in zip(result.stylized, padded.split(1), strict=True):
            x = stylize_by_hand(denoiser, image, padded_styles, layers, gamma, temperature)
            assert (stylized - (x[0, :, :5] + 1).div(2).clamp(0, 1)).abs().max() < 1e-9, f"{options}"
        assert torch.equal(result.sources, styles) and torch.equal(result.images, images)
        assert result.style == f"{options.get('inject', 'attention')} injected"
    prompts: tuple[tuple[Any, tuple[str, str, str]], ...] = (
        ({"content_prompt": "a ball"}, ("", "a ball", "a ball")),
        ({"style_prompt": "ink", "guidance": 2.5}, ("ink", "", "ink")),
        (
            {"content_prompt": "a ball", "style_prompt": "ink", "guidance": 1.5},
            ("ink", "a ball", "a ball, ink"),
        ),
    )
    for options, texts in prompts:
        result = tested(images, styles, denoiser, steps=1, **options)
        layers, guidance = attention[1:], options.get("guidance", 1.0)
        for stylized, image in zip(result.stylized, padded.split(1), strict=True):
            x = stylize_by_hand(denoiser, image, padded_styles, layers, 0.75, 1.5, texts, guidance)
            assert (stylized - (x[0, :, :5] + 1).div(2).clamp(0, 1)).abs().max() < 1e-9, f"{options}"
    # Keys with positions are those of one style of the same size, after padding to a multiple of 4.
    denoiser.positional_keys = True
    assert tested(images, images[:1], denoiser, steps=1).stylized.shape == images.shape
    refused = (
        (images, styles[:1], "8 x 4, not 1 of 4 x 8"),
        (images, images, "8 x 4, not 2 of 8 x 4"),
        (images[:, :1], styles[:1], "channel"),
    )
    for content, style, reason in refused:
        message = "accepted"
        try:
            tested(content, style, denoiser, steps=1)
        except InputError as error:
            message = str(error)
        assert reason in message, message


@method(
    family="style",
    references=[
        Reference(
            key="chung2024",
            title="Style Injection in Diffusion: A Training-free Approach for Adapting Large-scale Diffusion "
            "Models for Style Transfer",
            authors="Chung, Hyun, Heo",
            year=2024,
            url="https://arxiv.org/abs/2312.09008",
        ),
        Reference(
            key="song2021",
            title="Denoising Diffusion Implicit Models",
            authors="Song, Meng, Ermon",
            year=2021,
            url="https://arxiv.org/abs/2010.02502",
        ),
        Reference(
            key="hu2024",
            title="DiffuseST: Unleashing the Capability of the Diffusion Model for Style Transfer",
            authors="Hu, Zhuang, Gao",
            year=2024,
            url="https://arxiv.org/abs/2410.15007",
        ),
    ],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    relations=[InvariantTo("batch_order")],
    # Guidance other than 1 evaluates the noise without the text as well.
    cost=Cost(
        forward=param.steps * (2 * size.images + size.styles) + param.steps * size.images * WITHOUT_TEXT
    ),
    oracle=gaussian_images_have_a_closed_form,
    quick={"steps": 2},
    demo={"styles": "builtin:swirls", "gamma": 0.5, "steps": 25},
)
def diffusion_style(
    images: Images,
    styles: Styles,
    denoiser: Denoiser,
    *,
    inject: Annotated[
        Literal["attention", "features", "nothing"],
        Field(description="layer outputs of the style that replace the content's during sampling"),
    ] = "attention",
    gamma: Annotated[
        float,
        Field(ge=0, le=1, description="share of the content's own queries or features that is preserved"),
    ] = 0.75,
    temperature: Annotated[
        float, Field(gt=0, le=100, description="factor of the attention logits; higher is sharper")
    ] = 1.5,
    steps: Annotated[
        int, Field(ge=1, le=10_000, description="number of DDIM steps of the inversion, and of the sampling")
    ] = 50,
    layers: Annotated[
        list[str] | None,
        Field(
            description="layers whose outputs are replaced; default: the finer two thirds of the up blocks"
        ),
    ] = None,
    content_prompt: Annotated[
        str, Field(description="caption of the content, for a text-conditioned model")
    ] = "",
    style_prompt: Annotated[
        str, Field(description="description of the style, for a text-conditioned model")
    ] = "",
    guidance: Guidance = 1.0,
) -> Stylization:
    """Diffusion style transfer (StyleID): images resampled with a style's self-attention keys and values.

    x_T = DDIM inversion of the content,  y_T of the style
    z_T = sigma(y_T) (x_T - mu(x_T)) / sigma(x_T) + mu(y_T)                        (per channel)
    z_0 = DDIM from z_T, where self-attention is softmax(temperature Q K^T / sqrt(d)) V with
    Q = gamma Q_content + (1 - gamma) Q_z,  K = K_style,  V = V_style              (at each time step)

    For networks without self-attention, ``inject="features"`` matches the statistics of residual blocks'
    features f to the style's: AdaIN(gamma f_content + (1 - gamma) f_z, f_style). With several ``styles``
    attention is over the positions of all, and statistics are those of all together. Nothing is trained.

    A text-conditioned model takes captions of both images (the textual embeddings of DiffuseST): the
    content is inverted with ``content_prompt``, the style with ``style_prompt``, and the result is sampled
    with "content_prompt, style_prompt" and eps = eps_empty + guidance (eps_text - eps_empty).

    Images (N, C, H, W) and styles (S, C, H', W') are in [0, 1], best of the size that the model was trained
    on. ``denoiser`` is the bundled one, the folder of a diffusers pipeline (unconditional, Stable Diffusion
    1, 2, XL or 3, or Flux, by default with the empty prompt), or a ``Denoiser``. Stable Diffusion 3 and
    Flux have attention over image and text together: the image's queries, keys and values are replaced (in
    Flux's single blocks the text's too), queries after their normalization; without residual blocks they
    take no features, and Flux takes one style of the images' size. The model can only transfer what it can
    generate: the bundled pixel model, a small one, transfers color and layout more than brushwork.

    Returns:
        ``images`` (N, C, H, W) the content, ``stylized`` (N, C, H, W) in [0, 1], ``sources`` (S, C, H', W')
        the styles.

    Raises:
        InputError: images with other channels than the model's; a prompt or guidance for a model without
            text.
        ModelError: a model without layers to inject into.
        UnknownName: layers that the model does not have.

    Example::
        from phosphene import run

        result = run("diffusion_style", images="builtin:scenes/1", styles="builtin:swirls", steps=2)
        result.stylized.shape  # (1, 3, 64, 64)

    Source: Chung et al. 2024 (StyleID), section 4; the prompts: Hu et al. 2024, section 3.
    """
    require_channels_of(denoiser, images=images, styles=styles)
    prompt = ", ".join(text for text in (content_prompt, style_prompt) if text)
    if guidance != 1 and not prompt:
        raise InputError("guidance is the weight of a text: pass content_prompt or style_prompt")
    of_text = {text: denoiser.prompted(text) if text else denoiser for text in
               ("", content_prompt, style_prompt, prompt)}  # fmt: skip
    content_outputs: LayerOutputs = {}
    style_outputs: LayerOutputs = {}

    def keys_or_values(name: str, t: int, output: Tensor) -> Tensor:
        """The keys or values (S, L, D) of all styles as those of one image: (1, S L, D)."""
        return style_outputs[t][name].flatten(0, 1)[None]

    def queries(name: str, t: int, output: Tensor) -> Tensor:
        return temperature * (gamma * content_outputs[t][name] + (1 - gamma) * output)

    def features(name: str, t: int, output: Tensor) -> Tensor:
        return adain(gamma * content_outputs[t][name] + (1 - gamma) * output, style_outputs[t][name])

    match inject:
        case "attention":
            attention = select_layers(self_attention_layers(denoiser), layers, "self-attention layer")
            of_content = {query_layer(denoiser, name): queries for name in attention}
            _require_same_positions(denoiser, images, styles)
            of_style = {
                f"{name}.to_{projection}": keys_or_values for name in attention for projection in "kv"
            }
        case "features":
            blocks = select_layers(residual_blocks(denoiser), layers, "residual block")
            of_content = of_style = dict.fromkeys(blocks, features)
        case _:
            of_content = of_style = {}
    replacements = {name: partial(function, name) for name, function in (of_content | of_style).items()}
    record_content = record_outputs(of_text[content_prompt], of_content, content_outputs)
    record_style = record_outputs(of_text[style_prompt], of_style, style_outputs)
    with_text, empty = (replace_outputs(of_text[text], replacements) for text in (prompt, ""))
    inject_style = guided(with_text, empty, guidance)
    times = timesteps(denoiser.time_steps, steps)
    stylized = []
    with guard(denoiser):
        y = ddim(denoiser, record_style, encode_padded(denoiser, styles), times, "Inverting styles")
        for image in progress_bar(images.split(1), "Stylizing", len(images)):
            x = ddim(denoiser, record_content, encode_padded(denoiser, image), times, "Inverting")
            z = ddim(denoiser, inject_style, adain(x, y), times[::-1], "Sampling")
            stylized.append(decode_cropped(denoiser, z, image).clamp(0, 1))
    return Stylization(
        images=images, stylized=torch.cat(stylized).to(images), style=f"{inject} injected", sources=styles
    )


def _require_same_positions(denoiser: NoisePredictor, images: Tensor, styles: Tensor) -> None:
    """Raises InputError where keys carry positions, which those of another size do not share."""
    size, other = (
        [-(-side // denoiser.multiple) * denoiser.multiple for side in batch.shape[2:]]
        for batch in (images, styles)
    )
    if denoiser.positional_keys and (len(styles) > 1 or size != other):
        raise InputError(
            f"the keys of this model carry their position, so it takes one style of the images' size, "
            f"{size[0]} x {size[1]}, not {len(styles)} of {other[0]} x {other[1]}"
        )


@hookimpl
def phosphene_methods():
    return [diffusion_style]
