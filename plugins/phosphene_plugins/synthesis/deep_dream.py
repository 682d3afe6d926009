"""DeepDream: what a layer sees in a picture, made stronger until it can be seen."""

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import InputError, Reference, hookimpl, load_model, method, optimize, stopped_early_at
from phosphene.images import resize
from phosphene.optimize import (
    Optimization,
    PixelImage,
    concatenate_stages,
    optimize_image,
)
from phosphene.results import Synthesis
from phosphene.roles import Content, Frames, Guide, LayerName, Model, Seed
from phosphene.spec import Cost, PixelRange, SameShape, param, size


def identity_grows_by_its_own_direction() -> None:
    """Where features are pixels, I <- clip(I + lr I / rms(I)), and rolling the picture changes nothing."""
    identity = nn.Conv2d(1, 1, 1, bias=False).double()
    nn.init.ones_(identity.weight)
    model = load_model(nn.Sequential(identity, nn.Flatten(), nn.Linear(64, 2).double()), input_size=(1, 8, 8))
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9
    made = deep_dream(model, images, layers=["0"], octaves=1, steps=2, lr=0.1, total_variation=0, seed=0)
    wanted = images
    for _ in range(2):
        mean_square = wanted.square().mean((1, 2, 3), keepdim=True)
        wanted = (wanted + 0.1 * wanted / mean_square.sqrt()).clamp(0, 1)
    torch.testing.assert_close(made.images, wanted)


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
    # Of a guide one pass for each layer's batch.
    cost=Cost(
        forward=size.images * param.octaves * param.steps * (param.zoom + 1) + 1,
        backward=size.images * param.octaves * param.steps * (param.zoom + 1),
    ),
    oracle=identity_grows_by_its_own_direction,
    quick={"steps": 2, "octaves": 2, "zoom": 0},
    demo={"layers": ["features.16"], "octaves": 2, "steps": 12},
)
def deep_dream(
    model: Model,
    images: Content,
    guide: Guide = None,
    *,
    layers: Annotated[
        Annotated[list[LayerName], Field(min_length=1)] | None,
        Field(description="what dreams; the last stage but one"),
    ] = None,
    octaves: Annotated[int, Field(ge=1, le=32, description="sizes, the smallest first")] = 4,
    octave_scale: Annotated[float, Field(gt=1, le=4, description="how much larger each is")] = 1.4,
    steps: Annotated[int, Field(ge=1, le=10_000, description="steps of ascent at each size")] = 10,
    lr: Annotated[float, Field(gt=0, le=1, description="root mean square of a step, in pixel units")] = 0.01,
    jitter: Annotated[int, Field(ge=0, le=1024, description="roll by up to so many pixels each step")] = 8,
    total_variation: Annotated[float, Field(ge=0, le=1e6, description="weight of it, per pixel")] = 0.0,
    zoom: Annotated[
        int, Field(ge=0, le=10_000, description="more dreams, each of the last one's middle")
    ] = 0,
    zoom_scale: Annotated[float, Field(gt=1, le=2, description="how far each goes in")] = 1.05,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Let layers exaggerate what they see in a picture: gradient ascent on the norm of their answers.

    I* = argmax_I  sum_l ||phi_l(I)||_2^2 / |phi_l|  -  total_variation TV(I) / HW

    by steps I <- I + lr g / rms(g) from the picture itself, rolled anew each time by up to ``jitter``
    pixels. It begins ``octave_scale`` ^ -(octaves - 1) of its size; what was dreamt there is enlarged, added
    to the next size of the picture, and dreamt on, so that forms of every size grow. With a ``guide`` it is
    not what is there that is made stronger but what is there of the guide: at each place
    the answer of the guide's that fits best, max_q phi(I)_p . phi(guide)_q, of which the mean is taken.

    ``images`` (N, C, H, W) in [0, 1], at their own size -> ``images`` of the same shape, ``scores``
    (octaves * steps, N). After ``zoom`` more dreams, each of the last one's middle enlarged by
    ``zoom_scale``, ``frames`` are the sequence, one each, and ``film.gif`` shows it; with the extra
    ``video``, ``film.mp4``, too. Raises InputError where both frames and zoom are asked for, and where the
    smallest size is too small for the network.

    Source: Mordvintsev et al. 2015 (lecture 21.10).
    """
    if zoom and frames:
        raise InputError("the frames of a zoom are its dreams: ask for zoom or for frames, not both")
    chosen = list(layers or model.stages[-2:][:1])
    height, width = images.shape[2:]
    scales = [octave_scale**-back for back in reversed(range(octaves))]
    sizes = [(max(1, round(height * scale)), max(1, round(width * scale))) for scale in scales]
    if guide is not None:
        with torch.no_grad():
            told = [places_of(model, f, guide) for f in model.features_of(guide, chosen)]

    def liveliness(found: Tensor) -> Tensor:
        answers = model.features_of(found, chosen)
        if guide is None:
            return torch.stack([a.square().flatten(1).mean(1) for a in answers]).sum(0)
        pairs = zip(answers, told, strict=True)
        best = [(places_of(model, a, found) @ wanted.flatten(0, 1).T).amax(2).mean(1) for a, wanted in pairs]
        return torch.stack(best).sum(0)

    def penalty(found: Tensor) -> Tensor:
        return total_variation * optimize.total_variation(found) / found[0, 0].numel()

    def dream(picture: Tensor) -> Optimization:
        stages: list[Optimization] = []
        dreamt = torch.zeros_like(picture)
        for octave, shape in enumerate(sizes):
            base = resize(picture, shape)
            dreamt = F.interpolate(dreamt, shape, mode="bilinear", antialias=True)
            stages.append(
                optimize_image(
                    liveliness,
                    PixelImage((base + dreamt).clamp(0, 1)),
                    steps=steps,
                    lr=lr,
                    optimizer="normalized-sgd",
                    regularizer=penalty if total_variation else None,
                    transform=partial(optimize.jitter, pixels=jitter) if jitter else None,
                    frames=frames * (octave + 1) // octaves - frames * octave // octaves,
                    seed=seed,
                )
            )
            dreamt = stages[-1].images - base
        return concatenate_stages(stages)

    made = [dream(images)]
    for _ in range(zoom):
        if stopped_early_at():
            break
        made.append(dream(closer(made[-1].images, zoom_scale)))
    whole = concatenate_stages(made)
    if zoom:
        whole = whole._replace(frames=torch.stack([(d.images * 255).round().byte() for d in made]))
    names = (" + ".join(chosen) + (" as in the guide" if guide is not None else ""),) * len(images)
    return Synthesis(**whole._asdict(), targets=names, sources=images)


def places_of(model: Model, features: Tensor, pictures: Tensor) -> Tensor:
    """What a layer answers at each place, (N, P, C); a vector is one place."""
    if features.ndim == 2:
        return features[:, None]
    return model.maps(features, pictures).flatten(2).transpose(1, 2)


def closer(pictures: Tensor, scale: float) -> Tensor:
    """The middle of pictures (N, C, H, W), enlarged to their size."""
    height, width = pictures.shape[2:]
    rows, columns = (max(1, round(side / scale)) for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize(pictures[:, :, top : top + rows, left : left + columns], (height, width))


@hookimpl
def phosphene_methods():
    return [deep_dream]
