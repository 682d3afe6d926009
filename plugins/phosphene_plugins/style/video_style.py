"""Video style transfer, Ruder et al. 2016: neural style with a temporal loss along the optical flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from phosphene import InputError, Reference, hookimpl, method
from phosphene.builtin.clip import BACKGROUND_MOTION, SHAPE_MOTION, draw_clip
from phosphene.optimize import Optimization, pad_rows
from phosphene.roles import Model, Styles, Video
from phosphene.spec import Cost, PixelRange, param, size

from ._optical_flow import FlowMethod, check_flow, consistent_pixels, optical_flow, warp, warp_error
from ._parameters import (
    Blend,
    ContentLayer,
    ContentWeight,
    LayerWeights,
    LongestSide,
    StyleLayers,
    StyleOptimizer,
    StyleScale,
    StyleWeight,
    TotalVariation,
)
from ._pixel_features import STD, draw_images, load_pixel_model, pixel_features, transfer_loss
from ._resize import scale_styles, shrink_to
from ._style_blend import normalize_blend, style_title
from ._style_loss import StyleLoss, StyleTargets
from ._video_result import VideoStylization
from .neural_style import GATYS, optimize_style


class Tie(NamedTuple):
    """An earlier stylized frame (1, 3, H, W), warped, and the weights (H, W) of its pixels."""

    image: Tensor
    weights: Tensor


def temporal_loss(ties: Sequence[Tie], images: Tensor) -> Tensor:
    """1/D sum_j sum_k c_jk (x_k - w_jk)^2 of images (N, 3, H, W) of D values each: (N,)."""
    total = images.new_zeros(len(images))
    for image, weights in ties:
        total = total + (weights * (images - image).square()).mean((1, 2, 3))
    return total


def long_term_weights(consistent: Sequence[Tensor]) -> list[Tensor]:
    """c_j = max(c_j - sum_{k < j} c_k, 0) of pixels (H, W), bool, nearest frame first: float (H, W) each.

    A pixel is tied to the nearest of the frames from which its motion is consistent.
    """
    weights, covered = [], torch.zeros_like(consistent[0])
    for pixels in consistent:
        weights.append((pixels & ~covered).float())
        covered = covered | pixels
    return weights


def flow_of_a_translation_is_exact() -> None:
    """The drawn clip: its flow is found, uncovered pixels and those at the borders are left out."""
    clip = draw_clip(3)
    earlier, later = clip.frames[:2]
    forward, backward = optical_flow(earlier, later, "dis"), optical_flow(later, earlier, "dis")
    consistent = consistent_pixels(backward, forward)
    shape, background = (torch.tensor(m)[:, None, None] for m in (SHAPE_MOTION, BACKGROUND_MOTION))
    error = (backward + torch.where(clip.masks[1], shape, background)).norm(dim=0)
    assert consistent.double().mean() > 0.8 and (error[consistent] < 0.3).double().mean() > 0.97
    assert consistent[clip.masks[1]].double().mean() > 0.7, "the moving shape is left out"
    uncovered = clip.masks[0].roll(BACKGROUND_MOTION, (1, 0)) & ~clip.masks[1]
    assert consistent[uncovered].double().mean() < 0.2, "a pixel that was covered has no earlier position"
    assert warp_error(later, warp(earlier[None], backward)[0], consistent) < 0.02
    # By hand, of an integer flow: (x, y) = (2, 1).
    image, ones = draw_images(1, 3, 5, 6, seed=0), torch.ones(5, 6)
    flow = torch.stack([2 * ones, ones])
    assert torch.allclose(warp(image, flow)[..., :4, :4], image[..., 1:, 2:], atol=1e-6)
    assert consistent_pixels(flow, -flow).nonzero().tolist() == [[y, x] for y in range(4) for x in range(4)]
    lost = -flow.clone()
    lost[0, 2, 3] = 2  # where pixel (1, 1) lands
    assert not consistent_pixels(flow, lost)[1, 1]
    step = flow.clone()
    step[0, 0, 1] = 2.3
    boundary = ~consistent_pixels(step, -flow)
    assert boundary[0, :2].all() and not boundary[1:4, :4].any()
    # A flow that ends half a pixel outside, at the edge of the image, cannot be relied on.
    for column, motion in ((0, -0.5), (5, 0.5)):
        half = torch.stack([motion * ones, 0 * ones])
        assert (~consistent_pixels(half, -half)).nonzero().tolist() == [[y, column] for y in range(5)]
    some, other = torch.zeros(5, 6, dtype=torch.bool), image[0] + 0.3
    assert warp_error(image[0], other, some) == 0, "no pixel is consistent"
    some[:, 0], other[..., 1:] = True, 0
    assert abs(warp_error(image[0], other, some) - 0.3) < 1e-6
    wide, small = draw_clip(2).frames[..., :12, :20], draw_clip(2).frames[..., :12, :12]
    check_flow("dis", small)
    for side in (2, 3):
        refusal = ""
        try:
            check_flow("dis", wide.narrow(side, 0, 11))
        except InputError as error:
            refusal = str(error)
        assert (
            "12 pixels a side or more, not 1" in refusal
            and optical_flow(small[0], small[1], "dis").isfinite().all()
        )
    # Farneback's flow blurs the boundaries of a motion.
    smooth = optical_flow(later, earlier, "farneback") + torch.where(clip.masks[1], shape, background)
    assert smooth.shape == backward.shape and smooth.norm(dim=0).median() < 0.1
    masks = [torch.tensor(m, dtype=torch.bool)[None] for m in ([1, 0, 0], [1, 1, 0], [0, 1, 1])]
    weights = [w[0].tolist() for w in long_term_weights(masks)]
    assert weights == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def pixels_as_features_have_a_closed_form() -> None:
    """Features = pixels: without a style every frame is the weighted mean of itself and the last, warped."""
    flow_of_a_translation_is_exact()
    tested: Any = video_style  # its result has every field here
    model = load_pixel_model()
    frames = 0.25 + 0.5 * draw_clip(4).frames[..., 8:40, 4:44].double()
    styles = draw_images(2, 3, 9, 6, seed=2) / 1.5
    options: Any = {"content_layer": "0", "style_layers": ["0"], "steps": 40, "content_weight": 0.5}
    options |= {"temporal_weight": 30.0, "style_weight": 0.0, "size": 64}
    result = tested(model, frames, styles, long_term=(1, 2), compare=True, **options)
    std = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    expected = [frames[0]]
    for n in range(1, 4):
        content_weight = 0.5 / std.square() / pixel_features(frames[n : n + 1], "0").square().sum()
        numerator, denominator = content_weight * frames[n], content_weight.expand_as(frames[n]).clone()
        covered = torch.zeros(32, 40, dtype=torch.bool)
        for j in (1, 2)[:n]:
            backward = optical_flow(frames[n], frames[n - j], "dis")
            pixels = consistent_pixels(backward, optical_flow(frames[n - j], frames[n], "dis"))
            weight = 30.0 / frames[0].numel() * (pixels & ~covered)
            covered |= pixels
            numerator = numerator + weight * warp(expected[n - j][None], backward)[0]
            denominator = denominator + weight
            if j == 1:
                assert torch.equal(result.consistent[n - 1], pixels)
                error = warp_error(frames[n], warp(frames[n - 1 : n], backward)[0], pixels)
                assert abs(result.input_flicker[n - 1] - error) < 1e-6
        expected.append(numerator / denominator)
    assert (result.stylized - torch.stack(expected)).abs().max() < 1e-5, "not the minimum of the loss"
    assert (result.independent - frames).abs().max() < 1e-5, "frames alone depend on others"
    assert (result.flicker < result.independent_flicker).all(), (
        "the temporal loss does not reduce the flicker"
    )
    # With a style: the first loss of the second frame, at the first one's result, warped.
    styled = tested(model, frames[:2], styles, blend=[1, 3], **options | {"style_weight": 2.0, "steps": 2})
    backward = optical_flow(frames[1], frames[0], "dis")
    pixels = consistent_pixels(backward, optical_flow(frames[0], frames[1], "dis"))
    warped = warp(styled.stylized[:1], backward)
    start = torch.where(pixels, warped, frames[1:])
    scaled = scale_styles(styles, frames, 1.0)
    loss = transfer_loss(start, frames[1:], scaled, (0.25, 0.75), weights={"0": 1}, alpha=0.5, beta=2.0)
    assert torch.allclose(styled.losses[0, 1], loss[0], rtol=1e-6), "frame 1 does not start at frame 0"
    assert styled.independent is None and styled.style == "25% of style 0 + 75% of style 1"
    refused = False
    try:
        tested(model, frames, styles, long_term=(2, 1), **options)
    except InputError:
        refused = True
    assert refused


@method(
    family="style",
    references=[
        Reference(
            key="ruder2016",
            title="Artistic Style Transfer for Videos",
            authors="Ruder, Dosovitskiy, Brox",
            year=2016,
            url="https://arxiv.org/abs/1604.08610",
        ),
        GATYS,
    ],
    invariants=[PixelRange(field="stylized")],
    needs=["gradients"],
    # L-BFGS evaluates the loss once or twice per step.
    cost=Cost(
        forward=(1 + param.compare) * size.frames * (2 * param.steps + 2) + size.styles,
        backward=(1 + param.compare) * size.frames * (2 * param.steps + 1),
    ),
    oracle=pixels_as_features_have_a_closed_form,
    quick={"steps": 2},
    demo={
        "styles": ["builtin:swirls"],
        "style_weight": 10,
        "total_variation": 3,
        "compare": True,
        "steps": 40,
    },
)
def video_style(
    model: Model,
    video: Video,
    styles: Styles,
    *,
    blend: Blend = None,
    content_layer: ContentLayer = None,
    style_layers: StyleLayers = None,
    weights: LayerWeights = None,
    content_weight: ContentWeight = 1.0,
    style_weight: StyleWeight = 30.0,
    temporal_weight: Annotated[
        float, Field(ge=0, le=1e12, description="gamma: weight of the temporal loss")
    ] = 1000.0,
    total_variation: TotalVariation = 0.0,
    style_scale: StyleScale = 1.0,
    flow: FlowMethod = "dis",
    long_term: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1000)], ...],
        Field(min_length=1, max_length=8, description="distances in frames to the earlier ones, increasing"),
    ] = (1,),
    compare: Annotated[
        bool, Field(description="also stylize every frame alone, for the flicker without the temporal loss")
    ] = False,
    size: LongestSide = 512,
    steps: Annotated[int, Field(ge=1, le=100_000, description="optimization steps of every frame")] = 60,
    optimizer: StyleOptimizer = "lbfgs",
    lr: Annotated[
        float | None,
        Field(gt=0, le=100, description="step length; default: 1 for lbfgs, 0.02 for adam"),
    ] = None,
    fps: Annotated[
        float, Field(ge=1, le=120, description="frames per second of the film that is saved")
    ] = 10.0,
) -> VideoStylization:
    """Video style transfer: neural style of every frame, with a temporal loss along the optical flow.

    x_t = argmin_x  alpha L_content(x, p_t) + beta L_style(x)
                    + gamma / D sum_j sum_k c_jk (x_k - warp_j(x_(t-j))_k)^2

    with the content and style losses of ``neural_style``, and the j of ``long_term``. warp_j moves an earlier
    stylized frame along the optical flow of the input. c_j is 1 where the flow there and back agrees and no
    nearer frame does already; it is 0 at motion boundaries and where an object has uncovered the background.
    D is the number of values. The optimization begins at the nearest earlier frame, warped, and at the input
    where c_1 is 0; the first frame begins at the input. ``long_term=(1, 2, 4)`` carries the style of an area
    over the frames in which something hides it.

    ``video`` (T, 3, H, W) is a video file (MP4 needs the extra ``video``), an animated GIF, a folder of
    frames or a tensor; ``{"files": "film.mp4", "size": 256, "frames": 48}`` reads a part of it. OpenCV, of
    the same extra, computes the flow. ``save`` writes the frames and a film, ``save_video`` an MP4 or GIF.

    Returns:
        ``images`` and ``stylized`` (T, 3, H, W) in [0, 1], ``consistent`` (T - 1, H, W), bool, ``flicker``
        (T - 1,), the root mean square difference of every frame and the one before, warped, over consistent
        pixels, ``input_flicker`` that of the input; with ``compare`` ``independent`` (T, 3, H, W) and
        ``independent_flicker``; ``losses`` (steps, T), ``sources`` (S, 3, H', W') the styles.

    Raises:
        InputError: blend or layer weights that do not fit, distances that do not increase, or frames too
            small for the flow.
        MissingExtra: no OpenCV.

    Example::
        from phosphene import run

        result = run("video_style", video="builtin:clip/2", styles=["builtin:swirls"], steps=2)
        result.stylized.shape  # (2, 3, 64, 64)

    Source: Ruder et al. 2016, sections 4.1 to 4.3, equations 4 to 9.
    """
    if any(later <= earlier for earlier, later in zip(long_term, long_term[1:], strict=False)):
        raise InputError(f"long_term distances increase, as (1, 2, 4), unlike {long_term}")
    frames = shrink_to(video, size)
    check_flow(flow, frames)
    loss_network = StyleLoss(model, content_layer, style_layers, weights)
    blend_weights = normalize_blend(blend, styles)
    style_grams = loss_network.style_grams(scale_styles(styles, frames, style_scale), blend_weights)

    def stylize(frame: Tensor, start: Tensor, ties: Sequence[Tie]) -> Optimization:
        """One frame (1, 3, H, W), tied to earlier ones."""
        return optimize_style(
            loss_network,
            start,
            StyleTargets(loss_network.content_features(frame), style_grams),
            content_weight=content_weight,
            style_weight=style_weight,
            tv_weight=total_variation,
            further_loss=lambda images: temporal_weight * temporal_loss(ties, images),
            steps=steps,
            optimizer=optimizer,
            lr=lr,
        )

    flows = [_flow_between(frames, n, n - 1, flow) for n in range(1, len(frames))]
    optimizations: list[Optimization] = []
    for n, frame in enumerate(frames.split(1)):
        earlier = [n - distance for distance in long_term if distance <= n]
        pairs = [flows[n - 1] if m == n - 1 else _flow_between(frames, n, m, flow) for m in earlier]
        warped = [
            warp(optimizations[m].images, backward) for m, (backward, _) in zip(earlier, pairs, strict=True)
        ]
        start, ties = frame, []
        if pairs:
            pixel_weights = long_term_weights([consistent for _, consistent in pairs])
            ties = [Tie(i, w.to(frame)) for i, w in zip(warped, pixel_weights, strict=True)]
            start = torch.where(pairs[0][1], warped[0], frame)
        optimizations.append(stylize(frame, start, ties))
    stylized = torch.cat([optimization.images for optimization in optimizations])
    independent = None
    if compare:
        independent = torch.cat([stylize(frame, frame, ()).images for frame in frames.split(1)])
    return VideoStylization(
        images=frames,
        stylized=stylized,
        style=style_title(blend_weights),
        consistent=torch.stack([consistent for _, consistent in flows]),
        flicker=_flicker(stylized, flows),
        input_flicker=_flicker(frames, flows),
        independent=independent,
        independent_flicker=None if independent is None else _flicker(independent, flows),
        sources=shrink_to(styles, size),
        losses=torch.cat(pad_rows([optimization.scores for optimization in optimizations]), 1),
        fps=fps,
    )


def _flow_between(frames: Tensor, later: int, earlier: int, method: str) -> tuple[Tensor, Tensor]:
    """Flow (2, H, W) from a later frame to an earlier one, and the pixels (H, W) where it is consistent."""
    backward = optical_flow(frames[later], frames[earlier], method)
    forward = optical_flow(frames[earlier], frames[later], method)
    return backward, consistent_pixels(backward, forward)


def _flicker(frames: Tensor, flows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``warp_error`` of every frame and the one before: (T - 1,)."""
    errors = [
        warp_error(frames[n], warp(frames[n - 1 : n], backward)[0], consistent)
        for n, (backward, consistent) in enumerate(flows, 1)
    ]
    return frames.new_tensor(errors)


@hookimpl
def phosphene_methods():
    return [video_style]
