"""Latent visualisation: the picture that a unit answers to most among those that a generator can draw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Class, InputError, Reference, hookimpl, load_model, method, progress_bar, scores
from phosphene.generative import Generator as Decoder
from phosphene.hooks import guard
from phosphene.images import resize
from phosphene.optimize import LatentImage, optimize_image
from phosphene.results import Panel, Synthesis
from phosphene.roles import Frames, Generator, Model, Seed, Target
from phosphene.spec import Cost, PixelRange, param, size

from ._activation_maximization import SIMONYAN, Step, Steps, preferred

#: The length of a step where the pixels are free: that of ``class_visualization``.
FREE_RATE = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentSynthesis(Synthesis):
    """What units like best, twice: among a generator's pictures, and among all.

    ``images`` and ``free`` (N, C, H, W) in [0, 1], found in the ``codes`` (N, ...) and in the pixels, by
    ``scores`` and ``free_scores`` (steps, N); where the generator can encode, ``strange`` and
    ``free_strange`` (N,) say how far each is from what it makes of it. ``frames`` of the first, as in
    ``Synthesis``.
    """

    per_image: ClassVar[tuple[str, ...]] = ("images", "free", "codes", "targets", "strange", "free_strange")
    per_step: ClassVar[tuple[str, ...]] = ("scores", "free_scores", "frames")

    free: Tensor
    codes: Tensor
    free_scores: Tensor
    strange: Tensor | None = None
    free_strange: Tensor | None = None

    def panels(self) -> list[list[Panel]]:
        def told(scores: Tensor, strange: Tensor | None, n: int) -> str:
            far = "" if strange is None else f", strange by {float(strange[n]):.3f}"
            return f"{float(scores[-1, n]):.3g}{far}"

        return [
            [
                Panel(
                    self.images[n], f"{target}, a code: {told(self.scores, self.strange, n)}", is_output=True
                ),
                Panel(
                    self.free[n],
                    f"free pixels: {told(self.free_scores, self.free_strange, n)}",
                    is_output=True,
                ),
            ]
            for n, target in enumerate(self.targets)
        ]

    def rows(self) -> list[list[Panel]]:
        """Each row of codes above its row of free pixels."""
        groups, found = self.panels(), []
        for start in range(0, len(groups), self.groups_per_row):
            found += [list(row) for row in zip(*groups[start : start + self.groups_per_row], strict=True)]
        return found


def a_linear_decoder_and_unit_have_their_closed_form() -> None:
    """max w.(D z + c) - l2 ||z||^2 lies at z = D^T w / (2 l2), but for what the bound cuts off."""
    decoder, linear = nn.Linear(6, 27).double(), nn.Linear(27, 2).double()
    with torch.no_grad():
        decoder.weight.copy_(0.02 * torch.linspace(-1, 1, 162).view(27, 6).sin())
        decoder.bias.fill_(0.5)
        linear.weight.copy_(torch.linspace(-2, 2, 54).view(2, 27).cos())
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(3, 3, 3))
    generator = Decoder((6,), nn.Sequential(decoder, nn.Unflatten(1, (3, 3, 3))))
    wanted = linear.weight.detach() @ decoder.weight.detach() / 2
    bound = 0.75 * float(wanted.abs().max())
    for limit in (10.0, bound):
        made = latent_visualization(model, Class((0, 1)), generator, l2=1.0, bound=limit, draws=0,
                                    optimizer="sgd", lr=0.2, steps=60, seed=0)  # fmt: skip
        torch.testing.assert_close(made.codes, wanted.clamp(-limit, limit), atol=1e-6, rtol=0)


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
    invariants=[PixelRange(), PixelRange(field="free")],
    needs=["gradients", "generator"],
    cost=Cost(
        forward=size.images * (param.draws + 2 * param.steps + 1),
        backward=size.images * (2 * param.steps + 1),
    ),
    oracle=a_linear_decoder_and_unit_have_their_closed_form,
    quick={"steps": 4, "draws": 2},
    demo={"steps": 100},
)
def latent_visualization(
    model: Model,
    target: Target,
    generator: Generator,
    *,
    l2: Annotated[float, Field(ge=0, description="lambda: weight of ||z||^2, the prior's")] = 0.05,
    bound: Annotated[float, Field(gt=0, le=100, description="most that any number of z may be")] = 3.0,
    draws: Annotated[
        int, Field(ge=0, le=10_000, description="codes drawn from the prior, to begin at the best; 0: z = 0")
    ] = 32,
    optimizer: Step = "adam",
    steps: Steps = 200,
    lr: Annotated[float, Field(gt=0, le=1000, description="length of a step in z")] = 0.05,
    frames: Frames = 0,
    seed: Seed = None,
) -> LatentSynthesis:
    """Draw what a unit answers to most among a generator's pictures, beside the best of all pictures.

    z* = argmax_z S(G(z)) - l2 ||z||^2  with |z_i| <= bound,   I* = G(z*)

    from the best of some ``draws`` z ~ N(0, I): such are the codes that G knows, so the penalty is their
    prior, and ``bound`` keeps every number where it has any. Beside it stands what ``class_visualization``
    finds in as many steps with the pixels free. The free picture reaches higher scores, and says what the
    unit alone wants; the code's looks like what G was taught: what G cannot draw is not found.

    One picture of each kind (C, H, W) in [0, 1] per class of the target, else one, of the model's size;
    ``scores`` and ``free_scores`` (steps, N) are S at every step. Where G has an encoder E, ``strange`` and
    ``free_strange`` (N,) are the root mean square of I - G(E(I)): small for what lies among the pictures that
    G knows, and by G's own measure. ``generator``: the bundled one, of scenes, or a Generator of yours.

    Raises InputError for a generator that draws no pictures or other channels than the model sees,
    DivergenceError where a unit has no gradient. Source: Nguyen et al. 2016; lecture 21.6.2.
    """
    count = len(target.index) if isinstance(target, Class) and isinstance(target.index, tuple) else 1
    score = partial(scores, model, target=target)
    if any((p.device, p.dtype) != (model.device, model.dtype) for p in generator.parameters()):
        generator = copy.deepcopy(generator).to(model.device, model.dtype)
    with guard(generator):
        z = torch.zeros(count, *generator.latent_size, device=model.device, dtype=model.dtype)
        with torch.no_grad():
            drawn = generator.decode(z[:1])
        shape = tuple(drawn.shape)
        if len(shape) != 4 or shape[0] != 1:
            raise InputError(f"a generator draws pictures (N, C, H, W), not {shape} of one code")
        if 1 not in (shape[1], model.input_size[0]) and shape[1] != model.input_size[0]:
            raise InputError(
                f"the model takes {model.input_size[0]} channels, the generator draws {shape[1]}"
            )

        def decode(z: Tensor) -> Tensor:
            return fitted(generator.decode(z), model.input_size)

        def strange(images: Tensor) -> Tensor:
            seen = fitted(images, shape[1:])
            return (generator.decode(generator.encode(seen)) - seen).square().mean((1, 2, 3)).sqrt()

        if draws:
            random = torch.Generator().manual_seed(seed or 0)
            codes = torch.randn(draws, *generator.latent_size, generator=random).to(z)
            z = best_of(codes, count, lambda z: score(decode(z)))
        latent = LatentImage(z, decode, l2=l2, bound=bound)
        climb: dict[str, Any] = {"optimizer": optimizer, "steps": steps, "seed": seed}
        made = optimize_image(score, latent, lr=lr, frames=frames, **climb)
        free = preferred(model, score, count, None, lr=FREE_RATE, **climb | {"optimizer": "adam"})
        far: list[Tensor | None] = [None, None]
        if generator.encoder is not None:
            with torch.no_grad():
                far = [strange(made.images), strange(free.images)]
    return LatentSynthesis(
        images=made.images,
        free=free.images,
        codes=latent.parameter.detach(),
        scores=made.scores,
        free_scores=free.scores,
        targets=target.names(model, count),
        strange=far[0],
        free_strange=far[1],
        frames=made.frames,
    )


@torch.no_grad()
def best_of(draws: Tensor, count: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Of codes (D, ...) the one with the highest score for each of ``count`` targets: (count, ...)."""
    codes = progress_bar(draws, "drawing codes", len(draws))
    found = torch.stack([score(z.expand(count, *z.shape)) for z in codes])
    return draws[found.argmax(0)]


def fitted(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Pictures as (C, H, W) wants them: resized, grey where it is to be so, or grey in all channels."""
    channels, *sides = size
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return images if list(images.shape[2:]) == sides else resize(images, (sides[0], sides[1]))


@hookimpl
def phosphene_methods():
    return [latent_visualization]
