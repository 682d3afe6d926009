"""``timm:`` - every network of timm, with the preprocessing of its pretrained configuration.

timm is imported when a network is loaded: this module is imported for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phosphene import ModelError, UnknownName, hookimpl

from ._downloads import fetch_from_hub, fetch_weights

if TYPE_CHECKING:
    from torch import nn


#: The arguments of ``timm.create_model`` that change the network and name no file.
_ARCHITECTURE_OPTIONS = (
    *("num_classes", "in_chans", "global_pool", "img_size", "patch_size", "depth", "embed_dim", "num_heads"),
    *("drop_rate", "drop_path_rate", "output_stride", "dynamic_img_size", "dynamic_img_pad", "window_size"),
)


class TimmLoader:
    """Every name of ``timm.list_models`` and ``timm.list_pretrained``: ``resnet18``, ``resnet18.a1_in1k``.

    ``weights`` is a pretrained tag of the architecture (``"a1_in1k"``), or ``"DEFAULT"``.
    """

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        import timm

        architecture, tag = timm.models.split_model_name_tag(name)
        if not timm.models.is_model(architecture):
            raise UnknownName("timm model", name, self.names())
        tags = [n.partition(".")[2] for n in timm.models.list_pretrained(f"{architecture}.*")]
        tag = tag if weights in (None, "DEFAULT") else weights
        if tag and tag not in tags:
            raise UnknownName("pretrained weights", tag, tags, f"timm:{architecture}")
        full = f"{architecture}.{tag}" if tag else architecture
        overlay = dict(options.pop("pretrained_cfg_overlay", None) or {})
        pretrained = pretrained or weights is not None
        if pretrained and not overlay.keys() & {"file", "state_dict"}:
            overlay["file"] = _weights_file(full, overlay, options.get("cache_dir"))
        module = timm.create_model(full, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)
        return module, {"name": f"timm:{full}", **_preprocessing(module, options)}

    def saved_options(self, name: str) -> Sequence[str]:
        """Arguments of the architecture. No file, folder or configuration of weights: those name paths."""
        return _ARCHITECTURE_OPTIONS

    def names(self) -> Sequence[str]:
        import timm

        return sorted({*timm.list_models(), *timm.list_pretrained()})


def _weights_file(name: str, overlay: Mapping[str, Any], cache: str | None) -> str:
    """The file of the weights; timm itself would need the network for cached ones, too."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise ModelError(
            f"there are no pretrained weights for timm:{name}; leave pretrained=False for a random network"
        )
    repository, _, revision = (overlay.get("hf_hub_id") or cfg.hf_hub_id or "").partition("@")
    if not repository:
        return str(fetch_weights(overlay.get("url") or cfg.url))
    binary = cfg.hf_hub_filename or "pytorch_model.bin"
    file = cfg.hf_hub_filename.replace(".bin", ".safetensors") if cfg.hf_hub_filename else "model.safetensors"
    return str(fetch_from_hub(repository, file, binary, revision=revision or None, cache=cache))


def _preprocessing(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """The network's preprocessing and class names."""
    from timm import data

    config = data.resolve_model_data_config(module)
    channels = options.get("in_chans", config["input_size"][0])
    height, width = config["input_size"][1:]
    if size := options.get("img_size"):
        height, width = (size, size) if isinstance(size, int) else size
    subset = data.infer_imagenet_subset(module)
    return {
        **{name: _adapt_channels(config[name], channels) for name in ("mean", "std")},
        "input_size": (channels, height, width),
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "classes": data.ImageNetInfo(subset).label_descriptions() if subset else None,
    }


def _adapt_channels(statistics: Sequence[float], channels: int) -> list[float]:
    """The statistics, or their mean for every channel where the number of channels differs."""
    if len(statistics) == channels:
        return list(statistics)
    return [sum(statistics) / len(statistics)] * channels


@hookimpl
def phosphene_model_loaders():
    return {"timm": TimmLoader()}
