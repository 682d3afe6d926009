"""Which rule of layer-wise relevance propagation each layer has: by name, by type, by kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from phosphene import InputError, Model, ModelError, UnknownName

from ._lrp_rules import AlphaBeta, Box, Epsilon, Flat, Gamma, InputRule, LinearLayer, Rule, WSquare, ZPlus

#: Rules of all layers, and combinations of rules.
RuleName = Literal[
    "epsilon",
    "gamma",
    "zplus",
    "alpha_beta",
    "composite",
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
]
_PATTERN = r"^(zplus|box|flat|w_square|(epsilon|gamma|alpha_beta)(\([0-9]+(\.[0-9]+)?(e-?[0-9]+)?\))?)$"


def _check_rule(value: object) -> object:
    """The value; ValueError for a text that is no rule."""
    if isinstance(value, str) and not re.match(_PATTERN, value):
        raise ValueError(
            "should be epsilon, gamma, zplus, alpha_beta, box, flat or w_square, the first two and "
            "alpha_beta also with a number, as 'gamma(0.1)'"
        )
    return value


#: A rule with its number, where it has one: ``gamma(0.1)``.
RuleText = Annotated[str, BeforeValidator(_check_rule), Field(json_schema_extra={"pattern": _PATTERN})]


# Parameters of the methods that propagate relevance.
RuleOption = Annotated[
    RuleName,
    Field(
        description="rule of all layers, or a combination; composite: gamma for convolutions, epsilon "
        "for linear layers; others by their rules of linear layers, convolutions and the first layer"
    ),
]
RulesByLayer = Annotated[
    dict[str, RuleText],
    Field(
        description="rules of single layers, by name or by type of module: epsilon(0.25), gamma(0.1), "
        "zplus, alpha_beta(2); of the layer that reads the pixels also box, flat, w_square"
    ),
]
EpsilonOption = Annotated[
    float, Field(ge=0, le=1, description="stabilizer added to the magnitude of each denominator")
]
GammaOption = Annotated[
    float,
    Field(ge=0, le=1000, description="gamma rule: extra weight of contributions with the output's sign"),
]


class LayerRules:
    """The rule of each convolution and linear layer.

    rule: the name of a rule of all layers, or of a combination.
    by_layer: rules by layer name, which includes all layers inside, or by type of module; the longest name
        that contains the layer decides, before the type.
    epsilon, gamma: of the rules without a number of their own.
    """

    def __init__(
        self, model: Model, rule: RuleName, by_layer: Mapping[str, str], epsilon: float, gamma: float
    ) -> None:
        blank = torch.zeros(1, len(model.mean), 1, 1, dtype=model.dtype, device=model.device)
        low, high = (model.normalize(blank + value).flatten() for value in (0, 1))
        simple: dict[str, Rule] = {
            "epsilon": Epsilon(epsilon),
            "gamma": Gamma(gamma, epsilon),
            "zplus": ZPlus(epsilon),
            "alpha_beta": AlphaBeta(2, epsilon),
        }
        pixels: dict[str, InputRule] = {
            "box": Box(low, high, epsilon),
            "flat": Flat(epsilon),
            "w_square": WSquare(epsilon),
        }
        convolution, first = {
            "composite": ("gamma", None),
            "epsilon_plus": ("zplus", None),
            "epsilon_plus_flat": ("zplus", "flat"),
            "epsilon_alpha2_beta1": ("alpha_beta", None),
            "epsilon_alpha2_beta1_flat": ("alpha_beta", "flat"),
            "epsilon_gamma_box": ("gamma", "box"),
        }.get(rule, (rule, None))
        self.convolution, self.dense = simple[convolution], simple.get(rule, simple["epsilon"])
        self.first = None if first is None else pixels[first]
        self._types = {
            name: [kind.__name__ for kind in type(module).__mro__ if kind not in (object, nn.Module)]
            for name, module in model.layers.items()
        }
        names = [*dict.fromkeys([*self._types, *(kind for kinds in self._types.values() for kind in kinds)])]
        self._by_layer: dict[str, Rule | InputRule] = {}
        for key, text in by_layer.items():
            if key not in names:
                raise UnknownName("layer or type of layer", key, names, model.name)
            name, _, number = text.strip().rstrip(")").partition("(")
            self._by_layer[key] = _with_number(name, number, epsilon) if number else (simple | pixels)[name]
        self._unused = set(by_layer)

    @property
    def names_layers(self) -> bool:
        """Whether rules are chosen by the names of layers, which a copy of the network does not have."""
        return bool(self._by_layer) or self.first is not None

    def choose(self, name: str, layer: LinearLayer, reads_pixels: bool) -> Rule | InputRule:
        """The rule of a layer by the name of the module that calls it.

        Raises InputError for a rule for pixels of a layer that does not read them.
        """
        inside = [key for key in self._by_layer if name == key or name.startswith(f"{key}.")]
        types = [key for key in self._types.get(name, ()) if key in self._by_layer]
        keys = [max(inside, key=len)] if inside else types
        if not keys:
            kind = self.dense if layer.is_dense else self.convolution
            return self.first if self.first is not None and reads_pixels else kind
        self._unused.discard(keys[0])
        rule = self._by_layer[keys[0]]
        if not callable(rule) and not reads_pixels:
            raise InputError(
                f"rules: {type(rule).__name__} of {keys[0]!r} is a rule for the layer that reads the pixels, "
                f"and {name!r} does not; use epsilon, gamma, zplus or alpha_beta"
            )
        return rule

    def check_use(self) -> None:
        """Raises ModelError for a rule by name or type that no layer used."""
        if self._unused:
            raise ModelError(
                f"rules: no convolution or linear layer below the target is {sorted(self._unused)[0]!r} "
                "or inside it, without a rule by a longer name"
            )


def _with_number(name: str, number: str, epsilon: float) -> Rule:
    """A rule with its own number. Raises InputError for one that is too large or too small."""
    value = float(number)
    allowed = {"epsilon": (0, 1), "gamma": (0, 1000), "alpha_beta": (1, 1000)}[name]
    if not allowed[0] <= value <= allowed[1]:
        raise InputError(f"rules: {name} takes a number from {allowed[0]} to {allowed[1]}, not {number}")
    rules: dict[str, Rule] = {
        "epsilon": Epsilon(value),
        "gamma": Gamma(value, epsilon),
        "alpha_beta": AlphaBeta(value, epsilon),
    }
    return rules[name]
