"""DeepDream: gradient ascent on the activations of layers over several octaves."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Reference,
    at_least_float32,
    hookimpl,
    load_model,
    method,
    optimize,
    stopped_early_at,
)
from phosphene.images import gaussian_blur, resize
from phosphene.optimize import Optimization, PixelImage, concatenate_stages, optimize_image
from phosphene.results import Synthesis
from phosphene.roles import Content, Frames, Guide, LayerName, Model, Seed
from phosphene.spec import (
    Agrees,
    Cost,
    Equivariant,
    InvariantTo,
    PixelRange,
    SameShape,
    ScalesWith,
    param,
    size,
)

from ._relations import dream_by_hand


def identity_features_are_scaled_by_normalised_steps() -> None:
    """Where features are pixels, I <- clip(I + lr I / rms(I)), and random shifts change nothing."""
    network = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(128, 2)).double()
    model = load_model(network, input_size=(2, 8, 8), mean=[0.0] * 2, std=[0.5] * 2)
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9
    result = deep_dream(model, images, layers=["0"], octaves=1, steps=2, lr=0.1, total_variation=0, seed=0)
    expected = images
    for _ in range(2):
        mean_square = expected.square().mean((1, 2, 3), keepdim=True)
        expected = (expected + 0.1 * expected / mean_square.sqrt()).clamp(0, 1)
    torch.testing.assert_close(result.images, expected)
    assert result.sources is not None and torch.equal(result.sources, images)
    assert result.targets == ("0", "0")
    energy = (images / 0.5).square().mean((1, 2, 3))
    torch.testing.assert_close(result.scores[0], energy)
    # Two layers with the same features have twice the sum. Of three frames the second octave has two.
    twice = deep_dream(model, images, layers=["0", "1"], octaves=2, steps=4, frames=3, lr=1e-9, jitter=0)
    torch.testing.assert_close(twice.scores[4], 2 * energy)
    assert twice.frames is not None and len(twice.frames) == 3 and twice.targets[0] == "0 + 1"
    # Guided by a red and a green pixel, each position adds to its larger channel: one of two, so sqrt(2) lr.
    guide = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    guide[0, 0, 1, 2] = guide[0, 1, 3, 4] = 0.5
    guided = deep_dream(model, images, guide, layers=["0"], octaves=1, steps=1, lr=0.01)
    larger = images == images.amax(1, keepdim=True)
    torch.testing.assert_close(guided.images, images + 0.01 * 2**0.5 * larger)
    torch.testing.assert_close(guided.scores[0], 2 * images.amax(1).mean((1, 2)))
    assert guided.targets == ("0, guided", "0, guided")
    # A vector is one position: the product with the guide's vector grows along it.
    vector = deep_dream(model, images, guide, layers=["1"], octaves=1, steps=1, lr=0.01, jitter=0)
    torch.testing.assert_close(vector.images, images + 0.01 * guide / guide.square().mean().sqrt())
    # A blur after the third of four steps.
    blurred = images
    for n in range(4):
        mean_square = blurred.square().mean((1, 2, 3), keepdim=True)
        blurred = (blurred + 0.01 * blurred / mean_square.sqrt()).clamp(0, 1)
        blurred = gaussian_blur(blurred, 0.8) if n == 2 else blurred
    smooth = deep_dream(model, images, layers=["0"], octaves=1, steps=4, blur_every=3, jitter=0)
    torch.testing.assert_close(smooth.images, blurred)
    zoomed = deep_dream(model, images, layers=["0"], octaves=1, steps=1, zoom=2)
    assert zoomed.frames is not None and len(zoomed.frames) == 3 and len(zoomed.scores) == 3
    assert torch.equal(zoomed.frames[2], (zoomed.images * 255).round().byte())


@method(
    family="synthesis",
    title="DeepDream",
    references=[
        Reference(
            key="mordvintsev2015",
            title="Inceptionism: Going Deeper into Neural Networks",
            authors="Mordvintsev, Olah, Tyka",
            year=2015,
            url="https://research.google/blog/inceptionism-going-deeper-into-neural-networks/",
        )
    ],
    invariants=[PixelRange(), SameShape()],
    needs=["gradients"],
    # + 1: the guide's features.
    cost=Cost(
        forward=size.images * param.octaves * param.steps * (param.zoom + 1) + 1,
        backward=size.images * param.octaves * param.steps * (param.zoom + 1),
    ),
    oracle=identity_features_are_scaled_by_normalised_steps,
    relations=[
        Agrees(dream_by_hand, fields=("images",), where={"jitter": 0, "octaves": 3, "total_variation": 2.0}),
        Agrees(dream_by_hand, fields=("images",), where={"jitter": 0, "zoom": 2, "zoom_scale": 1.3}),
        Agrees(dream_by_hand, fields=("images",), where={"jitter": 0, "blur_every": 2, "blur_sigma": 0.6}),
        *(
            Equivariant(transform, where={"jitter": 0, "octaves": 1})
            for transform in ("hflip", "vflip", "transpose")
        ),
        InvariantTo("batch_order"),
        InvariantTo("normalization"),
        ScalesWith("logits", power=0),
    ],
    quick={"steps": 2, "octaves": 2, "zoom": 0},
    demo={
        "model": "builtin:parts-resnet",
        "images": {"files": "builtin:part-scenes/2", "size": (128, 128)},
        "layers": ["layer2"],
        "octaves": 3,
        "steps": 20,
    },
)
def deep_dream(
    model: Model,
    images: Content,
    guide: Guide = None,
    *,
    layers: Annotated[
        Annotated[list[LayerName], Field(min_length=1)] | None,
        Field(description="layers to maximize; default: the second to last stage"),
    ] = None,
    octaves: Annotated[int, Field(ge=1, le=32, description="number of sizes, smallest first")] = 4,
    octave_scale: Annotated[float, Field(gt=1, le=4, description="ratio of successive sizes")] = 1.4,
    steps: Annotated[int, Field(ge=1, le=10_000, description="number of steps per octave")] = 10,
    lr: Annotated[float, Field(gt=0, le=1, description="root mean square of a step, in pixel values")] = 0.01,
    jitter: Annotated[int, Field(ge=0, le=1024, description="largest random shift per step, in pixels")] = 8,
    total_variation: Annotated[
        float, Field(ge=0, le=1e6, description="weight of the total variation, per pixel")
    ] = 0.0,
    blur_every: Annotated[
        int, Field(ge=0, description="number of steps of an octave between Gaussian blurs; 0: no blur")
    ] = 0,
    blur_sigma: Annotated[
        float, Field(ge=0, le=50, description="standard deviation of the Gaussian blur, in pixels")
    ] = 0.8,
    zoom: Annotated[
        int,
        Field(
            ge=0,
            le=10_000,
            description="number of further runs, each from the enlarged center of the last image",
        ),
    ] = 0,
    zoom_scale: Annotated[
        float, Field(gt=1, le=2, description="enlargement of the center between the runs of a zoom")
    ] = 1.05,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """DeepDream: images that maximize the activations of layers, by gradient ascent from the images.

    I* = argmax_I  sum_l ||phi_l(I)||_2^2 / |phi_l|  -  total_variation TV(I) / HW

    by steps I <- I + lr g / rms(g), each on the image shifted at random by up to ``jitter`` pixels, then
    clipped to [0, 1]; every ``blur_every`` steps it is blurred by a Gaussian of ``blur_sigma`` pixels. The
    ascent runs over ``octaves``, from ``octave_scale`` ^ -(octaves - 1) of the size to the full size; the
    detail added at one size is enlarged and added to the image at the next, which yields patterns of all
    sizes. With a ``guide`` the objective is the similarity to the guide's features instead: at each position
    p the largest product max_q phi(I)_p . phi(guide)_q over the guide's positions q, averaged over p.

    With ``zoom`` the result is cropped to its center, enlarged by ``zoom_scale`` and optimized again,
    repeatedly; ``frames`` are then the images of these runs, saved as ``film.gif`` (and ``film.mp4`` with the
    extra ``video``).

    Returns:
        ``images`` (N, C, H, W) in [0, 1], of the shape of the inputs; ``scores`` ((zoom + 1) * octaves *
        steps, N), the objective at every step; ``sources``, the inputs.

    Raises:
        InputError: both ``frames`` and ``zoom``, or a smallest octave that is too small for the network.

    Example::
        from phosphene import run

        result = run("deep_dream", images="builtin:scenes/2", octaves=2, steps=2, seed=0)
        result.images.shape  # (2, 3, 64, 64)

    Source:
        Mordvintsev et al. 2015 (lecture 21.10).
    """
    if zoom and frames:
        raise InputError("with zoom the frames are the images of its runs: use zoom or frames, not both")
    dream_layers = list(layers or model.stages[-2:][:1])
    if guide is None:
        objective = partial(mean_square_activation, model, dream_layers)
    else:
        with torch.no_grad():
            guide_features = features_by_position(model, dream_layers, guide)
        objective = partial(guide_similarity, model, dream_layers, guide_features)

    def penalty(images: Tensor) -> Tensor:
        # equivalent mutants: all channels have the same number of pixels
        return total_variation * optimize.total_variation(images) / images[0, 0].numel()

    def blur(images: Tensor, gradient: Tensor, step: int) -> Tensor:
        return images if (step + 1) % blur_every else gaussian_blur(images, blur_sigma)

    def ascend(images: Tensor, octave: int) -> Optimization:
        return optimize_image(
            objective,
            PixelImage(images.clamp(0, 1)),
            steps=steps,
            lr=lr,
            optimizer="normalized-sgd",
            # equivalent mutants: a penalty of weight 0 is 0
            regularizer=penalty if total_variation else None,
            # equivalent mutants: a jitter of 0 moves nothing
            transform=partial(optimize.jitter, pixels=jitter) if jitter else None,
            after_step=blur if blur_every else None,
            frames=frames * (octave + 1) // octaves - frames * octave // octaves,
            seed=seed,
        )

    def dream(images: Tensor) -> Optimization:
        stages: list[Optimization] = []
        detail = at_least_float32(torch.zeros_like(images))
        for octave, shape in enumerate(octave_sizes(images, octaves, octave_scale)):
            base = resize(images, shape)
            # equivalent mutants: octaves only grow, where there is no aliasing
            detail = F.interpolate(detail, shape, mode="bilinear", antialias=True)
            stages.append(ascend(base + detail, octave))
            detail = stages[-1].images - base
        return concatenate_stages(stages)

    dreams = [dream(images)]
    for _ in range(zoom):
        if stopped_early_at():
            break
        dreams.append(dream(enlarge_center(dreams[-1].images, zoom_scale)))
    result = concatenate_stages(dreams)
    if zoom:
        result = result._replace(frames=torch.stack([(d.images * 255).round().byte() for d in dreams]))
    title = " + ".join(dream_layers) + (", guided" if guide is not None else "")
    return Synthesis(**result._asdict(), targets=(title,) * len(images), sources=images)


def octave_sizes(images: Tensor, octaves: int, scale: float) -> list[tuple[int, int]]:
    """Height and width at every octave, smallest first."""
    height, width = images.shape[2:]
    factors = [scale**-n for n in reversed(range(octaves))]
    return [(max(1, round(height * factor)), max(1, round(width * factor))) for factor in factors]


def mean_square_activation(model: Model, layers: Sequence[str], images: Tensor) -> Tensor:
    """sum_l ||phi_l(I)||^2 / |phi_l|, (N,)."""
    features = model.features_of(images, layers)
    return torch.stack([f.square().flatten(1).mean(1) for f in features]).sum(0)


def guide_similarity(
    model: Model, layers: Sequence[str], guide_features: Sequence[Tensor], images: Tensor
) -> Tensor:
    """sum_l mean_p max_q phi_l(I)_p . phi_l(guide)_q, (N,)."""
    features = features_by_position(model, layers, images)
    pairs = zip(features, guide_features, strict=True)
    return torch.stack([(f @ g.flatten(0, 1).T).amax(2).mean(1) for f, g in pairs]).sum(0)


def features_by_position(model: Model, layers: Sequence[str], images: Tensor) -> list[Tensor]:
    """Features (N, positions, C) of every layer; a vector counts as one position."""
    features = zip(model.features_of(images, layers), layers, strict=True)
    return [
        f[:, None] if f.ndim == 2 else model.maps(f, images, layer).flatten(2).transpose(1, 2)
        for f, layer in features
    ]


def enlarge_center(images: Tensor, scale: float) -> Tensor:
    """Center crop of images (N, C, H, W), enlarged to their size by ``scale``."""
    height, width = images.shape[2:]
    crop_height, crop_width = (max(1, round(side / scale)) for side in (height, width))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return resize(images[:, :, top : top + crop_height, left : left + crop_width], (height, width))


@hookimpl
def phosphene_methods():
    return [deep_dream]
