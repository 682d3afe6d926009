"""The universal perturbation: one change of the pixels that fools the model on most pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    methods,
    progress_bar,
    report_progress,
    save_progress,
    saved_progress,
)  # fmt: skip
from phosphene.results import AdversarialExamples, Panel, Result
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, PixelRange, param, size

from ._lp_balls import length

#: Pictures (N, C, H, W) of a data set, by their places in it, with something done to them.
Change = Callable[[Tensor, Sequence[int]], Tensor]
#: How many held-out pictures a result shows, and how many passes for each step an inner attack may take.
_SHOWN, _PASSES = 6, 16


@dataclass(frozen=True, eq=False, kw_only=True)
class UniversalPerturbation(Result):
    """One perturbation for all pictures, how often it fools the model, and some pictures with it.

    ``perturbation`` (C, H, W) is added to a picture; ``fooling_rate`` is the share of the pictures it was
    made from that the model takes for something else with it, ``held_out_rate`` that of pictures it never
    saw, None where none were left out. ``images``, ``adversarial`` (P, C, H, W) in [0, 1].
    """

    groups_per_row: ClassVar[int] = 3

    perturbation: Tensor
    fooling_rate: float
    held_out_rate: float | None
    images: Tensor
    adversarial: Tensor
    names_before: tuple[str, ...]
    names_after: tuple[str, ...]

    def panels(self) -> list[list[Panel]]:
        shown = zip(self.images, self.adversarial, self.names_before, self.names_after, strict=True)
        pairs = [
            [Panel(before, name), Panel(after, f"-> {other}" if other != name else "the same")]
            for before, after, name, other in shown
        ]
        return [[self._portrait()], *pairs]

    def _portrait(self) -> Panel:
        largest = float(self.perturbation.abs().max())
        factor = 0.5 / largest if largest else 1.0
        return Panel(0.5 + self.perturbation * factor, f"×{factor:.0f}: {self._rates()}", is_output=True)

    def _rates(self) -> str:
        held_out = "" if self.held_out_rate is None else f", {self.held_out_rate:.0%} held out"
        return f"fools {self.fooling_rate:.0%}{held_out}"


def is_the_corner_of_the_ball_on_a_linear_model() -> None:
    """On two classes it is xi sign(w), and fools every picture whose margin is below xi ||w||_1."""
    linear = nn.Linear(4, 2, bias=False).double()
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 2, 2))
    away = (linear.weight[1] - linear.weight[0]).detach().view(1, 1, 2, 2)
    # All of class 0, by these margins in units of what the ball allows; grey, so that nothing is clipped.
    shares = torch.tensor([0.2, 0.5, 0.9, 1.5], dtype=torch.float64)[:, None, None, None]
    base = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    base = base - away * ((away * base).sum() / away.square().sum())
    images = base - away * (shares * 0.1 * away.abs().sum() / away.square().sum())
    found = universal(model, TensorDataset(images), eps=0.1, held_out=0)
    torch.testing.assert_close(found.perturbation, 0.1 * away[0].sign())
    assert found.fooling_rate == 0.75 and found.held_out_rate is None


@method(
    family="attacks",
    title="Universal perturbation",
    references=[
        Reference(
            key="moosavi2017",
            title="Universal adversarial perturbations",
            authors="Moosavi-Dezfooli, Fawzi, Fawzi, Frossard",
            year=2017,
            url="https://arxiv.org/abs/1610.08401",
        )
    ],
    invariants=[PixelRange(field="adversarial")],
    needs=["gradients", "dataset"],
    # For each picture what an inner attack may take at most, a look again where the perturbation has grown
    # meanwhile, and a look at all of them after every round.
    cost=Cost(
        forward=size.dataset * (param.epochs * (_PASSES * param.steps + (_PASSES + 2)) + 2),
        backward=size.dataset * param.epochs * (_PASSES * param.steps + _PASSES),
    ),
    tags=["white-box", "fixed-radius"],
    oracle=is_the_corner_of_the_ball_on_a_linear_model,
    quick={"epochs": 1, "steps": 2},
    demo={"dataset": "builtin:scenes/32", "eps": 0.2, "attack": "pgd", "epochs": 3},
)
def universal(
    model: Model,
    dataset: Dataset,
    *,
    attack: Annotated[
        str, Field(description="the attack that takes each picture further, by its name")
    ] = "deepfool",
    eps: Annotated[float, Field(gt=0, le=1000, description="radius of the ball, pixels in [0, 1]")] = 10
    / 255,
    norm: Annotated[Literal["linf", "l2"], Field(description="what the ball is measured in")] = "linf",
    aim: Annotated[float, Field(gt=0, le=1, description="the fooling rate that is enough")] = 0.8,
    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the pictures at most")] = 5,
    steps: Annotated[int, Field(ge=1, le=10_000, description="steps of the inner attack at most")] = 10,
    pictures: Annotated[
        int, Field(ge=1, le=1000, description="how many pictures are attacked at once; in the paper 1")
    ] = 8,
    held_out: Annotated[float, Field(ge=0, lt=1, description="share of the pictures to test it on")] = 0.25,
) -> UniversalPerturbation:
    """Find one perturbation that fools the model on most pictures, going from picture to picture.

    v <- P(v + r),  r the smallest change with which the model takes x + v + r for another class than x

    for every picture x that x + v does not fool, P the projection onto the ball of radius ``eps``; again
    over all pictures, until the share that is fooled reaches ``aim``. The r of ``pictures`` pictures are
    found at once, from the same v, which then takes them one after another: each only if the model is still
    not fooled, as in the paper, but found where v was a few pictures ago. r comes from ``attack``, any
    registered one that takes a model, images and labels; it is told ``norm``, ``eps`` and ``steps`` where it
    knows them. "Fooled" means another class than the model says of the picture itself. The last pictures of
    the data set, a share ``held_out``, take no part and tell how well it carries over; the result shows some
    of them. A run that was cut off goes on. InputError for an attack that takes or gives other things.

    Source: Moosavi-Dezfooli et al. 2017, algorithm 1.
    """
    inner = _inner(attack, {"norm": norm, "eps": eps, "steps": steps})
    count = training_count(dataset, held_out)
    state: dict[str, Any] = saved_progress() or {
        "said": said_of(model, dataset),
        "perturbation": torch.zeros_like(dataset.read([0])[0]),
        "done": 0,
    }
    said = state["said"].to(model.device)
    v = state["perturbation"].to(model.device, model.dtype)

    def perturbed(images: Tensor, places: Sequence[int]) -> Tensor:
        return (images + v).clamp(0, 1)

    rounds = [range(start, min(start + pictures, count)) for start in range(0, count, pictures)] * epochs
    work = list(enumerate(rounds, start=1))[state["done"] :]
    for done, places in progress_bar(work, "one perturbation for all"):
        if done > 1 and places.start == 0:
            others = said_of(model, dataset, perturbed, count)
            if float(others.ne(said[:count]).double().mean()) >= aim:
                break
        images = dataset.read(places).to(model.device, model.dtype)
        labels, points = said[places.start : places.stop], perturbed(images, places)
        with report_progress(False):  # one count for all, not one for each inner attack
            size = batch_size(model)
            parts = zip(points.split(size), labels.split(size), strict=True)
            further = torch.cat([inner(model, *part) for part in parts]) - points
        before = v
        for image, label, r in zip(images, labels, further, strict=True):
            if r.any() and (v is before or _says(model, (image + v).clamp(0, 1), label)):
                v = _within(v + r, eps, norm)
        save_progress(said=said, perturbation=v, done=done)
    return UniversalPerturbation(perturbation=v, **shown(model, dataset, count, said, perturbed, None))


def _inner(name: str, told: dict[str, Any]) -> Callable[[Model, Tensor, Tensor], Tensor]:
    """An attack as a function of a model, images and labels; what cannot be one is refused."""
    attack = methods[name]
    takes = [i.role for i in attack.spec.inputs if i.required]
    if takes != ["model", "images", "labels"] or not issubclass(attack.result, AdversarialExamples):
        raise InputError(
            f"{attack.spec.name} takes {', '.join(takes) or 'nothing'} and gives a {attack.spec.returns}; "
            "the inner attack takes a model, images and labels and gives AdversarialExamples: deepfool or pgd"
        )
    params = attack.validate({n: v for n, v in told.items() if n in attack.spec.params.model_fields})
    if attack.spec.cost is not None:
        passes = attack.spec.cost.evaluate(params, images=1, height=1, width=1, dataset=0)
    if attack.spec.cost is None or max(passes) > _PASSES * told["steps"] + _PASSES:
        raise InputError(
            f"{attack.spec.name} with steps={told['steps']} takes too many passes for one picture; "
            "give a cheaper inner attack: deepfool or pgd"
        )
    # The function itself: checks and a record of every call would cost more than a small network.
    return lambda model, images, labels: attack.function(model, images, labels, **params).adversarial


def _says(model: Model, image: Tensor, label: Tensor) -> bool:
    """Whether the model takes a picture (C, H, W) for this class."""
    with torch.no_grad():
        return bool(model(image[None]).argmax(1) == label)


def _within(v: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest perturbation (C, H, W) of the ball."""
    if norm == "linf":
        return v.clamp(-eps, eps)
    return v * (eps / length(v[None])[0].clamp(min=eps))


def training_count(dataset: Dataset, held_out: float) -> int:
    """How many of the first pictures are learned from, when a share of them is held out."""
    return max(1, len(dataset) - round(held_out * len(dataset)))


def said_of(model: Model, dataset: Dataset, change: Change | None = None, count: int | None = None) -> Tensor:
    """What the model says of the first ``count`` pictures, changed, (count,)."""
    count = len(dataset) if count is None else count
    said = []
    with torch.no_grad():
        for batch in dataset.batches(batch_size(model)):
            if batch.indices[0] >= count:
                break
            images = batch.images.to(model.device, model.dtype)
            said.append(model(images if change is None else change(images, batch.indices)).argmax(1))
    return torch.cat(said)[:count]


def shown(
    model: Model, dataset: Dataset, count: int, said: Tensor, change: Change, wanted: int | None
) -> dict[str, Any]:
    """The fields of a result: how often ``change`` fools the model, or makes it say what is wanted."""
    after = said_of(model, dataset, change)
    chosen = range(count, len(dataset))[:_SHOWN] or range(count)[:_SHOWN]
    images = dataset.read(chosen).to(model.device, model.dtype)
    # Where nothing is left to change, nothing can be achieved.
    open_ = torch.ones_like(said, dtype=torch.bool) if wanted is None else said.ne(wanted)
    won = (after.ne(said) if wanted is None else after.eq(wanted)) & open_

    def rate(part: slice) -> float:
        return float(won[part].sum()) / max(1, int(open_[part].sum()))

    return {
        "fooling_rate": rate(slice(count)),
        "held_out_rate": rate(slice(count, None)) if count < len(dataset) else None,
        "images": images,
        "adversarial": change(images, chosen),
        "names_before": tuple(model.class_name(int(said[i])) for i in chosen),
        "names_after": tuple(model.class_name(int(after[i])) for i in chosen),
    }


@hookimpl
def phosphene_methods():
    return [universal]
