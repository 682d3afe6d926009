"""``hf:`` - vision networks of transformers, from a folder or the Hugging Face hub.

transformers is imported when a network is loaded: this module is imported for every model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phosphene import InputError, MissingExtra, ModelError, UnknownName, hookimpl

from ._downloads import fetch_from_hub, find_on_hub

if TYPE_CHECKING:
    from torch import nn

#: The heads that can be chosen: transformers' automatic class, its table of architectures, the task.
_HEADS = {
    "classification": (
        "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "classification"
    ),
    "segmentation": (
        "AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES", "segmentation"
    ),
    "detection": ("AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "detection"),
    "backbone": ("AutoBackbone", "MODEL_FOR_BACKBONE_MAPPING_NAMES", "embedding"),
    "text": (
        "AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "classification"
    ),
    "answers": (
        "AutoModelForVisualQuestionAnswering", "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES",
        "classification",
    ),
    "none": ("AutoModel", "MODEL_MAPPING_NAMES", "embedding"),
}  # fmt: skip


class HuggingFaceLoader:
    """A repository of the hub, ``owner/name``, or a folder, as ``save_pretrained`` writes it.

    The architecture in its configuration decides the head; ``head`` chooses another: "classification",
    "segmentation", "detection", "backbone" (the mean of the last feature map), "none" (the pooled features),
    "text" (a captioner: its classes are the texts ``answers``, its logits their log-probabilities after the
    text ``question``, if any), "answers" (a classifier of the answers to a ``question``).
    Preprocessing, class names and task come from the repository's processor and configuration. Weights are
    read from safetensors only, and code in a repository is never run. Without ``pretrained`` the weights are
    random. ``revision`` and ``cache_dir`` are those of the hub's client; other options replace values of the
    configuration (``num_labels=2``).
    """

    random_by_default = True
    fills = True

    def load(
        self,
        name: str,
        *,
        weights: Any,
        pretrained: bool,
        head: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        question: str | None = None,
        answers: Sequence[str] | None = None,
        **options: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        if find_spec("transformers") is None:
            raise MissingExtra(f"hf:{name}", "transformers")
        from phosphene.models import infer_task  # imported here: lists do not need torch

        from ._hf_networks import (
            as_image_network,
            build,
            detection_boxes,
            image_settings,
            load_tokenizer,
            text_features,
        )
        from ._image_text import image_text_network

        state = weights if isinstance(weights, Mapping) else None
        if state is None and weights not in (None, "DEFAULT"):
            raise InputError(f"hf:{name} has no weights called {weights!r}, only 'DEFAULT'")
        if head is not None and head not in _HEADS:
            raise UnknownName("head", head, _HEADS, f"hf:{name}")
        pretrained = state is None and (pretrained or weights is not None)
        folder, uri = _folder(name, pretrained, revision, cache_dir)
        config = _config(folder, uri, options)
        class_name, kind = _architecture(config, head, uri)
        is_text = head in ("text", "answers") or class_name in _text_architectures()
        if not is_text and (question is not None or answers is not None):
            raise InputError(f"{uri} is a {class_name}, which takes no question and no answers")
        task: str | None = kind
        network = build(class_name, config, folder if pretrained else state, uri)
        is_trained = pretrained or state is not None
        settings: dict[str, Any] = image_settings(folder, config, uri, is_trained)
        repository = None if Path(name).expanduser().is_dir() else name
        hub = {"repository": repository, "revision": revision, "cache": cache_dir} if repository else None
        inferred = infer_task(network)  # of the network itself, before what is put around it
        if is_text:
            settings.pop("reverse_channels")
            tokenizer = load_tokenizer(folder, hub, uri)
            network, texts = image_text_network(network, tokenizer, question, answers, uri)
            classes = texts or _class_names(config)
            return network, settings | {"name": uri, "uri": uri, "task": task, "classes": classes}
        network, output = as_image_network(network, kind, settings.pop("reverse_channels"), uri)
        if output is not None:
            settings["output"] = output
        if (embed_text := text_features(network, folder, hub, uri)) is not None:
            settings["embed_text"] = embed_text
        if kind == "detection":
            network = detection_boxes(network, folder, config, uri)
        if task == "classification":
            task = inferred or ("classification" if config.num_labels > 1 else None)
        classes = _class_names(config) if task != "embedding" else None
        return network, settings | {"name": uri, "uri": uri, "task": task, "classes": classes}

    def saved_options(self, name: str) -> Sequence[str]:
        """The head, the revision, and what changes the network; no folder of a cache."""
        return ("head", "revision", "num_labels", "image_size", "question", "answers")

    def names(self) -> Sequence[str]:
        """Empty: names are repositories and folders, which are not listed."""
        return []


def _folder(name: str, pretrained: bool, revision: str | None, cache: str | None) -> tuple[Path, str]:
    """The local folder of a network, and its URI with an absolute path."""
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} contains no config.json, which network.save_pretrained writes")
        if pretrained and not any(
            (folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")
        ):
            raise ModelError(
                f"{folder} contains no model.safetensors, and pickled weights are never loaded: write it "
                "with network.save_pretrained(folder), or leave pretrained=False for random weights"
            )
        return folder.resolve(), f"hf:{folder.resolve()}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise InputError(f"there is no folder {name!r}, and a repository is hf:owner/name")
    where: dict[str, Any] = {"revision": revision, "cache": cache}
    config = fetch_from_hub(name, "config.json", **where)
    for file in ("preprocessor_config.json", "processor_config.json"):
        if find_on_hub(name, file, **where) is not None:
            break
    if pretrained:
        path = fetch_from_hub(name, "model.safetensors", "model.safetensors.index.json", **where)
        if path.suffix == ".json":
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            for shard in sorted(set(shards)):
                fetch_from_hub(name, shard, **where)
    return config.parent, f"hf:{name}"


def _config(folder: Path, uri: str, options: dict[str, Any]) -> Any:
    """The configuration with the options in it; ModelError for an architecture that transformers lacks."""
    import transformers

    if "architecture" in (document := json.loads((folder / "config.json").read_text(encoding="utf-8"))):
        timm = uri.replace("hf:", "timm:local-dir:" if Path(uri[3:]).is_dir() else "timm:hf-hub:")
        raise InputError(f"{uri} is a network of timm's: load it as {timm}")
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, return_unused_kwargs=True, **options
        )
    except (KeyError, ValueError) as error:
        kind = document.get("model_type")
        if kind in transformers.CONFIG_MAPPING:
            raise
        raise ModelError(
            f"transformers {transformers.__version__} has no architecture {kind!r} for {uri}, and code in a "
            "repository is never run: build the network yourself and pass it, load_model(network, mean=..., "
            "std=..., input_size=...)"
        ) from error
    if unused:
        raise InputError(f"the configuration of {uri} has no {', '.join(map(repr, unused))}")
    return config


def _text_architectures() -> set[str]:
    """The classes of networks that take an image and a text, and write or select a text."""
    from transformers.models.auto import modeling_auto

    return {name for head in ("text", "answers") for name in getattr(modeling_auto, _HEADS[head][1]).values()}


def _architecture(config: Any, head: str | None, uri: str) -> tuple[str, str]:
    """The name of the network's class and its task; InputError where the configuration names no head."""
    from transformers.models.auto import modeling_auto

    if head is not None:
        return _HEADS[head][0], _HEADS[head][2]
    architecture = (config.architectures or [None])[0]
    for _, table, task in _HEADS.values():
        names = getattr(modeling_auto, table).values()
        if any(architecture in ([n] if isinstance(n, str) else n) for n in names):
            return architecture, task
    if str(architecture).endswith(("VisionModel", "VisionModelWithProjection")):
        return architecture, "embedding"
    reason = f"its architecture is {architecture}" if architecture else "it names no architecture"
    raise InputError(
        f"the head of {uri} cannot be read from its configuration ({reason}): choose head= one of "
        f"{', '.join(map(repr, _HEADS))}"
    )


def _class_names(config: Any) -> list[str] | None:
    """The class names in the configuration; None where it has only numbered ones (LABEL_0)."""
    labels = config.id2label or {}
    names = [str(labels[index]) for index in sorted(labels)]
    is_numbered = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return None if is_numbered else names


@hookimpl
def phosphene_model_loaders():
    return {"hf": HuggingFaceLoader()}
