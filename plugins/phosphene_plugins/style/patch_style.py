"""Style transfer by patches (Li and Wand): each patch of features approaches its best match in the style."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from phosphene import Reference, hookimpl, method
from phosphene.images import resize
from phosphene.optimize import Optimization, PixelImage, concatenate_stages, optimize_image
from phosphene.results import Stylization
from phosphene.roles import Content, Frames, LayerName, Model, Start, Styles
from phosphene.spec import Cost, PixelRange, either, minimum, param, size

from ._parameters import (
    ContentLayer,
    ContentWeight,
    LongestSide,
    Scales,
    StyleScale,
    StyleWeight,
    TotalVariation,
)
from ._pixel_features import draw_images, load_pixel_model, pixel_features, relative, transfer_loss
from ._resize import coarse_to_fine, shrink_to
from ._style_loss import StyleLoss, relative_error, smoothness_loss
from ._tiled_gradient import TILE_COUNT, TileSide, image_loss

#: Number of correlations that are computed at once.
_CHUNK = 2**24  # equivalent mutants: only how many are computed at once


def best_matches(patches: Tensor, style_patches: Tensor) -> Tensor:
    """The index (N, n) of the style patch (m, D) of highest normalized cross-correlation with each patch."""
    # The norm of the patch (N, n, D) itself does not change which style patch is best.
    directions = F.normalize(style_patches, dim=1)
    # equivalent mutants: only how many are computed at once
    count = max(1, _CHUNK // patches[..., 0].numel())
    best, indices = [], []
    for start in range(0, len(directions), count):
        values, index = (patches @ directions[start : start + count].T).max(2)
        best.append(values)
        indices.append(index + start)
    chunk = torch.stack(best).argmax(0, keepdim=True)
    return torch.stack(indices).gather(0, chunk)[0]


def patch_error(maps: Tensor, style_patches: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Mean over patches i of |Psi_i - Psi_NN(i)|^2, relative to the style patches' mean square norm: (N,).

    The patches have ``sides`` (height, width): maps (N, C, h, w), style_patches (m, C height width).
    """
    patches = F.unfold(maps, sides).mT
    with torch.no_grad():
        targets = style_patches[best_matches(patches, style_patches)]
    scale = style_patches.square().sum(1).mean().clamp(min=1e-30)
    return (patches - targets).square().sum(2).mean(1) / scale


def loss_by_loops(images: Tensor, styles: Tensor, layer: str, side: int) -> Tensor:
    """``patch_error`` of the pixel model's features, patch by patch."""
    style_patches = [
        maps[:, y : y + side, x : x + side]
        for maps in pixel_features(styles, layer)
        for y in range(maps.shape[1] - side + 1)
        for x in range(maps.shape[2] - side + 1)
    ]
    scale = sum(float(patch.square().sum()) for patch in style_patches) / len(style_patches)
    losses = []
    for maps in pixel_features(images, layer):
        total, count = maps.new_zeros(()), 0
        for y in range(maps.shape[1] - side + 1):
            for x in range(maps.shape[2] - side + 1):
                patch = maps[:, y : y + side, x : x + side]
                correlations = [
                    float((patch * other).sum() / (patch.norm() * other.norm())) for other in style_patches
                ]
                best = style_patches[correlations.index(max(correlations))]
                total, count = total + (patch - best).square().sum(), count + 1
        losses.append(total / count / scale)
    return torch.stack(losses)


def pixels_as_features_have_a_closed_form() -> None:
    """Features = pixels: the losses by loops over patches, and the minimum of patches of one pixel."""
    tested: Any = patch_style  # its result has every field here
    model, content, start = load_pixel_model(), *(draw_images(2, 3, 6, 8, seed=s) for s in (0, 1))
    styles = draw_images(2, 3, 8, 5, seed=2)
    for side, layers, weights in ((3, ["0", "1"], [1.0, 1.0]), (2, ["1", "0"], [2.0, 0.5])):
        content_layer = "0" if side == 3 else "1"
        options: Any = {"patch_size": side, "style_layers": layers, "content_layer": content_layer}
        options |= {} if side == 3 else {"weights": weights, "content_weight": 3.0, "style_weight": 7.0}
        alpha, beta = (1.0, 5.0) if side == 3 else (3.0, 7.0)
        result = tested(model, content, styles, start, steps=2, frames=2, **options)
        style_loss = sum(
            (w * loss_by_loops(start, styles, layer, side) for w, layer in zip(weights, layers, strict=True)),
            torch.zeros(2, dtype=torch.float64),
        )
        expected = alpha * relative(*(pixel_features(x, content_layer) for x in (start, content)))
        difference = (result.losses[0] - expected - beta * style_loss).abs().max()
        assert difference < 1e-10, f"patches of {side}: the first loss differs by {difference}"
        assert torch.equal(result.images, content) and torch.equal(result.sources, styles)
        assert len(result.frames) == 2
    # Patches of one pixel: each pixel becomes the style's pixel of the most similar direction.
    expected = styles[0].flatten(1).flip(1).view(1, 3, 5, 8)
    near = 0.99 * expected + 0.01 * content[:1, :, :5]
    options = {"patch_size": 1, "style_layers": ["0"], "content_weight": 0.0}
    pixels = tested(model, near, styles[:1], steps=60, **options).stylized
    assert (pixels - expected).abs().max() < 1e-5, "pixels differ from their best matches"
    smooth = tested(model, content, styles, style_weight=0, total_variation=2, steps=60, content_layer="0")
    images = smooth.stylized.requires_grad_()
    loss = transfer_loss(images, content, content, (), weights={}, alpha=1, beta=0, smoothness=2)
    gradient = torch.autograd.grad(loss.sum(), images)[0]
    assert gradient.abs().max() < 1e-6, "it is not the minimum of content and smoothness"
    # A map of 2 x 3 positions has one patch of 2 x 3; chunks of style patches are one set.
    small = draw_images(1, 3, 3, 6, seed=3)
    result = tested(model, small, small / 2, style_layers=["1"], content_weight=0, style_weight=1, steps=1)
    features = [pixel_features(images, "1") for images in (small, small / 2)]
    assert torch.allclose(result.losses[0], relative(*features), rtol=1e-10), "patches larger than the map"
    patches, others = draw_images(2, 2500, 4, seed=4), draw_images(4000, 4, seed=5)
    similarity = F.normalize(patches, dim=2) @ F.normalize(others, dim=1).T
    assert torch.equal(best_matches(patches, others), similarity.argmax(2))
    # Of the style's 40 pixels every third: 0, 3, ..., 39.
    options = {
        "patch_size": 1,
        "style_layers": ["0"],
        "content_weight": 0.0,
        "max_patches": 14,
        "style_weight": 1.0,
    }
    thinned = tested(model, near, styles[:1], steps=1, **options)
    fewer = torch.cat([styles[:1].flatten(2)[..., ::3]], 0).view(1, 3, 14, 1)
    loss = loss_by_loops(near, fewer, "0", 1)
    assert torch.allclose(thinned.losses[0], loss, rtol=1e-10), "style patches are not evenly thinned"


@method(
    family="style",
    references=[
        Reference(
            key="li2016",
            title="Combining Markov Random Fields and Convolutional Neural Networks for Image Synthesis",
            authors="Li, Wand",
            year=2016,
            url="https://arxiv.org/abs/1601.04589",
        )
    ],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    # L-BFGS evaluates the loss once or twice per step.
    cost=Cost(
        forward=param.scales
        * (
            size.images * ((2 * param.steps + 1) * minimum(2, either(param.tile, 1)) * TILE_COUNT + 1)
            + size.styles
            + 1
        ),
        backward=param.scales * size.images * (2 * param.steps + 1) * TILE_COUNT,
    ),
    oracle=pixels_as_features_have_a_closed_form,
    quick={"steps": 3, "scales": 1, "style_scale": 0.5, "max_patches": 100},
    demo={
        "images": {"files": "builtin:part-scenes/2", "size": (128, 128)},
        "styles": ["builtin:night"],
        "style_layers": ["features.1"],
        "max_patches": 1024,
        "style_weight": 10,
        "total_variation": 3,
        "scales": 2,
        "steps": 20,
    },
)
def patch_style(
    model: Model,
    images: Content,
    styles: Styles,
    start: Start = None,
    *,
    content_layer: ContentLayer = None,
    style_layers: Annotated[
        list[LayerName] | None,
        Field(description="layers of the patches; default: the middle stage of the model and the next"),
    ] = None,
    weights: Annotated[
        list[NonNegativeFloat] | None,
        Field(description="w_j: weight of each style layer; default: 1 for each"),
    ] = None,
    patch_size: Annotated[
        int, Field(ge=1, le=16, description="height and width of the patches, in positions of a layer")
    ] = 3,
    max_patches: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="largest number of style patches per layer, evenly spaced"),
    ] = 4096,
    content_weight: ContentWeight = 1.0,
    style_weight: StyleWeight = 5.0,
    total_variation: TotalVariation = 0.0,
    style_scale: StyleScale = 1.0,
    size: LongestSide = 384,
    scales: Scales = 1,
    tile: TileSide = None,
    steps: Annotated[int, Field(ge=1, le=100_000, description="L-BFGS steps at each scale")] = 100,
    frames: Frames = 0,
) -> Stylization:
    """Style transfer by patches (Markov random field): each patch of features approaches its best match.

    L(I) = alpha L_content + beta sum_j w_j 1/n_j sum_i |Psi_i(I) - Psi_NN(i)|^2 / (1/m_j sum_k |Psi_k|^2)

    NN(i) = argmax_k  Psi_i(I) . Psi_k / (|Psi_i(I)| |Psi_k|)

    with Psi_i(I) the n_j patches of ``patch_size`` x ``patch_size`` positions of the image's features at
    layer j, Psi_k the m_j patches of the styles, and L_content as in ``neural_style``. The matches are
    searched anew at every evaluation. The paper has sums over patches; the means here make the weights
    independent of image sizes.

    A Gram matrix is the style's average over the image; a patch is copied from one location of it. The result
    has the style's own details and fewer artifacts where content and style show similar things, such as two
    faces, and depends more on the choice of the style. Several styles are one set of patches: pass
    rotated and scaled copies of a style to search them as well, as the paper does. Patches larger than a
    map of the content or of a style are reduced to its size.

    The content (N, 3, H, W) is processed at its own size, up to ``size``; ``scales`` optimizes from coarse to
    fine. Optimization begins at ``start``, or at the content. Time grows with the number of positions of the
    image times that of style patches, which ``max_patches`` limits. ``tile`` computes the same gradient
    without the activations of all layers in memory, at twice the time of the network.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, 3, H, W) in [0, 1], ``losses`` (steps, N),
        ``sources`` (S, 3, H', W') the styles, ``frames`` (F, N, 3, H, W).

    Raises:
        InputError: no style layers, or another number of weights than of layers.
        ModelError: tiles for a layer whose receptive field covers the image.

    Example::
        from phosphene import run

        result = run("patch_style", images="builtin:scenes/1", styles=["builtin:swirls"], steps=2)
        result.stylized.shape  # (1, 3, 64, 64)

    Source: Li and Wand 2016, section 3, equations 1 to 4.
    """
    middle = (len(model.stages) - 1) // 2
    layers = model.stages[middle : middle + 2] if style_layers is None else style_layers
    loss_network = StyleLoss(model, content_layer, layers, weights or [1.0] * len(layers))
    content = shrink_to(images, size)

    stages: list[Optimization] = []
    for scaled_content, scaled_styles in coarse_to_fine(content, styles, scales, style_scale):
        height, width = scaled_content.shape[2:]
        content_features = loss_network.content_features(scaled_content)
        with torch.no_grad():
            shapes = [maps.shape[2:] for maps in loss_network.features(scaled_content[:1])[:-1]]
            style_maps = [loss_network.features(style)[:-1] for style in scaled_styles.split(1)]
        layer_patches = []
        for shape, *maps in zip(shapes, *style_maps, strict=True):
            lengths = zip(shape, *(m.shape[2:] for m in maps), strict=True)
            sides = tuple(min(patch_size, *both) for both in lengths)
            patches = torch.cat([F.unfold(m, sides).mT[0] for m in maps])
            # equivalent mutants: of as many patches none is left out
            if len(patches) > max_patches:
                evenly = torch.linspace(0, len(patches) - 1, max_patches, dtype=torch.float64)
                patches = patches[evenly.round().long().to(patches.device)]
            layer_patches.append((patches, sides))

        def loss(
            candidate_features: list[Tensor],
            candidates: Tensor,
            content_features: Tensor = content_features,
            layer_patches: list[tuple[Tensor, tuple[int, ...]]] = layer_patches,
        ) -> Tensor:
            *features, candidate_content = candidate_features
            terms = zip(loss_network.weights, features, layer_patches, strict=True)
            errors = [weight * patch_error(maps, *patches) for weight, maps, patches in terms]
            content_loss = relative_error(candidate_content, content_features)
            return content_weight * content_loss + style_weight * torch.stack(errors).sum(0)

        if stages:
            initial = resize(stages[-1].images, (height, width))
        else:
            initial = scaled_content if start is None else resize(start, (height, width))
        stages.append(
            optimize_image(
                image_loss(loss_network, loss, scaled_content, tile),
                PixelImage(initial.expand_as(scaled_content)),
                steps=steps,
                lr=1.0,
                optimizer="lbfgs",
                maximize=False,
                regularizer=smoothness_loss(total_variation),
                frames=frames,
            )
        )
    optimization = concatenate_stages(stages)
    return Stylization(
        images=content,
        stylized=optimization.images,
        style="in the style" if len(styles) == 1 else f"in {len(styles)} styles",
        sources=shrink_to(styles, size),
        losses=optimization.scores,
        frames=optimization.frames,
    )


@hookimpl
def phosphene_methods():
    return [patch_style]
