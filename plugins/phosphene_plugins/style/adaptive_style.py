"""Adaptive style: a network that repaints any picture in any style it is shown, in one pass."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, batch_size, hookimpl, load_model, method, progress_bar
from phosphene.results import Stylization
from phosphene.roles import AdaptiveStylizer, Dataset, Images, LayerName, Model, Seed, Styles
from phosphene.spec import Cost, PixelRange, SameShape, param, size
from phosphene.training import train

from ._adain import renormalized, statistics
from ._adaptive_network import AdaptiveNetwork, Decoder, mirrored, stages_up_to
from ._color_transfer import Colour, prepared, recoloured
from ._optimize_style import Blend, called, shares_of
from ._style_loss import relative

HUANG = Reference(
    key="huang2017",
    title="Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
    authors="Huang, Belongie",
    year=2017,
    url="https://arxiv.org/abs/1703.06868",
)
#: How many pictures show what was learned.
SHOWN = 4


def pixels_are_given_the_styles_colours() -> None:
    """Where maps are pixels and the decoder changes nothing, it is AdaIN of the pixels, in closed form."""
    pixels = nn.Conv2d(3, 3, 1, bias=False).double()
    pixels.weight.data = torch.eye(3, dtype=torch.float64)[:, :, None, None]
    encoder = load_model(nn.Sequential(pixels), input_size=(3, 8, 8))
    stylizer = AdaptiveNetwork.of(encoder, nn.Conv2d(3, 3, 1, bias=False).double(), "0")
    stylizer.network.weight.data = pixels.weight.data.clone()
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=random, dtype=torch.float64)
    content, style = 0.4 + 0.2 * draw(1, 3, 8, 8), 0.3 + 0.3 * draw(1, 3, 6, 9)
    places, deviation = (
        content.mean((2, 3), keepdim=True),
        lambda x: (x.var((2, 3), keepdim=True) + 1e-5).sqrt(),
    )
    wanted = deviation(style) * (content - places) / deviation(content) + style.mean((2, 3), keepdim=True)
    for alpha in (0.0, 0.25, 1.0):
        made = adaptive_style(content, style, stylizer, alpha=alpha).stylized
        expected = (1 - alpha) * content + alpha * wanted
        assert (made - expected.clamp(0, 1)).abs().max() < 1e-9, f"alpha={alpha} is not the equation"


@method(
    family="style",
    references=[HUANG],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(forward=3 * param.steps * param.batch + 8, backward=param.steps * param.batch),
    network=lambda widths, channels, **_: Decoder(widths, channels),
    oracle=pixels_are_given_the_styles_colours,
    quick={"steps": 2, "batch": 2},
    demo={"styles": "builtin:textures/64", "steps": 120, "batch": 4, "lr": 5e-3},
)
def adaptive_style_fit(
    model: Model,
    dataset: Dataset,
    styles: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="f; the middle stage")] = None,
    style_layers: Annotated[
        list[LayerName] | None, Field(description="the phi_j; the stages up to the layer, and it")
    ] = None,
    style_weight: Annotated[float, Field(ge=0, le=1e6, description="weight of the style")] = 10.0,
    reconstruction_weight: Annotated[
        float, Field(ge=0, le=1e6, description="weight of what a content becomes in its own style")
    ] = 30.0,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="steps of Adam")] = 2000,
    batch: Annotated[int, Field(ge=1, le=1024, description="pictures a step")] = 8,
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate, falling to zero")] = 2e-3,
    seed: Seed = None,
) -> AdaptiveNetwork:
    """Train a decoder that paints what AdaIN makes of any content and any style back into pixels.

    t = AdaIN(f(c), f(s)) = sigma(f(s)) (f(c) - mu(f(c))) / sigma(f(c)) + mu(f(s))
    min_g E_c,s  |f(g(t)) - t|^2 / |t|^2
               + style_weight sum_j |m_j(g(t)) - m_j(s)|^2 / |m_j(s)|^2,   m_j = (mu(phi_j), sigma(phi_j))
               + reconstruction_weight |g(f(c)) - c|^2 / |c|^2

    with f the model's features at ``layer`` (None: the middle one of ``model.stages``), phi_0 the pixels,
    phi_j the features at ``style_layers`` and g the decoder, f's mirror image: at each of f's resolutions as
    wide as its stage. The paper has neither phi_0 nor the last term, for t = f(c) where the style is the
    content's own; a network that was not trained on photographs forgets colours, and needs both.
    Only g is trained, by Adam; every content of a step is paired with a style drawn anew. All terms are
    relative, so that the weight means the same for every model.

    Contents (N, C, H, W) and ``styles`` (S, C, H', W'), two data sets, in [0, 1]: the more different styles,
    the better an unseen one is painted. ``losses`` (steps,); ``previews`` (4, C, H, W) the first contents in
    the first styles. The result knows its encoder; a run that was cut off goes on.

    Raises DivergenceError if the loss is no longer finite, ModelError for a layer without places.
    Source: Huang and Belongie 2017.
    """
    first = dataset.read(range(min(SHOWN, len(dataset)))).to(model.device, model.dtype)
    layer = layer or model.stages[(len(model.stages) - 1) // 2]
    looked = style_layers or stages_up_to(model, layer)
    config: dict[str, Any] = {"widths": mirrored(model, layer), "channels": first.shape[1]}
    stylizer = AdaptiveNetwork.of(model, Decoder(**config).to(first), layer, config=config)
    decoder = stylizer.network.requires_grad_(True)

    def look(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f (N, C, h, w), and the means and deviations (N, 2 C_j) of the pixels and at the style's layers."""
        images = stylizer.whole(images)
        maps, *others = (model.maps(f, images) for f in model.features_of(images, [layer, *looked]))
        return maps, [torch.cat(statistics(m, each=True), 1).flatten(1) for m in (images, *others)]

    def loss(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        """(n,) one for each content, whose style depends on the step and its place alone."""
        random = torch.Generator().manual_seed(((seed or 0) + round(share * steps)) % 2**63)
        which = torch.randint(len(styles), (len(dataset),), generator=random)[list(places)].tolist()
        with torch.no_grad():
            style, wanted = look(styles.read(which).to(images))
            content, _ = look(images)
            target = renormalized(content, *statistics(style, each=True))
        found, seen = look(stylizer.decode(target, images))
        again = relative(stylizer.decode(content, images), images)
        total = relative(found, target) + reconstruction_weight * again
        for own, other in zip(seen, wanted, strict=True):
            total = total + style_weight * relative(own, other)
        return total

    optimizer = torch.optim.Adam(decoder.parameters(), lr)
    course = train(
        decoder, dataset, loss, optimizer, steps=steps, batch=batch, seed=seed or 0,
        at_once=batch_size(model), schedule=lambda share: 1 - share,
    )  # fmt: skip
    shown = [n % len(styles) for n in range(len(first))]
    with torch.no_grad():
        manner = stylizer.manner(styles.read(shown).to(first))
        previews = stylizer.paint(first, manner, torch.eye(len(first)))
    labels = tuple(f"in style {styles.id(n)}" for n in shown)
    return dataclasses.replace(stylizer, losses=course.losses, previews=previews, labels=labels)


@method(
    family="style",
    references=[HUANG],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    cost=Cost(forward=size.images + size.images * size.styles),
    oracle=pixels_are_given_the_styles_colours,
    demo={"styles": ["builtin:swirls"]},
)
def adaptive_style(
    images: Images,
    styles: Styles,
    stylizer: AdaptiveStylizer,
    *,
    blend: Blend = None,
    alpha: Annotated[float, Field(ge=0, le=1, description="how much style; 0 paints the content")] = 1.0,
    colour: Annotated[
        Colour, Field(description="whose colours: the style's, or the content's, kept in one of two ways")
    ] = "style",
) -> Stylization:
    """Repaint pictures in any style that is shown, in one pass and without training for it.

    T(c, s) = g((1 - alpha) f(c) + alpha sum_s gamma_s AdaIN(f(c), f(s))),   sum_s gamma_s = 1
    AdaIN(x, y) = sigma(y) (x - mu(x)) / sigma(x) + mu(y)                     (per channel)

    with the encoder f and the decoder g of ``stylizer``, which is what ``adaptive_style_fit`` gave, or its
    folder. Pictures (N, 3, H, W) and styles (S, 3, H', W') of any size, in [0, 1]. With ``alpha`` 0 the
    decoder paints the content as it knows it; ``blend`` mixes several styles. ``colour`` "luminance" paints
    in grey and puts the content's colours back, "histogram" gives the styles its mean and covariance of
    colours beforehand.

    A decoder paints with the brushstrokes that it learned: the more styles it was trained on, the more
    there are. Raises InputError for shares that do not fit and for another network, ModelError where the
    encoder is not at hand. Source: Huang and Belongie 2017, sections 5 and 6.4.
    """
    network, shares = adaptive(stylizer), shares_of(blend, styles)
    shown, palettes = prepared(images, styles, colour)
    manners = [network.manner(palette) for palette in palettes]
    painted = []
    for n, image in enumerate(progress_bar(shown.split(1), "Painting", len(images))):
        painted.append(network.paint(image, manners[n % len(manners)], shares[None], alpha))
    stylized = torch.cat(painted)
    return Stylization(
        images=images,
        stylized=recoloured(stylized, images) if colour == "luminance" else stylized,
        style=called(shares),
        sources=styles,
    )


def adaptive(stylizer: object) -> AdaptiveNetwork:
    """The stylizer, or an InputError where it is another's."""
    if not isinstance(stylizer, AdaptiveNetwork):
        made = getattr(stylizer, "method", "something else")
        raise InputError(f"adaptive_style applies a network of adaptive_style_fit, not one of {made}")
    return stylizer


@hookimpl
def phosphene_methods():
    return [adaptive_style, adaptive_style_fit]
