"""Diffusion style: a picture drawn anew by a diffusion model that attends to another; nothing is trained."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import InputError, Reference, hookimpl, method, progress_bar
from phosphene.generative import Denoiser as NoisePredictor
from phosphene.hooks import guard
from phosphene.results import Stylization
from phosphene.roles import Denoiser, Images, Styles
from phosphene.spec import Cost, PixelRange, SameShape, param, size

from ._adain import adain
from ._diffusion_hooks import Eps, Memory, attention_layers, chosen, injected, residual_blocks, watched


def ddim(denoiser: NoisePredictor, eps: Eps, x: Tensor, times: Sequence[int], words: str) -> Tensor:
    """x carried along the times, up (inversion) or down (drawing): the same step, whichever way it goes.

    x_t' = sqrt(abar_t') (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) + sqrt(1 - abar_t') eps

    with eps at x_t and at the noisier of t and t', so that both ways ask the network at the same times.
    """
    for now, then in progress_bar(list(pairwise(times)), words):
        noise = eps(x, max(now, then))
        (signal, level), (next_signal, next_level) = denoiser.levels(now), denoiser.levels(then)
        x = next_signal * (x - level * noise) / signal + next_level * noise
    return x


class GaussianDenoiser(NoisePredictor):
    """The best there is for pictures whose x_0 are independent numbers of N(mean, deviation^2)."""

    def __init__(self, alphas: Tensor, mean: float, deviation: float) -> None:
        super().__init__(alphas)
        self.mean, self.deviation = mean, deviation

    def forward(self, x: Tensor, t: int) -> Tensor:
        signal, level = self.levels(t)
        return level * (x - signal * self.mean) / (signal**2 * self.deviation**2 + level**2)

    def flow(self, x: Tensor, t: int) -> Tensor:
        """Where the exact ODE carries x from time 0 to t."""
        (first, noise), (signal, level) = self.levels(0), self.levels(t)
        spread = (signal**2 * self.deviation**2 + level**2) / (first**2 * self.deviation**2 + noise**2)
        return signal * self.mean + spread**0.5 * (x - first * self.mean)


def gaussian_pictures_have_a_closed_form() -> None:
    """The inversion goes where the ODE leads, half as far off with twice the steps; the whole is AdaIN."""
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    denoiser = GaussianDenoiser(alphas, 0.3, 0.5)
    random = torch.Generator().manual_seed(0)
    content = 0.3 + 0.2 * torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=random)
    style = 0.5 + 0.1 * torch.rand(1, 3, 12, 10, dtype=torch.float64, generator=random)
    wrong, off = [], []
    for steps in (50, 100, 200):
        x = denoiser.encode(content)
        found = ddim(denoiser, denoiser.eps, x, grid(1000, steps), "")
        wrong.append((found - denoiser.flow(x, 999)).abs().max().item())
        made = diffusion_style(content, style, denoiser, inject="nothing", steps=steps)
        off.append((made.stylized - adain(content, style)).abs().max().item())
    assert all(0.45 < later / earlier < 0.55 for earlier, later in pairwise(wrong)), f"errors {wrong}"
    assert off[0] > off[1] > off[2] and off[2] < 5e-3, f"away from AdaIN by {off}"


def grid(count: int, steps: int) -> list[int]:
    """The times 0 ... count - 1 in so many equal steps, or in all there are."""
    return (
        torch.linspace(0, count - 1, min(steps, count - 1) + 1, dtype=torch.float64).round().long().tolist()
    )


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
    ],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    cost=Cost(forward=param.steps * (2 * size.images + size.styles)),
    oracle=gaussian_pictures_have_a_closed_form,
    quick={"steps": 2},
    demo={"styles": "builtin:swirls", "gamma": 0.25, "steps": 25},
)
def diffusion_style(
    images: Images,
    styles: Styles,
    denoiser: Denoiser,
    *,
    inject: Annotated[
        Literal["attention", "features", "nothing"],
        Field(description="what of the style's passes is put into the picture's"),
    ] = "attention",
    gamma: Annotated[
        float, Field(ge=0, le=1, description="how much of the content's own queries or features is kept")
    ] = 0.75,
    temperature: Annotated[
        float, Field(gt=0, le=100, description="what the attention's logits are multiplied by")
    ] = 1.5,
    steps: Annotated[int, Field(ge=1, le=10_000, description="of DDIM, each way")] = 50,
    layers: Annotated[
        list[str] | None, Field(description="where it is put in; the finer ones on the way up")
    ] = None,
) -> Stylization:
    """Draw pictures anew in the manner of others, by a diffusion model that was never trained to.

    x_T = DDIM inversion of the content,  y_T of the style
    z_T = sigma(y_T) (x_T - mu(x_T)) / sigma(x_T) + mu(y_T)                        (per channel)
    z_0 = DDIM from z_T, where self-attention is softmax(temperature Q K^T / sqrt(d)) V with
    Q = gamma Q_content + (1 - gamma) Q_z,  K = K_style,  V = V_style              (at each time)

    For networks without self-attention, ``inject="features"`` gives residual blocks' features f the
    style's statistics: AdaIN(gamma f_content + (1 - gamma) f_z, f_style). Of several ``styles`` every
    place may look at all, and statistics are theirs together.

    Pictures (N, C, H, W) and styles (S, C, H', W') in [0, 1], best of the size that the model knows;
    ``denoiser``: the bundled one, a folder of a diffusers pipeline (Stable Diffusion's kind, told the
    empty text, or unconditional), or a Denoiser of yours. A style that the model cannot draw, it cannot
    lend; the bundled one, small and of pixels, lends colours and their places more than brushwork.

    Raises InputError for pictures of other channels, ModelError for a model without such layers,
    UnknownName for layers it does not have. Source: Chung et al. 2024 (StyleID).
    """
    for pictures, what in ((images, "images"), (styles, "styles")):
        if pictures.shape[1] != denoiser.channels:
            wanted = f"the diffusion model takes {denoiser.channels} channels"
            raise InputError(f"{wanted}, the {what} have {pictures.shape[1]}")
    content: Memory = {}
    style: Memory = {}

    def joined(name: str, t: int, own: Tensor) -> Tensor:
        """The keys or values (S, L, D) of all styles, as one picture's."""
        return style[t][name].flatten(0, 1)[None]

    def queries(name: str, t: int, own: Tensor) -> Tensor:
        return temperature * (gamma * content[t][name] + (1 - gamma) * own)

    def features(name: str, t: int, own: Tensor) -> Tensor:
        return adain(gamma * content[t][name] + (1 - gamma) * own, style[t][name])

    match inject:
        case "attention":
            found = chosen(denoiser, attention_layers(denoiser), layers, "self-attention layer")
            of_content = {f"{name}.to_q": queries for name in found}
            of_style = {f"{name}.to_{part}": joined for name in found for part in "kv"}
        case "features":
            of_content = of_style = dict.fromkeys(
                chosen(denoiser, residual_blocks(denoiser), layers, "residual block"), features
            )
        case _:
            of_content = of_style = {}
    changes = {name: partial(change, name) for name, change in (of_content | of_style).items()}
    up = grid(len(denoiser.alphas), steps)
    made = []
    with guard(denoiser):
        y = ddim(
            denoiser, watched(denoiser, of_style, style), encoded(denoiser, styles), up, "Inverting styles"
        )
        for image in progress_bar(images.split(1), "Drawing anew", len(images)):
            x = encoded(denoiser, image)
            x = ddim(denoiser, watched(denoiser, of_content, content), x, up, "Inverting")
            x = ddim(denoiser, injected(denoiser, changes), adain(x, y), up[::-1], "Drawing")
            made.append(denoiser.decode(x)[..., : image.shape[2], : image.shape[3]].clamp(0, 1))
    return Stylization(
        images=images, stylized=torch.cat(made).to(images), style=f"{inject} put in", sources=styles
    )


def encoded(denoiser: NoisePredictor, images: Tensor) -> Tensor:
    """x_0 where the model is, of pictures whose edges are repeated to sides that it takes."""
    padding = [-side % denoiser.multiple for side in images.shape[:1:-1]]
    images = F.pad(images, (0, padding[0], 0, padding[1]), mode="replicate")
    return denoiser.encode(images.to(next(denoiser.parameters(), images).device))


@hookimpl
def phosphene_methods():
    return [diffusion_style]
