"""TCAV: sensitivity of a class to a concept, tested against random concepts, Kim et al. 2018."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import Class, InputError, TensorDataset, batch_size, hookimpl, load_model, method
from phosphene.images import charts, colorize, enlarge
from phosphene.results import Panel, Result
from phosphene.roles import Dataset, LayerName, Model, Seed, Target
from phosphene.spec import Cost, InvariantTo, ScalesWith, UnitRange, size
from phosphene.training import label_index

from ._pooled_activations import LEAST_IMAGES, PooledGradients, by_concept, fit_vector, pooled_activations
from .concept_vectors import KIM_2018, Classifier, Strength

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptSensitivity(Result):
    """TCAV scores of concepts for T targets.

    ``scores`` (T, K, R): share of the images whose score rises along the vector, for each target, concept and
    set of random images; ``random_scores`` (T, R): the same of vectors that separate random images from
    random images; ``p_values`` (T, K) of the difference of their means; ``magnitudes`` (T, K): the mean
    derivative along the vectors, in units of the mean length of the gradient; ``counts`` (T,) of images.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "targets": "T",
        "concepts": "K",
        "scores": "T K R",
        "random_scores": "T R",
        "p_values": "T K",
        "magnitudes": "T K",
        "counts": "T",
    }

    targets: tuple[str, ...]
    layer: str
    concepts: tuple[str, ...]
    scores: Tensor
    random_scores: Tensor
    p_values: Tensor
    magnitudes: Tensor
    counts: Tensor

    def significant(self, target: int = 0, level: float = 0.05) -> tuple[str, ...]:
        """The concepts of p-value below ``level`` divided by the number of all tests (Bonferroni)."""
        limit = level / self.p_values.numel()
        values = self.p_values[target].tolist()
        return tuple(name for name, p in zip(self.concepts, values, strict=True) if p < limit)

    def lines(self) -> list[str]:
        lines = [f"TCAV in {self.layer}, {self.scores.shape[2]} sets of random images"]
        for n, target in enumerate(self.targets):
            rows = zip(self.concepts, self.scores[n], self.p_values[n].tolist(), strict=True)
            texts = [f"{name} {float(scores.mean()):.2f} (p = {p:.2g})" for name, scores, p in rows]
            lines.append(f"{target}: {', '.join(texts)}; random {float(self.random_scores[n].mean()):.2f}")
        return lines

    def panels(self) -> list[list[Panel]]:
        means = self.scores.mean(2).float()
        matrix = enlarge(colorize(means, "RdBu_r"), max(8, 160 // max(means.shape)))
        return [[Panel(matrix, self.lines()[0], is_output=True)]]

    def draw(self) -> Figure:
        """The scores of every concept and of random ones from 1/2 on, significant concepts in color."""
        height = max(2.6, 0.3 * len(self.concepts) + 1.4)
        figure = charts.new_figure(height)
        figure.set_size_inches(2.2 + 3.2 * len(self.targets), height)
        parts = cast(Any, figure.subplots(1, len(self.targets), squeeze=False, sharey=True))[0]
        for n, (axes, target) in enumerate(zip(parts, self.targets, strict=True)):
            chosen = self.significant(n)
            groups = [*zip(self.concepts, self.scores[n].float().cpu(), strict=True)]
            groups.append(("random", self.random_scores[n].float().cpu()))
            for row, (name, scores) in enumerate(groups):
                mean, random = float(scores.mean()), float(self.random_scores[n].mean())
                color = "0.75" if name not in chosen else "tab:blue" if mean > random else "tab:red"
                axes.barh(row, mean - 0.5, left=0.5, color=color)  # from 1/2: a share of 0 is a bar as well
                axes.plot(scores.tolist(), [row] * len(scores), ".", color="black", markersize=3, alpha=0.5)
            axes.axvline(0.5, color="0.4", linestyle=":")
            axes.set_xlim(0, 1)
            axes.set_title(charts.plain_label(target, 40), fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=7)
        parts[0].set_yticks(range(len(groups)), [charts.plain_label(name) for name, _ in groups], fontsize=8)
        parts[0].invert_yaxis()
        text = "share of images whose score rises along the concept\ndots: each set of random images\n"
        text += "significantly more than along random vectors: blue, fewer: red"
        figure.supxlabel(text, fontsize=8)
        return figure


def _oracle() -> None:
    """Of a linear score the derivative along red is positive for all images, along green negative."""
    same, head = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2)
    network = nn.Sequential(same, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    with torch.no_grad():
        same.weight.copy_(torch.eye(3)[..., None, None])
        head.weight.copy_(torch.tensor([[0, 0, 0], [2.0, -1.0, 0]]))
    model = load_model(network, mean=[0.5] * 3, std=[0.5] * 3, input_size=(3, 2, 4))
    draw = torch.Generator().manual_seed(0)
    random = 0.3 + 0.3 * torch.rand(30, 3, 2, 4, generator=draw, dtype=torch.float64)
    concepts = 0.3 + 0.3 * torch.rand(24, 3, 2, 4, generator=draw, dtype=torch.float64)
    concepts[:12, 0], concepts[12:, 1] = concepts[:12, 0] + 0.3, concepts[12:, 1] + 0.3
    data = TensorDataset(concepts, ["red"] * 12 + ["green"] * 12)
    images = TensorDataset(torch.rand(5, 3, 2, 4, generator=draw, dtype=torch.float64))
    options: dict[str, Any] = {"layer": "0", "runs": 6, "seed": 0}
    for classifier in ("linear", "mean_difference"):
        target = Class((1, 0))
        result = tcav(model, images, data, TensorDataset(random), target, classifier=classifier, **options)
        assert result.concepts == ("green", "red") and result.counts.tolist() == [5, 5]
        assert result.targets == ("class 1", "class 0")
        assert (result.scores[0, 0] == 0).all() and (result.scores[0, 1] == 1).all()
        # The gradient of class 1 is (2, -1, 0): along red 2 / 5^1/2 of its length, if the vector is red.
        assert abs(float(result.magnitudes[0, 1]) - 2 / 5**0.5) < 0.1
        assert abs(float(result.magnitudes[0, 0]) + 1 / 5**0.5) < 0.1
        assert ((result.random_scores == 0) | (result.random_scores == 1)).all()
        # The logit of class 0 is constant: it rises along no vector.
        assert (result.scores[1] == 0).all() and (result.p_values[1] == 1).all()
    # Significant at 0.05 divided by the number of tests, which is 4.
    p_values = torch.tensor([[0.0125, 0.012], [1.0, 1.0]], dtype=torch.float64)
    assert dataclasses.replace(result, p_values=p_values).significant() == ("red",)
    # Images with classes are those of each target; of the last map by default, in the model's precision.
    single = load_model(network.float(), mean=[0.5] * 3, std=[0.5] * 3, input_size=(3, 2, 4))
    classified = TensorDataset(images.images, ["1", "1", "0", "1", "0"])
    result = tcav(single, classified, data, TensorDataset(random), Class((1, 0)), runs=6, seed=0)
    assert result.counts.tolist() == [3, 2] and result.layer == "0"
    assert result.magnitudes.dtype == result.scores.dtype == result.p_values.dtype == torch.float32
    assert result.random_scores.dtype == torch.float32
    network.double()
    assert tcav(model, images, data, TensorDataset(random), Class(1), layer="1", runs=3).layer == "1"
    # A concept of the same distribution as the random images has no significant score.
    similar = TensorDataset(0.3 + 0.3 * torch.rand(12, 3, 2, 4, generator=draw, dtype=torch.float64))
    result = tcav(model, images, similar, TensorDataset(random), Class(1), layer="0", runs=20, seed=0)
    assert float(result.p_values[0, 0]) > 1e-4
    # Welch's test of two samples, as SciPy's ``ttest_ind(equal_var=False)`` computes it.
    assert abs(_p_value([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0]) - 0.09991) < 1e-5
    from scipy.stats import ttest_ind

    samples = [0.1, 0.2, 0.4], [0.3, 0.7, 0.2, 0.9]
    assert abs(_p_value(*samples) - ttest_ind(*samples, equal_var=False).pvalue) < 1e-12
    p = _p_value(result.scores[0, 0].tolist(), result.random_scores[0].tolist())
    assert abs(float(result.p_values[0, 0]) - p) < 1e-12


@method(
    family="concepts",
    title="TCAV",
    references=[KIM_2018],
    invariants=[UnitRange(field="scores"), UnitRange(field="random_scores"), UnitRange(field="p_values")],
    relations=[
        InvariantTo("logit_shift", fields=("scores",)),
        ScalesWith("logits", power=0, fields=("scores",)),
    ],
    needs=["gradients", "dataset"],
    cost=Cost(forward=size.dataset * (size.images + 2), backward=size.dataset * size.images),
    oracle=_oracle,
    quick={"runs": 2},
    demo={"concepts": "builtin:scenes/200", "random": "builtin:textures/64", "target": "star"},
)
def tcav(
    model: Model,
    dataset: Dataset,
    concepts: Dataset,
    random: Dataset,
    target: Target = None,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to read; default: the last map")] = None,
    runs: Annotated[int, Field(ge=2, le=1000, description="number of sets of random images")] = 20,
    classifier: Classifier = "linear",
    strength: Strength = 1.0,
    seed: Seed = None,
) -> ConceptSensitivity:
    """TCAV: share of a class's images whose score rises along a concept's vector, with a p-value.

    TCAV = share of images x with sum_p dS / dA_p (x) . v > 0

    with A_p the layer's activations at position p, S the target's score and v the concept's vector. It is
    computed ``runs`` times, each time against other random images: as many as the concept has, at most half
    of ``random``. A single vector proves nothing, so the same is done for random images against random
    images; ``p_values`` are of a two-sided t-test (Welch) between both. Images of the target's class are used
    where the data set has classes; a score of 0.5 means that the concept does not matter, one near 0 that it
    counts against the class. Below a linear classifier the derivative is the same for all images, and every
    score 0 or 1: choose a layer further down to tell images apart. Without a ``target`` the first five
    classes of the model are tested; ``significant`` corrects for all of them.

    Returns:
        ``scores`` (T, K, R) of T targets, ``random_scores`` (T, R), ``p_values`` (T, K), ``magnitudes``
        (T, K). ``significant(t)`` are the concepts that remain after Bonferroni's correction.

    Raises:
        InputError: a data set without images of a class, a concept with fewer than two images, or fewer than
            four random ones.
        ModelError: the target does not depend on the layer.

    Example::
        from phosphene import run

        result = run("tcav", dataset="builtin:scenes/64", concepts="builtin:scenes/64",
                     random="builtin:textures/32", target="star", runs=5, seed=0)
        result.scores.mean(2)  # for each of the ten shapes

    Source:
        Kim et al. 2018, sections 3.3 to 3.5.
    """
    layer = layer if layer is not None else model.last_map
    classes = target.index if isinstance(target, Class) and isinstance(target.index, tuple) else None
    targets = [target] if classes is None else [Class(index) for index in classes]
    rows = [_rows_of_class(model, dataset, single) for single in targets]
    features, labels = pooled_activations(model, concepts, layer, "concepts")
    groups = by_concept(features, labels, concepts)
    other, _ = pooled_activations(model, random, layer, "random images")
    if len(other) < 2 * LEAST_IMAGES:
        raise InputError(f"there are {len(other)} random images; TCAV needs at least {2 * LEAST_IMAGES}")
    most = len(other) // 2
    # (runs, C) for random images and for each concept.
    vectors = []
    for group in (None, *groups.values()):
        fitted = []
        for _ in range(runs):
            order = torch.randperm(len(other))
            first = other[order[:most]] if group is None else group
            count = min(len(first), most)
            fitted.append(fit_vector(first, other[order[len(other) - count :]], classifier, strength)[0])
        vectors.append(torch.stack(fitted))
    scores, magnitudes = [], []
    for single, indices in zip(targets, rows, strict=True):
        gradients = PooledGradients(model, layer, single).run(dataset, batch_size(model))[indices].double()
        derivatives = torch.stack([gradients @ part.T for part in vectors])  # (1 + K, images, runs)
        scores.append((derivatives > 0).double().mean(1))
        magnitudes.append(derivatives.mean((1, 2)) / gradients.norm(dim=1).mean().clamp(min=1e-300))
    p_values = [[_p_value(row.tolist(), part[0].tolist()) for row in part[1:]] for part in scores]
    # equivalent mutants: all images have the same name
    names = [single.names(model, 1)[0] for single in targets]
    return ConceptSensitivity(
        targets=tuple(names),
        layer=layer,
        concepts=tuple(groups),
        scores=torch.stack(scores)[:, 1:].to(model.device, model.dtype),
        random_scores=torch.stack(scores)[:, 0].to(model.device, model.dtype),
        p_values=torch.tensor(p_values, dtype=torch.float64).to(model.device, model.dtype),
        magnitudes=torch.stack(magnitudes)[:, 1:].to(model.device, model.dtype),
        counts=torch.tensor([len(indices) for indices in rows], device=model.device),
    )


def _rows_of_class(model: Model, dataset: Dataset, target: Any) -> list[int]:
    """The images of the target's class; all for another target, and for a data set without classes."""
    labels = dataset.labels(range(len(dataset)))
    if labels is None or not isinstance(target, Class) or not isinstance(target.index, int):
        return list(range(len(dataset)))
    rows = [n for n, label in enumerate(labels) if label_index(model, label) == target.index]
    if not rows:
        raise InputError(f"the data set has no image of class {model.class_name(target.index)!r}")
    return rows


def _p_value(first: list[float], second: list[float]) -> float:
    """Two-sided p-value of Welch's t-test; without variation 0 for different means, 1 for equal ones."""
    from scipy.stats import t

    samples = [torch.tensor(values, dtype=torch.float64) for values in (first, second)]
    errors = [float(sample.var()) / len(sample) for sample in samples]
    difference = abs(float(samples[0].mean() - samples[1].mean()))
    if not sum(errors) > 0:
        return float(difference == 0)
    freedom = sum(errors) ** 2 / sum(e**2 / (len(s) - 1) for e, s in zip(errors, samples, strict=True))
    return float(2 * t.sf(difference / sum(errors) ** 0.5, freedom))


@hookimpl
def phosphene_methods():
    return [tcav]
