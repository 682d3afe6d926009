"""StyleDiffusion: a diffusion model fine-tuned to add to a content what a style adds to its own."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, at_least_float32, hookimpl, load_model, method, progress_bar
from phosphene.generative import Denoiser as NoisePredictor
from phosphene.hooks import guard
from phosphene.optimize import total_variation as total_variation_of
from phosphene.results import Stylization
from phosphene.roles import Content, Denoiser, LayerName, Model, Styles
from phosphene.spec import Cost, InvariantTo, PixelRange, SameShape, param, size

from ._color_transfer import luminance
from ._ddim import ddim, decode_cropped, encode_padded, timesteps
from ._parameters import TotalVariation
from ._pixel_features import MEAN, STD, draw_images, load_pixel_model, pixel_features
from ._style_loss import smoothness_loss


class _ColorNoise(NoisePredictor):
    """Predicts the noise c + 0.1 (t + 1) x, with a color c that is zero at first."""

    def __init__(self) -> None:
        super().__init__(torch.tensor([0.95, 0.9, 0.8, 0.6, 0.4, 0.2]))
        self.color = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.autoencoder = nn.ParameterList([torch.ones((), dtype=torch.float64)])

    def forward(self, x: Tensor, t: int) -> Tensor:
        return self.color[:, None, None] + 0.1 * (t + 1) * x

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(x * self.autoencoder[0])


def steps_of_the_fine_tuning_by_hand() -> None:
    """Contents, directions of moments or of an embedding, and two steps of Adam on the color, by hand."""
    images, styles = draw_images(2, 3, 6, 4, seed=1), draw_images(2, 3, 5, 5, seed=2) ** 2
    pixels = load_pixel_model()
    mean_color = nn.Sequential(pixels.module.get_submodule("0"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    colors = load_model(mean_color, task="embedding", input_size=(3, 6, 4), mean=MEAN, std=STD)
    denoiser = _ColorNoise()
    call: Any = style_diffusion  # its result has every field here
    options: dict[str, Any] = {"steps": 2, "fit_steps": 2, "lr": 0.05, "strength": 0.7}
    weights: dict[str, Any]
    for model, features, removal, weights in (
        (pixels, "moments", [0, 1, 2], {"reconstruction": 0.6, "total_variation": 3.0}),
        (colors, "embedding", [], {"reconstruction": 0.0, "total_variation": 0.0}),
    ):
        options |= {"layers": ["0", "1"] if features == "moments" else None}
        result = call(
            model, images, styles, denoiser, features=features, removal=0.3 if removal else 0.0,
            l1=0.7, direction=1.3, **weights, **options,
        )  # fmt: skip
        assert not denoiser.color.any(), "the model that was passed has been trained"

        def embed(batch: Tensor, features: str = features) -> list[Tensor]:
            if features == "embedding":
                return [pixel_features(batch, "0").mean((2, 3))]
            maps = [pixel_features(batch, layer) for layer in ("0", "1")]
            return [torch.cat([m.mean((2, 3)), m.var((2, 3), correction=0).sqrt()], 1) for m in maps]

        def content(batch: Tensor, times: list[int] = removal) -> Tensor:
            x = 2 * luminance(batch).expand(-1, 3, -1, -1) - 1
            return _move(denoiser, torch.zeros(3).double(), x, [*times, *times[-2::-1]])

        up, zero = [0, 2, 4], torch.zeros(3).double()
        style_contents = content(styles)
        pairs = zip(embed(styles), embed((style_contents + 1) / 2), strict=True)
        towards = [(a - b).mean(0) for a, b in pairs]
        noisy_styles = _move(denoiser, zero, style_contents, up)
        for n, image in enumerate(images.split(1)):
            noisy = _move(denoiser, zero, content(image), up)
            origin = embed((content(image) + 1) / 2)
            color = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.Adam([color])
            for step, lr in enumerate((0.05, 0.025)):
                with torch.enable_grad():
                    drawn = (_move(denoiser, color, noisy, up[::-1]) + 1) / 2
                    terms = []
                    for end, begin, toward in zip(embed(drawn), origin, towards, strict=True):
                        moved = (end - begin)[0]
                        length = max(moved.norm(), toward.norm() / 10)
                        terms.append(0.7 * (moved - toward).abs().sum() / toward.abs().sum())
                        terms.append(1.3 * (1 - moved @ toward / (toward.norm() * length)))
                    loss = torch.stack(terms).sum() / len(towards)
                    reconstructed = (_move(denoiser, color, noisy_styles, up[::-1]) + 1) / 2
                    loss = loss + weights["reconstruction"] * (reconstructed - styles).abs().mean()
                    loss = loss + weights["total_variation"] * total_variation_of(drawn)[0] / 24
                    optimizer.zero_grad()
                    loss.backward()
                torch.testing.assert_close(result.losses[step, n], loss.detach())
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            drawn = (_move(denoiser, color.detach(), noisy, up[::-1]) + 1) / 2
            torch.testing.assert_close(result.stylized[n : n + 1], drawn.clamp(0, 1))
    long, short = torch.tensor([[3.0, -1.0, 2.0]]), torch.tensor([[0.5, 0.4, -0.2]])
    for moved, toward in ((long, short), (short, long)):
        expected = 1 - torch.cosine_similarity(moved, toward)[0]
        torch.testing.assert_close(_cosine_distance(moved, toward), expected)
    try:
        call(colors, images[:, :1], styles, denoiser)
    except InputError:
        return
    raise AssertionError("images of one channel are not refused")


def _move(denoiser: _ColorNoise, color: Tensor, x: Tensor, times: list[int]) -> Tensor:
    """x_t moved along the times by DDIM, with the noise of the color at the noisier of two times."""
    for t, after in pairwise(times):
        eps = color[:, None, None] + 0.1 * (max(t, after) + 1) * x
        (signal, level), (next_signal, next_level) = denoiser.levels(t), denoiser.levels(after)
        x = next_signal * (x - level * eps) / signal + next_level * eps
    return x


@method(
    family="style",
    references=[
        Reference(
            key="wang2023",
            title="StyleDiffusion: Controllable Disentangled Style Transfer via Diffusion Models",
            authors="Wang, Zhao, Xing",
            year=2023,
            url="https://arxiv.org/abs/2308.07863",
        ),
        Reference(
            key="kim2022",
            title="DiffusionCLIP: Text-Guided Diffusion Models for Robust Image Manipulation",
            authors="Kim, Kwon, Ye",
            year=2022,
            url="https://arxiv.org/abs/2110.02711",
        ),
    ],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    relations=[InvariantTo("batch_order")],
    needs=["gradients", "training"],
    # Passes through the diffusion model (removal, inversion, training, result) and the embedding network.
    cost=Cost(
        forward=size.images * (4 * param.steps + 1 + param.fit_steps * (param.steps + 1))
        + size.styles * (3 * param.steps + 2)
        + size.images * size.styles * param.fit_steps * param.steps,
        backward=size.images * param.fit_steps * (param.steps + 1)
        + size.images * size.styles * param.fit_steps * param.steps,
    ),
    oracle=steps_of_the_fine_tuning_by_hand,
    quick={"fit_steps": 1, "steps": 1, "reconstruction": 0.0, "removal": 0.0},
    demo={"images": "builtin:scenes/2", "styles": "builtin:swirls"},
)
def style_diffusion(
    model: Model,
    images: Content,
    styles: Styles,
    denoiser: Denoiser,
    *,
    features: Annotated[
        Literal["moments", "embedding"],
        Field(description="embedding: means and deviations of channels, or the model's own, as of a CLIP"),
    ] = "moments",
    layers: Annotated[
        list[LayerName] | None, Field(description="layers of the moments; default: every stage")
    ] = None,
    removal: Annotated[
        float, Field(ge=0, le=1, description="time up to which the style is removed; 0: colors only")
    ] = 0.2,
    strength: Annotated[
        float, Field(gt=0, le=1, description="time from which the fine-tuned model samples")
    ] = 0.5,
    steps: Annotated[
        int, Field(ge=1, le=1000, description="number of DDIM steps of each inversion and sampling")
    ] = 3,
    fit_steps: Annotated[int, Field(ge=1, le=100_000, description="steps of the fine-tuning")] = 50,
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate of Adam")] = 3e-4,
    l1: Annotated[
        float, Field(ge=0, le=1000, description="weight of the relative L1 distance of directions")
    ] = 1.0,
    direction: Annotated[
        float, Field(ge=0, le=1000, description="weight of the cosine distance of directions")
    ] = 1.0,
    reconstruction: Annotated[
        float, Field(ge=0, le=1000, description="weight of the styles' reconstruction from their content")
    ] = 1.0,
    total_variation: TotalVariation = 10.0,
) -> Stylization:
    """StyleDiffusion: content and style disentangled, and a diffusion model fine-tuned to add the difference.

    I^c = sampling(inversion(luminance(I)))                       (style removal, up to time ``removal`` T)
    D_s = E(I_s) - E(I_s^c),   D = E(J) - E(I^c)                  (what the style adds in an embedding E)
    L = ``l1`` |D - D_s|_1 / |D_s|_1 + ``direction`` (1 - cos(D, D_s)) + ``reconstruction`` |J_s - I_s|_1

    The content I^c of an image is its luminance, moved by DDIM to time ``removal`` T and back, which aligns
    it with what the diffusion model draws (the paper has 0.6, for a large model). J is sampled by a copy of
    the model from the inversion of I^c up to ``strength`` T; the copy is fine-tuned by L, through all steps,
    for each image. J_s is its image from the style's content, so that it learns to draw the style itself.
    Of several styles D_s is the mean. ``total_variation`` of J is added to L.

    The paper's E is a CLIP's: ``model="open_clip:..."`` with ``features="embedding"``. "moments" are the
    means and standard deviations of each layer's channels, a direction for each layer, which any network
    has; the embedding of a classifier says more of its classes than of a style.

    ``denoiser`` is the bundled one, the folder of a diffusers pipeline, or a ``Denoiser``; its copy, the
    gradients and Adam's state need four times the memory of its network. The color of the content is
    removed by definition: colors are the style's. A model whose output layer rearranges channels to pixels,
    as the bundled one's does, draws grids where it is fine-tuned, which ``total_variation`` removes.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``sources`` (S, 3, H', W')
        the styles, ``losses`` (fit_steps, N).

    Raises:
        InputError: images without three channels, or a model of other channels.

    Example::
        from phosphene import run

        result = run("style_diffusion", images="builtin:scenes/1", styles="builtin:swirls", fit_steps=2)
        result.stylized.shape  # (1, 3, 64, 64)

    Source: Wang et al. 2023, sections 3.2 (removal), 3.3 (transfer) and 3.4 (losses, equations 4 to 8).
    """
    for batch, name in ((images, "images"), (styles, "styles")):
        if batch.shape[1] != 3 or denoiser.channels != 3:
            raise InputError(
                f"luminance needs red, green and blue: the {name} have {batch.shape[1]} channels, "
                f"the diffusion model takes {denoiser.channels}"
            )
    up_to_removal, up_to_strength = (
        timesteps(max(1, round(share * (denoiser.time_steps - 1))) + 1, steps) if share else []
        for share in (removal, strength)
    )
    names = [] if features == "embedding" else list(layers or model.stages)

    def remove_style(batch: Tensor) -> Tensor:
        """x_0 of the content domain."""
        x = encode_padded(denoiser, luminance(batch).expand_as(batch))
        for times in (up_to_removal, up_to_removal[::-1]):
            x = ddim(denoiser, denoiser.predict, x, times, "Removing style")
        return x

    def draw(network: NoisePredictor, noisy: Tensor, like: Tensor) -> Tensor:
        """Images sampled from x at time ``strength`` T."""
        x = ddim(network, network.predict, noisy, up_to_strength[::-1])
        return decode_cropped(network, x, like).to(like)

    def embed(batch: Tensor) -> list[Tensor]:
        """Embeddings (N, D), one, or one of each layer."""
        if features == "embedding":
            return [at_least_float32(model.embed(batch))]
        maps = (
            at_least_float32(model.maps(values, batch, name)).flatten(2)
            for values, name in zip(model.features_of(batch, names), names, strict=True)
        )
        return [torch.cat([m.mean(2), m.std(2, correction=0)], 1) for m in maps]

    smoothness = smoothness_loss(total_variation)
    with guard(denoiser):
        with torch.no_grad():
            style_contents = remove_style(styles)
            plain = decode_cropped(denoiser, style_contents, styles).to(styles)
            noisy_styles = ddim(
                denoiser, denoiser.predict, style_contents, up_to_strength, "Inverting styles"
            )
            style_directions = [
                (a - b).mean(0, keepdim=True) for a, b in zip(embed(styles), embed(plain), strict=True)
            ]
        stylized, losses = [], []
        for image in progress_bar(images.split(1), "Stylizing", len(images)):
            with torch.no_grad():
                content = remove_style(image)
                start = decode_cropped(denoiser, content, image).to(image)
                origin = embed(start)
                noisy = ddim(denoiser, denoiser.predict, content, up_to_strength, "Inverting")
            tuned = copy.deepcopy(denoiser)
            parameters = [
                parameter.requires_grad_()
                for name, parameter in tuned.named_parameters()
                if not name.startswith("autoencoder.") and parameter.is_floating_point()
            ]
            optimizer = torch.optim.Adam(parameters, lr=lr)
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / fit_steps)
            for _ in progress_bar(range(fit_steps), "Fine-tuning"):
                with torch.enable_grad():
                    drawn = draw(tuned, noisy, image)
                    ends = zip(embed(drawn), origin, style_directions, strict=True)
                    terms = [
                        l1 * (end - begin - toward).abs().sum() / toward.abs().sum().clamp(min=1e-12)
                        + direction * _cosine_distance(end - begin, toward)
                        for end, begin, toward in ends
                    ]
                    loss = torch.stack(terms).mean()
                    if reconstruction:
                        loss = loss + reconstruction * F.l1_loss(draw(tuned, noisy_styles, styles), styles)
                    if smoothness is not None:
                        # equivalent mutants: it is one image
                        loss = loss + smoothness(drawn).mean()
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                decay.step()
                losses.append(loss.detach())
            with torch.no_grad():
                stylized.append(draw(tuned, noisy, image).clamp(0, 1))
    return Stylization(
        images=images,
        stylized=torch.cat(stylized).to(images),
        style="fine-tuned",
        sources=styles,
        losses=torch.stack(losses).view(len(images), fit_steps).T.to(images),
    )


def _cosine_distance(moved: Tensor, toward: Tensor) -> Tensor:
    """1 - cos of two directions (1, D); a norm below a tenth of the other's counts as that.

    The model begins at D = 0, where the cosine's gradient would be infinite.
    """
    norm = toward.norm().clamp(min=1e-12)
    return 1 - (moved * toward).sum() / (norm * torch.maximum(moved.norm(), norm / 10))


@hookimpl
def phosphene_methods():
    return [style_diffusion]
