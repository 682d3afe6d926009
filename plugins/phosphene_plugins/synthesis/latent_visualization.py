"""Activation maximization in the latent space of a generator, Nguyen et al. 2016."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Class,
    InputError,
    Reference,
    hookimpl,
    load_model,
    method,
    methods,
    progress_bar,
    scores,
)
from phosphene.generative import Generator as Decoder
from phosphene.hooks import guard
from phosphene.images import resize
from phosphene.optimize import LatentImage, optimize_image
from phosphene.roles import Frames, Generator, Model, Seed, Target
from phosphene.spec import Agrees, Cost, InvariantTo, PixelRange, param, size

from ._activation_maximization import (
    SIMONYAN,
    ActivationMaximization,
    Steps,
    UpdateRule,
    class_count,
    maximize_activation,
)
from ._latent_result import LatentSynthesis
from ._relations import class_visualization, latent_ascent


def linear_decoder_and_unit_have_their_closed_form() -> None:
    """max w.(D z + c) - l2 ||z||^2 is attained at z = D^T w / (2 l2), clipped to the bound."""
    decoder, linear = nn.Linear(6, 27), nn.Linear(27, 2).double()
    with torch.no_grad():
        decoder.weight.copy_(0.02 * torch.linspace(-1, 1, 162).view(27, 6).sin())
        decoder.bias.fill_(0.5)
        linear.weight.copy_(torch.linspace(-2, 2, 54).view(2, 27).cos())
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 3, 3))
    generator = Decoder((6,), nn.Sequential(decoder, nn.Unflatten(1, (3, 3, 3))))
    expected = linear.weight.detach() @ decoder.weight.detach().double() / 2
    active_bound = 0.75 * float(expected.abs().max())
    for bound in (10.0, active_bound):
        result = latent_visualization(model, Class((0, 1)), generator, l2=1.0, bound=bound, draws=0,
                                      optimizer="sgd", lr=0.2, steps=40, seed=0)  # fmt: skip
        torch.testing.assert_close(result.codes, expected.clamp(-bound, bound), atol=1e-6, rtol=0)
    assert result.scores.shape == (40, 2) and result.frames is result.reconstruction_error is None
    assert result.targets == ("class 0", "class 1")
    # The generator is copied to the model's precision.
    assert decoder.weight.dtype == torch.float32
    assert torch.equal(result.images, generator.double().decode(result.codes))
    # The start is the best of the drawn codes for each class.
    start: Any = {"draws": 5, "optimizer": "sgd", "lr": 1e-9, "steps": 1}
    for seed in (0, 3):
        codes = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()
        result = latent_visualization(model, Class((0, 1)), generator, **start, seed=seed)
        torch.testing.assert_close(result.codes, codes[(codes @ expected.T).argmax(0)])
        own = methods["synthesis.class_visualization"](model, Class((0, 1)), steps=1, seed=seed).images
        torch.testing.assert_close(result.pixel_images, own)
    colors = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(match_shape(colors, (3, 3, 3)), resize(colors, (3, 3)))
    assert torch.equal(match_shape(colors[:, :1], (6, 6, 6)), colors[:, :1].expand(-1, 6, -1, -1))
    # A generator of larger gray images: reduced to the model's size for the model, and compared at its own.
    gray = Decoder(
        (4,),
        lambda z: 0.5 + z.view(-1, 1, 2, 2).repeat_interleave(3, 2).repeat_interleave(6, 3) / 8,
        lambda images: (images.mean((2, 3)) - 0.5).expand(-1, 4) * 8,
    )
    result = latent_visualization(model, Class((1, 0)), gray, draws=0, steps=2, frames=2, lr=0.01, seed=0)
    assert result.images.shape == (2, 3, 3, 3) and torch.equal(result.images[:, 0], result.images[:, 2])
    assert result.frames is not None and len(result.frames) == 2
    for images, error in (
        (result.images, result.reconstruction_error),
        (result.pixel_images, result.pixel_reconstruction_error),
    ):
        at_size = resize(images.mean(1, keepdim=True), (6, 12))
        assert error is not None
        torch.testing.assert_close(error, at_size.std(dim=(1, 2, 3), correction=0), atol=1e-9, rtol=0)
    # Neither vectors nor images of another number of channels can be read.
    for unreadable in (nn.Identity(), nn.Unflatten(1, (2, 2, 1))):
        message = ""
        try:
            latent_visualization(model, Class(0), Decoder((4,), unreadable), steps=1)
        except InputError as error:
            message = str(error)
        assert "a generator returns" in message or "the generator returns 2" in message


@method(
    family="synthesis",
    references=[
        Reference(
            key="nguyen2016",
            title="Synthesizing the Preferred Inputs for Neurons in Neural Networks via Deep Generator "
            "Networks",
            authors="Nguyen, Dosovitskiy, Yosinski, Brox, Clune",
            year=2016,
            url="https://arxiv.org/abs/1605.09304",
        ),
        SIMONYAN,
    ],
    invariants=[PixelRange(), PixelRange(field="pixel_images")],
    needs=["gradients", "generator"],
    cost=Cost(
        forward=size.images * (param.draws + 2 * param.steps + 1),
        backward=size.images * (2 * param.steps + 1),
    ),
    oracle=linear_decoder_and_unit_have_their_closed_form,
    relations=[
        Agrees(latent_ascent, fields=("codes",), where={"optimizer": "sgd", "draws": 5}, networks=("gap",)),
        Agrees(latent_ascent, fields=("codes",), where={"optimizer": "sgd", "seed": 0}, networks=("gap",)),
        Agrees(class_visualization, fields=("pixel_images",), networks=("gap",)),
        InvariantTo("logit_shift", fields=("images", "pixel_images", "codes"), tolerance=1e-6),
    ],
    quick={"steps": 2, "draws": 2},
    demo={"steps": 100},
)
def latent_visualization(
    model: Model,
    target: Target,
    generator: Generator,
    *,
    l2: Annotated[float, Field(ge=0, description="weight lambda of the penalty ||z||^2 on the code")] = 0.05,
    bound: Annotated[
        float, Field(gt=0, le=100, description="largest absolute value of each component of the code")
    ] = 3.0,
    draws: Annotated[
        int,
        Field(
            ge=0, le=10_000, description="number of random codes, of which the best is the start; 0: z = 0"
        ),
    ] = 32,
    optimizer: UpdateRule = "adam",
    steps: Steps = 200,
    lr: Annotated[float, Field(gt=0, le=1000, description="learning rate in the latent space")] = 0.05,
    frames: Frames = 0,
    seed: Seed = None,
) -> LatentSynthesis:
    """Activation maximization in a generator's latent space (deep generator network), beside pixel space.

    z* = argmax_z S(G(z)) - l2 ||z||^2  with |z_i| <= bound,   I* = G(z*)

    started at the best of ``draws`` codes z ~ N(0, I), the distribution that G was trained on: the penalty is
    the negative log-density of this prior, and ``bound`` excludes components that are improbable under it.
    For comparison, ``class_visualization`` with its defaults optimizes the pixels in as many steps. Pixels
    reach higher scores with unnatural images; codes are limited to images that G can generate.

    ``generator`` is the bundled generator of scenes by default, or any ``phosphene.generative.Generator``.

    Returns:
        ``images`` and ``pixel_images`` (N, C, H, W) in [0, 1], one per class of the target, else one, of the
        model's input size; ``codes`` (N, ...); ``scores`` and ``pixel_scores`` (steps, N), S at every step.
        For a generator with an encoder E, ``reconstruction_error`` and ``pixel_reconstruction_error`` (N,)
        are the root mean square of I - G(E(I)), small for images like those that G was trained on.

    Raises:
        InputError: a generator that does not return images, or not of the model's channels.
        DivergenceError: the gradient is zero at the start.

    Example::
        from phosphene import run

        result = run("latent_visualization", target="star", draws=4, steps=3, seed=0)
        result.images.shape  # (1, 3, 64, 64)
        result.scores[-1], result.pixel_scores[-1]

    Source:
        Nguyen et al. 2016, section 2 (lecture 21.6.2).
    """
    count = class_count(target)
    score = partial(scores, model, target=target)
    if any((p.device, p.dtype) != (model.device, model.dtype) for p in generator.parameters()):
        generator = copy.deepcopy(generator).to(model.device, model.dtype)
    with guard(generator):
        image_shape = check_generator(generator, model)

        def decode(z: Tensor) -> Tensor:
            return match_shape(generator.decode(z), model.input_size)

        z = torch.zeros(count, *generator.latent_size, device=model.device, dtype=model.dtype)
        if draws:
            random = torch.Generator().manual_seed(seed or 0)
            codes = torch.randn(draws, *generator.latent_size, generator=random).to(z)
            z = best_codes(codes, count, lambda z: score(decode(z)))
        image = LatentImage(z, decode, l2=l2, bound=bound)
        latent = optimize_image(
            score, image, steps=steps, lr=lr, optimizer=optimizer, frames=frames, seed=seed
        )
        defaults = ActivationMaximization(steps=steps, deconvnet_steps=16)  # of class_visualization
        pixels = maximize_activation(model, score, count, None, defaults, seed=seed)
        errors: list[Tensor | None] = [None, None]
        if generator.encoder is not None:
            errors = [reconstruction_error(generator, x.images, image_shape) for x in (latent, pixels)]
    return LatentSynthesis(
        images=latent.images,
        pixel_images=pixels.images,
        codes=image.parameter.detach(),
        scores=latent.scores,
        pixel_scores=pixels.scores,
        targets=target.names(model, count),
        reconstruction_error=errors[0],
        pixel_reconstruction_error=errors[1],
        frames=latent.frames,
    )


@torch.no_grad()
def check_generator(generator: Decoder, model: Model) -> tuple[int, ...]:
    """Shape (C, H, W) of the generator's images; InputError if the model cannot read them."""
    z = torch.zeros(1, *generator.latent_size, device=model.device, dtype=model.dtype)
    shape = tuple(generator.decode(z).shape)
    if len(shape) != 4 or shape[0] != 1:
        raise InputError(f"a generator returns images (N, C, H, W), not {shape} for one code")
    channels, input_channels = shape[1], model.input_size[0]
    if 1 not in (channels, input_channels) and channels != input_channels:
        raise InputError(f"the model takes {input_channels} channels, the generator returns {channels}")
    return shape[1:]


@torch.no_grad()
def best_codes(draws: Tensor, count: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The code of highest score for each of ``count`` targets: draws (D, ...) -> (count, ...)."""
    codes = progress_bar(draws, "drawing codes", len(draws))
    values = torch.stack([score(z.expand(count, *z.shape)) for z in codes])
    return draws[values.argmax(0)]


@torch.no_grad()
def reconstruction_error(generator: Decoder, images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Root mean square of I - G(E(I)) over each image, at the generator's own shape (C, H, W): (N,)."""
    images = match_shape(images, shape)
    return (generator.decode(generator.encode(images)) - images).square().mean((1, 2, 3)).sqrt()


def match_shape(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images resized to (C, H, W); where the channels differ, the channel mean is repeated."""
    channels, height, width = shape
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    # equivalent mutants: an image of this size is resized to itself
    return images if tuple(images.shape[2:]) == (height, width) else resize(images, (height, width))


@hookimpl
def phosphene_methods():
    return [latent_visualization]
