"""Concept relevance propagation (CRP): relevance of pixels conditioned on single channels of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import Permute

from phosphene import ModelError, Reference, hookimpl, load_model, method, progress_bar
from phosphene.images import colorize
from phosphene.results import Panel, Result
from phosphene.roles import Images, LayerName, Model, Target
from phosphene.spec import Cost, Equivariant, InvariantTo, length, maximum, param, size

from ..activations._channel_numbers import require_channels
from ..attribution._lrp_layers import EpsilonOption, GammaOption, LayerRules, RuleOption, RulesByLayer
from ..attribution._lrp_propagation import AttentionOption
from ._conditional_relevance import layer_relevance

ACHTIBAT_2023 = Reference(
    key="achtibat2023",
    title="From attribution maps to human-understandable explanations through Concept Relevance Propagation",
    authors="Achtibat, Dreyer, Eisenbraun, Bosse, Wiegand, Samek, Lapuschkin",
    year=2023,
    url="https://doi.org/10.1038/s42256-023-00711-8",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptRelevance(Result):
    """Relevance of pixels for a target that passes through single channels of a layer.

    ``maps`` (N, K, H, W), raw and signed: relevance through channel ``channels[n, k]`` of (N, K);
    ``relevance`` (N, C): that of every channel of the layer, summed over its positions. The relevance through
    several channels together is the sum of their maps.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "maps": "N K H W",
        "channels": "N K",
        "relevance": "N channels",
        "targets": "N",
    }
    per_image: ClassVar[tuple[str, ...]] = ("images", "maps", "channels", "relevance", "targets")

    images: Tensor
    maps: Tensor
    channels: Tensor
    relevance: Tensor
    targets: tuple[str, ...]
    layer: str

    def panels(self) -> list[list[Panel]]:
        groups = []
        for n, (image, maps, target) in enumerate(zip(self.images, self.maps, self.targets, strict=True)):
            # One scale for all maps of an image, so that they can be compared; the 99th percentile, because
            # a few extreme pixels would leave the maps white.
            values = maps.abs().flatten().float().cpu()
            top = float(values.quantile(0.995).clamp(min=1e-30))
            group = [Panel(image, target)]
            total = float(self.relevance[n].clamp(min=0).sum())
            for channel, part in zip(self.channels[n].tolist(), maps, strict=True):
                share = float(self.relevance[n, channel])
                title = f"channel {channel}: {share:+.2f}" + (f", {share / total:.0%}" if total > 0 else "")
                drawn = colorize((part.float() / top).clamp(-1, 1) / 2 + 0.5, "RdBu_r")
                group.append(Panel(drawn, title, is_output=True))
            groups.append(group)
        return groups

    def rows(self) -> list[list[Panel]]:
        return self.panels()

    def lines(self) -> list[str]:
        lines = [f"relevance through channels of {self.layer}"]
        for target, channels, relevance in zip(self.targets, self.channels, self.relevance, strict=True):
            parts = ", ".join(f"{c}: {float(relevance[c]):+.3g}" for c in channels.tolist())
            lines.append(f"{target}: {parts}")
        return lines


def _oracle() -> None:
    """Through unit k of a hidden layer, R_i = x_i w_ki / (z_k + eps) R_k with R_k = h_k v_k / (s + eps) s.

    The most relevant units come first, and the maps of all units sum to that of LRP.
    """
    torch.manual_seed(0)
    hidden, last = nn.Linear(18, 6), nn.Linear(6, 2)
    network = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), last).double()
    model = load_model(network, input_size=(3, 2, 3), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    images = torch.rand(3, 3, 2, 3, dtype=torch.float64)
    x = model.normalize(images).flatten(1)
    z = x @ hidden.weight.T + hidden.bias
    for index in (0, 1):
        score = z.relu() @ last.weight[index] + last.bias[index]
        stabilized = score + 0.25 * score.sign()
        relevance = z.relu() * last.weight[index] * (score / stabilized)[:, None]
        shares = x[:, None] * hidden.weight / (z + 0.25 * z.sign())[..., None]
        expected = (shares * relevance[..., None]).unflatten(2, (3, 2, 3)).sum(2)
        order = relevance.argsort(dim=1, descending=True, stable=True)
        for layer in ("1", "2"):
            result = concept_relevance(model, images, index, layer=layer, k=4, rule="epsilon", epsilon=0.25)
            torch.testing.assert_close(result.relevance, relevance)
            assert torch.equal(result.channels, order[:, :4])
            rows = torch.arange(3)[:, None]
            torch.testing.assert_close(result.maps, expected[rows, order[:, :4]])
            assert result.targets == (f"class {index}",) * 3
        options: dict[str, Any] = {"layer": "2", "rule": "epsilon", "epsilon": 0.25}
        result = concept_relevance(model, images, index, channels=[5, 0], **options)
        torch.testing.assert_close(result.maps, expected[:, [5, 0]])
    # Of a map, a channel's relevance is the sum over its positions.
    convolution, last = nn.Conv2d(3, 4, 2), nn.Linear(8, 2)
    network = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), last).double()
    model = load_model(network, input_size=(3, 2, 3))
    result = concept_relevance(model, images, 1, layer="1", channels=[2], rule="epsilon", epsilon=0)
    assert result.layer == "1"
    result = concept_relevance(model, images, 1, channels=[2], rule="epsilon", epsilon=0)
    assert result.layer == "1"  # the last map
    below = concept_relevance(model, images, 1, layer="0", k=1, rule="epsilon", epsilon=0)
    assert below.layer == "0"
    maps = convolution(images).relu()
    parts = (maps.flatten(1) * last.weight[1]).view(3, 4, 2)
    torch.testing.assert_close(result.relevance, parts.sum(2))
    patches = torch.stack([images[:, :, :, p : p + 2] for p in range(2)], 1)
    weights = patches * convolution.weight[2] / convolution(images)[:, 2, 0, :, None, None, None]
    weighted = (weights * parts[:, 2, :, None, None, None]).sum(2)
    expected = torch.zeros(3, 1, 2, 3, dtype=torch.float64)
    for p in range(2):
        expected[:, 0, :, p : p + 2] += weighted[:, p]
    torch.testing.assert_close(result.maps, expected)
    _layers_of_other_layouts()


def _layers_of_other_layouts() -> None:
    """Channels on the last axis; a batch norm behind the layer; what no relevance reaches is refused."""
    convolution, norm, last = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Linear(8, 2, bias=False)
    for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        nn.init.uniform_(values, 0.5, 1.5)  # type: ignore[arg-type]
    network = nn.Sequential(convolution, norm, Permute([0, 2, 3, 1]), nn.ReLU(), nn.Flatten(), last)
    model = load_model(network.double().eval(), input_size=(3, 2, 3), mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.rand(3, 3, 2, 3, dtype=torch.float64)
    variance = norm.running_var
    assert variance is not None
    with torch.no_grad():
        below = convolution(images)
        above = norm(below)
    weight = last.weight[1].detach().view(1, 2, 4).movedim(2, 0) * (above > 0)  # (3, 4, 1, 2)
    options: dict[str, Any] = {"rule": "epsilon", "epsilon": 0, "k": 4}
    for layer, relevance in (
        ("2", above * weight),
        # Not folded into the convolution, whose output has the relevance y dS/dy.
        ("0", below * weight * (norm.weight / (variance + norm.eps).sqrt()).view(-1, 1, 1)),
    ):
        result = concept_relevance(model, images, 1, layer=layer, **options)
        torch.testing.assert_close(result.relevance, relevance.sum((2, 3)).detach())
    beside = load_model(_Beside().double(), input_size=(3, 2, 3))
    for network_model, layer, rules, message in (
        (model, "5", {"3": "gamma"}, "no convolution or linear layer below the target is '3'"),
        (beside, "side", {}, "has no relevance in layer 'side'"),
    ):
        refusal = ""
        try:
            concept_relevance(network_model, images, 1, layer=layer, rules=rules)
        except ModelError as error:
            refusal = str(error)
        assert message in refusal, refusal


class _Beside(nn.Module):
    """A linear layer, and another one that runs and that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.head = nn.Linear(18, 4), nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.side(x.flatten(1))
        result: Tensor = self.head(x.flatten(1))
        return result


@method(
    family="concepts",
    references=[ACHTIBAT_2023],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images * (1 + maximum(length(param.channels, 0), param.k))),
    oracle=_oracle,
    relations=[
        InvariantTo("batch_order", fields=("maps", "relevance")),
        *(Equivariant(transform, fields=("maps",)) for transform in ("hflip", "transpose")),
    ],
    quick={"k": 2},
    demo={"images": "builtin:scenes/4", "layer": "features.11", "k": 4},
)
def concept_relevance(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: Annotated[
        LayerName | None, Field(description="layer of the channels; default: the last map")
    ] = None,
    channels: Annotated[
        Annotated[list[int], Field(min_length=1)] | None,
        Field(description="channel numbers; default: the k of largest relevance in each image"),
    ] = None,
    k: Annotated[int, Field(ge=1, le=1000, description="channels per image, where none are named")] = 4,
    rule: RuleOption = "epsilon_plus",
    rules: RulesByLayer = {},  # noqa: B006
    attention: AttentionOption = "cp_lrp",
    epsilon: EpsilonOption = 1e-6,
    gamma: GammaOption = 0.25,
) -> ConceptRelevance:
    """Concept relevance propagation (CRP): relevance of pixels that passes through a channel of a layer.

    R_c = sum_p A_cp dS/dA_cp,  M_c = relevance of the pixels by the rules of LRP, from R_c alone

    Relevance is propagated from the target S to the layer, set to 0 in all channels but c, and propagated to
    the pixels: the map of what channel c recognized, as far as the target uses it. Parts of the network that
    bypass the layer do not count. Relevance through a set of channels is the sum of their maps; that of all
    channels is the map of ``lrp``, where nothing bypasses the layer. A batch norm directly behind the layer
    is not folded into it: choose the activation behind both.

    Returns:
        ``maps`` (N, K, H, W), raw and signed, ``channels`` (N, K), ``relevance`` (N, C) of all channels.

    Raises:
        InputError: a channel that the layer does not have, or a rule for pixels for another layer.
        ModelError: an operation without a rule, a layer that the target does not depend on, or one whose axis
            of channels is not recorded.

    Example::
        from phosphene import run

        result = run("concept_relevance", images="builtin:scenes/2", layer="features.11", k=3)
        result.maps.shape  # (2, 3, 64, 64)
        result.relevance.sum(1)  # at most the score

    Source:
        Achtibat et al. 2023, section 4.1 (equations 6 to 8).
    """
    layer = layer if layer is not None else model.last_map
    layer_rules = LayerRules(model, rule, rules, epsilon, gamma)
    with layer_relevance(model, layer_rules, attention, images, target, layer) as below:
        relevance = below.of_channels()
        count = relevance.shape[1]
        require_channels(channels or (), layer, count)
        if channels is None:
            # equivalent mutants: axis 1 is the last, and on the CPU every sort of torch is stable
            selected = relevance.sort(dim=1, descending=True, stable=True).indices[:, :k]
        else:
            selected = torch.tensor(channels, device=relevance.device).expand(len(images), -1)
        maps = [below.of_pixels(column) for column in progress_bar([*selected.T], "channels")]
    return ConceptRelevance(
        images=images,
        maps=torch.stack(maps, 1),
        channels=selected.clone(),  # equivalent mutants: the same numbers in memory that is shared
        relevance=relevance,
        targets=target.names(model, len(images)),
        layer=layer,
    )


@hookimpl
def phosphene_methods():
    return [concept_relevance]
