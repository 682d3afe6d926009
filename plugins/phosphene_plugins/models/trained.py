"""``trained:`` - the model in the folder of a training's result: ``trained:results/robust``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phosphene import InputError, hookimpl
from phosphene.errors import type_name

if TYPE_CHECKING:
    from torch import nn


class TrainedLoader:
    """Loads a ``TrainedModel`` from the folder that ``run(..., out=folder)`` saved it in."""

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from phosphene import load_result  # imported here: help and lists do not need torch
        from phosphene.training import TrainedModel

        result = load_result(name)
        if not isinstance(result, TrainedModel):
            raise InputError(f"{name} contains {type_name(result)}, not a trained model")
        if weights is not None or options:
            extra = ", ".join(filter(None, [weights, *options]))
            raise InputError(f"trained:{name} has its own weights and takes no {extra}")
        model = result.model()
        return model.module, model.settings | {"uri": model.name}

    def names(self) -> Sequence[str]:
        """Empty: names are folders, which are not listed."""
        return []


@hookimpl
def phosphene_model_loaders():
    return {"trained": TrainedLoader()}
