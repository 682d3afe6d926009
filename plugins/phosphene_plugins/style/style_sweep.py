"""Style sweep: a picture with more and more of a style, or with the style seen at other sizes."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from phosphene import hookimpl, load_model, method
from phosphene.results import Panel, Result
from phosphene.roles import Content, Model, Styles
from phosphene.spec import Cost, PixelRange, length, param, size

from ._optimize_style import GATYS, Blend, ContentLayer, StyleLayers, at_most, paint, resized, shares_of
from ._style_loss import Aim, Perception


@dataclass(frozen=True, eq=False, kw_only=True)
class StyleSweep(Result):
    """Pictures repainted in several ways: ``images`` (N, 3, H, W), ``stylized`` (N, V, 3, H, W) in [0, 1].

    ``labels`` name the V ways; ``losses`` (steps, N, V).
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "stylized")
    per_step: ClassVar[tuple[str, ...]] = ("losses",)

    images: Tensor
    stylized: Tensor
    labels: tuple[str, ...]
    losses: Tensor

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, ways in zip(self.images, self.stylized, strict=True):
            made = [Panel(way, label, is_output=True) for way, label in zip(ways, self.labels, strict=True)]
            groups.append([Panel(image), *made])
        return groups


def more_style_is_nearer_to_the_style() -> None:
    """Features = pixels: the heavier the style, the nearer the mean square is to the style's."""
    pixels = torch.nn.Conv2d(1, 1, 1, bias=False).double()
    torch.nn.init.ones_(pixels.weight)
    model = load_model(torch.nn.Sequential(pixels, torch.nn.ReLU()), input_size=(1, 8, 8))
    content = torch.linspace(0.1, 0.6, 64, dtype=torch.float64).view(1, 1, 8, 8)
    style = torch.full_like(content, 0.9)
    layers: Any = {"content_layer": "0", "style_layers": ["0"]}
    made = style_sweep(model, content, style, values=(0.01, 1.0, 1e4), steps=60, **layers)
    away = (made.stylized.square().mean((2, 3, 4)) - 0.81).abs()[0]
    assert away[0] > away[1] > away[2] and away[2] < 1e-3, f"mean squares are {away} from the style's"


@method(
    family="style",
    references=[GATYS],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (length(param.values, 4) * (2 * param.steps + 1 + size.styles) + 1),
        backward=size.images * length(param.values, 4) * (2 * param.steps + 1),
    ),
    oracle=more_style_is_nearer_to_the_style,
    quick={"steps": 3, "values": (1.0, 2.0)},
    demo={"images": "builtin:scenes/1", "styles": ["builtin:swirls"], "steps": 40},
)
def style_sweep(
    model: Model,
    images: Content,
    styles: Styles,
    *,
    over: Annotated[
        Literal["intensity", "scale"], Field(description="what grows: beta/alpha, or the style's size")
    ] = "intensity",
    values: Annotated[
        tuple[PositiveFloat, ...] | None, Field(min_length=1, description="0.1 to 100, or 1/2 to 4")
    ] = None,
    blend: Blend = None,
    content_layer: ContentLayer = None,
    style_layers: StyleLayers = None,
    style_weight: Annotated[float, Field(ge=0, le=1e12, description="beta, where the scale grows")] = 30.0,
    total_variation: Annotated[float, Field(ge=0, le=1e6, description="its weight, per pixel")] = 1.0,
    size: Annotated[int, Field(ge=8, le=16384, description="longer side of larger pictures")] = 512,
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of descent")] = 100,
) -> StyleSweep:
    """Draw the rows of the lecture: one picture from faithful to free, or in fine to wide strokes.

    L(I) = |phi(I) - phi(I_c)|^2 / |phi(I_c)|^2 + beta sum_j w_j |G_j(I) - G_j|_F^2 / |G_j|_F^2

    as in ``neural_style``, for every beta of ``values`` (over "intensity": None is 0.1, 1, 10, 100), or for
    styles whose longer side is so many times the content's (over "scale": None is 1/2, 1, 2, 4); the
    descents run side by side. The pictures (N, 3, H, W) keep their own size, but for ``size``.

    ``stylized`` (N, V, 3, H, W) in [0, 1]. Source: Gatys et al. 2016; lecture 21.12.1.
    """
    wide = over == "scale"
    values = values or ((0.5, 1.0, 2.0, 4.0) if wide else (0.1, 1.0, 10.0, 100.0))
    look, shares = Perception(model, content_layer, style_layers), shares_of(blend, styles)
    content = at_most(images, size)
    longest = max(content.shape[2:]) / max(styles.shape[2:])
    seen = [look.style(resized(styles, scale * longest), shares) for scale in (values if wide else (1.0,))]
    grams = [torch.cat(layer) for layer in zip(*seen, strict=True)]
    weight = style_weight if wide else content.new_tensor(values)
    made = [
        paint(
            look,
            picture.expand(len(values), -1, -1, -1),
            Aim(look.content(picture), grams),
            content_weight=1.0,
            style_weight=weight,
            total_variation=total_variation,
            steps=steps,
        )
        for picture in content.split(1)
    ]
    return StyleSweep(
        images=content,
        stylized=torch.stack([m.images for m in made]),
        labels=tuple(f"style at {v:g} of the size" if wide else f"beta/alpha = {v:g}" for v in values),
        losses=torch.stack([m.scores for m in made], 1),
    )


@hookimpl
def phosphene_methods():
    return [style_sweep]
