"""Neural style transfer (Gatys et al.): optimize an image's features and their Gram matrices."""

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import Permute

from phosphene import InputError, ModelError, Reference, hookimpl, load_model, method
from phosphene.images import noise_images, resize
from phosphene.optimize import (
    Optimization,
    PerImage,
    PixelImage,
    concatenate_stages,
    gram_matrix,
    optimize_image,
)
from phosphene.results import Stylization
from phosphene.roles import Content, Frames, Model, Seed, Start, Styles
from phosphene.spec import Cost, PixelRange, either, minimum, param, size

from ._color_transfer import luminance, match_color_statistics, prepare_colors, replace_luminance
from ._parameters import (
    Blend,
    Color,
    ContentLayer,
    ContentWeight,
    LayerWeights,
    LongestSide,
    Scales,
    StyleLayers,
    StyleOptimizer,
    StyleScale,
    StyleWeight,
    TotalVariation,
)
from ._pixel_features import draw_images, gram, load_pixel_model, relative, transfer_loss
from ._resize import coarse_to_fine, scale_images, shrink_to
from ._style_blend import normalize_blend, style_title
from ._style_loss import StyleLoss, StyleTargets, relative_error, smoothness_loss
from ._tiled_gradient import TILE_COUNT, TileSide, image_loss, split_into_tiles, tiled_loss

GATYS = Reference(
    key="gatys2016",
    title="Image Style Transfer Using Convolutional Neural Networks",
    authors="Gatys, Ecker, Bethge",
    year=2016,
    url="https://openaccess.thecvf.com/content_cvpr_2016/html/Gatys_Image_Style_Transfer_CVPR_2016_paper.html",
)


def style_transfer_loss(
    loss_network: StyleLoss,
    targets: StyleTargets,
    content_weight: float,
    style_weight: float | Tensor,
    images: Tensor,
) -> Tensor:
    """alpha L_content + beta L_style of images (N, C, H, W): (N,). beta may be a tensor (N,)."""
    *style_features, content_features = loss_network.features(images)
    style_loss = loss_network.style_loss([gram_matrix(f) for f in style_features], targets.style_grams)
    content_loss = relative_error(content_features, targets.content)
    return content_weight * content_loss + style_weight * style_loss


def optimize_style(
    loss_network: StyleLoss,
    start: Tensor,
    targets: StyleTargets,
    *,
    content_weight: float,
    style_weight: float | Tensor,
    tv_weight: float = 0.0,
    further_loss: PerImage | None = None,
    tile: int | None = None,
    steps: int,
    optimizer: StyleOptimizer = "lbfgs",
    lr: float | None = None,
    frames: int = 0,
) -> Optimization:
    """Minimize the style-transfer loss over the pixels, starting from the images ``start`` (N, C, H, W).

    ``further_loss`` is added to it.
    """
    tiles = None if tile is None else split_into_tiles(loss_network, start, tile)
    if tiles is None:
        loss = partial(style_transfer_loss, loss_network, targets, content_weight, style_weight)
    else:
        loss = partial(tiled_loss, loss_network, targets, tiles, content_weight, style_weight)
    return optimize_image(
        loss if further_loss is None else lambda images: loss(images) + further_loss(images),
        PixelImage(start),
        steps=steps,
        lr=lr or (1.0 if optimizer == "lbfgs" else 0.02),
        optimizer=optimizer,
        maximize=False,
        regularizer=smoothness_loss(tv_weight),
        frames=frames,
    )


def colors_are_matched_and_clipped() -> None:
    """(x - m) s_r / s_x + m_r of one channel, the luminance of primary colors, and a single color."""
    image = torch.tensor([0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1], dtype=torch.float64).view(1, 1, 2, 4)
    reference = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64)
    assert (match_color_statistics(image, reference) - image).abs().max() < 1e-12, "2 x - 0.5 is not clipped"
    matched = match_color_statistics(image, 0.25 + reference / 4)  # of deviation 1 / 8 and mean 3 / 8
    assert (matched - (image - 0.5) / 2 - 0.375).abs().max() < 1e-12
    flat = match_color_statistics(torch.full_like(image, 0.25), reference)
    assert (flat - 0.5).abs().max() < 1e-12, "the mean of an image of one color is not the reference's"
    colors = torch.eye(3, dtype=torch.float64)[None, :, None]  # a red, a green and a blue pixel
    red = colors[..., :1]
    assert luminance(colors).flatten().tolist() == [0.299, 0.587, 0.114]
    white, black = replace_luminance(red, torch.ones_like(red)), replace_luminance(red, torch.zeros_like(red))
    assert (white.flatten() - red.new_tensor([1, 0.701, 0.701])).abs().max() < 1e-12
    assert (black.flatten() - red.new_tensor([0.701, 0, 0])).abs().max() < 1e-12


def layers_and_weights_have_defaults() -> None:
    """The middle one of three stages, weights 3^-j, and an error relative to zero."""
    stages = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.MaxPool2d(2))][:-1]
    loss = StyleLoss(load_model(nn.Sequential(*stages), input_size=(3, 16, 16)))
    assert loss.layers == [*loss.model.stages, loss.model.stages[1]] and loss.weights == [1, 1 / 3, 1 / 9]
    zeros = torch.zeros(2, 3)
    assert relative_error(zeros, zeros).tolist() == [0, 0], "zero features are not equal to themselves"
    styles = torch.zeros(3, 1)
    assert normalize_blend([1e300, 0.0, 3e300], styles).tolist() == [0.25, 0, 0.75], "large weights"
    layers: list[tuple[Any, ...]] = [([],), (["0"], [1.0, 2.0])]
    calls: list[Any] = [partial(StyleLoss, loss.model, None, *args) for args in layers]
    for call in calls + [partial(normalize_blend, blend, styles) for blend in ([], [1.0], [0.0, 0.0, 0.0])]:
        refused = False
        try:
            call()
        except InputError:
            refused = True
        assert refused, f"{call.args[1:]} is accepted"


def sizes_are_rounded() -> None:
    """Smaller images and a factor of one return the images; no side is shorter than one pixel."""
    image = torch.zeros(1, 3, 10, 40)
    assert shrink_to(image, 40) is image and shrink_to(image, 41) is image and scale_images(image, 1) is image
    sizes = [tuple(scale_images(image, factor).shape[2:]) for factor in (2, 0.26, 0.03)]
    assert sizes == [(20, 80), (3, 10), (1, 1)] and shrink_to(image, 20).shape[2:] == (5, 20)


def tiles_cover_images() -> None:
    """The windows of tiles, also of an asymmetric layer; the loss of two images of odd sides."""
    loss_network = StyleLoss(load_pixel_model(), "1", ["0", "1"])
    images = draw_images(2, 3, 15, 37, seed=0)
    tiles = split_into_tiles(loss_network, images, 17)
    assert tiles is not None and split_into_tiles(loss_network, images, 38) is None
    columns = [slice(0, 18), slice(14, 34), slice(30, 37)]
    assert [tile.window for tile in tiles] == [(slice(0, 15), column) for column in columns]
    one_layer = StyleLoss(load_model(nn.Sequential(nn.AvgPool2d(4, 1, 1)), input_size=(3, 16, 16)))
    right = split_into_tiles(one_layer, images, 19)
    assert right is not None and [tile.window[1] for tile in right] == [slice(0, 21), slice(17, 37)]
    targets = StyleTargets(
        loss_network.content_features(images.flip(2)),
        loss_network.style_grams(images[:1] / 2, images.new_ones(1)),
    )
    images.requires_grad_()
    betas = images.new_tensor([5.0, 7.0])
    plain = style_transfer_loss(loss_network, targets, 3.0, betas, images)
    tiled = tiled_loss(loss_network, targets, tiles, 3.0, betas, images)
    gradients = [torch.autograd.grad(loss.sum(), images)[0] for loss in (plain, tiled)]
    assert torch.allclose(plain, tiled, rtol=1e-10), "tiles change the loss"
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10, "tiles change the gradient"
    # At 2 tiles' sides and 1 pixel, less than a stride, the second tile is a pixel larger.
    ends = split_into_tiles(loss_network, images[..., :33], 17)
    assert ends is not None and [tile.window[1].stop for tile in ends] == [18, 33]
    # A loss of features and pixels, of one layer alone, and of pixels alone, with a nonlinear gradient.
    for loss in (
        lambda maps, pixels: sum(m.square().sum((1, 2, 3)).sin() for m in maps) * pixels.mean((1, 2, 3)),
        lambda maps, pixels: maps[1].cos().mean((1, 2, 3)) * images.new_tensor([2.0, 3.0]),
    ):
        values = [image_loss(loss_network, loss, images, tile)(images) for tile in (None, 17)]
        gradients = [torch.autograd.grad(value.sum(), images)[0] for value in values]
        assert torch.allclose(values[0], values[1], rtol=1e-10), "tiles change a loss of features"
        assert (gradients[0] - gradients[1]).abs().max() < 1e-10, "tiles change the gradient of a loss"
    # Of two layouts of one shape, the layer's name says which a map has.
    both = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), Permute([0, 2, 3, 1]))
    square, channels_last = (
        images.detach()[..., :3, :3].float(),
        StyleLoss(load_model(both, input_size=(3, 3, 3)), "1", ["0"]),
    )
    first, last = channels_last.features(square)
    assert torch.equal(first, last) and torch.equal(channels_last.content_features(square), first)
    everywhere = load_model(nn.Sequential(nn.InstanceNorm2d(3)), input_size=(3, 16, 16))
    try:
        split_into_tiles(StyleLoss(everywhere), images, 16)
    except ModelError:
        return
    raise AssertionError("a layer that depends on all pixels is split into tiles")


def pixels_as_features_have_a_closed_form() -> None:
    """Features = pixels: the first loss, the minimum, colors, tiles and scales in closed form."""
    colors_are_matched_and_clipped()
    layers_and_weights_have_defaults()
    sizes_are_rounded()
    tiles_cover_images()
    tested: Any = neural_style  # its result has every field here
    model, seeded = load_pixel_model(), {"seed": 1, "steps": 2}
    content, start = draw_images(2, 3, 8, 12, seed=0), draw_images(2, 3, 8, 12, seed=1)
    styles = draw_images(2, 3, 9, 6, seed=2) / 1.5
    small, large = (resize(styles, sides) for sides in ((6, 4), (12, 8)))
    both = tested(model, content, styles, start, frames=2, **seeded)
    loss = transfer_loss(start, content, large, (0.5, 0.5), weights={"0": 1, "1": 1 / 3}, alpha=1, beta=30)
    assert torch.allclose(both.losses[0], loss, rtol=1e-10), (
        "the first loss is not that of the initial images"
    )
    assert len(both.frames) == 2 and torch.equal(both.sources, styles)
    options: Any = {"content_layer": "1", "style_layers": ["1", "0"], "weights": [2, 0.5], "blend": [1, 3]}
    options |= {"content_weight": 3, "style_weight": 5, "style_scale": 0.5, **seeded}
    for init, initial in (
        ("style", resize(small[1:], (8, 12)).expand(2, -1, -1, -1)),
        ("noise", noise_images(content.shape, seed=1, sd=0.25).to(content)),
        ("content", content),
    ):
        result = tested(model, content, styles, init=init, **options)
        loss = transfer_loss(
            initial,
            content,
            small,
            (0.25, 0.75),
            content_layer="1",
            weights={"1": 2, "0": 0.5},
            alpha=3,
            beta=5,
        )
        assert torch.allclose(result.losses[0], loss, rtol=1e-10), f"the first loss is not that of the {init}"
    assert result.style == "25% of style 0 + 75% of style 1"

    style_only = tested(model, content, styles, content_weight=0, blend=[1, 3], style_layers=["0"], steps=60)
    target = 0.25 * gram(large[:1], "0") + 0.75 * gram(large[1:], "0")
    assert relative(gram(style_only.stylized, "0"), target.expand(2, -1, -1)).max() < 1e-6
    smooth = tested(model, content, styles, style_weight=0, total_variation=2, steps=60).stylized
    smooth.requires_grad_()
    loss = transfer_loss(smooth, content, large, (), weights={}, alpha=1, beta=0, smoothness=2)
    assert torch.autograd.grad(loss.sum(), smooth)[0].abs().max() < 1e-6, "it is not the minimum"
    for optimizer, lr in (("adam", 0.02), ("adam", 0.05), ("lbfgs", 1.0)):
        moved = tested(model, content, styles, optimizer=optimizer, lr=lr, steps=1).stylized
        default = tested(model, content, styles, optimizer=optimizer, steps=1).stylized
        assert torch.equal(moved, default) == (lr != 0.05), "the default step length differs"
    content = 0.3 + 0.3 * content  # of few contrasts: no color is clipped
    for color in ("luminance", "histogram"):
        colored = tested(model, content, styles[:1], color=color, steps=1)
        (gray, (style, _)) = prepare_colors(content, large[:1], color)
        loss = transfer_loss(gray[:1], gray[:1], style, weights={"0": 1, "1": 1 / 3}, alpha=1, beta=30)
        assert torch.allclose(colored.losses[0, 0], loss, rtol=1e-10), f"{color}: the first loss differs"
        flat_content, flat_style = gray[0].flatten(1), style[0].flatten(1)
        assert torch.allclose(flat_style.mean(1), flat_content.mean(1)), f"{color}: the mean color differs"
        assert torch.allclose(flat_style.cov(correction=0), flat_content.cov(correction=0), atol=1e-6)
        luma = torch.einsum("nchw,c->nhw", content, content.new_tensor((0.299, 0.587, 0.114)))
        assert color == "histogram" or torch.allclose(gray, luma[:, None])
        change = colored.stylized - content  # of the luminance: the same for all channels
        assert (change.std(1).max() < 1e-12) == (color == "luminance")

    wide = draw_images(1, 3, 16, 36, seed=3)
    tiled = tested(model, wide, styles, wide.flip(3), tile=16, steps=3, total_variation=2.0)
    plain = tested(model, wide, styles, wide.flip(3), steps=3, total_variation=2.0)
    assert torch.allclose(tiled.losses, plain.losses, rtol=1e-10), "tiles change the loss"
    assert (tiled.stylized - plain.stylized).abs().max() < 1e-9, "tiles change the result"
    stages: list[Any] = []
    for sides in ((4, 9), (8, 18), (16, 36)):
        previous = resize(stages[-1].stylized, sides) if stages else None
        stages.append(tested(model, resize(wide, sides), styles, previous, **seeded))
    scales = tested(model, wide, styles, scales=3, **seeded)
    assert torch.equal(scales.stylized, stages[-1].stylized), "scales are not stages that continue"
    assert torch.equal(scales.losses, torch.cat([stage.losses for stage in stages]))
    shrunk = tested(model, wide, styles, size=8, **seeded)
    assert torch.equal(shrunk.images, resize(wide, (4, 8))) and shrunk.sources.shape[2:] == (8, 5)


@method(
    family="style",
    references=[
        GATYS,
        Reference(
            key="gatys2016color",
            title="Preserving Color in Neural Artistic Style Transfer",
            authors="Gatys, Bethge, Hertzmann, Shechtman",
            year=2016,
            url="https://arxiv.org/abs/1606.05897",
        ),
    ],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    # L-BFGS evaluates the loss once or twice per step, and a tiled loss runs every tile forward twice.
    cost=Cost(
        forward=param.scales
        * size.images
        * ((2 * param.steps + 1) * minimum(2, either(param.tile, 1)) * TILE_COUNT + 1 + size.styles),
        backward=param.scales * size.images * (2 * param.steps + 1) * TILE_COUNT,
    ),
    oracle=pixels_as_features_have_a_closed_form,
    quick={"steps": 3, "scales": 1, "tile": None},
    demo={
        "images": {"files": "builtin:part-scenes/2", "size": (128, 128)},
        "styles": ["builtin:night"],
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
    weights: LayerWeights = None,
    content_weight: ContentWeight = 1.0,
    style_weight: StyleWeight = 30.0,
    total_variation: TotalVariation = 0.0,
    style_scale: StyleScale = 1.0,
    init: Annotated[
        Literal["content", "noise", "style"], Field(description="initial image, unless start is set")
    ] = "content",
    color: Color = "style",
    size: LongestSide = 512,
    scales: Scales = 1,
    tile: TileSide = None,
    steps: Annotated[int, Field(ge=1, le=100_000, description="optimization steps at each scale")] = 100,
    optimizer: StyleOptimizer = "lbfgs",
    lr: Annotated[
        float | None, Field(gt=0, le=1000, description="step length; default: 1 for lbfgs, 0.02 for adam")
    ] = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Stylization:
    """Neural style transfer (Gatys et al.): images optimized for content features and style Gram matrices.

    L(I) = alpha |phi(I) - phi(I_c)|^2 / |phi(I_c)|^2 + beta sum_j w_j |G_j(I) - G_j|_F^2 / |G_j|_F^2

    G_j = sum_s gamma_s G_j(I_s),  sum_s gamma_s = 1

    with phi the features at ``content_layer`` (default: the middle one of ``model.stages``) and G_j the Gram
    matrices at ``style_layers`` (default: ``model.stages``, j = 0 the finest). Both terms are relative, so
    the same weights suit every model. Blending the styles' Gram matrices has the gradient of
    blending their losses. ``total_variation`` adds the total variation per pixel to the loss.

    The content (N, 3, H, W) is processed at its own size, up to ``size``; the styles' longer side is
    ``style_scale`` times the content's: a large style transfers brushstrokes, a small one its motifs.
    Optimization begins at ``start``, or at the image that ``init`` names. ``color`` "luminance" stylizes the
    luminance and restores the content's colors, "histogram" first matches the styles' color mean and
    covariance to the content's. ``scales`` optimizes from coarse to fine, which large images need for strokes
    larger than a receptive field; ``tile`` computes the same gradient in bounded memory, at twice the time.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``losses`` (steps, N),
        ``sources`` (S, 3, H', W') the styles, ``frames`` (F, N, 3, H, W).

    Raises:
        InputError: blend or layer weights that do not fit the styles or layers.
        ModelError: tiles for a layer whose receptive field covers the image.

    Example::
        from phosphene import run

        result = run("neural_style", images="builtin:scenes/1", styles=["builtin:swirls"], steps=2)
        result.stylized.shape  # (1, 3, 64, 64)

    Source: Gatys et al. 2016, sections 2.1 to 2.3; lecture 21.12.1.
    """
    loss_network = StyleLoss(model, content_layer, style_layers, weights)
    blend_weights, content = normalize_blend(blend, styles), shrink_to(images, size)
    stages: list[Optimization] = []
    for scaled_content, scaled_styles in coarse_to_fine(content, styles, scales, style_scale):
        height, width = scaled_content.shape[2:]
        content_image, style_images = prepare_colors(scaled_content, scaled_styles, color)
        grams = zip(*(loss_network.style_grams(s, blend_weights) for s in style_images), strict=True)
        targets = StyleTargets(loss_network.content_features(content_image), [*map(torch.cat, grams)])
        if stages:
            initial = resize(stages[-1].images, (height, width))
        elif start is not None:
            initial = resize(start, (height, width))
        elif init == "noise":
            initial = noise_images(scaled_content.shape, seed=seed, sd=0.25).to(scaled_content)
        elif init == "style":
            initial = resize(scaled_styles[blend_weights.argmax()], (height, width))
        else:
            initial = content_image
        stages.append(
            optimize_style(
                loss_network,
                initial.expand_as(scaled_content),
                targets,
                content_weight=content_weight,
                style_weight=style_weight,
                tv_weight=total_variation,
                tile=tile,
                steps=steps,
                optimizer=optimizer,
                lr=lr,
                frames=frames,
            )
        )
    optimization = concatenate_stages(stages)
    stylized = optimization.images
    return Stylization(
        images=content,
        stylized=replace_luminance(content, stylized) if color == "luminance" else stylized,
        style=style_title(blend_weights),
        sources=shrink_to(styles, size),
        losses=optimization.scores,
        frames=optimization.frames,
    )


@hookimpl
def phosphene_methods():
    return [neural_style]
