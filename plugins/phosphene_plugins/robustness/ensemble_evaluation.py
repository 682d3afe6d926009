"""Ensembles of weak defences: each broken alone, and their average attacked as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import Reference, batch_size, hookimpl, load_model, method, progress_bar
from phosphene.images.charts import new_figure, show_image
from phosphene.results import Panel, Result
from phosphene.roles import Images, Labels, Model, Seed
from phosphene.spec import Cost, PixelRange, UnitRange, length, param, size

from ..attacks._gradients import Eot, projected_ascent
from ..attacks._lp_balls import Norm, random_point
from ..models._ensembles import MeanOf, URIs, averaged, averaged_logits, loaded_beside, without_scheme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: So many of the images are shown.
_SHOWN = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class EnsembleReport(Result):
    """What an ensemble withstands, beside each of its members.

    ``accuracy`` (M + 2, M + 1): the share of images taken for their labels, as they are (row 0), attacked
    through member i (row 1 + i) and through the ensemble (the last row), by member j (column j) and by the
    ensemble (the last column). ``borrowed`` is the ensemble's accuracy where any of the members' examples may
    be shown to it. ``images`` (N, C, H, W) in [0, 1], ``adversarial`` what was made of them on the ensemble,
    ``fooled`` (N,) whether it is.
    """

    groups_per_row: ClassVar[int] = 2

    names: tuple[str, ...]
    accuracy: Tensor
    borrowed: float
    images: Tensor
    adversarial: Tensor
    fooled: Tensor

    @property
    def alone(self) -> Tensor:
        """(M,) each member's accuracy, attacked by itself."""
        return self.accuracy[1:-1, :-1].diagonal()

    @property
    def transferred(self) -> Tensor:
        """(M,) the ensemble's accuracy on what each member was attacked with."""
        return self.accuracy[1:-1, -1]

    @property
    def whole(self) -> float:
        """The ensemble's accuracy, attacked as a whole."""
        return float(self.accuracy[-1, -1])

    def _bars(self) -> list[tuple[str, float, float]]:
        """What is attacked and with what, its accuracy before and after."""
        before = self.accuracy[0].tolist()
        bars = [
            (f"{without_scheme(name)}, attacked alone", clean, left)
            for name, clean, left in zip(self.names, before, self.alone.tolist(), strict=False)
        ]
        bars.append(("their average, shown the members' examples", before[-1], self.borrowed))
        return [*bars, ("their average, attacked as a whole", before[-1], self.whole)]

    def lines(self) -> list[str]:
        return [f"{name}: {clean:.0%} -> {left:.0%}" for name, clean, left in self._bars()]

    def panels(self) -> list[list[Panel]]:
        told = ("the average is not fooled", "the average is fooled")
        shown = zip(self.images, self.adversarial, self.fooled.tolist(), strict=True)
        return [
            [Panel(x, "original"), Panel(attacked, told[won], is_output=True), Panel.difference(x, attacked)]
            for x, attacked, won in shown
        ]

    def figure(self) -> Figure:
        """Bars of what each withstands, beside some of the images that the whole was attacked with."""
        bars = self._bars()
        figure = new_figure(1.2 + 0.42 * max(5, len(bars)))
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.7, 1))
        axes = halves[0].subplots()
        places = range(len(bars))
        axes.barh(places, [clean for _, clean, _ in bars], color="0.9", label="the images as they are")
        colours = ["tab:blue"] * len(self.names) + ["tab:orange", "tab:red"]
        axes.barh(places, [left for *_, left in bars], color=colours, height=0.55)
        for place, (_, clean, left) in enumerate(bars):
            axes.text(left + 0.01, place, f"{left:.0%}", va="center", size=8)
            axes.text(clean - 0.01, place, f"{clean:.0%}", va="center", ha="right", size=7, color="0.55")
        axes.set_yticks(places, [name.replace(", ", ",\n") for name, *_ in bars], fontsize=8)
        axes.set_ylim(len(bars) - 0.5, -0.5), axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_xlabel("images taken for what they are; grey: not attacked")
        axes.spines[["top", "right"]].set_visible(False)
        groups = self.panels()[:_SHOWN]
        for cells, group in zip(halves[1].subplots(len(groups), 3, squeeze=False), groups, strict=True):
            for cell, panel in zip(cells, group, strict=True):
                show_image(cell, panel.image, panel.title.replace("the average is ", ""))
        return figure


def adds_up_on_linear_members() -> None:
    """An attack takes from the average of two linear members at right angles what it takes from both.

    That is 0.1 each. Their margins are 0.06 and 0.16 on the first image, 0.06 and 0.08 on the second.
    """
    members = []
    for row in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]):
        linear = nn.Linear(4, 2, bias=False)
        linear.weight.data = torch.stack([torch.zeros(4), torch.tensor(row)])
        members.append(load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2)))
    images = torch.tensor([[[[0.56, 0.66], [0.5, 0.5]]], [[[0.56, 0.58], [0.5, 0.5]]]])
    found = _evaluated(
        members,
        images,
        torch.tensor([1, 1]),
        "logits",
        0,
        eps=0.05,
        step_size=0.02,
        steps=6,
        norm="linf",
        eot=1,
    )
    assert found.accuracy.tolist() == [[1, 1, 1], [0, 1, 1], [1, 0.5, 1], [0, 0.5, 0.5]]
    assert found.borrowed == 1 and found.whole == 0.5 and found.fooled.tolist() == [False, True]


@method(
    family="robustness",
    references=[
        Reference(
            key="he2017",
            title="Adversarial Example Defenses: Ensembles of Weak Defenses are not Strong",
            authors="He, Wei, Chen, Carlini, Song",
            year=2017,
            url="https://arxiv.org/abs/1706.04701",
        )
    ],
    invariants=[PixelRange(field="adversarial"), UnitRange(field="accuracy")],
    needs=["gradients"],
    # Every member is attacked alone and with all others, and shown each attack's examples and the images.
    cost=Cost(
        forward=size.images
        * (1 + length(param.models))
        * (2 * (param.steps * param.eot + 1) + 3 + length(param.models)),
        backward=size.images * (1 + length(param.models)) * 2 * param.steps * param.eot,
    ),
    tags=["evaluation"],
    batch_independent=False,
    oracle=adds_up_on_linear_members,
    quick={"models": (), "steps": 2, "eot": 1},
    demo={
        "models": ("defended:bit_depth(bits=3)|builtin:shapes-vgg",),
        "images": "builtin:scenes/12",
        "eps": 4 / 255,
        "steps": 8,
    },
)
def ensemble_evaluation(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    models: URIs = (),
    mean_of: MeanOf = "probabilities",
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 8 / 255,
    step_size: Annotated[float, Field(gt=0, le=1000, description="length of one ascent step")] = 1 / 255,
    steps: Annotated[int, Field(ge=1, le=10_000, description="how many ascent steps")] = 40,
    norm: Annotated[Norm, Field(description="what the ball is measured in")] = "linf",
    eot: Eot = 1,
    seed: Seed = None,
) -> EnsembleReport:
    """Ask what the average of several models withstands that none of them does alone: less than it seems.

    p(x) = 1/M sum_i p_i(x),   x <- clip(P(x + step_size d)),  d the steepest way up -log p_y

    with p_i the members' probabilities, ``model`` and ``models``, each behind its own defence
    (``defended:jpeg()|builtin:shapes-vgg``); "logits" averages those. PGD from a random point of the ball
    attacks each member alone, and the average as a whole, through all members and their defences at once.
    What was made on the members is shown to the average, too: the number that looks well, since what has
    crossed one member's boundary need not have crossed the others', and nobody had asked for that.
    ``images`` (N, C, H, W) in [0, 1], ``labels`` (N,), of classes that all models share.

    Accuracy is the share of images that are taken for their labels, also where no attack was needed. A failed
    attack proves nothing here either; ``eot`` averages gradients over random members. Raises InputError or
    ModelError for a model that cannot be had, has other classes, or lets no gradient through.

    Source: He et al. 2017, section 4.
    """
    members = [model, *loaded_beside(model, models)]
    for other in members[1:]:
        other.require_gradients()
    return _evaluated(
        members, images, labels, mean_of, seed or 0, eps=eps, norm=norm, step_size=step_size, steps=steps,
        eot=eot,
    )  # fmt: skip


def _evaluated(
    members: Sequence[AnyModel],
    images: Tensor,
    labels: Tensor,
    mean_of: MeanOf,
    seed: int,
    *,
    eps: float,
    norm: Norm,
    **climbing: Any,
) -> EnsembleReport:
    size = batch_size(members[0])

    def attacked(model: AnyModel) -> Tensor:
        made = []
        for some, theirs in zip(images.split(size), labels.split(size), strict=True):
            # Every batch with the same draws, so that how images are put together changes nothing.
            start = random_point(some, eps, norm, torch.Generator().manual_seed(seed))
            found, _ = projected_ascent(
                model, some, theirs, start=start, eps=eps, norm=norm, targeted=False, **climbing
            )
            made.append(found)
        return torch.cat(made)

    def right(pictures: Tensor) -> Tensor:
        """(M + 1, N) who takes these pictures for what they are, the ensemble last."""
        with torch.no_grad():
            logits = [torch.cat([m(some) for some in pictures.split(size)]) for m in members]
        said = [some.argmax(1).to(labels.device) for some in (*logits, averaged_logits(logits, mean_of))]
        return torch.stack([answer == labels for answer in said])

    with ExitStack() as stack:
        for member in members:
            stack.enter_context(member.guard())
        examples = [attacked(m) for m in progress_bar([*members, averaged(members, mean_of)], "attacking")]
        seen = torch.stack([right(pictures) for pictures in (images, *examples)])
    return EnsembleReport(
        names=tuple(member.name for member in members),
        accuracy=seen.double().mean(2).to(images),
        borrowed=float(seen[1:-1, -1].all(0).double().mean()),
        images=images,
        adversarial=examples[-1],
        fooled=~seen[-1, -1],
    )


@hookimpl
def phosphene_methods():
    return [ensemble_evaluation]
