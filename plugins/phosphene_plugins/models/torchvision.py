"""``torchvision:`` - the image classifiers of torchvision, with the preprocessing of their weights.

torchvision is imported when a network is loaded: this module is imported for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phosphene import ModelError, UnknownName, hookimpl

from ._downloads import fetch_weights

if TYPE_CHECKING:
    from torch import nn


class TorchvisionLoader:
    """Every classifier of ``torchvision.models``.

    Mean, std, crop and class names come from the metadata of the named weights, or of the DEFAULT ones for
    random weights and for a local file.
    """

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from torchvision import models

        from phosphene.models import fill_weights, read_weights

        if name not in self.names():
            if name in models.list_models():
                raise ModelError(
                    f"torchvision's {name} is no image classifier: build it and pass the module, "
                    "load_model(module, output=lambda result: ...)"
                )
            raise UnknownName("torchvision model", name, self.names())
        members: Mapping[str, Any] = models.get_model_weights(name).__members__
        chosen = weights.rpartition(".")[2] if weights else "DEFAULT"
        if chosen not in members:
            raise UnknownName("weights", weights, members, f"torchvision:{name}")
        entry = members[chosen] if weights or pretrained else None
        # The builders would unpickle the weights: they build a network of the same shape, filled here.
        options = _builder_options(name, members[chosen].meta, pretrained=entry is not None) | options
        module = models.get_model(name, weights=None, **options)
        if entry is not None:
            state = read_weights(fetch_weights(entry.url))
            if options.get("aux_logits") is False:
                state = {k: v for k, v in state.items() if not k.lower().startswith("aux")}
            fill_weights(module, state, entry, f"torchvision:{name} with {options}")
        return module, _preprocessing(members[chosen], options)

    def saved_options(self, name: str) -> Sequence[str]:
        """Arguments of torchvision's builders that change the network."""
        return ("num_classes", "image_size", "aux_logits", "transform_input", "init_weights", "dropout")

    def names(self) -> Sequence[str]:
        from torchvision import models

        return models.list_models(module=models)


def _builder_options(name: str, meta: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    """The options that torchvision's builders set together with weights."""
    if name in ("googlenet", "inception_v3"):
        # Weights from TensorFlow, with auxiliary heads that run in training only.
        return {"transform_input": True, "aux_logits": True, "init_weights": False}
    if not pretrained:
        return {}
    options: dict[str, Any] = {"num_classes": len(meta["categories"])} if meta.get("categories") else {}
    if name.startswith("vit_"):
        options["image_size"] = meta["min_size"][0]
    if name.startswith("vgg"):
        options["init_weights"] = False
    return options


def _preprocessing(entry: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing and class names of these weights."""
    preset = entry.transforms()
    side = options.get("image_size", preset.crop_size[0])
    categories = entry.meta.get("categories")
    is_named = categories and options.get("num_classes", 1000) == len(categories)
    return {
        "mean": preset.mean,
        "std": preset.std,
        "input_size": (3, side, side),
        "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        "interpolation": preset.interpolation.value,
        "classes": categories if is_named else None,
    }


@hookimpl
def phosphene_model_loaders():
    return {"torchvision": TorchvisionLoader()}
