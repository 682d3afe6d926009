"""A method's inputs and parameters as rows of text: name, option, type, bounds, default, meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parameter_text import bounds_text, default_text, kind_text, option_name

if TYPE_CHECKING:
    from ..spec import MethodSpec

#: What to write for an input of each role.
INPUT_OPTIONS = {
    "model": ("URI", "scheme:name, such as timm:resnet18 (default: builtin:shapes-vgg)"),
    "images": ("FILE|FOLDER", "picture file or folder, repeatable; or builtin:scenes/8"),
    "labels": ("TEXT,...", "class of each image, by name or number (default: what the model predicts)"),
    "masks": (
        "FILE",
        "mask picture of each image, white in the object; repeatable (the bundled scenes have theirs)",
    ),
    "start": (
        "FILE",
        "picture to begin from, one for all or one each, repeatable; or a saved result",
    ),
    "guide": ("FILE", "picture whose forms are wanted, or builtin:bricks; repeatable"),
    "target": ("TEXT", "class, or one for each image, or a unit: layer4[17] (default: the predicted class)"),
    "dataset": ("FOLDER", "folder of pictures, builtin:scenes/1000 or builtin:textures/64"),
    "texture": ("FILE", "picture file, or builtin:bricks; repeatable"),
    "styles": ("FILE", "picture file, or builtin:bricks; repeatable"),
    "stylizer": ("FOLDER", "folder that a training method saved its network in"),
    "adaptive_stylizer": ("FOLDER", "folder that adaptive_style_fit saved its network in"),
    "denoiser": ("FOLDER", "folder of a diffusers pipeline (default: the bundled builtin:shapes-diffusion)"),
    "generator": ("FOLDER", "folder that a generator was saved in (default: builtin:shapes-autoencoder)"),
}


def argument_rows(spec: MethodSpec) -> list[tuple[str, ...]]:
    """A method's inputs and parameters in words: name, option, kind, bounds, default, meaning."""
    found = [(i.name, INPUT_OPTIONS[i.role][0], "", "", INPUT_OPTIONS[i.role][1]) for i in spec.inputs]
    for name, schema in spec.params_schema["properties"].items():
        limits = bounds_text(schema), default_text(schema)
        found.append((name, kind_text(schema), *limits, schema.get("description", "")))
    return [(name, option_name(name, spec.short_name), *words) for name, *words in found]
