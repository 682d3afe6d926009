"""Class visualization by activation maximization, Simonyan et al. 2014."""

from functools import partial
from typing import Any

import torch

from phosphene import Class, DivergenceError, hookimpl, load_model, method, scores
from phosphene.results import Synthesis
from phosphene.roles import Frames, Model, Seed, Start, Target
from phosphene.spec import Cost, InvariantTo, Monotone, PixelRange, param, size

from ._activation_maximization import (
    MORDVINTSEV,
    PENALTY_PASSES,
    SIMONYAN,
    YOSINSKI,
    ActivationMaximization,
    class_count,
    maximize_activation,
)
from ._ascent_closed_forms import ascent_has_its_closed_forms
from ._relations import PLAIN, agrees_with_ascent, class_ascent


def linear_unit_with_l2_has_its_closed_form() -> None:
    """max w.I - lambda ||I - m||^2 is attained at I = m + w / (2 lambda), clipped to [0, 1]."""
    linear = torch.nn.Linear(48, 2).double()
    weight = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 48)
    with torch.no_grad():
        linear.weight.copy_(weight)
    network = torch.nn.Sequential(torch.nn.Flatten(), linear)
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[1.0, 1.0, 1.0], input_size=(3, 4, 4))
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", "lr": 0.2, "start_noise": 0.0, **PLAIN}
    result = class_visualization(model, Class((0, 1)), **plain | {"l2": 0.8, "steps": 60})
    expected = (model.mean.double().view(3, 1, 1) + weight.view(2, 3, 4, 4) / (2 * 0.8)).clamp(0, 1)
    assert (result.images - expected).abs().max() < 1e-6, "not at m + w / (2 lambda)"
    assert result.targets == ("class 0", "class 1") and result.scores.shape == (60, 2)
    # One step of one class from a start s: s + lr (w - 2 lambda (s - m)).
    start = torch.full((1, 3, 4, 4), 0.3, dtype=torch.float64)
    center = model.mean.double().view(3, 1, 1)
    one = class_visualization(model, 1, start, frames=1, **plain | {"l2": 0.1, "steps": 1})
    step = start + 0.2 * (weight[1].view(3, 4, 4) - 0.2 * (start - center))
    torch.testing.assert_close(one.images, step.clamp(0, 1))
    assert one.targets == ("class 1",) and one.frames is not None and len(one.frames) == 1
    first_steps_open_a_closed_unit()
    # A unit without gradient is refused after eight other noise images, or at once without noise.
    passes: list[int] = []
    linear.register_forward_hook(lambda *_: passes.append(1))
    linear.weight.data.zero_()
    for noise in (0.1, 0.0):
        try:
            class_visualization(model, 1, **plain | {"start_noise": noise, "steps": 1, "deconvnet_steps": 0})
        except DivergenceError:
            passes.append(0)
    assert passes == [1] * 9 + [0, 1, 0]
    ascent_has_its_closed_forms(class_visualization)


def first_steps_open_a_closed_unit() -> None:
    """S = relu(w.I - 3) - relu(u.I) from gray: first steps of w, then of -u, whose ReLU alone is open."""
    hidden, last = torch.nn.Linear(12, 2).double(), torch.nn.Linear(2, 1, bias=False).double()
    w, u = (torch.linspace(*ends, 12, dtype=torch.float64) for ends in ((0.1, 0.3), (0.3, -0.1)))
    with torch.no_grad():
        hidden.weight.copy_(torch.stack([w, u]))
        hidden.bias.copy_(torch.tensor([-3.0, 0.0]))
        last.weight.copy_(torch.tensor([[1.0, -1.0]]))
    network = torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.ReLU(), last)
    model = load_model(network, task="regression", input_size=(3, 2, 2))
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", "lr": 0.01, "start_noise": 0.0, **PLAIN}
    start = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    for first, minimize, direction in (
        (2, False, 2 * w - u), (0, False, -3 * u), (5, False, 3 * w), (5, True, 3 * u),
    ):  # fmt: skip
        options = plain | {"steps": 3, "deconvnet_steps": first, "minimize": minimize}
        result = class_visualization(model, 0, **options)
        torch.testing.assert_close(result.images, start + 0.01 * direction.view(1, 3, 2, 2))


@method(
    family="synthesis",
    references=[SIMONYAN, YOSINSKI, MORDVINTSEV],
    invariants=[PixelRange()],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * param.variants * ((1 + param.transparent + PENALTY_PASSES) * param.steps + 8),
        backward=size.images * param.variants * ((1 + PENALTY_PASSES) * param.steps + 8),
    ),
    oracle=linear_unit_with_l2_has_its_closed_form,
    relations=[
        agrees_with_ascent(class_ascent),
        agrees_with_ascent(class_ascent, deconvnet_steps=2),
        agrees_with_ascent(class_ascent, jitter=0, rotate=0, rescale=1, size=None, clip_contribution=0),
        Monotone(
            "steps",
            values=(2, 6, 12),
            measure="scores",
            where=PLAIN,
            networks=("gap",),
        ),
        InvariantTo("logit_shift", fields=("images",), tolerance=1e-6),
    ],
    quick={"steps": 4, "size": None},
    demo={
        "model": "builtin:parts-resnet",
        "target": ["boat", "fish", "bird", "butterfly", "cat"],
        "parametrization": "cppn",
        "jitter": 4,
        "rotate": 5,
        "rescale": 1.05,
    },
)
def class_visualization(
    model: Model,
    target: Target,
    start: Start = None,
    *,
    params: ActivationMaximization = ActivationMaximization(deconvnet_steps=16),
    frames: Frames = 0,
    seed: Seed = None,
) -> Synthesis:
    """Class visualization by activation maximization: an image of maximal class score (gradient ascent).

    I* = argmax_I S(I) - l2 ||I - m||^2 - total_variation TV(I)

    by steps I <- I + lr grad from I = m, the model's mean color, which normalization maps to zero (mid-gray
    for a model without a mean), plus ``start_noise`` and smooth gray noise of ``start_contrast``. S is the
    logit of a class, or any other target. From an even gray the gradient may only remove what speaks against
    a class, and the ascent ends with an empty image: what speaks for it is behind closed ReLUs. In the first
    ``deconvnet_steps`` positive gradients alone pass ReLUs, closed ones as well; not those of a network of
    coordinates, which they darken (its ``start_noise`` of 0.2 is enough). ``start_contrast`` of 0.2 opens
    ReLUs too, and leaves a trace of the noise.

    Regularizers, off at 0: the two penalties; a Gaussian blur of width ``blur_sigma`` after every
    ``blur_every`` steps; clipping to m of the ``clip_norm`` per cent of pixels nearest to m and of the
    ``clip_contribution`` per cent that contribute least to the score, after every step; a gradient of zero
    for the ``clip_gradient`` per cent of pixels with the smallest one; random shifts (``jitter``), rotations
    (``rotate``) and scales (``rescale``) of the network's input. The default
    ``parametrization`` is a Fourier spectrum with the amplitudes of natural images and decorrelated colors;
    "pixels" optimizes the pixels, with ``optimizer`` "sgd" by the plain gradient step; "cppn" the weights of
    a small network of the pixels' coordinates, whose image is smooth and returned at any ``render_size``.

    ``minimize`` is the negative side of a unit. Several ``variants`` of an image start at other noise, and
    ``diversity`` penalizes the cosine of the Gram matrices of their last maps. ``batch_norm`` penalizes the
    distance of the statistics of every normalized layer from those of the training,
    sum_l ||mean_l(I) - m_l|| + ||var_l(I) - v_l||. A ``transparent`` image has an opacity alpha and is laid
    before a random background at every step; (S - S of the background) (1 - mean alpha) is maximized, so that
    only what S needs is opaque.

    Returns:
        ``images`` (N, C, size, size) in [0, 1], or of ``render_size``, ``variants`` per class of the target
        in a row, else of one target; ``scores`` (steps, N), S at every step; ``alpha`` (N, size, size) if
        ``transparent``.

    Raises:
        DivergenceError: the gradient is zero at the start, or the score does not change in ten steps; try
            ``start_noise`` or another seed.

    Example::
        from phosphene import run

        result = run("class_visualization", target=["star", "circle"], steps=5, seed=0)
        result.images.shape  # (2, 3, 64, 64)

    Source:
        Simonyan et al. 2014, section 2. Blur and clipping: Yosinski et al. 2015, section 3. Fourier
        parametrization, augmentations and diversity: Olah et al. 2017. Networks of coordinates and opacity:
        Mordvintsev et al. 2018. Statistics of batch normalization: Yin et al. 2020, equation 4. Gradients
        through closed ReLUs: Zeiler & Fergus 2014, section 2.1.
    """
    count = class_count(target)
    rows = torch.arange(count).repeat_interleave(params.variants).tolist()
    score = partial(scores, model, target=target.select(rows))
    optimization = maximize_activation(model, score, len(rows), start, params, frames=frames, seed=seed)
    names = target.names(model, count)
    return Synthesis(**optimization._asdict(), targets=tuple(names[row] for row in rows))


@hookimpl
def phosphene_methods():
    return [class_visualization]
