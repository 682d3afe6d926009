"""Style sweep: neural style transfer with a range of style weights or style sizes."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat

from phosphene import hookimpl, method
from phosphene.images import resize
from phosphene.roles import Content, Model, Styles
from phosphene.spec import Cost, PixelRange, length, param, size

from ._parameters import Blend, ContentLayer, StyleLayers
from ._pixel_features import draw_images, load_pixel_model, transfer_loss
from ._resize import scale_images, shrink_to
from ._style_blend import normalize_blend
from ._style_loss import StyleLoss, StyleTargets
from ._style_sweep_result import StyleSweep
from .neural_style import GATYS, neural_style, optimize_style


def each_value_is_neural_style() -> None:
    """Features = pixels: each value's images are those of ``neural_style``; the first loss by hand."""
    call: Any = style_sweep  # its result has every field here
    tested: Any = neural_style  # its result has every field here
    model, steps = load_pixel_model(), 3
    content, styles = draw_images(2, 3, 16, 20, seed=0), draw_images(2, 3, 9, 6, seed=1)
    default = call(model, content, styles, over="scale", steps=steps, size=10)
    assert default.labels == tuple(f"style at {v} of the size" for v in ("0.5", "1", "2", "4"))
    assert torch.equal(default.images, resize(content, (8, 10)))
    panels = default.panels()[1]
    assert [panel.title for panel in panels] == ["", *default.labels]
    assert [panel.is_output for panel in panels] == [False, True, True, True, True]
    weights = call(model, content, styles, steps=steps, total_variation=0.0)
    assert weights.labels == tuple(f"beta/alpha = {v}" for v in ("0.1", "1", "10", "100"))
    large = resize(styles, (20, 13))
    for v, beta in enumerate((0.1, 1.0, 10.0, 100.0)):
        loss = transfer_loss(
            content, content, large, (0.5, 0.5), weights={"0": 1, "1": 1 / 3}, alpha=1, beta=beta
        )
        assert torch.allclose(weights.losses[0, :, v], loss, rtol=1e-10), f"the first loss at {beta} differs"
    options: Any = {"blend": [1, 3], "content_layer": "1", "style_layers": ["1", "0"], "steps": steps}
    options |= {"total_variation": 2.0, "size": 10}
    for over, parameter, other in (
        ("intensity", "style_weight", {}),
        ("scale", "style_scale", {"style_weight": 7.0}),
    ):
        values = (0.5, 3.0)
        sweep = call(model, content, styles, over=over, values=values, **options, **other)
        for v, value in enumerate(values):
            alone = tested(model, content, styles, **{parameter: value}, **options, **other)
            assert torch.allclose(sweep.losses[:, :, v], alone.losses, rtol=1e-8), f"{parameter}={value}"
            assert (sweep.stylized[:, v] - alone.stylized).abs().max() < 1e-8, f"{parameter}={value}"


@method(
    family="style",
    references=[GATYS],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (length(param.values, 4) * (2 * param.steps + 1 + size.styles) + 1),
        backward=size.images * length(param.values, 4) * (2 * param.steps + 1),
    ),
    oracle=each_value_is_neural_style,
    quick={"steps": 3, "values": (1.0, 2.0)},
    demo={"images": "builtin:scenes/1", "styles": ["builtin:swirls"], "steps": 40},
)
def style_sweep(
    model: Model,
    images: Content,
    styles: Styles,
    *,
    over: Annotated[
        Literal["intensity", "scale"],
        Field(description="quantity that is varied: the style weight beta, or the size of the styles"),
    ] = "intensity",
    values: Annotated[
        tuple[PositiveFloat, ...] | None,
        Field(
            min_length=1, description="values to use; default: 0.1 to 100 for intensity, 1/2 to 4 for scale"
        ),
    ] = None,
    blend: Blend = None,
    content_layer: ContentLayer = None,
    style_layers: StyleLayers = None,
    style_weight: Annotated[
        float, Field(ge=0, le=1e12, description="beta: weight of the style loss where the scale is varied")
    ] = 30.0,
    total_variation: Annotated[
        float, Field(ge=0, le=1e6, description="weight of the total-variation loss, per pixel")
    ] = 1.0,
    size: Annotated[
        int, Field(ge=8, le=16384, description="longer side that larger images are shrunk to")
    ] = 512,
    steps: Annotated[int, Field(ge=1, le=100_000, description="optimization steps for each value")] = 100,
) -> StyleSweep:
    """Neural style transfer over a range of style weights or style sizes, side by side.

    L(I) = |phi(I) - phi(I_c)|^2 / |phi(I_c)|^2 + beta sum_j w_j |G_j(I) - G_j|_F^2 / |G_j|_F^2

    as in ``neural_style``, for every beta of ``values`` (over "intensity"; default: 0.1, 1, 10, 100), or
    for styles whose longer side is that many times the content's (over "scale"; default: 1/2, 1, 2, 4). All
    values are optimized in one batch. The content (N, 3, H, W) is processed at its own size, up to
    ``size``.

    Returns:
        ``images`` (N, 3, H, W) the content, ``stylized`` (N, V, 3, H, W) in [0, 1], ``labels`` of the V
        values, ``losses`` (steps, N, V).

    Raises:
        InputError: blend weights that do not fit the styles.

    Example::
        from phosphene import run

        options = {"values": [1, 10], "steps": 2}
        result = run("style_sweep", images="builtin:scenes/1", styles="builtin:swirls", **options)
        result.stylized.shape  # (1, 2, 3, 64, 64)

    Source: Gatys et al. 2016, section 3.1 and figure 4; lecture 21.12.1.
    """
    over_scale = over == "scale"
    values = values or ((0.5, 1.0, 2.0, 4.0) if over_scale else (0.1, 1.0, 10.0, 100.0))
    loss_network, blend_weights = (
        StyleLoss(model, content_layer, style_layers),
        normalize_blend(blend, styles),
    )
    content = shrink_to(images, size)
    ratio = max(content.shape[2:]) / max(styles.shape[2:])
    scaled_styles = [scale_images(styles, scale * ratio) for scale in (values if over_scale else (1.0,))]
    grams_by_scale = [loss_network.style_grams(s, blend_weights) for s in scaled_styles]
    style_grams = [torch.cat(layer) for layer in zip(*grams_by_scale, strict=True)]
    optimizations = [
        optimize_style(
            loss_network,
            image.expand(len(values), -1, -1, -1),
            StyleTargets(loss_network.content_features(image), style_grams),
            content_weight=1.0,
            style_weight=style_weight if over_scale else content.new_tensor(values),
            tv_weight=total_variation,
            steps=steps,
        )
        for image in content.split(1)
    ]
    return StyleSweep(
        images=content,
        stylized=torch.stack([o.images for o in optimizations]),
        labels=tuple(f"style at {v:g} of the size" if over_scale else f"beta/alpha = {v:g}" for v in values),
        losses=torch.stack([o.scores for o in optimizations], 1),
    )


@hookimpl
def phosphene_methods():
    return [style_sweep]
