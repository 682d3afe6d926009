"""Relevance-maximizing patches (RelMax): where in a data set a channel is most relevant for a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    Model,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
)
from phosphene.data import Batch, State
from phosphene.results import Panel, Patches
from phosphene.roles import Dataset
from phosphene.roles import Model as ModelRole
from phosphene.spec import Cost, InvariantTo, size
from phosphene.targets import Objective, Predicted, parse_target

from ..activations._channel_numbers import require_channels
from ..activations.top_patches import (
    Channels,
    Count,
    MapLayer,
    PerImage,
    TopUnits,
    largest_per_image,
    located_units,
)
from ..attribution._lrp_layers import EpsilonOption, GammaOption, LayerRules, RuleOption, RulesByLayer
from ..attribution._lrp_propagation import AttentionOption
from ._conditional_relevance import layer_relevance
from .concept_relevance import ACHTIBAT_2023

#: What patches are ordered by, in the order of the result.
_MEASURES = ("relevance", "activation")


@dataclass(frozen=True, eq=False, kw_only=True)
class RelevantPatches(Patches):
    """Patches of the largest relevance of channels, and of their largest activations.

    ``by_relevance`` (M,): whether the patch was chosen by its relevance, which is then its score in
    ``scores`` (M,), else by its activation. Of each channel there are k patches of either.
    """

    shapes: ClassVar[Mapping[str, str]] = {**Patches.shapes, "by_relevance": "M"}

    by_relevance: Tensor

    def most_relevant(self) -> Patches:
        """The patches of largest relevance."""
        return self._patches_where(self.by_relevance)

    def most_active(self) -> Patches:
        """The patches of largest activation, as ``top_patches`` returns them."""
        return self._patches_where(~self.by_relevance)

    def _patches_where(self, mask: Tensor) -> Patches:
        rows = mask.nonzero()[:, 0].tolist()  # equivalent mutants: a tensor selects the same rows
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Patches)}
        for name in ("scores", "image_indices", "positions", "boxes"):
            fields[name] = fields[name][rows]
        for name in ("channels", "ids"):
            fields[name] = tuple(fields[name][i] for i in rows)
        return Patches(**fields)

    def panels(self) -> list[list[Panel]]:
        parts = {"relevance": self.most_relevant(), "activation": self.most_active()}
        panels = {name: part.panels() for name, part in parts.items()}
        if any(len(groups) != 2 * len(set(self.channels)) for groups in panels.values()):  # strips
            return [group for pair in zip(*panels.values(), strict=True) for group in pair]
        groups = []
        for start in range(0, 2 * len(set(self.channels)), 2):
            for name, part in parts.items():
                patches, images = panels[name][start : start + 2]
                first = start // 2 * len(patches)
                titles = [f"{score:.2g}" for score in part.scores[first : first + len(patches)].tolist()]
                titles[0] = f"{part.channels[first]}: {name} {titles[0]}"
                groups.append([dataclasses.replace(p, title=t) for p, t in zip(patches, titles, strict=True)])
                groups.append(images)
        return groups

    def lines(self) -> list[str]:
        relevance, activation = self.most_relevant().lines(), self.most_active().lines()
        return [
            *(f"relevance: {line}" for line in relevance),
            *(f"activation: {line}" for line in activation),
        ]


def _oracle() -> None:
    """Behind a ReLU, the relevance of unit (c, p) is h_cp w_cp, which a negative weight makes least."""
    torch.manual_seed(0)
    convolution, head = nn.Conv2d(3, 4, 2), nn.Linear(24, 2)
    network = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), head).double()
    model = load_model(network, input_size=(3, 3, 4), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    images = torch.rand(5, 3, 3, 4, dtype=torch.float64)
    activations = convolution(model.normalize(images)).relu().detach()
    with torch.no_grad():  # both classes are predicted
        head.bias[0] -= (head(activations.flatten(1)) @ torch.tensor([1.0, -1.0]).double()).median()
    scores = head(activations.flatten(1)).detach()
    options: dict[str, Any] = {"layer": "1", "channels": [3, 1], "k": 4, "epsilon": 0.25}
    predicted = scores.argmax(1)
    assert len(predicted.unique()) == 2
    for target, index, limit in (("class:0", 0, 2), ("class:1", 1, 5), ("predicted", predicted, 2)):
        index = torch.as_tensor(index).expand(5)
        chosen = scores[torch.arange(5), index]
        stabilized = chosen / (chosen + 0.25 * chosen.sign())
        relevance = activations * head.weight[index].view(5, 4, 2, 3) * stabilized[:, None, None, None]
        with max_batch(limit):
            result = relevant_patches(model, TensorDataset(images), target=target, per_image=2, **options)
        assert result.by_relevance.tolist() == [True] * 8 + [False] * 8
        assert result.channels == ((3,) * 4 + (1,) * 4) * 2
        rows = torch.tensor([int(name) for name in result.ids])
        y, x = result.positions.T
        units = activations[rows, list(result.channels), y, x]
        torch.testing.assert_close(result.scores[8:], units[8:])
        torch.testing.assert_close(result.scores[:8], relevance[rows, list(result.channels), y, x][:8])
        for values, start in ((relevance, 0), (activations, 8)):
            for part, channel in enumerate((3, 1)):
                best = values[:, channel].flatten(1).topk(2, dim=1).values.flatten().topk(4).values
                largest = result.scores[start + 4 * part : start + 4 * part + 4]
                torch.testing.assert_close(largest, best.detach())
        assert torch.equal(result.boxes, torch.stack([y, x, y + 2, x + 2], 1))
        assert torch.equal(result.images[result.image_indices], images[rows])
        for patches, start in ((result.most_relevant(), 0), (result.most_active(), 8)):
            assert patches.channels == result.channels[start : start + 8]
            assert patches.ids == result.ids[start : start + 8]
            for name in ("scores", "image_indices", "positions", "boxes"):
                assert torch.equal(getattr(patches, name), getattr(result, name)[start : start + 8])
        assert result.map_size == (2, 3)
    # By default all of up to six channels of the last map.
    result = relevant_patches(model, TensorDataset(images.float()), k=1)
    assert (result.layer, result.channels) == ("1", (0, 1, 2, 3) * 2)
    result = relevant_patches(model, TensorDataset(images), layer="0", channels=[2], k=1)
    assert result.layer == "0"
    torch.testing.assert_close(result.scores[1], convolution(model.normalize(images))[:, 2].max().detach())


@method(
    family="concepts",
    references=[ACHTIBAT_2023],
    needs=["gradients", "dataset"],
    cost=Cost(forward=size.dataset, backward=size.dataset),
    oracle=_oracle,
    relations=[InvariantTo("dataset_order", fields=("scores",))],
    exempt={"choices_differ(rule)": "the rules of the first layer are not reached from the layers above it"},
    quick={"k": 2, "channels": [0]},
    demo={"layer": "features.11", "k": 6, "channels": [83, 37]},
)
def relevant_patches(
    model: ModelRole,
    dataset: Dataset,
    *,
    target: Annotated[
        str,
        Field(
            description="score of all images: predicted (the predicted class of each), a class, or a unit of "
            "a layer"
        ),
    ] = "predicted",
    layer: MapLayer = None,
    channels: Channels = None,
    k: Count = 6,
    per_image: PerImage = 1,
    rule: RuleOption = "epsilon_plus",
    rules: RulesByLayer = {},  # noqa: B006
    attention: AttentionOption = "cp_lrp",
    epsilon: EpsilonOption = 1e-6,
    gamma: GammaOption = 0.25,
) -> RelevantPatches:
    """Relevance-maximizing patches (RelMax): the patches of a data set in which a channel matters most.

    top-k over images x and positions (h, w) of R_c[h, w](x) = A_c[h, w] dS/dA_c[h, w]

    by the rules of LRP, and beside them the top-k of the activations A_c[h, w] themselves, as ``top_patches``
    has them. The largest activations show what the channel responds to; the largest relevance shows for which
    of this the network uses it. S is the target's score. A patch is the unit's theoretical receptive field,
    clipped at the image's border.

    Returns:
        2 M patches, the M of relevance first, k per channel, the largest first: ``by_relevance`` (2 M,), and
        the fields of ``top_patches``.

    Raises:
        InputError: a channel that the layer does not have.
        UnknownName: a target that is neither a class nor a layer.
        ModelError: the layer's output is not a map, an operation without a rule, or a target that does not
            depend on the layer.

    Example::
        from phosphene import run

        result = run("relevant_patches", dataset="builtin:scenes/32", layer="features.11", channels=[3], k=4)
        result.scores  # (8,): four of relevance, four of activation
        result.most_relevant().ids

    Source:
        Achtibat et al. 2023, section 4.2 (relevance maximization).
    """
    layer = layer if layer is not None else model.last_map
    count = model.map_shape(layer)[0]
    objective = Predicted() if target == "predicted" else parse_target(target, model)
    if channels is None:
        channels = sorted({i * count // 6 for i in range(6)})
    selected = list(range(count)) if channels == "all" else list(channels)
    require_channels(selected, layer, count)
    layers = LayerRules(model, rule, rules, epsilon, gamma)
    fold = _TopRelevance(model, layer, selected, k, per_image, objective, layers, attention)
    states = fold.run(dataset, batch_size(model))
    units = torch.cat([states[name]["units"].flatten(0, 1) for name in _MEASURES])
    per_channel = states["relevance"]["units"].shape[1]
    half = tuple(channel for channel in selected for _ in range(per_channel))
    return RelevantPatches(
        layer=layer,
        channels=half * 2,
        by_relevance=torch.arange(2 * len(half), device=model.device) < len(half),
        scores=torch.cat([states[name]["scores"].flatten() for name in _MEASURES]).to(model.device),
        map_size=tuple(states["relevance"]["map_size"]),
        **located_units(model, dataset, layer, units),
    )


@dataclass
class _TopRelevance(Fold[dict[str, State]]):
    """Per channel, the units of largest relevance and those of largest activation; see ``TopUnits``.

    The state has the values of both by names such as "relevance.scores".
    """

    title = "relevant patches"
    model: Model
    layer: str
    channels: list[int]
    k: int
    per_image: int
    target: Objective
    layers: LayerRules
    attention: Any

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        target, tops = self.target.unresolved(), State()
        with (
            torch.enable_grad(),
            layer_relevance(self.model, self.layers, self.attention, images, target, self.layer) as at,
        ):
            # equivalent mutants: results are detached
            relevance, activation = at.relevance, at.output.detach()
        for name, values in (("relevance", relevance), ("activation", activation)):
            maps = self.model.maps(values, images, self.layer)[:, self.channels]
            scores, units = largest_per_image(maps, torch.tensor(batch.indices), self.per_image)
            tops |= _named(name, {"scores": scores, "units": units, "map_size": [*maps.shape[2:]]})
        return self.merge(state, tops)

    def merge(self, first: State, second: State) -> State:
        top = TopUnits(self.model, self.layer, self.channels, self.k, self.per_image)
        merged = State()
        for name in _MEASURES:
            merged |= _named(name, top.merge(_part(first, name), _part(second, name)))
        return merged

    def finish(self, state: State) -> dict[str, State]:
        return {name: _part(state, name) for name in _MEASURES}


def _named(measure: str, top: State) -> State:
    """The values of a measure by their names in a state of both."""
    return {f"{measure}.{name}": value for name, value in top.items()}


def _part(state: State, measure: str) -> State:
    """The values of one measure in a state of both."""
    prefix = f"{measure}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@hookimpl
def phosphene_methods():
    return [relevant_patches]
