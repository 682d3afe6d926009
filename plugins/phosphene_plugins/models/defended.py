"""``defended:`` - any model behind an input transform: ``defended:jpeg(quality=50)|builtin:shapes-vgg``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phosphene import InputError, UnknownName, hookimpl, methods
from phosphene.parameter_text import read_option

if TYPE_CHECKING:
    from torch import nn

    from phosphene import Method

_WRITTEN = re.compile(r"(?P<defense>[\w.:-]+)\s*(?:\((?P<params>[^()]*)\))?")


class DefendedLoader:
    """A defence that can stand before a model, its parameters, ``|``, and a model by its own name.

    Several stand one before the other: ``defended:median(size=3)|defended:jpeg()|timm:resnet18``. Weights and
    options go to the model behind them.
    """

    fills = True

    def load(
        self, name: str, *, weights: Any, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from phosphene import load_model  # late: help and lists do not need torch

        defense, bar, behind = name.partition("|")
        written = _WRITTEN.fullmatch(defense.strip())
        if not bar or written is None:
            raise InputError(
                f"defended:{name} does not say what defends what: write defended:jpeg(quality=75)|scheme:name"
            )
        method, params = _defense(written["defense"]), {}
        for given in filter(None, map(str.strip, (written["params"] or "").split(","))):
            parameter, equals, value = (part.strip() for part in given.partition("="))
            fields = method.spec.params.model_fields
            if not equals:
                raise InputError(
                    f"{written['defense']}({given}): parameters are given by name, one of {', '.join(fields)}"
                )
            if parameter not in fields:
                raise UnknownName("parameter", parameter, fields, written["defense"])
            params[parameter] = read_option(value, fields[parameter])
        params = method.validate(params)
        model = load_model(behind.strip(), weights=weights, pretrained=pretrained, **options)
        defended = method.defend(model, **params)
        return defended.module, defended.settings | {"uri": (defended.source or {}).get("uri", defended.name)}

    def names(self) -> Sequence[str]:
        """Each defence before a bundled model; every other model's name may stand there, too."""
        return [f"{name}()|builtin:shapes-vgg" for name in _known()]


def _defense(name: str) -> Method[..., Any]:
    """The method that can stand before a model; InputError or UnknownName otherwise."""
    if name not in methods:
        raise UnknownName("defence", name, _known())
    method = methods[name]
    if method.defense is None:
        raise InputError(
            f"{name} is no defence that can stand before a model; these can: {', '.join(_known())}"
        )
    return method


def _known() -> list[str]:
    return [
        method.spec.short_name for method in methods.find(family="defenses") if method.defense is not None
    ]


@hookimpl
def phosphene_model_loaders():
    return {"defended": DefendedLoader()}
