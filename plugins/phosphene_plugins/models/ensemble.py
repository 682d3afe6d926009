"""``ensemble:`` - the average of several models: ``ensemble:builtin:shapes-vgg + builtin:shapes-resnet``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phosphene import InputError, hookimpl

if TYPE_CHECKING:
    from torch import nn


class EnsembleLoader:
    """The mean of several models' probabilities, named by their URIs with `` + `` between them.

    The option ``mean_of="logits"`` averages logits instead; ``pretrained`` applies to every member.
    """

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from phosphene import load_model  # imported here: help and lists do not need torch

        from ._ensembles import EnsembleNetwork, input_settings, load_compatible_models

        first, *others = (uri.strip() for uri in name.split(" + "))
        if not others or weights is not None:
            raise InputError(
                f"ensemble:{name} must name several models, each with weights of its own: "
                "ensemble:builtin:shapes-vgg + builtin:shapes-resnet"
            )
        model = load_model(first, pretrained=pretrained)
        models = [model, *load_compatible_models(model, others, pretrained=pretrained)]
        return EnsembleNetwork(models, **options), input_settings(model)

    def saved_options(self, name: str) -> Sequence[str]:
        """What is averaged."""
        return ("mean_of",)

    def names(self) -> Sequence[str]:
        """An example of bundled models; any others can be combined."""
        return ["builtin:shapes-vgg + builtin:shapes-resnet"]


@hookimpl
def phosphene_model_loaders():
    return {"ensemble": EnsembleLoader()}
