"""Whitening and coloring transform (WCT): images whose features have the covariance of a style's."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, hookimpl, method, progress_bar, to_float64
from phosphene.results import Stylization
from phosphene.roles import AdaptiveStylizer, Images, Styles
from phosphene.spec import Cost, InvariantTo, PixelRange, SameShape, size

from ._adaptive_network import AdaptiveNetwork, require_adaptive_network
from ._color_transfer import prepare_colors, replace_luminance
from ._parameters import Blend, Color
from ._pixel_features import MEAN, STD, draw_images, load_pixel_model, pixel_features
from ._style_blend import normalize_blend, style_title

#: Least variance of a principal axis, as a fraction of the largest: the directions of smaller ones are noise.
MIN_VARIANCE = 1e-5


def covariance_power(features: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Mean (C, 1) and a power (C, C) of the covariance of features (C, M) on their principal axes.

    Axes with less than ``MIN_VARIANCE`` of the largest variance are set to zero.
    """
    mean = features.mean(1, keepdim=True)
    centered = features - mean
    variances, axes = torch.linalg.eigh(centered @ centered.T / max(1, features.shape[1] - 1))
    relevant = variances > MIN_VARIANCE * variances.amax().clamp(min=1e-30)
    powers = torch.where(relevant, variances.clamp(min=1e-30) ** power, 0)
    return mean, (axes * powers) @ axes.T


def whiten_and_color(content: Tensor, style: Tensor) -> Tensor:
    """S_s^(1/2) S_c^(-1/2) (f_c - m_c) + m_s of feature maps (C, h, w) and (C, h', w')."""
    maps, style_maps = (to_float64(f.flatten(1)) for f in (content, style))
    mean, whitening = covariance_power(maps, -0.5)
    style_mean, coloring = covariance_power(style_maps, 0.5)
    transformed = coloring @ (whitening @ (maps - mean)) + style_mean
    return transformed.view_as(content).to(content)


def pixels_as_features_have_a_closed_form() -> None:
    """With pixels as features and the identity as decoder: the color covariance of the style, and blends."""
    tested: Any = wct  # its result has every field here
    model, decoder = load_pixel_model(), nn.Conv2d(3, 3, 1).double()
    std, mean = torch.tensor(STD, dtype=torch.float64), torch.tensor(MEAN, dtype=torch.float64)
    decoder.weight.data, decoder.bias = torch.diag(std)[:, :, None, None], nn.Parameter(mean)
    stylizer = AdaptiveNetwork.from_decoder(model, decoder, "0")
    contents = 0.4 + 0.25 * (draw_images(2, 3, 8, 8, seed=0) - 0.5)  # of few contrasts: nothing is clipped
    styles = 0.5 + 0.2 * (draw_images(2, 3, 6, 9, seed=1) - 0.5)
    mix = torch.tensor([[0.8, 0.3, 0.1], [0.1, 0.6, 0.2], [0.0, 0.3, 0.9]], dtype=torch.float64)
    styles = torch.einsum("ij,njhw->nihw", mix, styles)

    def by_hand(content: Tensor, style: Tensor) -> Tensor:
        """WCT with roots and inverse roots by the iteration of Denman and Beavers."""
        roots = []
        for maps in (content, style):
            covariance = maps.flatten(1).cov()
            y, z = covariance / covariance.trace(), torch.eye(3, dtype=torch.float64)
            for _ in range(60):
                t = (3 * torch.eye(3, dtype=torch.float64) - z @ y) / 2
                y, z = y @ t, t @ z
            roots.append((y * covariance.trace().sqrt(), z / covariance.trace().sqrt()))
        centered = content.flatten(1) - content.flatten(1).mean(1, keepdim=True)
        moved = roots[1][0] @ roots[0][1] @ centered + style.flatten(1).mean(1, keepdim=True)
        return moved.view_as(content)

    for alpha, blend in ((1.0, [1.0, 0.0]), (0.4, [1.0, 3.0])):
        result = tested(contents, styles, stylizer, alpha=alpha, blend=blend)
        for stylized, content in zip(result.stylized, contents, strict=True):
            features = pixel_features(content[None], "0")[0]
            moved = [by_hand(features, pixel_features(s[None], "0")[0]) for s in styles]
            weights = [b / sum(blend) for b in blend]
            mixed = (1 - alpha) * features + alpha * (weights[0] * moved[0] + weights[1] * moved[1])
            expected = mixed * std[:, None, None] + mean[:, None, None]
            assert (stylized - expected).abs().max() < 1e-9, f"alpha={alpha}: pixels differ"
        assert torch.equal(result.sources, styles) and torch.equal(result.images, contents)
    colored = tested(contents[:1], styles[:1], stylizer).stylized[0]
    assert torch.allclose(colored.flatten(1).cov(), styles[0].flatten(1).cov(), rtol=1e-8), (
        "the color covariance is not the style's"
    )
    # What leaves [0, 1] is clipped.
    strong = (0.5 + 4 * (styles[:1] - 0.5)).clamp(0, 1)
    unclipped = by_hand(*(pixel_features(x, "0")[0] for x in (contents[:1], strong)))
    unclipped = unclipped * std[:, None, None] + mean[:, None, None]
    assert unclipped.max() > 1
    clipped = tested(contents[:1], strong, stylizer).stylized[0]
    assert (clipped - unclipped.clamp(0, 1)).abs().max() < 1e-9
    gray = torch.full_like(contents[:1], 0.3)
    flat = tested(gray, styles[:1], stylizer).stylized
    assert (flat - styles[:1].mean((2, 3), keepdim=True)).abs().max() < 1e-9, "a constant image has no axes"
    line = contents[:1, :1].expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.5, 0.2]).double()[:, None, None]
    _, whitening = covariance_power(line[0].flatten(1), -0.5)
    assert torch.linalg.matrix_rank(whitening) == 1, "an axis without variance is amplified"
    for color in ("luminance", "histogram"):
        colored = tested(contents, styles[:1], stylizer, color=color).stylized
        gray_content, style_images = prepare_colors(contents, styles[:1], color)
        plain = torch.cat([
            tested(image, style_images[n], stylizer).stylized for n, image in enumerate(gray_content.split(1))
        ])  # fmt: skip
        expected = replace_luminance(contents, plain) if color == "luminance" else plain
        assert torch.allclose(colored, expected, atol=1e-9), f"{color}: colors differ"


@method(
    family="style",
    title="WCT style transfer",
    references=[
        Reference(
            key="li2017",
            title="Universal Style Transfer via Feature Transforms",
            authors="Li, Fang, Yang, Wang, Lu, Yang",
            year=2017,
            url="https://arxiv.org/abs/1705.08086",
        )
    ],
    invariants=[PixelRange(field="stylized"), SameShape(field="stylized")],
    relations=[InvariantTo("batch_order")],
    cost=Cost(forward=size.images + size.images * size.styles),
    oracle=pixels_as_features_have_a_closed_form,
    demo={"styles": ["builtin:swirls"], "alpha": 0.8},
)
def wct(
    images: Images,
    styles: Styles,
    stylizer: AdaptiveStylizer,
    *,
    blend: Blend = None,
    alpha: Annotated[
        float, Field(ge=0, le=1, description="strength of the style; 0 decodes the content's own features")
    ] = 1.0,
    color: Color = "style",
) -> Stylization:
    """Whitening and coloring transform (WCT): images whose feature covariance is that of any style.

    T(c, s) = g((1 - alpha) f(c) + alpha sum_s gamma_s WCT(f(c), f(s))),   sum_s gamma_s = 1

    WCT(x, y) = S_y^(1/2) S_x^(-1/2) (x - m_x) + m_y

    with S the covariance (C, C) of the features and m their mean, over all positions. AdaIN, in
    ``adaptive_style``, matches the variance of each channel only; with the covariances the features' Gram
    matrix becomes the style's. Principal axes of less than 1e-5 of the largest variance are left out.

    The encoder f and the decoder g are those of ``stylizer``, a result of ``adaptive_style_fit`` or its
    folder; ``AdaptiveNetwork.from_decoder`` makes one of any decoder. Images (N, 3, H, W) and styles
    (S, 3, H', W') are of any size, in [0, 1]. ``color`` "luminance" stylizes the luminance and restores the
    content's colors, "histogram" first matches the styles' color mean and covariance to the content's.
    Several levels, as in the paper, are several calls, the deepest layer first, each on the result of the
    last.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``style`` its title,
        ``sources`` (S, 3, H', W') the styles.

    Raises:
        InputError: blend weights that do not fit the styles, or a network of another method.
        ModelError: an encoder that cannot be loaded.

    Example::
        from phosphene import run

        result = run("wct", images="builtin:scenes/2", styles=["builtin:swirls"], alpha=0.6)
        result.stylized.shape  # (2, 3, 64, 64)

    Source: Li et al. 2017, section 3.
    """
    network, blend_weights = require_adaptive_network(stylizer, "wct"), normalize_blend(blend, styles)
    content, style_images = prepare_colors(images, styles, color)
    style_features = [[network.encode(style)[0] for style in batch.split(1)] for batch in style_images]
    batches = []
    for n, image in enumerate(progress_bar(content.split(1), "Stylizing", len(images))):
        own_styles = style_features[n % len(style_features)]  # one list for all images, or one for each
        features = network.encode(image)[0]
        transformed = torch.stack([whiten_and_color(features, style) for style in own_styles])
        target = torch.einsum("s,schw->chw", blend_weights.to(features), transformed)
        stylized = network.decode(features.lerp(target, alpha)[None], image)
        batches.append(stylized.clamp(0, 1).to(images))
    stylized = torch.cat(batches)
    return Stylization(
        images=images,
        stylized=replace_luminance(images, stylized) if color == "luminance" else stylized,
        style=style_title(blend_weights),
        sources=styles,
    )


@hookimpl
def phosphene_methods():
    return [wct]
