"""Class visualisation: the picture a model would like best to see."""

from functools import partial
from typing import Any

import torch

from phosphene import Class, hookimpl, load_model, method, scores
from phosphene.results import Synthesis
from phosphene.roles import Frames, Model, Seed, Start, Target
from phosphene.spec import Cost, PixelRange, param, size

from ._activation_maximization import (
    L2,
    SIMONYAN,
    YOSINSKI,
    BlurEvery,
    BlurSigma,
    ClipContribution,
    ClipNorm,
    Jitter,
    LearningRate,
    Moved,
    Rescale,
    Rotate,
    Size,
    StartNoise,
    Step,
    Steps,
    Variation,
    preferred,
)


def linear_unit_with_l2_has_its_closed_form() -> None:
    """max w.I - lambda ||I - m||^2 lies at I = m + w / (2 lambda), clipped into the box."""
    linear = torch.nn.Linear(48, 2).double()
    weight = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 48)
    with torch.no_grad():
        linear.weight.copy_(weight)
    network = torch.nn.Sequential(torch.nn.Flatten(), linear)
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[1.0, 1.0, 1.0], input_size=(3, 4, 4))
    plain: Any = {"blur_every": 0, "jitter": 0, "parametrization": "pixels", "optimizer": "sgd", "lr": 0.2}
    made = class_visualization(model, Class((0, 1)), l2=0.8, **plain)
    wanted = (model.mean.double().view(3, 1, 1) + weight.view(2, 3, 4, 4) / (2 * 0.8)).clamp(0, 1)
    assert (made.images - wanted).abs().max() < 1e-6, "not at m + w / (2 lambda)"


@method(
    family="synthesis",
    references=[SIMONYAN, YOSINSKI],
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(forward=size.images * (param.steps + 8), backward=size.images * (param.steps + 8)),
    oracle=linear_unit_with_l2_has_its_closed_form,
    quick={"steps": 4, "size": None},
    demo={"l2": 3e-3, "lr": 0.04},
)
def class_visualization(
    model: Model,
    target: Target,
    start: Start = None,
    *,
    l2: L2 = 1e-3,
    total_variation: Variation = 0.0,
    blur_every: BlurEvery = 4,
    blur_sigma: BlurSigma = 0.8,
    clip_norm: ClipNorm = 0,
    clip_contribution: ClipContribution = 0,
    jitter: Jitter = 8,
    rotate: Rotate = 0.0,
    rescale: Rescale = 1.0,
    parametrization: Moved = "fourier",
    optimizer: Step = "adam",
    steps: Steps = 200,
    lr: LearningRate = 0.05,
    start_noise: StartNoise = 0.0,
    size: Size = None,
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Draw the image that a class, or any unit, answers to most: gradient ascent on the pixels.

    I* = argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I)

    found by I <- I + lr grad from I = m, the model's mean colour, which is zero to the network
    (mid-grey where it has none).

    Regularisers, each alone or with others (0 leaves it out): the two penalties above; a Gaussian
    blur of ``blur_sigma`` after every ``blur_every`` steps; after every step, back to m with the
    ``clip_norm`` per cent of pixels nearest to it, and with the ``clip_contribution`` per cent whose
    loss costs the score least; ``jitter``, ``rotate`` and ``rescale`` show the model the image rolled,
    turned and at another size, at random. ``parametrization`` "fourier" climbs in a spectrum weighed
    like a natural image's, its colours decorrelated, "pixels" in the pixels themselves; the
    ``optimizer`` "sgd" takes the plain gradient step.

    One image (C, size, size) in [0, 1] per class of the target, else one; ``scores`` (steps, N) are
    S at every step. Raises DivergenceError where nothing can be climbed: a unit with zero gradient
    at the start wants ``start_noise`` or another seed.
    Source: Simonyan et al. 2014; clipping and blur: Yosinski et al. 2015.
    """
    count = len(target.index) if isinstance(target, Class) and isinstance(target.index, tuple) else 1
    made = preferred(
        model,
        partial(scores, model, target=target),
        count,
        start,
        l2=l2,
        total_variation=total_variation,
        blur_every=blur_every,
        blur_sigma=blur_sigma,
        clip_norm=clip_norm,
        clip_contribution=clip_contribution,
        jitter=jitter,
        rotate=rotate,
        rescale=rescale,
        parametrization=parametrization,
        start_noise=start_noise,
        size=size,
        seed=seed,
        optimizer=optimizer,
        steps=steps,
        lr=lr,
        frames=frames,
    )
    return Synthesis(**made._asdict(), targets=target.names(model, count))


@hookimpl
def phosphene_methods():
    return [class_visualization]
