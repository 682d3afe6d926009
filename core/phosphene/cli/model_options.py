"""Options of commands that describe a model: its weights, task, class names and normalization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError

#: The options of a model: type and help text.
MODEL_OPTIONS: dict[str, tuple[Any, str]] = {
    "weights": (
        str | None,
        "weights of the model: a safetensors or .pth file, or the name of published weights",
    ),
    "pretrained": (bool, "load the model with its scheme's default weights"),
    "model_task": (
        str | None,
        "what the model's output means: classification, binary, multilabel, regression, segmentation, "
        "detection, embedding",
    ),
    "model_classes": (
        str | None,
        "class names of the model: a text file with one in each line, NAME,NAME,..., or imagenet",
    ),
    "model_mean": (str | None, "mean of each channel of the model's training images: 0.485,0.456,0.406"),
    "model_std": (str | None, "standard deviation of each channel of the model's training images"),
}


#: How the options of functions are declared.
_STYLE: dict[str, Any] = {"rich_help_panel": "Model", "show_default": False}

#: The same options for commands that are declared as functions.
Weights = Annotated[str | None, typer.Option(help=MODEL_OPTIONS["weights"][1], **_STYLE)]
Pretrained = Annotated[bool, typer.Option(help=MODEL_OPTIONS["pretrained"][1], **_STYLE)]
ModelTask = Annotated[str | None, typer.Option(help=MODEL_OPTIONS["model_task"][1], **_STYLE)]
ModelClasses = Annotated[str | None, typer.Option(help=MODEL_OPTIONS["model_classes"][1], **_STYLE)]
ModelMean = Annotated[str | None, typer.Option(help=MODEL_OPTIONS["model_mean"][1], **_STYLE)]
ModelStd = Annotated[str | None, typer.Option(help=MODEL_OPTIONS["model_std"][1], **_STYLE)]


def model_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``load_model`` that the options set, by the options' names without dashes."""
    chosen = {name.removeprefix("model_"): value for name in MODEL_OPTIONS if (value := values.get(name))}
    if "classes" in chosen:
        chosen["classes"] = read_class_names(chosen["classes"])
    return chosen | {name: _numbers(name, chosen[name]) for name in ("mean", "std") if name in chosen}


def read_class_names(text: str) -> list[str] | str:
    """Class names from a text file, from a list with commas, or the name of a list of ImageNet's.

    In a file a line is one class, and its commas separate synonyms. Raises InputError for a file that does
    not exist or is no text.
    """
    from ..models.class_names import IMAGENETS

    path = Path(text).expanduser()
    if text in IMAGENETS and not path.is_file():
        return text
    if text in IMAGENETS:
        raise InputError(
            f"{text!r} is a list of class names, and a file has that name: write --model-classes ./{text} "
            "for the file"
        )
    if not path.is_file():
        if "/" in text or path.suffix in (".txt", ".json", ".csv"):
            raise InputError(f"there is no file of class names at {text!r}")
        return [name.strip() for name in text.split(",")]
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"the class names in {text} cannot be read: {error}") from error
    return [name.strip() for name in names if name.strip()]


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--model-{name} {text!r} should be a number for each channel: 0.485,0.456,0.406"
        ) from None
