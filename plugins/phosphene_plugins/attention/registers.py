"""``registers:`` - a vision transformer with a register token at test time: ``registers:timm:...``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from phosphene import hookimpl

if TYPE_CHECKING:
    from torch import nn


class RegistersLoader:
    """The URI of a vision transformer whose high-norm patches a register token replaces.

    Options: ``neurons``, how many neurons are moved to the register (default 10), ``factor``, above how many
    times the median of its image a patch's norm is high (default 3), and ``images``, on which the neurons
    are determined (default builtin:scenes/16). Weights and all other options are passed to the model. See
    ``phosphene_plugins.attention._registers``.
    """

    fills = True

    def load(
        self,
        name: str,
        *,
        weights: Any,
        pretrained: bool,
        neurons: int = 10,
        factor: float = 3.0,
        images: Any = "builtin:scenes/16",
        **options: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        from phosphene import load_model, read_images  # imported here: help and lists do not need torch

        from ._registers import with_register

        model = load_model(name, weights=weights, pretrained=pretrained, **options)
        network = with_register(model, read_images(images, model), neurons=neurons, factor=factor)
        uri = (model.source or {}).get("uri", name)
        return network, model.settings | {"name": f"registers:{model.name}", "uri": f"registers:{uri}"}

    def saved_options(self, name: str) -> Collection[str]:
        """``neurons``, ``factor`` and those of the model."""
        from phosphene.models import saved_options

        return {"neurons", "factor", *saved_options(name)}

    def names(self) -> Sequence[str]:
        """Empty: any vision transformer whose patches have high norms."""
        return []


@hookimpl
def phosphene_model_loaders():
    return {"registers": RegistersLoader()}
