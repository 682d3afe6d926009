"""``defended:`` - any model behind an input transform: ``defended:jpeg(quality=50)|builtin:shapes-vgg``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from phosphene import InputError, UnknownName, hookimpl, methods
from phosphene.parameter_text import read_option

if TYPE_CHECKING:
    from torch import nn

    from phosphene import Method

#: A defense and its parameters: ``jpeg(quality=50)``.
_PATTERN = re.compile(r"(?P<defense>[\w.:-]+)\s*(?:\((?P<params>[^()]*)\))?")


class DefendedLoader:
    """An input transform with its parameters, ``|``, and the URI of the model behind it.

    Several can be chained: ``defended:median(size=3)|defended:jpeg()|timm:resnet18``. Weights and options are
    passed to the model.
    """

    fills = True

    def load(
        self, name: str, *, weights: Any, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from phosphene import load_model  # imported here: help and lists do not need torch

        defense, bar, uri = name.partition("|")
        match = _PATTERN.fullmatch(defense.strip())
        if not bar or match is None:
            raise InputError(
                f"defended:{name} must name a defense and a model: "
                "write defended:jpeg(quality=75)|scheme:name"
            )
        method, params = _defense(match["defense"]), {}
        for text in filter(None, map(str.strip, (match["params"] or "").split(","))):
            parameter, equals, value = (part.strip() for part in text.partition("="))
            fields = method.spec.params.model_fields
            if not equals:
                raise InputError(
                    f"{match['defense']}({text}): parameters must be named, one of {', '.join(fields)}"
                )
            if parameter not in fields:
                raise UnknownName("parameter", parameter, fields, match["defense"])
            params[parameter] = read_option(value, fields[parameter])
        params = method.validate(params)
        model = load_model(uri.strip(), weights=weights, pretrained=pretrained, **options)
        defended = method.defend(model, **params)
        return defended.module, defended.settings | {"uri": (defended.source or {}).get("uri", defended.name)}

    def saved_options(self, name: str) -> Collection[str]:
        """Those of the model behind the defense, which the options are passed to."""
        from phosphene.models import saved_options

        return saved_options(name.partition("|")[2].strip())

    def names(self) -> Sequence[str]:
        """Each defense before a bundled model, as an example; any other model can be defended."""
        return [f"{name}()|builtin:shapes-vgg" for name in _defense_names()]


def _defense(name: str) -> Method[..., Any]:
    """The input transform of this name; InputError or UnknownName otherwise."""
    if name not in methods:
        raise UnknownName("defense", name, _defense_names())
    method = methods[name]
    if method.defense is None:
        raise InputError(
            f"{name} is no input transform that can defend a model; these are: {', '.join(_defense_names())}"
        )
    return method


def _defense_names() -> list[str]:
    loaded = [info.load() for info in methods.find(family="defenses")]
    return [method.spec.short_name for method in loaded if method.defense is not None]


@hookimpl
def phosphene_model_loaders():
    return {"defended": DefendedLoader()}
