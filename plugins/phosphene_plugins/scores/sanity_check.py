"""The sanity check: whether a map changes when the network forgets what it learned."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from scipy.stats import rankdata
from torch import Tensor, nn

from phosphene import (
    Method,
    Reference,
    Result,
    TensorDataset,
    hookimpl,
    load_model,
    method,
    progress_bar,
    report_progress,
    save_progress,
    saved_progress,
)
from phosphene.errors import ModelError
from phosphene.images import colorize, gaussian_blur, min_max
from phosphene.results import Panel
from phosphene.roles import Dataset, Model, Seed

from ._evaluate_maps import (
    About,
    Explained,
    Measure,
    MethodName,
    MethodParams,
    Pictures,
    Pool,
    evidence,
    from_method,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stages = Annotated[int, Field(ge=1, le=200, description="at most so many, of about as many layers each")]


@dataclass(frozen=True, eq=False, kw_only=True)
class Cascade(Result):
    """How maps change while a network is randomised from the top down.

    ``stages`` name the lowest layer that is random, ``name`` the method; ``rank`` and ``ssim``
    (stages, N) tell how like the intact network's maps they still are; ``images`` (E, C, H, W) the first
    pictures, ``maps`` (1 + stages, E, H, W) their maps, the intact network's first.
    """

    name: str
    stages: tuple[str, ...]
    rank: Tensor
    ssim: Tensor
    images: Tensor
    maps: Tensor

    def lines(self) -> list[str]:
        rows = zip(self.stages, self.rank.mean(1).tolist(), self.ssim.mean(1).tolist(), strict=True)
        return [
            f"down to {stage}: rank correlation {rank:.3f}, SSIM {ssim:.3f}" for stage, rank, ssim in rows
        ]

    def panels(self) -> list[list[Panel]]:
        groups = []
        for image, maps in zip(self.images, self.maps.unbind(1), strict=True):
            tops = maps.flatten(1).float().quantile(0.99, dim=1).clamp(min=1e-30)
            drawn = colorize(maps / tops[:, None, None], "inferno")
            titled = zip(drawn, ("intact", *self.stages), strict=True)
            groups.append([Panel(image, self.name), *(Panel(picture, title) for picture, title in titled)])
        return groups

    def figure(self) -> "Figure":
        from matplotlib.figure import Figure

        groups = self.panels()
        columns, side = len(groups[0]), 1.25
        figure = Figure(figsize=(max(6.5, side * columns), 2.4 + 1.4 * len(groups)), dpi=110)
        chart, *strips = figure.subfigures(
            1 + len(groups), 1, height_ratios=[2.4] + [1.4] * len(groups), squeeze=False
        )[:, 0]
        axis = chart.subplots()
        chart.subplots_adjust(0.08, 0.2, 0.98, 0.88)
        for name, values in (("rank correlation", self.rank), ("SSIM", self.ssim)):
            axis.plot(["intact", *self.stages], [1.0, *values.mean(1).tolist()], marker="o", label=name)
        axis.axhline(0, color="0.8", linewidth=0.8)
        axis.set_title(f"{self.name.replace('_', ' ')}: likeness to the intact network's maps", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        for strip, group in zip(strips, groups, strict=True):
            axes = strip.subplots(1, columns, squeeze=False)[0]
            strip.subplots_adjust(0.005, 0.01, 0.995, 0.86, wspace=0.04)
            for place, panel in zip(axes, group, strict=True):
                place.set_axis_off()
                place.imshow(panel.image.permute(1, 2, 0).float().cpu().numpy())
                place.set_title(panel.title, fontsize=6.5, pad=2)
        return figure


def learned(model: Model) -> list[str]:
    """The layers that hold weights of their own and run, from the top down."""
    own = [name for name, part in model.module.named_modules() if name and any(True for _ in _weights(part))]
    order = {name: place for place, name in enumerate(model.structure.layers)}
    return sorted((name for name in own if name in order), key=lambda name: order[name], reverse=True)


def _weights(part: nn.Module) -> Any:
    return part.parameters(recurse=False)


@torch.no_grad()
def randomize(model: Model, layers: list[str], generator: torch.Generator) -> None:
    """Draw these layers' weights anew, normal with each tensor's own mean and deviation."""
    for name in layers:
        for weight in _weights(model.layers[name]):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(weight.mean() + noise * weight.std(correction=0))


def alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Spearman's rank correlation of raw maps (n, H, W), and the SSIM of both scaled to [0, 1]: (n,) each."""
    return rank_correlation(one, other), similarity(min_max(one), min_max(other))


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of maps (n, H, W): (n,), ties by their mean rank; of two constant maps 1, of one constant map 0."""
    values = (maps.detach().flatten(1).cpu().double().numpy() for maps in (one, other))
    ranks = [torch.from_numpy(rankdata(v, axis=1)) for v in values]
    a, b = (t - t.mean(1, keepdim=True) for t in ranks)
    size = a.norm(dim=1) * b.norm(dim=1)
    flat = ((a == 0).all(1) & (b == 0).all(1)).double()
    return torch.where(size > 0, (a * b).sum(1) / size.clamp(min=1e-12), flat).to(one)


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of maps (n, H, W) in [0, 1], (n,): Wang et al. 2004, Gaussian window of 1.5."""
    a, b = one[:, None], other[:, None]
    blurred = lambda t: gaussian_blur(t, 1.5)
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    found = (
        (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return found.mean((1, 2, 3))


def forgetting(seed: int) -> Measure:
    """The last stage alone: how like the maps of a wholly random network are to the intact one's."""
    random: dict[int, Model] = {}

    def measure(seen: Explained) -> Tensor | None:
        if seen.again is None:
            return None
        if id(seen.model) not in random:
            random[id(seen.model)] = made = seen.model.copy()
            randomize(made, learned(made), torch.Generator().manual_seed(seed))
        maps = seen.again(random[id(seen.model)])
        return rank_correlation(maps, seen.maps)[:, None]

    return Measure(("sanity",), (False,), measure, reruns=1)


def what_ignores_the_weights_stays() -> None:
    """Of a linear model gradient x input forgets, but where all weights are equal nothing can change."""
    linear = nn.Linear(64, 2)
    network = nn.Sequential(nn.Flatten(), linear)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = load_model(network, input_size=(1, 8, 8), mean=[0.0], std=[1.0])
    dataset = TensorDataset(images, ["0", "1"])
    found = sanity_check(model, dataset, method="gradient_x_input", seed=0)
    assert (found.rank < 0.6).all()
    nn.init.constant_(linear.weight, 0.5)
    found = sanity_check(model, dataset, method="gradient_x_input", seed=0)
    torch.testing.assert_close(found.rank, torch.ones(1, 2))
    torch.testing.assert_close(found.ssim, torch.ones(1, 2))


@method(
    family="scores",
    references=[
        Reference(
            key="adebayo2018",
            title="Sanity Checks for Saliency Maps",
            authors="Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim",
            year=2018,
            url="https://arxiv.org/abs/1810.03292",
        )
    ],
    needs=["dataset"],
    oracle=what_ignores_the_weights_stays,
    quick={"method": "grad_cam", "params": {}, "pictures": 2, "stages": 2},
    demo={"pictures": 8},
)
def sanity_check(
    model: Model,
    dataset: Dataset,
    *,
    method: MethodName = "grad_cam",
    params: MethodParams = {},  # noqa: B006
    target: About = "label",
    stages: Stages = 6,
    pictures: Pictures = 32,
    seed: Seed = None,
) -> Cascade:
    """Randomise a copy of the network from the top down, and see whether the maps notice.

    rank_k = corr( rank M(x; w), rank M(x; w_1 ... w_k random) ),  and SSIM of the maps scaled to [0, 1]

    Layer after layer, from the logits down, the weights are drawn anew, normal with each tensor's own
    mean and deviation, and what was drawn stays. Compared are the raw, signed maps at the picture's size.
    A map that stays the same tells of the picture, not of what was learned. The reverse does not hold: that
    a map changes does not make it true. SSIM is high for two maps that are both mostly flat. ``target``
    "predicted" is what the intact network says, throughout. The network itself is never touched.

    Raises InputError where the data set knows no classes, and for a method that gives no maps; ModelError
    for a network that holds no weights.

    Source: Adebayo et al. 2018, section 3 (cascading randomization).
    """
    assert seed is not None
    pool = Pool(model, dataset, pictures, target, needs_masks=False)
    source = from_method(method, params, seed)
    if not (layers := learned(model)):
        raise ModelError(f"{model.name} has no layer with weights that could be randomised")
    parts = _parts(layers, stages)
    first, _ = pool.read(range(1))
    few = min(2, pool.count)
    state = saved_progress() or {
        "done": 0,
        "intact": first.new_zeros(pool.count, *first.shape[2:]),
        "found": first.new_zeros(2, len(parts), pool.count),
        "shown": first.new_zeros(1 + len(parts), few, *first.shape[2:]),
    }
    intact, found, shown = (state[name].to(first.device) for name in ("intact", "found", "shown"))
    other, randomized = model.copy(), 0
    work = [(stage, places) for stage in range(1 + len(parts)) for places in pool.batches()]
    for done, (stage, places) in enumerate(progress_bar(work, "randomising"), start=1):
        while randomized < stage:  # with a seed of its own, so that work cut off goes on with the same
            generator = torch.Generator().manual_seed(seed + randomized)
            randomize(other, parts[randomized], generator)
            randomized += 1
        if done <= state["done"]:
            continue
        images, _ = pool.read(places)
        with report_progress(False):
            maps = source.explain(other, images, pool.classes(model, images, places), places)
        rows = slice(places.start, places.stop)
        if stage == 0:
            intact[rows] = maps
        else:
            found[0, stage - 1, rows], found[1, stage - 1, rows] = alike(maps, intact[rows])
        count = max(0, min(few, places.stop) - places.start)
        shown[stage, places.start : places.start + count] = evidence(maps[:count])
        save_progress(done=done, intact=intact, found=found, shown=shown)
    return Cascade(
        name=source.name,
        stages=tuple(part[-1] for part in parts),
        rank=found[0],
        ssim=found[1],
        images=pool.read(range(few))[0],
        maps=shown,
    )


def _parts(layers: list[str], stages: int) -> list[list[str]]:
    """The layers, from the top down, in at most so many parts of about the same number."""
    count = min(stages, len(layers))
    ends = [round(len(layers) * k / count) for k in range(count + 1)]
    return [layers[start:end] for start, end in zip(ends, ends[1:], strict=False)]


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [sanity_check]
