"""``timm:`` - every network of timm, with the preprocessing of its pretrained configuration.

timm is imported when a network is loaded: this module is imported for every model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phosphene import InputError, ModelError, UnknownName, hookimpl

from ._downloads import fetch_from_hub, fetch_weights

if TYPE_CHECKING:
    from torch import nn


#: The arguments of ``timm.create_model`` that change the network and name no file.
_ARCHITECTURE_OPTIONS = (
    *("num_classes", "in_chans", "global_pool", "img_size", "patch_size", "depth", "embed_dim", "num_heads"),
    *("drop_rate", "drop_path_rate", "output_stride", "dynamic_img_size", "dynamic_img_pad", "window_size"),
)


#: The prefixes of names that are no architecture: repositories on the hub, and folders.
_HUB, _FOLDER = "hf-hub:", "local-dir:"


class TimmLoader:
    """Every name of ``timm.list_models`` and ``timm.list_pretrained``: ``resnet18``, ``resnet18.a1_in1k``.

    ``weights`` is a pretrained tag of the architecture (``"a1_in1k"``), or ``"DEFAULT"``.
    ``hf-hub:owner/name`` is a timm network on the Hugging Face hub (``@revision`` may follow), and
    ``local-dir:folder`` one in a folder, as ``timm.models.save_for_hf`` writes it.
    """

    random_by_default = True

    def load(
        self, name: str, *, weights: str | None, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        import timm

        if name.startswith((_HUB, _FOLDER)):
            return _load_saved(name, weights, pretrained, options)
        if "/" in name:
            raise InputError(
                f"timm:{name} is no name of timm's: write timm:{_HUB}{name} for a repository on the hub, "
                f"timm:{_FOLDER}{name} for a folder"
            )
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


def _load_saved(
    name: str, weights: str | None, pretrained: bool, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """A network from its ``config.json``, in a folder or in a repository on the hub."""
    import timm

    if weights not in (None, "DEFAULT"):
        raise InputError(f"timm:{name} has no weights called {weights!r}, only 'DEFAULT'")
    pretrained = pretrained or weights is not None
    if name.startswith(_FOLDER):
        folder = Path(name.removeprefix(_FOLDER)).resolve()
        name = f"{_FOLDER}{folder}"  # absolute, so that a result can be replayed in any folder
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} contains no config.json, as timm.models.save_for_hf writes it")
    else:
        repository, _, revision = name.removeprefix(_HUB).partition("@")
        where: dict[str, Any] = {"revision": revision or None, "cache": options.get("cache_dir")}
        folder = fetch_from_hub(repository, "config.json", **where).parent
        if pretrained:
            fetch_from_hub(repository, "model.safetensors", "pytorch_model.bin", **where)
    if "architecture" not in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise InputError(f"timm:{name} is no timm network: its config.json names no architecture; try hf:")
    module = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **options)
    return module, {"name": f"timm:{name}", "uri": f"timm:{name}", **_preprocessing(module, options)}


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
    return {
        **{name: _adapt_channels(config[name], channels) for name in ("mean", "std")},
        "input_size": (channels, height, width),
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"] or "center",
        "interpolation": config["interpolation"],
        "classes": _class_names(module),
    }


def _class_names(module: Any) -> list[str] | None:
    """The class names in the network's configuration, or those of the ImageNet with as many classes."""
    from timm import data

    if module.num_classes == 0:  # timm would infer the classes that the head had
        return None
    names = module.pretrained_cfg.get("label_names")
    if names and len(names) == module.num_classes:
        descriptions = module.pretrained_cfg.get("label_descriptions") or {}
        return [str(descriptions.get(name, name)) for name in names]
    subset = data.infer_imagenet_subset(module) if not names else None
    return data.ImageNetInfo(subset).label_descriptions() if subset else None


def _adapt_channels(statistics: Sequence[float], channels: int) -> list[float]:
    """The statistics, or their mean for every channel where the number of channels differs."""
    if len(statistics) == channels:
        return list(statistics)
    return [sum(statistics) / len(statistics)] * channels


@hookimpl
def phosphene_model_loaders():
    return {"timm": TimmLoader()}
