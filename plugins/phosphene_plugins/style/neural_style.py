"""Neural style: what one picture shows, painted in the manner of others."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat

from phosphene import Reference, hookimpl, load_model, method
from phosphene.images import noise_images, resize
from phosphene.optimize import Optimization, concatenate_stages
from phosphene.results import Stylization
from phosphene.roles import Content, Frames, Model, Seed, Start, Styles
from phosphene.spec import Cost, PixelRange, ceil, either, minimum, param, size

from ._color_transfer import Colour, prepared, recoloured
from ._optimize_style import (
    GATYS,
    Blend,
    ContentLayer,
    StyleLayers,
    at_most,
    called,
    paint,
    resized,
    shares_of,
)
from ._style_loss import Aim, Perception


def one_pixel_layer_has_its_closed_form() -> None:
    """Features = pixels. With no style it is the content; with no content, the blend of the mean squares."""
    pixels = torch.nn.Conv2d(1, 1, 1, bias=False).double()
    torch.nn.init.ones_(pixels.weight)
    model = load_model(torch.nn.Sequential(pixels, torch.nn.ReLU()), input_size=(1, 8, 8))
    content = torch.linspace(0.1, 0.6, 64, dtype=torch.float64).view(1, 1, 8, 8)
    styles = torch.stack([content[0].flip(1) + 0.1, content[0] / 2])
    layers: Any = {
        "content_layer": "0",
        "style_layers": ["0"],
        "total_variation": 0.0,
        "steps": 60,
        "seed": 0,
    }
    same = neural_style(model, content, styles, style_weight=0.0, init="noise", **layers)
    assert (same.stylized - content).abs().max() < 1e-6, "with no style it is not the content"
    made = neural_style(model, content, styles, content_weight=0.0, blend=[1.0, 3.0], **layers)
    wanted = (styles.square().mean((1, 2, 3)) * torch.tensor([0.25, 0.75])).sum()
    assert abs(made.stylized.square().mean() - wanted) < 1e-6, (
        "its Gram matrix is not the blend of the styles'"
    )


@method(
    family="style",
    references=[
        GATYS,
        Reference(
            key="gatys2016colour",
            title="Preserving Color in Neural Artistic Style Transfer",
            authors="Gatys, Bethge, Hertzmann, Shechtman",
            year=2016,
            url="https://arxiv.org/abs/1606.05897",
        ),
    ],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    # L-BFGS looks once a step, or twice; tiles are looked at twice, and are up to half as large as asked for.
    cost=Cost(
        forward=param.scales
        * size.images
        * (
            (2 * param.steps + 1)
            * minimum(2, either(param.tile, 1))
            * ceil(2 * size.height / either(param.tile, 2 * size.height))
            * ceil(2 * size.width / either(param.tile, 2 * size.width))
            + 1
            + size.styles
        ),
        backward=param.scales
        * size.images
        * (2 * param.steps + 1)
        * ceil(2 * size.height / either(param.tile, 2 * size.height))
        * ceil(2 * size.width / either(param.tile, 2 * size.width)),
    ),
    oracle=one_pixel_layer_has_its_closed_form,
    quick={"steps": 3, "scales": 1, "tile": None},
    demo={
        "images": "builtin:scenes/2",
        "styles": ["builtin:swirls"],
        "style_weight": 10,
        "total_variation": 3,
    },
)
def neural_style(
    model: Model,
    images: Content,
    styles: Styles,
    start: Start = None,
    *,
    blend: Blend = None,
    content_layer: ContentLayer = None,
    style_layers: StyleLayers = None,
    weights: Annotated[list[NonNegativeFloat] | None, Field(description="w_j, one a layer; 3^-j")] = None,
    content_weight: Annotated[float, Field(ge=0, le=1e12, description="alpha")] = 1.0,
    style_weight: Annotated[float, Field(ge=0, le=1e12, description="beta")] = 30.0,
    total_variation: Annotated[float, Field(ge=0, le=1e6, description="its weight, per pixel")] = 0.0,
    style_scale: Annotated[float, Field(gt=0, le=8, description="a style's size, in contents")] = 1.0,
    init: Annotated[
        Literal["content", "noise", "style"], Field(description="what it begins with")
    ] = "content",
    colour: Annotated[
        Colour, Field(description="whose colours: the style's, or the content's, kept in one of two ways")
    ] = "style",
    size: Annotated[int, Field(ge=8, le=16384, description="longer side of larger pictures")] = 512,
    scales: Annotated[int, Field(ge=1, le=8, description="first at 1/2, 1/4, ... of the size")] = 1,
    tile: Annotated[
        int | None, Field(ge=16, le=4096, description="side of the parts to look at by turns")
    ] = None,
    steps: Annotated[int, Field(ge=1, le=100_000, description="steps of descent, at each scale")] = 100,
    optimizer: Annotated[Literal["lbfgs", "adam"], Field(description="lbfgs gets further")] = "lbfgs",
    lr: Annotated[float | None, Field(gt=0, le=1000, description="step length: 1, or 0.02 for Adam")] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Stylization:
    """Paint a picture in the style of others: descend from it to its own features and their correlations.

    L(I) = alpha |phi(I) - phi(I_c)|^2 / |phi(I_c)|^2 + beta sum_j w_j |G_j(I) - G_j|_F^2 / |G_j|_F^2

    G_j = sum_s gamma_s G_j(I_s),  sum_s gamma_s = 1

    with phi the features at ``content_layer`` (None: the middle one of ``model.stages``) and G_j the Gram
    matrices at ``style_layers`` (None: ``model.stages``, j = 0 the finest). Both terms are relative, so that
    the weights mean the same for every model. Mixing the styles' matrices has the gradient of mixing
    their losses.

    The content (N, 3, H, W) keeps its own size, but for ``size``; the styles' longer side is ``style_scale``
    times the content's: in a large style the network sees brushstrokes, in a small one whole motifs.
    It begins at ``start``, or at what ``init`` says. ``colour`` "luminance" paints in grey and puts the
    content's colours back, "histogram" gives the styles its mean and covariance of colours beforehand.
    ``scales`` goes from coarse to fine, which large pictures need for strokes wider than the network sees;
    ``tile`` looks at no more than such parts at once, for a second pass in exchange, with the same gradient.

    ``stylized`` (N, 3, H, W) in [0, 1], ``losses`` (steps, N), ``sources`` (S, 3, H', W') the styles. Raises
    InputError for shares or weights that do not fit, ModelError for tiles where a layer sees further than
    they reach. Source: Gatys et al. 2016; lecture 21.12.1.
    """
    look = Perception(model, content_layer, style_layers, weights)
    shares, content = shares_of(blend, styles), at_most(images, size)
    made: list[Optimization] = []
    for part in (resized(content, 2.0**-scale) for scale in reversed(range(scales))):
        painted = resized(styles, style_scale * max(part.shape[2:]) / max(styles.shape[2:]))
        shown, palettes = prepared(part, painted, colour)
        grams = zip(*(look.style(palette, shares) for palette in palettes), strict=True)
        aim = Aim(look.content(shown), list(map(torch.cat, grams)))
        sides = (part.shape[2], part.shape[3])
        if made:
            begin = resize(made[-1].images, sides)
        elif start is not None:
            begin = resize(start, sides)
        elif init == "noise":
            begin = noise_images(part.shape, seed=seed, sd=0.25).to(part)
        else:
            begin = shown if init == "content" else resize(painted[shares.argmax()], sides)
        made.append(
            paint(
                look,
                begin.expand_as(part),
                aim,
                content_weight=content_weight,
                style_weight=style_weight,
                total_variation=total_variation,
                tile=tile,
                steps=steps,
                optimizer=optimizer,
                lr=lr,
                frames=frames,
            )
        )
    whole = concatenate_stages(made)
    stylized = recoloured(whole.images, content) if colour == "luminance" else whole.images
    return Stylization(
        images=content,
        stylized=stylized,
        style=called(shares),
        sources=at_most(styles, size),
        losses=whole.scores,
        frames=whole.frames,
    )


@hookimpl
def phosphene_methods():
    return [neural_style]
