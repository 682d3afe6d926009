"""Transfer: examples made on one model, shown to others that nobody may look into."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import Reference, batch_size, hookimpl, load_model, method
from phosphene.images import charts
from phosphene.results import Panel, Result
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, UnitRange, length, param, size

from ..models._ensembles import URIs, loaded_beside, without_scheme
from ._gradients import Eot, Under, projected_ascent, reached
from ._lp_balls import Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: So many examples stand beside the table.
_SHOWN = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class TransferTable(Result):
    """How often what fools one model fools another.

    ``rates`` (M, M): of the images that models ``names[i]`` and ``names[j]`` both took for what they are, the
    share that j no longer does once they are attacked through i (targeted: of those that neither took for
    the class wanted, the share that j now does); ``counts`` (M, M) how many images those are. ``images``
    (N, C, H, W), ``adversarial`` (M, N, C, H, W) what each model was attacked with, in [0, 1]; ``fooled``
    (M, M, N) bool.
    """

    groups_per_row: ClassVar[int] = 1

    names: tuple[str, ...]
    rates: Tensor
    counts: Tensor
    images: Tensor
    adversarial: Tensor
    fooled: Tensor

    def panels(self) -> list[list[Panel]]:
        """Some images and what the first model was attacked with, with how many models that fools."""
        groups = []
        order = self.fooled[0].sum(0).argsort(descending=True, stable=True)[:_SHOWN].tolist()
        for n in order:
            told = f"fools {int(self.fooled[0, :, n].sum())} of {len(self.names)}"
            image, attacked = self.images[n], self.adversarial[0, n]
            change = Panel.difference(image, attacked)
            groups.append([Panel(image, "original"), Panel(attacked, told, is_output=True), change])
        return groups

    def lines(self) -> list[str]:
        told = []
        for name, row in zip(self.names, self.rates.tolist(), strict=True):
            shares = [
                f"{without_scheme(other)} {rate:.0%}" for other, rate in zip(self.names, row, strict=True)
            ]
            told.append(f"{without_scheme(name)} -> {', '.join(shares)}")
        return told

    def figure(self) -> Figure:
        """The table, darker where more is fooled, beside some of the examples."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
        left, right = halves
        axes, rates = left.subplots(), self.rates.float().cpu()
        axes.imshow(rates.numpy(), cmap="Reds", vmin=0, vmax=1)
        for row, column in torch.cartesian_prod(torch.arange(len(rates)), torch.arange(len(rates))).tolist():
            value = float(rates[row, column])
            colour = "white" if value > 0.6 else "black"
            told = f"{value:.0%}\nof {int(self.counts[row, column])}"
            axes.text(column, row, told, ha="center", va="center", color=colour, fontsize=10)
        names = [without_scheme(name) for name in self.names]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("shown to", fontsize=9), axes.set_ylabel("made on", fontsize=9)
        axes.spines[:].set_visible(False), axes.tick_params(length=0)
        groups = self.panels()
        for cells, group in zip(right.subplots(len(groups), 3, squeeze=False), groups, strict=True):
            for cell, panel in zip(cells, group, strict=True):
                charts.show_image(cell, panel.image, panel.title)
        return figure


def linear_models_share_their_examples() -> None:
    """What fools a linear model fools the same one scaled, and leaves one at right angles as it was."""
    rows = ([1.0, 0.0, -1.0, 0.0], [3.0, 0.0, -3.0, 0.0], [0.0, 1.0, 0.0, -1.0])
    models = []
    for row in rows:
        linear = nn.Linear(4, 2, bias=False)
        linear.weight.data = torch.stack([torch.zeros(4), torch.tensor(row)])
        models.append(load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2)))
    images = torch.tensor([[[[0.52, 0.52], [0.5, 0.5]]], [[[0.5, 0.52], [0.53, 0.51]]]])
    labels = models[0](images).argmax(1)
    rates, counts, _, _ = _across(
        models, images, labels, targeted=False, eps=0.05, step_size=0.05, steps=1
    )  # fmt: skip
    # Both say the same of the second image and of the first not: that one alone is asked about.
    torch.testing.assert_close(rates, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    assert counts.tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]


@method(
    family="attacks",
    title="Transfer between models",
    references=[
        Reference(
            key="dong2018",
            title="Boosting Adversarial Attacks with Momentum",
            authors="Dong, Liao, Pang, Su, Zhu, Hu, Li",
            year=2018,
            url="https://arxiv.org/abs/1710.06081",
        ),
        Reference(
            key="xie2019",
            title="Improving Transferability of Adversarial Examples with Input Diversity",
            authors="Xie, Zhang, Zhou, Bai, Wang, Ren, Yuille",
            year=2019,
            url="https://arxiv.org/abs/1803.06978",
        ),
    ],
    invariants=[PixelRange(field="adversarial"), UnitRange(field="rates")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images
        * (1 + length(param.models))
        * (param.steps * param.eot + 3 + length(param.models)),
        backward=size.images * (1 + length(param.models)) * param.steps * param.eot,
    ),
    tags=["black-box", "fixed-radius"],
    batch_independent=False,
    oracle=linear_models_share_their_examples,
    quick={"models": (), "steps": 3, "eot": 1},
    demo={"models": ("builtin:shapes-resnet",), "images": "builtin:scenes/24"},
)
def transfer(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    models: URIs = (),
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 16
    / 255,
    step_size: Annotated[float, Field(gt=0, le=1000, description="length of one step")] = 2 / 255,
    steps: Annotated[int, Field(ge=1, le=10_000, description="how many steps")] = 10,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    momentum: Annotated[float, Field(ge=0, le=1, description="of the gradients before: MI-FGSM")] = 1.0,
    under: Under = ("resize_and_pad",),
    eot: Eot = 1,
    targeted: Annotated[bool, Field(description="labels are the classes wanted, not the true ones")] = False,
    seed: Seed = None,
) -> TransferTable:
    """Attack each model through its gradients and show the examples to all: what fools one may fool others.

    g <- momentum g + dL(T(x))/dx / mean|dL(T(x))/dx|;  x <- clip(P(x + step_size sign(g)))

    with L the cross-entropy of ``labels``, P the projection onto the ball and T the random changes of
    ``under``: "resize_and_pad" is the diverse inputs of Xie et al., () no change. ``momentum`` 0 and () are
    plain ``bim``. ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,), of classes that all ``models`` share;
    they must take pictures of one size.

    ``rates`` (M, M): made on (row), shown to (column), of the images that both were right about. The
    diagonal is the white-box attack. Gradients are needed of every model; to attack one that has none,
    read its column. Raises InputError or ModelError for a model that cannot be had or has other classes.

    Source: Dong et al. 2018, algorithm 1; Xie et al. 2019, section 3.2; Papernot et al. 2016 for the idea.
    """
    everyone = [model, *loaded_beside(model, models)]
    for other in everyone[1:]:
        other.require_gradients()
    with ExitStack() as stack:
        for other in everyone:
            stack.enter_context(other.guard())
        rates, counts, adversarial, fooled = _across(
            everyone, images, labels, targeted=targeted, eps=eps, step_size=step_size, steps=steps, norm=norm,
            momentum=momentum, under=under, eot=eot, seed=seed or 0,
        )  # fmt: skip
    return TransferTable(
        names=tuple(m.name for m in everyone),
        rates=rates,
        counts=counts,
        images=images,
        adversarial=adversarial,
        fooled=fooled,
    )


def _across(
    models: Sequence[AnyModel],
    images: Tensor,
    labels: Tensor,
    *,
    targeted: bool,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm = "linf",
    momentum: float = 0.0,
    under: Under = (),
    eot: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rates and counts (M, M), examples (M, N, C, H, W), who is fooled (M, M, N): through each, on all."""
    size = batch_size(models[0])

    def says(victim: AnyModel, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            logits = torch.cat([victim(some) for some in pictures.split(size)])
        return reached(logits.to(images), labels, targeted)

    examples = []
    for surrogate in models:
        parts = []
        for some, theirs in zip(images.split(size), labels.split(size), strict=True):
            # Every batch with the same draws, so that how images are put together changes nothing.
            generator = torch.Generator().manual_seed(seed)
            parts.append(
                projected_ascent(
                    surrogate, some, theirs, eps=eps, step_size=step_size, steps=steps, norm=norm,
                    targeted=targeted, momentum=momentum, eot=eot, under=under, generator=generator,
                )[0]
            )  # fmt: skip
        examples.append(torch.cat(parts))
    before = torch.stack([says(victim, images) for victim in models])
    after = torch.stack([torch.stack([says(v, pictures) for v in models]) for pictures in examples])
    asked = ~(before[:, None] | before[None])  # what one of the two has wrong already proves nothing
    fooled, counts = after & asked, asked.sum(2)
    rates = (fooled.sum(2) / counts.clamp(min=1)).to(images)
    return rates, counts, torch.stack(examples), fooled


@hookimpl
def phosphene_methods():
    return [transfer]
