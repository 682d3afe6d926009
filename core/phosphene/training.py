"""Training a network on a data set: one loop, seeded and resumable, and the model that comes out of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from . import charts
from .bars import progress
from .batching import batch_size
from .checkpoints import keep, keeping, resumed
from .datasets import Dataset, TensorDataset
from .errors import DivergenceError, InputError, ModelError, PhospheneError
from .images import resize
from .models import Model, fill_weights, load_model
from .registry import methods
from .results import TrainedNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: ``loss(images (n, C, H, W), places, share) -> (n,)``: what is minimised, of pictures, the places where
#: they stand in the data set, and the share of all steps that is done.
Loss = Callable[[Tensor, Sequence[int], float], Tensor]
#: What a training is watched by: shares in [0, 1] by name.
Watch = Callable[[], Mapping[str, float]]
#: How often it is looked at, the beginning aside.
LOOKS = 8
#: Bytes of pictures that are not read or drawn again in every round.
_MEMORY = 2**28


@dataclass(frozen=True)
class Course:
    """How a training went: ``losses`` (steps,); after ``measured`` (M,) steps the ``curves``, each (M,).

    ``frames`` (F, P, C, H, W), bytes, are what was drawn on the way, where that was asked for.
    """

    losses: Tensor
    measured: Tensor
    curves: dict[str, Tensor]
    frames: Tensor | None = None


def train(
    network: nn.Module,
    dataset: Dataset,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int,
    seed: int,
    count: int | None = None,
    at_once: int | None = None,
    schedule: Callable[[float], float] = lambda share: 1.0,
    watch: Watch | None = None,
    frames: int = 0,
    draw: Callable[[], Tensor] | None = None,
    stage: int = 0,
) -> Course:
    """Minimise the mean of ``loss`` over the first ``count`` pictures of a data set, ``batch`` a step.

    Pictures come in random orders, each once before any comes again. All that is random in a step depends
    on ``seed`` and its number alone, so a method that was cut off goes on bit by bit when ``run`` is given
    the same ``out``. At most ``at_once`` pictures go through the network together; their gradients are
    summed. ``schedule``, told the share of the steps that is done, gives what the learning rates are
    multiplied by. ``watch`` is asked before, at the end and between; ``draw`` for pictures (P, C, H, W) in
    [0, 1], ``frames`` times, evenly over the steps, the last at the end. Leaves the network frozen in eval
    mode. A method that trains several networks one after another gives all of them as one ``network`` each
    time, and numbers the ``stage``: what is done is then not done again. Raises DivergenceError if the loss
    or a weight is no longer finite.
    """
    count = len(dataset) if count is None else count
    parameter = next(network.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    marks = {round(n * steps / LOOKS) for n in range(LOOKS + 1)} if watch else set()
    losses: list[float] = []
    seen: list[tuple[int, Mapping[str, float]]] = []
    film: list[Tensor] = []
    state = resumed()
    if state and state["stage"] >= stage:
        later = state["stage"] > stage
        losses, seen = [0.0] * steps if later else state["losses"].tolist(), [] if later else state["seen"]
        film = [] if later else list(state.get("frames", ()))
        _fill(network, None if later else optimizer, state)
    elif watch:
        seen.append((0, watch()))

    @functools.lru_cache(2)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=_generator(seed + epoch)).tolist()

    read = dataset.read if isinstance(dataset, TensorDataset) else _remembering(dataset)
    first = len(losses)
    work = progress(range(first, steps), "training", steps - first, note=lambda: f"loss {losses[-1]:.3f}")
    for step in work:
        torch.manual_seed((seed + step) % 2**63)
        places = [order(n // count)[n % count] for n in range(step * batch, (step + 1) * batch)]
        images = read(places).to(parameter)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / steps)
        optimizer.zero_grad()
        total = 0.0
        parts = math.ceil(batch / (at_once or batch))
        for part in torch.arange(batch).tensor_split(parts):
            value = loss(images[part], [places[n] for n in part], step / steps).sum() / batch
            value.backward()
            total += value.item()
        if not math.isfinite(total):
            raise DivergenceError(f"Step {step}: the loss is no longer finite; lower lr (now {rates[0]:g}).")
        optimizer.step()
        losses.append(total)
        if step + 1 in marks and watch:
            seen.append((step + 1, watch()))
        if draw and len(film) < (step + 1) * min(frames, steps) // steps:
            film.append((draw() * 255).round().byte().cpu())
        if keeping():
            done = {"losses": torch.tensor(losses, dtype=torch.float64)} | _state(network, optimizer)
            keep(stage=stage, seen=seen, **done, **({"frames": torch.stack(film)} if film else {}))
    optimizer.zero_grad()
    network.eval().requires_grad_(False)
    if not all(t.isfinite().all() for t in network.state_dict().values() if t.is_floating_point()):
        raise DivergenceError(f"The last step left weights that are not finite; lower lr (now {rates[0]:g}).")
    names = seen[0][1] if seen else ()
    return Course(
        losses=torch.tensor(losses).to(parameter),
        measured=torch.tensor([step for step, _ in seen], device=parameter.device),
        curves={name: torch.tensor([float(told[name]) for _, told in seen]).to(parameter) for name in names},
        frames=torch.stack(film).to(parameter.device) if film else None,
    )


def _remembering(dataset: Dataset) -> Callable[[Sequence[int]], Tensor]:
    """Read pictures of a data set, and those that there is memory for once only."""
    known: dict[int, Tensor] = {}

    def read(places: Sequence[int]) -> Tensor:
        new = [place for place in dict.fromkeys(places) if place not in known]
        found = known | (dict(zip(new, dataset.read(new), strict=True)) if new else {})
        if len(found) * found[places[0]].nbytes <= _MEMORY:
            known.update(found)
        return torch.stack([found[place] for place in places])

    return read


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def _state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the next step depends on, as copies: the originals may be cut off half-way through a step."""
    found = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, known in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": v for name, v in known.items() if isinstance(v, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _fill(network: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]) -> None:
    """Bring both to where ``_state`` found them."""
    network.load_state_dict({n.removeprefix("network."): t for n, t in state.items() if n[:8] == "network."})
    if optimizer is None:
        return
    known: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("optimizer."):
            _, number, what = name.split(".", 2)
            known.setdefault(int(number), {})[what] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": known})


# --- classifiers -------------------------------------------------------------------------------------


def trainable(model: Model) -> Model:
    """A copy of a model with all its weights free, in eval mode. ModelError where it has none."""
    if not any(p.is_floating_point() for p in model.module.parameters()):
        raise ModelError(f"{model.name} has no weights that could be trained")
    copied = model.copy()
    copied.module.requires_grad_(True)
    return copied


def classes_of(
    model: Model, dataset: Dataset, source: Literal["truth", "predicted"] = "truth"
) -> Callable[[Sequence[int]], Tensor]:
    """A function from places in a data set to class indices (n,): its own truth, or what the model says.

    InputError where the data set knows no classes, UnknownName where the model does not know them.
    """
    if source == "predicted":

        def predicted(places: Sequence[int]) -> Tensor:
            with torch.no_grad():
                images = dataset.read(places).to(model.device, model.dtype)
                return torch.cat([model(part).argmax(1) for part in images.split(batch_size(model))])

        return predicted
    first = dataset.labels([0])
    if first is None:
        raise InputError(
            'the data set knows no classes: say labels="predicted", sort its pictures into a folder for each '
            "class, or give TensorDataset(images, classes)"
        )
    known = {0: model.class_index(first[0])}

    def true(places: Sequence[int]) -> Tensor:
        new = [place for place in dict.fromkeys(places) if place not in known]
        if new:  # a data set that draws its pictures draws them for their labels, too
            known.update(zip(new, map(model.class_index, dataset.labels(new) or ()), strict=True))
        return torch.tensor([known[place] for place in places], device=model.device)

    return true


def split(dataset: Dataset, held_out: float, most: int = 64) -> tuple[int, range]:
    """How many of the first pictures are learned from, and the last ones, ``most`` of them, to look at.

    Where a share ``held_out`` is none at all, those to look at are learned from, too.
    """
    count = max(1, len(dataset) - round(held_out * len(dataset)))
    start = count if count < len(dataset) else 0
    return count, range(start, min(start + most, len(dataset)))


class Unbuilt(nn.Module):
    """In the place of a network that a folder alone cannot build: its weights, and the reason."""

    def __init__(self, weights: Mapping[str, Tensor], reason: str) -> None:
        super().__init__()
        self.weights, self.reason = dict(weights), reason

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The weights as they were saved."""
        return self.weights

    def forward(self, *args: Any) -> Any:
        raise ModelError(
            f"{self.reason}; build the network and give it the weights: load_model(module, weights=folder)"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedModel(TrainedNetwork):
    """A classifier that a method trained: ``model()`` is a ``Model`` like any other.

    Beside ``losses`` (steps,) its course: ``curves`` of shares, each (M,), after ``measured`` (M,) steps;
    ``note`` is what should be known of it. ``previews`` (P, C, H, W) are pictures with ``labels``. Its folder
    holds the weights and where the network comes from. Was that a name, ``load_model("trained:folder")``
    needs no more; what was given as an object is built by its owner: ``load_model(module, weights=folder)``.
    """

    abreast: ClassVar[int] = 9

    measured: Tensor
    curves: dict[str, Tensor]
    #: What it was trained from, while that is at hand.
    base: Model | None = field(default=None, repr=False, metadata={"saved": False})

    @classmethod
    def of(
        cls,
        method: str,
        trained: Model,
        base: Model,
        course: Course,
        changes: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> TrainedModel:
        """The result of training ``trained``, a copy of ``base``.

        ``changes``, where its network is another, is what the method's ``network`` makes it of the old by.
        """
        words = ("input_size", "classes", "crop_pct", "interpolation", "mean", "std")
        config = {name: base.settings[name] for name in words} | {"changes": changes}
        return cls(
            network=trained.module,
            method=method,
            config={"source": base.source, "name": base.name, **config},
            losses=course.losses,
            measured=course.measured,
            curves=course.curves,
            base=base,
            **fields,
        )

    @classmethod
    def restore(cls, fields: dict[str, Any], **rest: Any) -> TrainedModel:
        """Rebuild the network from where it came from, and fill in its weights."""
        state, config = fields.pop("network"), dict(fields["config"])
        changes = config.pop("changes")
        try:
            base = _rebuilt(**config)
            if (change := methods[fields["method"]].network) is not None:
                base.module = change(base.module, **changes)
            base.module.to(dtype=next(t.dtype for t in state.values() if t.is_floating_point()))
            fill_weights(base.module, state, "saved", config["name"])
        except PhospheneError as error:  # its weights are whole: who asks for the model is told
            return cls(network=Unbuilt(state, str(error)), **fields, **rest)
        return cls(network=base.module.requires_grad_(False), base=base, **fields, **rest)

    def model(self) -> Model:
        """The trained network with the classes and the normalisation of the one it was trained from.

        ModelError where it was loaded from a folder that does not say how to build it.
        """
        if self.base is None:
            self.network(None)  # which says why not
        assert self.base is not None
        name = f"{self.method.partition('.')[2]} of {self.base.name}"
        made = Model(self.network, **self.base.settings | {"name": name})
        if self.uri is not None:
            made.name = f"trained:{self.uri}"
            made.source = {"uri": made.name}
        return made

    def lines(self) -> list[str]:
        """The course in words, the note, and the pictures."""
        ends = [f"{n}: {curve[0]:.0%} -> {curve[-1]:.0%}" for n, curve in self.curves.items() if len(curve)]
        loss, *rest = super().lines()
        return [loss, *ends, *rest]

    def figure(self) -> Figure:
        """The loss and the shares over the steps, and below the pictures."""
        groups = self.panels()[: 2 * self.abreast]
        columns = min(self.abreast, max(1, len(groups)))
        rows = -(-len(groups) // columns)
        figure = charts.page(2.6 + 1.25 * rows)
        halves: Any = figure.subfigures(2, 1, height_ratios=[2.6, max(0.1, 1.25 * rows)])
        left, right = halves[0].subplots(1, 2)
        losses = self.losses.double().cpu()
        window = max(1, len(losses) // 50)
        smooth = losses.unfold(0, window, 1).mean(1) if window > 1 else losses
        left.plot(range(1, len(losses) + 1), losses, color="0.8", linewidth=1)
        marker = "o" if len(losses) == 1 else None
        left.plot(range(window, len(losses) + 1), smooth, marker=marker, linewidth=2)
        left.set(xlabel="step", ylabel="loss")
        width = 4.0  # the first's, so that those which run along it show, too
        for name, curve in self.curves.items():
            steps, shares = self.measured.cpu(), curve.double().cpu()
            right.plot(steps, shares, label=name, marker="o", markersize=3, linewidth=width)
            width = 1.5
        right.set(xlabel="step", ylabel="share of pictures held out", ylim=(-0.03, 1.22))
        right.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        right.legend(fontsize=8, frameon=False, loc="upper center", ncols=3)
        if self.note:
            right.set_title(self.note, fontsize=8, loc="left")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        if rows:
            axes = halves[1].subplots(rows, columns, squeeze=False).flatten()
            for axis in axes:
                axis.set_axis_off()
            for axis, (panel, *_) in zip(axes, groups, strict=False):
                charts.show(axis, resize(panel.image, (96, 96)).clamp(0, 1), panel.title)
        return figure


def _rebuilt(*, source: Mapping[str, Any] | None, name: str, **settings: Any) -> Model:
    """The model that a training began with, without its weights; ModelError where nobody can tell."""
    if source is None:
        raise ModelError(f"the network ({name}) was given as an object, and no folder holds its code")
    how = {key: settings.pop(key) for key in ("crop_pct", "interpolation")}
    bare = {key: value for key, value in source.items() if key not in ("uri", "weights", "pretrained")}
    with torch.random.fork_rng([]):  # its random beginning is nobody's loss
        model = load_model(source["uri"], **bare | settings)
    for key, value in how.items():
        setattr(model, key, value)
    return model
