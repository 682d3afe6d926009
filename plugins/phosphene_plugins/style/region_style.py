"""Style transfer by region: one style inside a mask, others outside, by Gram matrices of regions."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, hookimpl, load_model, method
from phosphene.images import resize
from phosphene.optimize import PixelImage, optimize_image
from phosphene.results import Stylization
from phosphene.roles import Content, Frames, Guide, Masks, Model, Start, Styles
from phosphene.spec import Cost, PixelRange, either, minimum, param, size

from ._parameters import (
    ContentLayer,
    ContentWeight,
    LayerWeights,
    LongestSide,
    StyleLayers,
    StyleScale,
    StyleWeight,
    TotalVariation,
)
from ._pixel_features import draw_images, load_pixel_model, pixel_features, relative, transfer_loss
from ._region_masks import erode, field_reach, region_gram, region_weights
from ._resize import scale_styles, shrink_to
from ._style_loss import StyleLoss, relative_error, smoothness_loss
from ._tiled_gradient import TILE_COUNT, TileSide, image_loss


def regions_are_stylized_separately() -> None:
    """Features = pixels: masks of ones are neural style; two regions have a closed-form loss and minimum."""
    eroded_masks_by_hand()
    tested: Any = region_style  # its result has every field here
    model, content = load_pixel_model(), draw_images(2, 3, 8, 12, seed=0)
    styles, start = draw_images(3, 3, 9, 6, seed=1), draw_images(2, 3, 8, 12, seed=2)
    large = resize(styles, (12, 8))
    everywhere = torch.ones(2, 8, 12, dtype=torch.bool)
    options: Any = {"content_weight": 2.0, "style_weight": 5.0, "steps": 1}
    plain = tested(model, content, styles[:1], everywhere, None, start, **options)
    loss = transfer_loss(start, content, large[:1], weights={"0": 1, "1": 1 / 3}, alpha=2, beta=5)
    assert torch.allclose(plain.losses[0], loss, rtol=1e-10), "a mask of ones is not the style-transfer loss"
    smooth = tested(model, content, styles[:1], style_weight=0, total_variation=2, steps=60).stylized
    smooth.requires_grad_()
    loss = transfer_loss(smooth, content, large, (), weights={}, alpha=1, beta=0, smoothness=2)
    assert torch.autograd.grad(loss.sum(), smooth)[0].abs().max() < 1e-6, "it is not the minimum"
    coarse = tested(model, content, styles[:1], None, None, start, content_layer="1", **options)
    loss = transfer_loss(
        start, content, large[:1], content_layer="1", weights={"0": 1, "1": 1 / 3}, alpha=2, beta=5
    )
    assert torch.allclose(coarse.losses[0], loss, rtol=1e-10), "the content layer is not the one chosen"
    regions_that_vanish_are_refused(model, content, styles)
    masks = everywhere.clone()
    masks[:, :, 5:] = False
    guides = torch.zeros(3, 3, 9, 6, dtype=torch.float64)
    guides[..., :3] = 1  # the left half of each style
    guides[:, 0] = 1  # red has a mean of 1/3
    options = {"style_layers": ["0"], "weights": [1.0], "content_weight": 0.0, "style_weight": 1.0}
    split = tested(model, content, styles, masks, guides, start, steps=60, **options)
    features, style_features = pixel_features(start, "0"), pixel_features(large, "0")[..., :4]

    def gram(maps: Tensor) -> Tensor:
        return maps.flatten(2) @ maps.flatten(2).mT / maps[0, 0].numel()

    targets = gram(style_features)[:1], gram(style_features)[1:].mean(0, keepdim=True)
    loss = sum(
        (relative(gram(part), target.expand(2, -1, -1)) for part, target in
         zip((features[..., :5], features[..., 5:]), targets, strict=True)),
        torch.zeros(2, dtype=torch.float64),
    )  # fmt: skip
    assert torch.allclose(split.losses[0], loss, rtol=1e-10), "the first loss is not that of the regions"
    stylized = pixel_features(split.stylized, "0")
    for part, target in zip((stylized[..., :5], stylized[..., 5:]), targets, strict=True):
        assert relative(gram(part), target.expand(2, -1, -1)).max() < 1e-6, "a region has another style"
    assert split.style == "styles by region" and torch.equal(split.sources, styles)
    options |= {"steps": 2, "frames": 2}
    small = tested(model, content, styles, masks, guides, size=8, **options)
    assert len(small.frames) == 2 and small.images.shape == (2, 3, 5, 8)
    columns = masks[:, :5][..., [0, 1, 3, 4, 6, 7, 9, 10]]  # of 12, every 1.5
    shrunk = tested(model, shrink_to(content, 8), styles, columns, guides, **options)
    torch.testing.assert_close(small.losses, shrunk.losses)


def regions_that_vanish_are_refused(model: Model, content: Tensor, styles: Tensor) -> None:
    """A pixel inside, or outside, is lost by erosion at the coarse layer alone, or at both layers."""
    tested: Any = region_style
    options: Any = {"erosion": 1.0, "steps": 1}
    for pixel_is_inside in (False, True):
        masks = torch.full((3, 8, 12), not pixel_is_inside)
        masks[1, 4, 6] = pixel_is_inside
        masks[::2, :, 6:] = pixel_is_inside
        images = content[[0, 1, 0]]
        result = tested(model, images, styles, masks, style_layers=["0", "1"], **options)
        assert result.losses.isfinite().all(), "a region that remains at one of two layers"
        refusal = ""
        try:
            tested(model, images, styles, masks, style_layers=["1"], **options)
        except InputError as error:
            refusal = str(error)
        assert "nothing of a region or of its style remains" in refusal, refusal


def eroded_masks_by_hand() -> None:
    """A radius erodes squares, not borders; a cell is inside if all its pixels are; reaches of two layers."""
    masks = torch.ones(1, 6, 7, dtype=torch.bool)
    masks[0, 2, 5] = False
    eroded = erode(masks, 1)[0]
    assert (~eroded).nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (4, 5, 6)]
    assert torch.equal(erode(masks, 0), masks)
    assert region_weights(masks, torch.Size((3, 3)))[0, 0].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert [[y.min(), y.max(), x.min(), x.max()] for y, x in [(~erode(masks, 2)[0]).nonzero().T]] == [
        [0, 4, 3, 6]
    ]
    model = load_pixel_model()
    assert [field_reach(model, layer, (16, 16)) for layer in ("0", "1")] == [0, 1]
    # Receptive fields of five pixels that extend to a single side: left, right, up, down.
    for pads, kernel in (((4, 0), (1, 5)), ((0, 4), (1, 5)), ((0, 0, 4, 0), (5, 1)), ((0, 0, 0, 4), (5, 1))):
        padded = nn.Sequential(nn.ZeroPad2d((*pads, 0, 0)[:4]), nn.AvgPool2d(kernel, 1))
        assert field_reach(load_model(padded, input_size=(3, 9, 9)), "1", (9, 9)) == 4, pads


@method(
    family="style",
    references=[
        Reference(
            key="gatys2017",
            title="Controlling Perceptual Factors in Neural Style Transfer",
            authors="Gatys, Ecker, Bethge, Hertzmann, Shechtman",
            year=2017,
            url="https://arxiv.org/abs/1611.07865",
        )
    ],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    # L-BFGS evaluates the loss once or twice per step.
    cost=Cost(
        forward=size.images * ((2 * param.steps + 1) * minimum(2, either(param.tile, 1)) * TILE_COUNT + 1)
        + size.styles
        + 1,
        backward=size.images * (2 * param.steps + 1) * TILE_COUNT,
    ),
    oracle=regions_are_stylized_separately,
    quick={"steps": 3},
    exempt={"parameters_matter": "erosion matters only with masks"},
    demo={
        "images": "builtin:scenes/2",
        "styles": ["builtin:swirls", "builtin:bricks"],
        "style_weight": 10,
        "total_variation": 3,
    },
)
def region_style(
    model: Model,
    images: Content,
    styles: Styles,
    masks: Masks = None,
    style_masks: Guide = None,
    start: Start = None,
    *,
    content_layer: ContentLayer = None,
    style_layers: StyleLayers = None,
    weights: LayerWeights = None,
    content_weight: ContentWeight = 1.0,
    style_weight: StyleWeight = 30.0,
    total_variation: TotalVariation = 0.0,
    erosion: Annotated[
        float,
        Field(ge=0, le=1, description="erosion of regions, as a fraction of the extent of receptive fields"),
    ] = 0.5,
    style_scale: StyleScale = 1.0,
    size: LongestSide = 512,
    tile: TileSide = None,
    steps: Annotated[int, Field(ge=1, le=100_000, description="number of optimization steps")] = 100,
    frames: Frames = 0,
) -> Stylization:
    """Style transfer by region: one style inside each image's mask and others outside, by Gram matrices.

    L(I) = alpha L_content + beta sum_r sum_j w_j |G_jr(I) - G_jr|_F^2 / |G_jr|_F^2

    G_jr = sum_p m_jr(p) F_jp F_jp^T / sum_p m_jr(p)

    with L_content and w_j as in ``neural_style``, and m_jr the positions of layer j in the region r. The
    first style is for the region inside the mask, the mean of the others' Gram matrices for the region
    outside; with a single style there is no loss outside but that of the content. With a mask of ones and a
    single style this is ``neural_style``. Without ``masks`` the region is the image, of a single style.

    A position belongs to a region if all pixels of its cell do, after the mask is eroded by ``erosion`` times
    the extent of the layer's receptive fields: otherwise a style bleeds into its neighbor. A layer at which
    nothing of a region remains does not contribute to it. ``style_masks`` (1 or S, C, H, W), white where a
    style is to be taken from, limit the styles in the same way. ``tile`` computes the same gradient without
    the activations of all layers in memory, at twice the time.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``losses`` (steps, N),
        ``sources`` (S, 3, H', W') the styles, ``frames`` (F, N, 3, H, W).

    Raises:
        InputError: several styles without masks, layer weights that do not fit the layers, style masks that
            do not fit the styles, or a region or style mask of which nothing remains at any layer.
        ModelError: tiles for a layer whose receptive field covers the image.

    Example::
        from phosphene import run

        styles = ["builtin:swirls", "builtin:bricks"]
        result = run("region_style", images="builtin:scenes/1", styles=styles, steps=2)
        result.stylized.shape  # (1, 3, 64, 64)

    Source: Gatys et al. 2017, section 4 (spatial control, guided Gram matrices).
    """
    if masks is None and len(styles) > 1:
        raise InputError(
            f"{len(styles)} styles need masks: the first style is for the region inside each image's mask, "
            "the others for the region outside; without masks pass one style"
        )
    loss_network, content = StyleLoss(model, content_layer, style_layers, weights), shrink_to(images, size)
    height, width = content.shape[2:]
    inside = torch.ones_like(images[:, 0], dtype=torch.bool) if masks is None else masks
    if inside.shape[1:] != (height, width):
        inside = F.interpolate(inside[:, None].float(), (height, width))[:, 0] > 0.5
    scaled_styles = scale_styles(styles, content, style_scale)
    style_inside = _style_regions(styles, style_masks, scaled_styles)
    # The extent of receptive fields only matters at the edge of a region.
    has_edges = not (bool(inside.all()) and bool(style_inside.all()))
    radii = [
        round(erosion * field_reach(model, layer, (height, width))) if has_edges and erosion else 0
        for layer in loss_network.style_layers
    ]
    content_features = loss_network.content_features(content)

    # For each region and layer: the positions (N, 1, h, w) and the target (1, C, C), 0 where it is empty.
    regions: list[list[tuple[Tensor, Tensor]]] = []
    has_style, vanishes = torch.zeros(2, len(content), dtype=torch.bool, device=content.device)
    with torch.no_grad():
        shapes = [maps.shape for maps in loss_network.features(content[:1])[:-1]]
        for region, members in ((inside, slice(0, 1)), (~inside, slice(1, None))):
            style_images, style_regions = scaled_styles[members], style_inside[members]
            if not len(style_images):
                continue
            region_layers = []
            style_features = [loss_network.features(style)[:-1] for style in style_images.split(1)]
            for j, (shape, radius) in enumerate(zip(shapes, radii, strict=True)):
                positions = region_weights(erode(region, radius), shape).to(content)
                grams, exists = [], []
                for features, style_region in zip(style_features, style_regions.split(1), strict=True):
                    taken_from = region_weights(erode(style_region, radius), features[j].shape)
                    grams.append(region_gram(features[j], taken_from.to(content)))
                    exists.append(bool(taken_from.any()))
                target = torch.stack(grams).sum(0) / max(1, sum(exists))
                region_layers.append((positions * float(any(exists)), target))
            regions.append(region_layers)
            remains = torch.stack([positions.amax((1, 2, 3)) for positions, _ in region_layers]).amax(0) > 0
            has_style |= remains
            vanishes |= region.flatten(1).any(1) & ~remains
    if bool(vanishes.any()) or not bool(has_style.all()):
        raise InputError(
            f"nothing of a region or of its style remains at any style layer with erosion={erosion}: use a "
            "smaller erosion, finer style_layers or larger masks"
        )

    def loss(candidate_features: list[Tensor], candidates: Tensor) -> Tensor:
        *features, candidate_content = candidate_features
        style_losses = []
        for region_layers in regions:
            terms = zip(loss_network.weights, features, region_layers, strict=True)
            errors = [
                weight * positions.amax((1, 2, 3)) * relative_error(region_gram(maps, positions), target)
                for weight, maps, (positions, target) in terms
            ]
            style_losses.append(torch.stack(errors).sum(0))
        content_loss = relative_error(candidate_content, content_features)
        return content_weight * content_loss + style_weight * sum(style_losses[1:], style_losses[0])

    optimization = optimize_image(
        image_loss(loss_network, loss, content, tile),
        PixelImage(content if start is None else resize(start, (height, width)).expand_as(content)),
        steps=steps,
        lr=1.0,
        optimizer="lbfgs",
        maximize=False,
        regularizer=smoothness_loss(total_variation),
        frames=frames,
    )
    return Stylization(
        images=content,
        stylized=optimization.images,
        style="in the style" if len(styles) == 1 else "styles by region",
        sources=shrink_to(styles, size),
        losses=optimization.scores,
        frames=optimization.frames,
    )


def _style_regions(styles: Tensor, style_masks: Tensor | None, scaled_styles: Tensor) -> Tensor:
    """The pixels (S, H, W) of the styles at their final size that a style is taken from.

    Raises InputError for masks of another number or size than the styles'.
    """
    size = scaled_styles.shape[2:]
    if style_masks is None:
        return torch.ones_like(scaled_styles[:, 0], dtype=torch.bool)
    if len(style_masks) not in (1, len(styles)) or style_masks.shape[2:] != styles.shape[2:]:
        expected = (len(styles), "C", *styles.shape[2:])
        raise InputError(
            f"style_masks must have the styles' shape {expected}, not {tuple(style_masks.shape)}"
        )
    white = style_masks.mean(1, keepdim=True).expand(len(styles), -1, -1, -1)
    return F.interpolate(white.float(), (int(size[0]), int(size[1])))[:, 0] > 0.5


@hookimpl
def phosphene_methods():
    return [region_style]
