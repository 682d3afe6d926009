"""``trained:`` - the model that a training method made, by its folder: ``trained:results/robust``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phosphene import InputError, hookimpl

if TYPE_CHECKING:
    from torch import nn


class TrainedLoader:
    """A folder that ``run("adversarial_training", ..., out=folder)`` and its like leave: no pickles."""

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from phosphene import load_result  # late: help and lists do not need torch
        from phosphene.training import TrainedModel

        result = load_result(name)
        if not isinstance(result, TrainedModel):
            raise InputError(f"{name} holds a {type(result).__name__}, and no model that was trained")
        if weights is not None or options:
            asked = ", ".join(filter(None, [weights, *options]))
            raise InputError(f"trained:{name} brings its own weights, and takes no {asked}")
        model = result.model()
        return model.module, model.settings | {"uri": model.name}

    def names(self) -> Sequence[str]:
        """None: a name is a folder."""
        return []


@hookimpl
def phosphene_model_loaders():
    return {"trained": TrainedLoader()}
