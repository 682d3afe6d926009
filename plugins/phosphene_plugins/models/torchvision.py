"""``torchvision:`` - classifiers, segmenters and detectors of torchvision, prepared as for their weights.

torchvision is imported when a network is loaded: this module is imported for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phosphene import ModelError, UnknownName, hookimpl

from ._downloads import fetch_weights

if TYPE_CHECKING:
    from torch import nn

#: Detectors whose weights COCO_V1 were trained with batch norms that add nothing to the variance.
_WITHOUT_EPS = (
    *("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
    "retinanet_resnet50_fpn",
)

#: What the networks take that cannot be loaded, by torchvision's module of them.
_REFUSED = {"video": "clips (N, C, T, H, W)", "optical_flow": "two images at a time"}


class TorchvisionLoader:
    """The classifiers, semantic segmenters, detectors and quantized classifiers of ``torchvision.models``.

    Mean, std, crop and class names come from the metadata of the named weights, or of the DEFAULT ones for
    random weights and for a local file. Detectors resize and normalize by themselves: they take images in
    [0, 1] and return boxes. Quantized networks (``quantized_resnet18``) run on the CPU and have no gradients.
    """

    random_by_default = True

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        from torchvision import models

        from phosphene.models import fill_weights, read_weights

        if name not in models.list_models():
            raise UnknownName("torchvision model", name, self.names())
        kind = _kind(name)
        if kind in _REFUSED:
            raise ModelError(
                f"torchvision's {name} takes {_REFUSED[kind]}, and Phosphene single images (N, C, H, W): put "
                "the network into a module that builds its input from an image, and pass that module"
            )
        members: Mapping[str, Any] = models.get_model_weights(name).__members__
        chosen = weights.rpartition(".")[2] if weights else "DEFAULT"
        if chosen not in members:
            raise UnknownName("weights", weights, members, f"torchvision:{name}")
        entry = members[chosen] if weights or pretrained else None
        # The builders would unpickle the weights: they build a network of the same shape, filled here.
        options = _builder_options(name, kind, members[chosen].meta, pretrained=entry is not None) | options
        module = _build(name, options)
        if entry is not None:
            state = read_weights(fetch_weights(entry.url))
            if options.get("aux_logits") is False:
                state = {k: v for k, v in state.items() if not k.lower().startswith("aux")}
            fill_weights(module, state, entry, f"torchvision:{name} with {options}")
            if name in _WITHOUT_EPS and entry.name == "COCO_V1":  # DEFAULT is an alias
                _set_eps(module, 0.0)
        return module, _preprocessing(members[chosen], kind, options)

    def saved_options(self, name: str) -> Sequence[str]:
        """Arguments of torchvision's builders that change the network."""
        classifiers = (
            "num_classes",
            "image_size",
            "aux_logits",
            "transform_input",
            "init_weights",
            "dropout",
        )
        return (*classifiers, "aux_loss", "num_keypoints", "min_size", "max_size", "box_score_thresh")

    def names(self) -> Sequence[str]:
        from torchvision import models

        return [name for name in models.list_models() if _kind(name) not in _REFUSED]


def _kind(name: str) -> str:
    """The module of torchvision that a network belongs to; "" for a classifier."""
    from torchvision import models

    for kind in ("segmentation", "detection", "quantization", *_REFUSED):
        if name in models.list_models(module=getattr(models, kind)):
            return kind
    return ""


def _builder_options(name: str, kind: str, meta: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    """The options that torchvision's builders set together with weights."""
    options: dict[str, Any] = {}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None  # by default those of ImageNet would be downloaded
    if kind == "quantization":
        options |= {"quantize": True, **({"backend": meta["backend"]} if "backend" in meta else {})}
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        # Weights from TensorFlow, with auxiliary heads that run in training only.
        return options | {"transform_input": True, "aux_logits": True, "init_weights": False}
    if not pretrained:
        return options
    if meta.get("categories"):
        options["num_classes"] = len(meta["categories"])
    if meta.get("keypoint_names"):
        options["num_keypoints"] = len(meta["keypoint_names"])
    if name.startswith(("fcn_", "deeplabv3_")):
        options["aux_loss"] = True
    if name.startswith("vit_"):
        options["image_size"] = meta["min_size"][0]
    if name.startswith("vgg"):
        options["init_weights"] = False
    return options


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network with random weights; torch's engine of quantized networks is restored."""
    import torch
    from torchvision import models

    engine = torch.backends.quantized.engine
    try:
        return models.get_model(name, weights=None, **options)
    finally:
        if torch.backends.quantized.engine != engine:
            torch.backends.quantized.engine = engine


def _set_eps(module: nn.Module, eps: float) -> None:
    """Set what the batch norms add to the variance."""
    from torch import nn

    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = eps


def _preprocessing(entry: Any, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing and class names of these weights, and the task of a classifier."""
    preset = entry.transforms()
    categories = entry.meta.get("categories")
    is_named = categories and options.get("num_classes", len(categories)) == len(categories)
    settings: dict[str, Any] = {"classes": categories if is_named else None}
    if kind == "detection":
        return settings | {"crop_mode": "none"}
    settings |= {"mean": preset.mean, "std": preset.std, "interpolation": preset.interpolation.value}
    if kind == "segmentation":
        side = preset.resize_size[0]
        return settings | {"input_size": (3, side, side), "crop_mode": "resize"}
    side = options.get("image_size", preset.crop_size[0])
    crop_pct = preset.crop_size[0] / preset.resize_size[0]
    return settings | {"task": "classification", "input_size": (3, side, side), "crop_pct": crop_pct}


@hookimpl
def phosphene_model_loaders():
    return {"torchvision": TorchvisionLoader()}
