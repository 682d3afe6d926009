"""``ensemble:`` - the average of several models: ``ensemble:builtin:shapes-vgg + builtin:shapes-resnet``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phosphene import InputError, hookimpl

if TYPE_CHECKING:
    from torch import nn


class EnsembleLoader:
    """Models by their own names, with `` + `` between them: the mean of their probabilities.

    The option ``mean_of="logits"`` takes those instead; ``pretrained`` is said to each of them.
    """

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from phosphene import load_model  # late: help and lists do not need torch

        from ._ensembles import Average, fed_like, loaded_beside

        first, *others = (uri.strip() for uri in name.split(" + "))
        if not others or weights is not None:
            raise InputError(
                f"ensemble:{name} must name several models, each with weights of its own: "
                "ensemble:builtin:shapes-vgg + builtin:shapes-resnet"
            )
        model = load_model(first, pretrained=pretrained)
        models = [model, *loaded_beside(model, others, pretrained=pretrained)]
        return Average(models, **options), fed_like(model)

    def names(self) -> Sequence[str]:
        """One of the bundled models; any others may stand there."""
        return ["builtin:shapes-vgg + builtin:shapes-resnet"]


@hookimpl
def phosphene_model_loaders():
    return {"ensemble": EnsembleLoader()}
